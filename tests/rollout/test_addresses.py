"""Addresses, the shared key and the placement: what people write, and what is refused."""

import stat

import pytest

from vcr1_fast.rollout.addresses import as_setting, is_loopback, read_addresses, read_bind, show
from vcr1_fast.rollout.rollout_key import read_key, read_or_make_key
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.io import load_settings
from vcr1_fast.settings.learning import SGLangConfig


def elsewhere(*addresses: str) -> SGLangConfig:
    return SGLangConfig(placement="disaggregated", addresses=addresses)


def test_addresses_are_read_in_order():
    assert read_addresses(["a:1", "b-2.example:7-9", "[fd00::1]:5"]) == [
        ("a", 1),
        *(("b-2.example", port) for port in (7, 8, 9)),
        ("fd00::1", 5),
    ]
    assert [show(address) for address in read_addresses(["a:1", "[fd00::1]:5"])] == ["a:1", "[fd00::1]:5"]


@pytest.mark.parametrize(("host", "ports"), [("a", [7, 8, 9]), ("a", [7, 9, 10]), ("fd00::1", [7])])
def test_addresses_as_the_command_line_takes_them(host, ports):
    options = ["--rollout.sglang.placement=disaggregated", f"--rollout.sglang.addresses={as_setting(host, ports)}"]
    read = read_addresses(load_settings(Config, None, options).rollout.sglang.addresses)
    assert read == [(host, port) for port in ports]
    assert as_setting("a", [7, 8, 9]) == '["a:7-9"]'


@pytest.mark.parametrize("bad", ["a", "a:", "a:0", "a:70000", "a:9-7", "a:1-2-3", ":5", "fd00::1:5", "a b:5", ""])
def test_what_is_no_address_is_refused(bad):
    with pytest.raises(ValueError, match=r"address|wanted"):
        read_addresses([bad])


def test_a_worker_named_twice_is_refused():
    with pytest.raises(ValueError, match="a:8 is named twice"):
        read_addresses(["a:7-9", "a:8"])


def test_bind_addresses():
    assert read_bind("0.0.0.0:7") == ("0.0.0.0", 7)
    assert read_bind("127.0.0.1") == ("127.0.0.1", 29800)
    assert read_bind("[::1]:0") == ("::1", 0)
    for bad in ("a:1-2", "a:99999", "::1"):
        with pytest.raises(ValueError, match="address"):
            read_bind(bad)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "node-2")] == [True] * 3 + [
        False
    ] * 2


def test_each_rank_has_workers_of_its_own():
    config = elsewhere("a:1-5")
    assert [config.of_rank(rank, 2).addresses for rank in range(2)] == [("a:1", "a:3", "a:5"), ("a:2", "a:4")]
    for check in (lambda: config.of_rank(0, 6), lambda: config.check_world_size(6)):
        with pytest.raises(ConfigError, match="names 5 workers, but there are 6 ranks"):
            check()
    assert SGLangConfig().of_rank(3, 8) == SGLangConfig()


def test_settings_refuse_what_is_no_address():
    with pytest.raises(ConfigError, match="'a' is no address"):
        elsewhere("a")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("rl_on_policy_target", "fsdp", "the positions of text"),
        ("tp_size", 2, "rollout.sglang.tp_size"),
        ("enable_lora", True, "lora"),
    ],
)
def test_arguments_that_would_break_the_engine_without_a_word_are_refused(name, value, reason):
    with pytest.raises(ConfigError, match=f"engine_args sets {name}: .*{reason}.*; leave it out"):
        SGLangConfig(engine_args={"max_total_tokens": 4096, name: value})


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("VCR1_ROLLOUT_KEY", raising=False)
    file = tmp_path / "folder" / "key"
    key, place = read_or_make_key(str(file))
    assert len(key) == 32 and place == str(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["key"]
    assert read_or_make_key(str(file))[0] == read_key(str(file)) == key
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="others may read"):
        read_key(str(file))
    file.chmod(0o600)
    file.write_text("secret")
    with pytest.raises(ConfigError, match="holds no key, wanted 64 hexadecimal digits"):
        read_key(str(file))
    with pytest.raises(ConfigError, match="`vcr1-fast serve` writes it"):
        read_key(str(tmp_path / "none"))


def test_the_environment_goes_before_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("VCR1_ROLLOUT_KEY", "0a" * 32)
    assert read_key(str(tmp_path / "none")) == b"\n" * 32
    assert read_or_make_key(str(tmp_path / "none")) == (b"\n" * 32, "the environment variable VCR1_ROLLOUT_KEY")
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("VCR1_ROLLOUT_KEY", "0a")
    with pytest.raises(ConfigError, match="VCR1_ROLLOUT_KEY holds no key"):
        read_key("")
