"""The command line: what a wrong setting is answered with, what is printed, and what is not imported."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

import vcr1_fast.cli as cli
from tests.command_line import run
from vcr1_fast.evaluation.samples import Sample, write_lines
from vcr1_fast.run.telemetry import console, say
from vcr1_fast.settings.config import Config, ConfigError, DataFile, RolloutConfig
from vcr1_fast.settings.io import UsageError, config_to_yaml, load_config, setting_types, settings_parser
from vcr1_fast.types import SampleError


def run_with(monkeypatch: pytest.MonkeyPatch, command) -> None:
    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command("", command, lambda: Config))


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("content", "key", "meant"),
    [
        ("rollout:\n  group_sise: 4\n", "rollout.group_sise", "rollout.group_size"),
        ("rolout:\n  group_size: 4\n", "rolout.group_size", "rollout.group_size"),
        ("train:\n  group_size: 4\n", "train.group_size", "rollout.group_size"),  # right field, wrong section
        ("learning_rate: 1.0\n", "learning_rate", "optimizer.learning_rate"),
    ],
)
def test_unknown_key_in_a_file_names_file_key_and_nearest(in_folder: Path, capsys, content, key, meant):
    (in_folder / "my.yaml").write_text(content)
    code, out, err = run(capsys, "config", "my.yaml")
    assert (code, out) == (2, "")
    assert err == f"vcr1-fast: error: unknown setting {key} in my.yaml: did you mean {meant}?\n"


@pytest.mark.parametrize("tokens", [["--rollout.gruop_size=3"], ["--rollout.gruop_size", "3"]])
def test_unknown_key_on_the_command_line(capsys, tokens):
    code, _, err = run(capsys, "train", *tokens)
    assert code == 2
    assert "unknown setting rollout.gruop_size on the command line: did you mean rollout.group_size?" in err


@pytest.mark.parametrize(
    ("tokens", "code", "message"),
    [
        (["--rollout.group_size=0"], 1, "rollout.group_size is 0, wanted >= 1"),
        (["--rollout.top_k=-1"], 1, "rollout.top_k is -1, wanted 0 (all tokens) or >= 2"),
        (["--rollout.top_k=1"], 1, "rollout.top_k is 1, wanted 0 (all tokens) or >= 2"),
        (["--train.profile_steps=[3,2]"], 1, "train.profile_steps is [3, 2], wanted [first, last], from 1 on"),
        (
            ["--train.profile_steps=[2]"],
            2,
            "train.profile_steps is '[2]' on the command line, wanted [a whole number, a whole number] or null",
        ),
        (["--rollout.over_provision=1.5"], 1, "rollout.over_provision is 1.5, wanted 0 .. 1"),
        (["--eval.repetition_penalty=0"], 1, "eval.repetition_penalty is 0.0, wanted more than 0 (1 is off)"),
        (["--eval.repetition_penalty=.inf"], 1, "eval.repetition_penalty is inf, wanted more than 0"),
        (["--train.seed=x"], 2, "train.seed is 'x' on the command line, wanted a whole number"),
        (["--algorithm.loss=foo"], 2, "algorithm.loss is 'foo' on the command line, wanted one of grpo, dr_grpo, dapo"),
        (["--train.seed"], 2, "--train.seed has no value"),
        (["a.yaml", "b.yaml"], 2, "got the config files a.yaml and b.yaml, wanted one"),
        (["nowhere.yaml"], 2, "cannot read the config nowhere.yaml: No such file or directory"),
        (["-x"], 2, "cannot read the config -x"),
    ],
)
def test_wrong_settings_are_answered_in_one_line(in_folder: Path, capsys, tokens, code, message):
    got_code, out, err = run(capsys, "config", *tokens)
    assert (got_code, out, err.count("\n")) == (code, "", 1)
    assert message in err


def test_a_contradiction_stops_only_the_command_that_uses_its_settings(monkeypatch, capsys):
    for name in ("train", "sft", "eval"):
        monkeypatch.setitem(cli.COMMANDS, name, cli.Command("", lambda config: {"ran": True}, lambda: Config))
    tokens = ["--train.prompts_per_step=6", "--algorithm.minibatches_per_rollout=4"]
    code, out, err = run(capsys, "train", *tokens)
    assert (code, out, err.count("\n")) == (1, "", 1) and "make the first a multiple of the second" in err
    for name in ("sft", "eval", "config"):
        assert run(capsys, name, *tokens)[0] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "bad.yaml holds no setting, wanted sections of key: value; without a file all settings are the defaults"),
        ("# rollout:\n", "bad.yaml holds no setting"),
        ("[" * 40 + "]" * 40, "bad.yaml is nested too deeply"),
        ("- 1\n- 2\n", "bad.yaml holds a list, wanted sections"),
        ("rollout: 3\n", "rollout is 3, wanted a section"),
        ("a: [\n", "bad.yaml is not YAML"),
        ("rollout: {group_size: eight}\n", "rollout.group_size is 'eight' in bad.yaml, wanted a whole number"),
    ],
)
def test_files_that_are_no_settings(in_folder: Path, content, message):
    (in_folder / "bad.yaml").write_text(content)
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        load_config("bad.yaml", [])


def test_a_value_that_is_nested_too_deeply(capsys):
    code, _, err = run(capsys, "config", "--data.train=" + "[" * 2000 + "]" * 2000)
    assert (code, err.count("\n")) == (2, 1)
    assert "data.train on the command line is nested too deeply" in err


def test_file_then_overrides_in_any_order_and_spelling(in_folder: Path, capsys):
    (in_folder / "my.yaml").write_text(
        "rollout: {group_size: 4, max_new_tokens: 9}\ntrain:\ndata: {train: a.jsonl}\n"
        "optimizer: {learning_rate: 1e-5}\ntask: {reward_weights: {iou: 2}}\n"
    )
    tokens = ["--rollout.group_size", "6", "my.yaml", "--data.eval=b.jsonl,c.jsonl", "--task.reward_weights.format=3"]
    code, out, _ = run(capsys, "config", *tokens)
    assert code == 0
    (in_folder / "resolved.yaml").write_text(out)
    config = load_config("resolved.yaml", ["--eval.max_examples=5"])
    assert config.rollout == RolloutConfig(group_size=6, max_new_tokens=9)
    assert (config.data.train, config.data.eval) == (("a.jsonl",), ("b.jsonl", "c.jsonl"))
    assert config.optimizer.learning_rate == 1e-5
    assert config.task.reward_weights == {"iou": 2.0, "format": 3.0}
    assert config.eval.max_examples == 5


def test_a_data_file_may_have_settings_of_its_own(in_folder: Path, capsys):
    (in_folder / "my.yaml").write_text(
        "data:\n  video_root: shared\n  train: {path: a.json, video_root: a}\n"
        "  eval: [b.json, {path: c.json, format: nextgqa_choice, task: multiple_choice}]\n"
    )
    config = load_config("my.yaml", [])
    assert config.data.train == (DataFile(path="a.json", video_root="a"),)
    assert config.data.eval[0] == "b.json"
    assert config.data.sources("eval") == [
        DataFile(path="b.json", video_root="shared", format="auto"),
        DataFile(path="c.json", video_root="shared", format="nextgqa_choice", task="multiple_choice"),
    ]
    code, out, _ = run(capsys, "config", "my.yaml", "--data.train=[x.json,{path: y.json, format: rows}]")
    assert code == 0
    (in_folder / "resolved.yaml").write_text(out)
    again = load_config("resolved.yaml", [])
    assert again.data.train == ("x.json", DataFile(path="y.json", format="rows"))
    assert again.data.eval == config.data.eval
    assert load_config(None, ["--data.eval={path: z.json}"]).data.eval == (DataFile(path="z.json"),)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "{path: a, video_rot: b}",
            "unknown setting data.train[0].video_rot{}: did you mean data.train[0].video_root?",
        ),
        ("[a, {path: b, fromat: rows}]", "unknown setting data.train[1].fromat{}: did you mean data.train[1].format?"),
        ("{format: rows}", "data.train[0] has no path{}, wanted {{path, video_root, format, task}}"),
        ("{path: a, format: charade}", "data.train[0].format is 'charade'{}, wanted one of auto, rows, charades,"),
        ("{path: 3}", "data.train[0].path is '3'{}, wanted text"),
        ('[a, ""]', "data.train holds an empty path, wanted the name of a file"),
    ],
)
def test_a_wrong_entry_of_a_list_is_named(in_folder: Path, capsys, entry, message):
    (in_folder / "my.yaml").write_text(f"data: {{train: {entry}}}\n")
    for tokens, where in ((["my.yaml"], " in my.yaml"), ([f"--data.train={entry}"], " on the command line")):
        code, out, err = run(capsys, "config", *tokens)
        assert code in (1, 2) and (out, err.count("\n")) == ("", 1)
        assert message.format(where) in err


def test_resolved_file_holds_every_setting_and_reads_back_equal(in_folder: Path):
    config = load_config(None, ["--rollout.temperature=0.7", "--optimizer.betas=[0.8,0.95]", "--data.video_root=v"])
    text = config_to_yaml(config)
    for key in setting_types(Config):
        assert f"{key.rpartition('.')[2]}:" in text
    (in_folder / "saved.yaml").write_text(text)
    assert load_config("saved.yaml", []) == config
    assert config == dataclasses.replace(config) and config.optimizer.betas == (0.8, 0.95)


def test_a_setting_without_help_is_noticed():
    actions = settings_parser(Config, "vcr1-fast train")._actions
    undocumented = [a.dest for a in actions if a.dest in setting_types(Config) and not (a.help or "").strip()]
    assert undocumented == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("train.output_dir is x"), "vcr1-fast: error: train.output_dir is x\n"),
        (SampleError("a.mp4", "no video stream"), "vcr1-fast: error: a.mp4: no video stream\n"),
        (PermissionError(13, "Permission denied", "/out"), "vcr1-fast: error: /out: Permission denied\n"),
        (OSError(28, "train.output_dir is full"), "vcr1-fast: error: train.output_dir is full\n"),
    ],
)
def test_a_failed_run_is_one_line_and_exit_1(monkeypatch, capsys, error, line):
    def fail(config):
        raise error

    run_with(monkeypatch, fail)
    assert run(capsys, "train") == (1, "", line)
    monkeypatch.setenv("VCR1_DEBUG", "1")
    code, _, err = run(capsys, "train")
    assert code == 1 and err.startswith("Traceback (most recent call last)") and err.endswith(line)


def test_what_no_one_foresaw_keeps_its_traceback_and_its_bytes_to_itself(monkeypatch, capsys):
    """A model's answer, a file name and a library's error may hold anything."""
    hostile = "\x1b]0;title\x07\x9b2J\rok\u202e\udcff"
    shown = r"\x1b]0;title\x07\x9b2J\rok\u202e\udcff"

    def fail(config):
        print(f"answer: {hostile}")
        say(f"say: {hostile}")
        console.print(Table(hostile))
        print(hostile, file=sys.stderr)
        raise TypeError(hostile)

    run_with(monkeypatch, fail)
    code, out, err = run(capsys, "train")
    assert code == 1 and not set(hostile) & set(out + err) - set("]0;title2Jok")
    assert f"answer: {shown}\n" in out and r"\x1b]0;title" in out.partition("say: ")[2]
    assert err.count(shown) >= 3 and err.count("Traceback") == 1
    assert err.splitlines()[-1].startswith("vcr1-fast: error: unforeseen TypeError, please report it")


def test_other_ranks_say_who_they_are_and_keep_quiet_about_the_command_line(monkeypatch, capsys):
    def fail(config):
        raise ConfigError("broken")

    run_with(monkeypatch, fail)
    monkeypatch.setenv("RANK", "3")
    assert run(capsys, "train") == (1, "", "vcr1-fast: error (rank 3): broken\n")
    assert run(capsys, "train", "--nonsense.key=1") == (2, "", "")


def test_last_line_is_json_from_rank_0_alone(monkeypatch, capsys):
    run_with(monkeypatch, lambda config: {"steps": config.train.num_steps, "run": Path("r"), "score": float("nan")})
    code, out, _ = run(capsys, "train", "--train.num_steps=7")
    assert code == 0
    assert json.loads(out.splitlines()[-1]) == {"steps": 7, "run": "r", "score": None}
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "train") == (0, "", "")


def test_interrupt_is_exit_130(monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    run_with(monkeypatch, interrupt)
    line = "vcr1-fast: error: interrupted; to go on from what is saved: vcr1-fast train '--train.output_dir=my run'\n"
    assert run(capsys, "train", "--train.output_dir=my run") == (130, "", line)
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun's command line is not known here
    assert cli._again("train", []) == "the same command"


@pytest.mark.parametrize("name", cli.PLAIN_COMMANDS)
def test_an_interrupt_of_any_command_is_one_line(monkeypatch, capsys, name):
    def interrupt(tokens):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.PLAIN_COMMANDS, name, interrupt)
    again = "; to go on from what is saved: vcr1-fast predict" if name == "predict" else ""
    assert run(capsys, name) == (130, "", f"vcr1-fast: error: interrupted{again}\n")


@pytest.mark.parametrize(("to", "code", "told"), [("| true", 141, ""), ("> /dev/full", 1, "No space left on device\n")])
def test_output_that_cannot_be_written(to, code, told):
    """`config` is the longest output without torch; a pipe that is closed says nothing, as with other programs."""
    command = f"{sys.executable} -m vcr1_fast config {to}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr[-len(told) :] if told else done.stderr) == (code, told)
    assert "Traceback" not in done.stderr


def test_a_run_goes_on_when_nobody_reads_it_any_more(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    steps = []

    def train(config):
        for step in range(3):
            say(f"step {step}")
            print("more")
            steps.append(step)

    run_with(monkeypatch, train)
    with os.fdopen(write, "w") as stdout, contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as end:
        cli.main(["train"])
    assert (steps, end.value.code) == ([0, 1, 2], 141)


def test_unknown_command_names_the_known_ones(capsys):
    code, _, err = run(capsys, "trian")
    assert code == 2 and "'train'" in err and "'doctor'" in err


@pytest.mark.parametrize(
    "tokens",
    [
        *(["--help"], ["--version"], ["train", "--help"], ["config"], ["doctor", "--help"], ["baselines", "--help"]),
        *(["baselines", "temporal_grounding", "rows.json"], ["compare", "samples.jsonl", "samples.jsonl"]),
    ],
)
def test_answers_without_importing_torch(tokens: list[str], tmp_path: Path):
    row = {"duration": 10.0, "timestamps": [[0.0, 5.0]], "sentences": ["a"]}
    (tmp_path / "rows.json").write_text(json.dumps({"v_1": row}))
    sample = Sample("p", "multiple_choice", "/p.mp4", "which?", "A", {}, {"acc": 0.0}, "", "stop", 5)
    write_lines(tmp_path / "samples.jsonl", [sample])
    heavy = {"torch", "transformers", "av", "datasets", "pyarrow"} | ({"numpy"} if len(tokens) < 3 else set())
    program = (
        "import sys\nfrom vcr1_fast.cli import main\n"
        f"try:\n    main({tokens!r})\n"
        "except SystemExit as end:\n"
        f"    heavy = {heavy} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy else end.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_rank_whose_peer_is_gone_says_so_in_one_line(monkeypatch, capsys, world_size: str):
    """Alone it would be a fault of ours, shown with its traceback."""
    monkeypatch.setenv("WORLD_SIZE", world_size)

    def wait_for_the_dead() -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")

    assert cli.exit_code_of(wait_for_the_dead) == 1
    err = capsys.readouterr().err
    assert ("another rank has ended, see what it said ([gloo" in err) == (world_size == "2") != ("Traceback" in err)
