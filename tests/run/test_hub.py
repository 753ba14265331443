"""Models of the Hub: the real client against a server on this machine that answers as the Hub does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.numpy import load_file, save

from tests.run.hub_server import Hub, hub_server
from tests.tiny_policy import run_ranks
from vcr1_fast import cli
from vcr1_fast.learner.model_size import read_model_size
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.run.hub import with_hub_config, with_hub_model
from vcr1_fast.run.hub_model import HubModel, hub_model
from vcr1_fast.run.model_folder import model_digest, model_folder
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.io import load_config
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset

OLD, NEW = "a" * 40, "b" * 40
WEIGHTS = "model.safetensors"
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NOT_READ = ["README.md", "pytorch_model.bin", "consolidated.safetensors", "modeling_tiny.py"]


def files_of_tiny() -> dict[str, bytes]:
    """The packaged model as a repository with two files of weights, and with what nobody reads."""
    folder = model_folder("tiny")
    small = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".jinja")}
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    halves = dict(zip(PARTS, (names[::2], names[1::2]), strict=True))
    parts = {part: save({name: weights[name] for name in half}) for part, half in halves.items()}
    weight_map = {name: part for part, half in halves.items() for name in half}
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    return small | parts | {f"{WEIGHTS}.index.json": json.dumps(index).encode()} | dict.fromkeys(NOT_READ, b"x")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = huggingface_hub.constants
    with hub_server(Hub({OLD: files_of_tiny()}, {"main": OLD, "v1": OLD})) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield served


def resolved(path: str, recorded: str | None = None) -> str:
    return with_hub_model(Config(model=replace(Config().model, path=path)), SINGLE_PROCESS, recorded).model.path


def test_what_has_the_shape_of_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_model("Qwen/Qwen2.5-VL-7B-Instruct") == HubModel("Qwen/Qwen2.5-VL-7B-Instruct")
    assert hub_model("a/b@refs/pr/1") == HubModel("a/b", "refs/pr/1") and str(hub_model("a/b@v1")) == "a/b@v1"
    assert not any(map(hub_model, ["tiny", "a", "a/b/c", "./a", "/a/b", "~/b", "../b", "a/b@", "a /b", "a/b@v 1", ""]))
    assert (HubModel("a/b", OLD).is_pinned, HubModel("a/b", OLD[:-1]).is_pinned) == (True, False)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert hub_model("a/b") is None  # a folder of that name is meant
    with pytest.raises(ConfigError, match=r"but a/b/config.json does not exist: give the folder of"):
        model_folder(resolved("a/b"))


def test_what_is_read_is_downloaded_once(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    pinned = resolved("owner/tiny")
    assert pinned == f"owner/tiny@{OLD}"
    folder, wanted = model_folder(pinned), hub.files[OLD]
    assert {path.name for path in folder.iterdir()} == wanted.keys() - set(NOT_READ)
    assert all(path.read_bytes() == wanted[path.name] for path in folder.iterdir())
    assert read_model_size(pinned).params == 1_112_000 and len(model_digest(folder)) == 64
    assert "downloading 2 of 2 files of weights of 0.0 GB together to" in capsys.readouterr().out
    assert hub.loaded() == sorted(wanted.keys() - set(NOT_READ))

    hub.asked.clear()
    assert resolved("owner/tiny") == resolved("owner/tiny@v1") == pinned and hub.loaded() == []
    assert resolved(pinned) == pinned and "downloading" not in capsys.readouterr().out


def test_a_run_that_goes_on_keeps_its_commit(hub: Hub) -> None:
    recorded = resolved("owner/tiny")
    hub.files[NEW], hub.refs["main"] = hub.files[OLD] | {"generation_config.json": b'{"seed": 1}'}, NEW
    hub.asked.clear()
    assert resolved("owner/tiny", recorded) == recorded and hub.asked == []  # without a word to the Hub
    assert resolved("owner/tiny@v1") == recorded
    assert resolved("owner/tiny") == f"owner/tiny@{NEW}"
    assert hub.loaded() == ["generation_config.json"]  # the cache knows the others by their contents
    assert model_digest(model_folder(recorded)) != model_digest(model_folder(f"owner/tiny@{NEW}"))


def test_a_dry_run_needs_config_json_alone(hub: Hub) -> None:
    config = with_hub_config(Config(model=replace(Config().model, path="owner/tiny")))
    assert hub.loaded() == ["config.json"]
    assert read_model_size(config.model.path).params == 1_112_000


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000
    )  # of 10 MB; what it has of one is lost
    hub.cut_after[PARTS[0]] = 1_000_000
    folder = model_folder(resolved("owner/tiny"))
    assert (folder / PARTS[0]).read_bytes() == hub.files[OLD][PARTS[0]]
    [again] = [line for line in hub.asked if line.startswith(f"GET {PARTS[0]} from ")]
    assert 0 < int(again.split()[-1]) <= 1_000_000


def test_an_interrupted_download_goes_on_with_the_missing_files(hub: Hub) -> None:
    hub.status[PARTS[1]] = 410  # 5xx would be asked again for 20 s
    with pytest.raises(ConfigError, match=r"answers 410 \(HfHubHTTPError.*: try again later"):
        resolved("owner/tiny")
    hub.status.clear()
    hub.asked.clear()
    assert resolved("owner/tiny") == f"owner/tiny@{OLD}"
    assert hub.loaded() == [PARTS[1]]


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        (
            "owner/none",
            {},
            r"no such folder here, and no model at .*/owner/none that you may see: correct the name; if",
        ),
        ("owner/tiny@v9", {}, r"'owner/tiny@v9', but .*/owner/tiny has no such revision: wanted one of its branches"),
        ("owner/tiny", {"tiny/revision/main": 401, "api/models/owner/tiny": 401}, r"may see: .*`hf auth login` first"),
        (
            "owner/tiny",
            {"config.json": 403},
            r"which is gated: accept its terms at .*/owner/tiny, then `hf auth login`",
        ),
        (f"owner/tiny@{OLD}", {OLD: 403}, r"which is gated: accept its terms"),
        (
            "owner/tiny",
            {"api/models/owner/tiny": 500},
            r"cannot be reached, and the cache .*cache does not have all of",
        ),
        ("owner/ti--ny", {}, r"no such folder here, and it is no id of the Hub either \(HFValidationError: "),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: Hub, path: str, status: dict[str, int], message: str) -> None:
    hub.status.update(status)
    with pytest.raises(ConfigError, match=message) as raised:
        resolved(path)
    assert "\n" not in str(raised.value)


def test_another_architecture_is_refused_before_its_weights_come(hub: Hub) -> None:
    hub.files[OLD]["config.json"] = b'{"model_type": "gpt2"}'
    with pytest.raises(ConfigError, match="is 'gpt2', wanted qwen2_5_vl"):
        resolved("owner/tiny")
    hub.files[NEW] = {name: content for name, content in hub.files[OLD].items() if name != "config.json"}
    with pytest.raises(ConfigError, match=r"has no config.json, wanted a checkpoint that transformers reads"):
        resolved(f"owner/tiny@{NEW}")
    assert not {*PARTS} & {*hub.loaded()}


def test_without_a_network_the_cache_does(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set, .* unset it, or run `hf download owner/tiny` where"):
        resolved("owner/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.status[PARTS[1]] = 410
    with pytest.raises(ConfigError):
        resolved("owner/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="does not have all of the model"):  # half of the weights
        resolved("owner/tiny")
    hub.status.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pinned = resolved("owner/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolved("owner/tiny") == resolved(pinned) == pinned
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    capsys.readouterr()
    assert resolved("owner/tiny") == pinned
    assert "http://127.0.0.1:9 cannot be asked for owner/tiny (ConnectError: " in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9 cannot be reached, and the cache"):
        resolved("owner/other")


def test_of_two_ranks_one_downloads(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "ranks"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    worker = Path(__file__).with_name("hub_ranks.py")
    run_ranks(worker, str(tmp_path), "owner/none", "owner/tiny")
    failed, got = zip(*(json.loads((tmp_path / f"rank_{rank}").read_text()) for rank in (0, 1)), strict=True)
    assert "correct the name" in failed[0] and failed[1].startswith("rank 0 failed while getting model.path")
    folder = tmp_path / "ranks" / "models--owner--tiny" / "snapshots" / OLD
    assert got[0] == got[1] == [f"owner/tiny@{OLD}", str(folder)]
    assert hub.loaded() == sorted(hub.files[OLD].keys() - set(NOT_READ))  # each once


def test_a_run_records_its_commit_and_goes_on_with_it(hub: Hub, tmp_path: Path, capsys) -> None:
    clips = SynthConfig(output_dir=str(tmp_path / "data"), num_train=2, num_eval=1, kinds=("grounding",))
    write_dataset(clips, show_progress=False)
    sizes = ["--sft.examples_per_step=2", "--video.num_workers=0", "--model.lora.rank=2", "--model.path=owner/tiny"]
    files = [f"--data.train={tmp_path / 'data' / 'train_grounding.jsonl'}", "--data.eval=[]"]

    def sft(num_steps: int) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["sft", "tiny", *sizes, *files, f"--train.output_dir={tmp_path}", f"--sft.num_steps={num_steps}"])
        return ended.value.code, "".join(capsys.readouterr())

    assert sft(1)[0] == 0
    assert load_config(str(tmp_path / "config.yaml"), []).model.path == f"owner/tiny@{OLD}"
    state = json.loads((tmp_path / "checkpoints" / "step_000001" / "state.json").read_text())
    assert state["asked_model"] == "owner/tiny" and f"path: owner/tiny@{OLD}\n" in state["config_yaml"]
    assert state["base"] == model_digest(model_folder(f"owner/tiny@{OLD}"))
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("owner/tiny", OLD)

    hub.files[NEW], hub.refs["main"] = hub.files[OLD] | {"generation_config.json": b'{"seed": 1}'}, NEW
    code, said = sft(2)
    assert code == 0 and f"model owner/tiny@{OLD} in float32" in said and "before: model.path" not in said
    sizes[-1] += "@main"  # other words: what they mean now
    code, said = sft(3)
    assert code == 1 and f"beside frozen weights of another model than owner/tiny@{NEW}: set model.path" in said
