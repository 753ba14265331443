"""The captioning judge behind SGLang's real HTTP server: what it answers, and what its client makes of its ends.

The judge is a small text model that has learned, word for word, what a rule-based judge answers to the questions of
this file; the rewards to compare with are those by that one.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from tests.judge.judge_server import Handler, judges_by_words, says, serving
from vcr1_fast.judge.client import JudgeUnavailableError, read_completion
from vcr1_fast.rollout.sglang_engine import CPU_ARGS
from vcr1_fast.settings.config import JudgeConfig, TaskConfig
from vcr1_fast.tasks.captioning import Captioning
from vcr1_fast.tiny.tokenizer import build_tokenizer
from vcr1_fast.types import CaptionTruth, Example

KEY, VARIABLE = "the-judges-key", "VCR1_TEST_JUDGE_KEY"
START_LIMIT_S = 300  # on two quiet cores 20 s
MAX_TRAIN_STEPS = 400  # about 150 are taken, 8 s
EXAMPLE = Example("e", "captioning", "/videos/e.mp4", "", 8.0, CaptionTruth(("A ball rolls.", "A dog barks.")))
REWARDS = {"A ball rolls. A dog barks.": 1.0, "A ball rolls. A man sings.": 0.5, "A man sings.": 0.0}
CONFUSING = "Something confusing happens."


def task_of(url: str, **judge: Any) -> Captioning:
    defaults = {"cache": None, "backoff_s": 0.01, "max_retries": 1, "timeout_s": 60.0, "api_key_env": VARIABLE}
    return Captioning(TaskConfig(think=False), JudgeConfig(url=url, **(defaults | judge)))


def score(task: Captioning, *captions: str) -> dict[str, list[float]]:
    return task.score([EXAMPLE] * len(captions), [f"<answer>{caption}</answer>" for caption in captions])


def ask(task: Captioning, prompt: str, max_tokens: int = 32) -> str:
    return task.judge.ask(prompt, str, max_tokens, task.judge.new_deadline())


def lessons() -> dict[str, str]:
    """Each question about the captions above, with the rule-based judge's answer."""
    learned: dict[str, str] = {}

    def judge(handler: Handler, prompt: str) -> None:
        reply = handler.reply

        def keep(status: int, body: bytes, **headers: str) -> None:
            learned[prompt], _ = read_completion(body)
            reply(status, body, **headers)

        handler.reply = keep
        (says("I cannot say.") if "confusing" in prompt else judges_by_words)(handler, prompt)

    with serving(judge) as server:
        task = task_of(server.url)
        assert score(task, *REWARDS)["f1"] == list(REWARDS.values())
        with pytest.raises(JudgeUnavailableError):
            score(task, CONFUSING)
    return learned


def taught(learned: dict[str, str]) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """A random model of 2 layers, trained until it says all answers."""
    tokenizer = build_tokenizer([*learned, *learned.values()])
    end: int = tokenizer.eos_token_id  # pyright: ignore[reportAssignmentType]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=640,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
    )
    model = Qwen2ForCausalLM(config).float()
    rows: list[torch.Tensor] = []
    is_answer: list[torch.Tensor] = []
    for prompt, text in learned.items():
        chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        asked: list[int] = chat["input_ids"]  # pyright: ignore
        said: list[int] = [*tokenizer(text)["input_ids"], end]  # pyright: ignore
        rows.append(torch.tensor(asked + said))
        is_answer.append(torch.tensor([False] * len(asked) + [True] * len(said)))
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    answer_BL = torch.nn.utils.rnn.pad_sequence(is_answer, batch_first=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(MAX_TRAIN_STEPS):
        logits_BLV = model(input_ids=ids_BL).logits[:, :-1]
        token_nll_N = cross_entropy(logits_BLV[answer_BL[:, 1:]], ids_BL[answer_BL], reduction="none")
        if token_nll_N.max() < 0.1:  # each token has 90 % and more
            return model, tokenizer
        optimizer.zero_grad()
        token_nll_N.mean().backward()
        optimizer.step()
    raise AssertionError(f"not learned in {MAX_TRAIN_STEPS} steps")


@dataclass(frozen=True)
class JudgeProcess:
    """SGLang's server and the processes that it started."""

    popen: subprocess.Popen[bytes]
    url: str

    def send(self, number: signal.Signals) -> None:
        os.killpg(self.popen.pid, number)


@pytest.fixture(scope="module")
def server(sglang_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JudgeProcess]:
    folder = tmp_path_factory.mktemp("judge")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        model, tokenizer = taught(lessons())
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "tokenizer")  # beside config.json transformers would make Qwen's own of it
    with socket.create_server(("127.0.0.1", 0)) as free:
        host, port = free.getsockname()
    arguments = {
        **CPU_ARGS,
        "model_path": folder / "model",
        "tokenizer_path": folder / "tokenizer",
        "served_model_name": "judge",
        "device": "cpu",
        "dtype": "float32",
        "host": host,
        "port": port,
        "api_key": KEY,
        "grammar_backend": "none",
        "skip_server_warmup": True,
    }
    command = [sglang_python, "-m", "sglang.launch_server"]
    for name, value in arguments.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    log = folder / "log"
    with log.open("wb") as out:
        popen = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    judge = JudgeProcess(popen, f"http://{host}:{port}/v1")
    try:
        wait_until_healthy(f"http://{host}:{port}/health", popen, log)
        yield judge
    finally:
        judge.send(signal.SIGKILL)  # its processes live in its group, also where it has ended
        popen.wait()


def wait_until_healthy(url: str, popen: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                assert reply.status == 200
                return
        except OSError as error:  # HTTP errors, too
            is_late = popen.poll() is not None or time.monotonic() > deadline
            assert not is_late, f"{error}\n{log.read_text()[-3000:]}"
        time.sleep(0.2)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)


def counts(task: Captioning) -> dict[str, float]:
    return {name: value for name, value in task.judge.counters().items() if value and name != "seconds"}


def test_rewards_are_those_of_the_judge_that_it_learned_from(server):
    task = task_of(server.url)
    assert score(task, *REWARDS) == {"format": [1.0] * 3, "f1": list(REWARDS.values())}
    assert counts(task) == {"requests": 7}  # 3 for recall, and 2 for precision of each caption that has some


def test_an_answer_that_is_no_verdict_costs_its_own_question_and_is_no_reward(server):
    task = task_of(server.url, max_retries=0)
    with pytest.raises(JudgeUnavailableError, match=r"left out: 1; .* there is no JSON object in 'I cannot say\.'"):
        score(task, CONFUSING)
    with pytest.raises(JudgeUnavailableError, match="its answer is longer than 3 tokens"):
        ask(task, next(iter(lessons())), max_tokens=3)
    with pytest.raises(JudgeUnavailableError, match=r"HTTP 400: .*context length.*; see its message"):
        ask(task, "x" * 5000)
    assert counts(task) == {"requests": 3, "invalid": 2, "failures": 3}
    assert score(task, "A man sings.")["f1"] == [0.0]  # the judge counts as being well


def test_a_wrong_key_is_named_by_its_variable_and_ends_the_questions(server, monkeypatch):
    for wrong in ("not-the-key", ""):
        monkeypatch.setenv(VARIABLE, wrong)
        task = task_of(server.url)
        for end in ("$", "; not asked again for 30 s$"):
            with pytest.raises(
                JudgeUnavailableError, match=rf"answered HTTP 401: .*; check the key in \${VARIABLE}{end}"
            ):
                ask(task, "who?")
        assert counts(task) == {"requests": 1, "failures": 2}


def test_a_server_that_hangs_and_one_that_is_killed_cost_the_time_out_and_then_nothing(server):
    """The last test: it ends the server."""
    task = task_of(server.url, timeout_s=0.5)
    server.send(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(JudgeUnavailableError, match=r"after 2 attempts: no complete reply after 0\.5 s$"):
        ask(task, "who?")
    assert 1.0 < time.monotonic() - began < 5.0
    with pytest.raises(JudgeUnavailableError, match="not asked again for 30 s"):
        ask(task, "who?")
    server.send(signal.SIGCONT)
    assert isinstance(ask(task_of(server.url), "who?"), str)

    task = task_of(server.url)
    server.popen.send_signal(signal.SIGKILL)
    server.popen.wait()
    with pytest.raises(JudgeUnavailableError, match=r"after 2 attempts: ConnectionRefusedError"):
        score(task, "A man sings.")
    with pytest.raises(JudgeUnavailableError, match="not asked again for 30 s"):
        score(task, "A man sings.")
    assert counts(task) == {"requests": 2, "retries": 1, "failures": 2}
