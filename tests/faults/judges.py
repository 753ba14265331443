"""Judges and rewards that are down, hang or lie: no training data is lost by it, and with them well again the run goes
on. Nothing here compares bits: which groups were scored depends on when the judge was well."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.rewards import FAILURES
from tests.faults.runs import Ended, Started, run
from tests.faults.trials import Bench, LostError
from tests.faults.undisturbed import NUM_STEPS, Runs
from tests.judge import judge_server
from tests.judge.judge_server import Behaviour, judges_by_words, says, sends, serving, waits
from vcr1_fast.run import exit_codes

LIES: tuple[object, ...] = (
    *("", "yes", "{", "[]", "null", "{}", '{"entailed": []}', '{"entailed": [true]}', '{"entailed": [1e999, 2]}'),
    *('{"entailed": [null, null]}', '{"entailed": "yes"}', '{"entailed": [true, true, true, true, true]}'),
    *('{"events": []}', '{"events": [1, 2]}', '{"events": {"a": 1}}', '{"entailed": ' + "[" * 5000, 7, None, {"a": 1}),
    "\ud83d".encode("utf-8", "surrogatepass").decode("utf-8", "replace") * 10_000,
)
BAD: dict[str, Callable[[random.Random], Behaviour]] = {
    "lies": lambda rng: says(rng.choice(LIES)),
    "cut answer": lambda rng: says('{"entailed": [true', "length"),
    "wrong number": lambda rng: says(json.dumps({"entailed": [True] * rng.randrange(9)})),
    "garbage": lambda rng: sends(200, rng.randbytes(rng.randrange(1, 500))),
    "strange reply": lambda rng: sends(200, rng.choice([b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}'])),
    "refusal": lambda rng: sends(rng.choice([400, 401, 404, 408, 429, 500, 502, 503]), b"no \x1b[31m"),
    "retry after": lambda rng: sends(429, b"", Retry_After=rng.choice(["1e9", "99999999", "-1", "soon", ""])),
    "redirect": lambda rng: sends(302, b"", Location="file:///etc/passwd"),
    "hangs up": lambda rng: judge_server.hangs_up,
    "closes halfway": lambda rng: judge_server.closes_halfway,
    "resets": lambda rng: judge_server.resets,
    "drips": lambda rng: judge_server.drips,
    "floods": lambda rng: judge_server.floods,
    "late": lambda rng: waits(1.0, says("yes")),
}
JUDGE = ("timeout_s=0.3", "total_timeout_s=1.0", "max_retries=1", "backoff_s=0.01", "cache=null")


def ask_a_bad_judge(bench: Bench, runs: Runs, rng: random.Random) -> None:
    folder = bench.empty_folder()
    name = rng.choice(["dead", *BAD])
    num_good = rng.choice([0, 0, rng.randrange(1, 12)])  # requests before it goes bad
    how = rng.choice(["drop", "drop", "zero"])
    bench.fault = f"the judge {name} after {num_good} requests, judge.on_failure={how}"
    data = _captions(runs, folder)
    options = (f"--judge.on_failure={how}", *(f"--judge.{setting}" for setting in JUDGE))
    if name == "dead":
        ended = run(_captioning(runs, folder, data, judge_server.unused_url(), *options), folder / "bad")
    else:
        behaviours = [judges_by_words] * num_good + [BAD[name](rng)]
        with _Serving(folder / "judge", behaviours) as url:
            ended = run(_captioning(runs, folder, data, url, *options), folder / "bad")
    _check_nothing_is_lost(folder / "run", ended)
    with _Serving(folder / "well", [judges_by_words]) as url:
        more = f"--train.num_steps={NUM_STEPS + 2}"
        ended = run(_captioning(runs, folder, data, url, *options, more), folder / "resumed")
    _check_goes_on(folder / "run", ended)


def call_a_bad_reward(bench: Bench, runs: Runs, rng: random.Random) -> None:
    folder, how = bench.empty_folder(), rng.choice(list(FAILURES))
    seconds = rng.choice([None, None, rng.uniform(0.3, 1.2)])
    bench.fault = f"the reward {how}{'' if seconds is None else f' until {seconds:.2f} s after the start'}"
    well = folder / "well"

    def set_up() -> None:
        os.environ.update(FAULTS_REWARD=how, FAULTS_REWARD_WELL=str(well))

    bad = ("--task.rewards.temporal_grounding=[tests.faults.rewards:failing]", "--task.reward_timeout_s=1")
    started = Started(runs.arguments("train", folder / "run", *bad), folder / "bad", set_up)
    if seconds is not None:
        time.sleep(seconds)
        well.touch()
    ended = started.wait()
    _check_nothing_is_lost(folder / "run", ended)
    well.touch()
    more = f"--train.num_steps={NUM_STEPS + 2}"
    ended = Started(runs.arguments("train", folder / "run", *bad, more), folder / "resumed", set_up).wait()
    _check_goes_on(folder / "run", ended)


class _Serving:
    """A judge in a process of its own: this one must have no threads."""

    def __init__(self, log: Path, behaviours: list[Behaviour]) -> None:
        self._address = log.with_suffix(".url")

        def serve() -> None:
            with serving(*behaviours) as server:
                aside = self._address.with_suffix(".part")
                aside.write_text(server.url)
                aside.rename(self._address)
                time.sleep(3600)

        self._process = Started([], log, serve)

    def __enter__(self) -> str:
        assert self._process.until(self._address.exists), self._process.text()
        return self._address.read_text()

    def __exit__(self, *_: object) -> None:
        self._process.kill()


def _captions(runs: Runs, folder: Path) -> Path:
    rows = [json.loads(line) for line in (runs.data / "train_grounding.jsonl").read_text().splitlines()]
    path = folder / "captions.jsonl"
    kept = [
        {"id": row["id"], "task": "captioning", "video": str(runs.data / row["video"]), "duration_s": row["duration_s"]}
        | {"events": ["A ball rolls by.", "It is red today."]}
        for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return path


def _captioning(runs: Runs, folder: Path, data: Path, url: str, *options: str) -> list[str]:
    """The ground truth is among the answers, so that the judge is asked about each group."""
    return runs.arguments(
        "train",
        folder / "run",
        f"--data.train=[{data}]",
        "--data.eval=[]",
        f"--judge.url={url}",
        "--task.rewards.captioning=[tests.faults.rewards:letters]",
        "--rollout.num_ground_truth=1",
        "--rollout.max_new_tokens=48",
        *options,
    )


def _check_nothing_is_lost(folder: Path, ended: Ended) -> None:
    """A failure of a judge or a reward says nothing about the data."""
    if ended.checked().code not in (0, exit_codes.NO_SIGNAL):
        ended.refusal()
    _check_no_quarantine(folder)
    if "\x1b" in ended.err + ended.out:
        raise LostError("an escape byte of the judge reached the terminal")
    steps = _steps(folder)
    failures = sum(step.get("reward_failures", 0) for step in steps)
    trained = [step for step in steps if step.get("grad_norm")]
    if ended.code == 0 and not trained and failures:
        raise LostError(f"exit code 0 though no step of {len(steps)} was trained ({failures:.0f} groups not scored)")


def _check_goes_on(folder: Path, ended: Ended) -> None:
    if ended.checked().code != 0:
        raise LostError(f"with everything well again it ended with {ended.code}: {ended.err[-300:]!r}")
    _check_no_quarantine(folder)
    last = _steps(folder)[-1]
    # answers of a small group may well earn the same, which leaves nothing to learn and is no fault
    is_scored = last.get("completions/count") and not last.get("reward_failures")
    learns = last.get("grad_norm") or last.get("frac_reward_zero_std") == 1.0
    if last["step"] != NUM_STEPS + 2 or not is_scored or not learns:
        raise LostError(f"with everything well again the last step is {last}")


def _check_no_quarantine(folder: Path) -> None:
    path = folder / "quarantine.jsonl"
    if path.exists() and path.read_text().strip():
        lines = path.read_text().splitlines()
        raise LostError(f"{len(lines)} rows of training data are quarantined for it: {lines[0]:.150}")


def _steps(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if "loss" in line]
