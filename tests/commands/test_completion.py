"""The script of `vcr1-fast completion`, as bash runs it."""

import shutil
import subprocess
from contextlib import redirect_stdout
from io import StringIO

import pytest

from vcr1_fast import cli


@pytest.fixture(scope="module")
def script() -> str:
    with redirect_stdout(StringIO()) as out:
        assert cli._run_completion(["bash"]) is None
    return out.getvalue()


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last of the words after `vcr1-fast`; it gives "=" as a word of its own."""
    quoted = " ".join(f"'{word}'" for word in ("vcr1-fast", *words))
    call = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _vcr1_fast; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", f"set -u\n{script}\n{call}"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("tra",), ["train"]),
        (("co",), ["config", "compare", "completion"]),
        (("train", "--rollout.group"), ["--rollout.group_size="]),
        (("eval", "my.yaml", "--eval.max_e"), ["--eval.max_examples="]),
        (("synth", "--num_"), ["--num_train=", "--num_eval=", "--num_distractors="]),
        (("train", "--rollout.engine", "="), ["local", "sglang"]),
        (("train", "--rollout.engine", "=", "s"), ["sglang"]),
        (("train", "--rollout.engine=s"), ["--rollout.engine=sglang"]),  # one word, as in zsh
        (("train", "--model.freeze_vision", "=", "t"), ["true"]),
        (("eval", "--eval.video.reader", "=", "py"), ["pyav"]),
        (("train", "--task.shaping", "="), []),  # a mapping
        (("train", "--train.output_dir", "=", "r"), []),  # then bash completes files
        (("doctor", "--rollout"), []),
    ],
)
def test_what_is_offered(script: str, words: tuple[str, ...], offered: list[str]):
    assert completed(script, *words) == offered


def test_every_command_is_offered(script: str):
    assert set(completed(script, "")) == {*cli.COMMANDS, *cli.PLAIN_COMMANDS}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_its_script(capsys):
    cli._run_completion(["zsh"])
    done = subprocess.run(["zsh", "-f", "-c", capsys.readouterr().out], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
