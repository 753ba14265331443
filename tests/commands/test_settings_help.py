"""`--help` of train, sft and eval: few settings, the right ones; `--help-all`: every one."""

import pytest

from vcr1_fast.cli import COMMANDS, main
from vcr1_fast.commands.settings_help import SHORT_HELP, short_help
from vcr1_fast.settings.config import Config
from vcr1_fast.settings.io import load_config, setting_types


def printed(capsys: pytest.CaptureFixture[str], *tokens: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(tokens))
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", SHORT_HELP)
def test_short_help_names_settings_that_exist_with_their_defaults(command: str):
    text = short_help(command, COMMANDS[command].help, Config)
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    keys = [token[2:].partition("=")[0] for token in shown]
    assert keys == list(SHORT_HELP[command].settings) and len(keys) == len(set(keys)) <= 18
    assert set(keys) <= set(setting_types(Config))
    given = ["--model.path=none", *(token for token in shown if not token.startswith("--model.path="))]
    assert load_config(None, given) == load_config(None, given[:1])  # what is shown can be typed, and is the default
    lines = text.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100


def test_each_command_shows_its_own(capsys):
    train, evaluation = printed(capsys, "train", "--help"), printed(capsys, "eval", "-h")
    assert "--rollout.group_size=8" in train and "--eval." not in train
    assert "G, completions per prompt." in train
    assert "--eval.max_new_tokens=null" in evaluation and "--eval.video.fps=null" in evaluation
    assert "--optimizer." not in evaluation and "--train." not in evaluation
    assert "--sft.num_steps=250" in printed(capsys, "sft", "--help")


def test_help_all_has_every_setting(capsys):
    text = printed(capsys, "eval", "--help-all")
    assert all(f"--{key}" in text for key in setting_types(Config))
    assert "log-probs everywhere are taken at this temperature" in " ".join(text.split())  # under rollout.temperature
    assert "Path to a configuration file" not in text  # sections are not options
