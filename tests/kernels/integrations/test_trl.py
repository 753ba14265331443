"""A real GRPOTrainer with TRL's own head and with ours: the same losses, metrics and weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast
from vcr1_kernels.integrations import trl as vcr1_trl
from vcr1_kernels.integrations.peer_version import check_version

from tests.kernels.integrations.tiny_qwen2 import WIDTH, tiny_qwen2
from tests.kernels.integrations.trl_runs import Run, assert_same_training, grpo_trainer

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
trl_symbols = pytest.importorskip("trl.trainer.utils")
ChunkedLogProbFunction = pytest.importorskip("trl.kernels").ChunkedLogProbFunction

VOCAB = 288


@pytest.fixture(autouse=True)
def restored_head() -> Iterator[None]:
    yield
    assert trl_symbols._ChunkedLogProbFunction is ChunkedLogProbFunction, "a test left our head in place"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable) -> Path:
    """A random Qwen2 of 2 layers and its byte tokenizer, on disk as TRL wants them."""
    folder = tmp_path_factory.mktemp("tiny_qwen2")
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(["<|end|>"])
    tokenizer.eos_token = tokenizer.pad_token = "<|end|>"
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny_qwen2(VOCAB, **ids).save_pretrained(folder)
    return folder


def build_trainer(folder: Path, output: Path, peft_config: Any = None, **options: Any) -> Any:
    """Two optimizer steps of two micro-batches, each of 2 prompts x 2 completions; the second step is off-policy."""
    arguments = {
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.3,
        "beta": 0.1,
        "model_init_kwargs": {"dtype": "float32"},
        **options,
    }
    data = datasets.Dataset.from_dict({"prompt": [f"{number} then" for number in range(8)]})
    return grpo_trainer(str(folder), output, data, {"peft_config": peft_config}, **arguments)


def train_both_ways(
    folder: Path, output: Path, keep: str = "none", **options: Any
) -> tuple[Run, Run, vcr1_trl.FusedHead]:
    theirs = Run(build_trainer(folder, output, **options))
    trainer = build_trainer(folder, output, **options)
    with vcr1_trl.use_fused_head(trainer, keep=keep) as head:
        return theirs, Run(trainer), head


@pytest.mark.parametrize(
    ("keep", "options"),
    [("none", {}), ("none", {"entropy_coef": 0.05}), ("probs", {"loss_type": "grpo", "beta": 0.0})],
    ids=["default", "entropy bonus", "probs kept"],
)
@pytest.mark.parametrize("compact", [False, True], ids=["all positions", "valid positions"])
def test_two_steps_with_our_head_equal_two_steps_with_theirs(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    keep: str, options: dict[str, Any], compact: bool,
):  # fmt: skip
    """TRL sends only positions with a label to the head on a GPU, and every position on a CPU: both are tried here."""
    monkeypatch.setattr(trl_symbols, "_use_triton", lambda _: compact)
    theirs, ours, head = train_both_ways(model_folder, tmp_path, keep, **options)
    assert_same_training(theirs, ours)
    assert head.trl_calls == {}
    assert head.fused_calls >= 4  # 2 steps x 2 micro-batches; above that old log-probs and the reference


def test_lora_on_a_frozen_head(model_folder: Path, tmp_path: Path):
    """The head needs no gradient: forward keeps d(logprob)/d(hidden), 2 matrix products instead of 4."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs, ours, head = train_both_ways(model_folder, tmp_path, peft_config=adapter, learning_rate=3.0)
    assert_same_training(theirs, ours)
    assert head.trl_calls == {} and theirs.num_trainable == 12  # 2 layers x 3 projections x 2 factors


@pytest.mark.gpu
def test_two_steps_on_a_gpu(model_folder: Path, tmp_path: Path):
    theirs, ours, head = train_both_ways(model_folder, tmp_path, use_cpu=False)
    assert_same_training(theirs, ours, rtol=1e-3)
    assert head.trl_calls == {}


LOSS_OUTPUTS = ("log_probs", "entropy")


def head_inputs(num_rows: int = 7, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows)
    hidden_ND = torch.randn(num_rows, WIDTH, generator=generator).to(dtype)
    weight_VD = (torch.randn(VOCAB, WIDTH, generator=generator) * 0.3).to(dtype)
    return hidden_ND, weight_VD, torch.randint(0, VOCAB, (num_rows,), generator=generator)


class Scored:
    """Outputs and gradients of one head, of loss = sum(a logprob) + 0.3 sum(b entropy)."""

    def __init__(
        self,
        apply: Callable[..., Any],
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        target_N: torch.Tensor,
        *,
        scale: float = 1.0,
        outputs: tuple[str, ...] = LOSS_OUTPUTS,
        autocast: bool = False,
    ) -> None:
        hidden_ND = hidden_ND.clone().requires_grad_()
        weight_VD = nn.Parameter(weight_VD.clone())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            self.values = apply(hidden_ND, weight_VD, None, target_N, 0.7, 32768, None, scale, outputs)
        factor_N = torch.linspace(-1.0, 1.0, len(target_N))
        loss = (factor_N * self.values[0]).sum()
        if "entropy" in outputs:
            loss = loss + 0.3 * (factor_N.flip(0) * self.values[1]).sum()
        loss.backward()
        self.hidden_grad, self.weight_grad = hidden_ND.grad, weight_VD.grad


def assert_close(ours: Scored, theirs: Scored, rtol: float) -> None:
    for mine, wanted in zip(ours.values, theirs.values, strict=True):
        assert (mine is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(mine, wanted, rtol=rtol, atol=rtol)
    for mine, wanted in ((ours.hidden_grad, theirs.hidden_grad), (ours.weight_grad, theirs.weight_grad)):
        assert (mine is None) == (wanted is None)
        if wanted is not None:
            assert mine.dtype == wanted.dtype
            torch.testing.assert_close(mine, wanted, rtol=rtol, atol=rtol * max(wanted.abs().max().item(), 1e-6))


@pytest.mark.parametrize(
    "options",
    [
        {"outputs": ("log_probs",)},
        {"scale": 0.25},  # Granite, Cohere: the logits' factor goes into the temperature
    ],
    ids=str,
)
def test_the_head_itself_equals_theirs(options: dict[str, Any]):
    inputs = head_inputs()
    with vcr1_trl.use_fused_head() as head:
        ours = Scored(trl_symbols._ChunkedLogProbFunction.apply, *inputs, **options)
    assert head.fused_calls == 1
    assert_close(ours, Scored(ChunkedLogProbFunction.apply, *inputs, **options), rtol=5e-6)


def test_no_rows_still_hang_on_the_model():
    """An all-masked micro-batch must give a zero gradient, not an error in backward."""
    with vcr1_trl.use_fused_head() as head:
        ours = Scored(head.apply, *head_inputs(num_rows=0))
    assert ours.values[0].shape == (0,)
    assert ours.hidden_grad.shape == (0, WIDTH)
    assert ours.weight_grad.abs().max() == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_closer_to_the_truth_than_theirs(autocast: bool):
    """Their logits are rounded to bfloat16, ours are float32. The truth: the rounded inputs in float64."""
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs = head_inputs(dtype=dtype)
    hidden_ND, weight_VD, target_N = inputs
    logits_NV = hidden_ND.bfloat16().double() @ weight_VD.bfloat16().double().T / 0.7
    truth_N = logits_NV.log_softmax(-1).gather(1, target_N[:, None])[:, 0]
    theirs = Scored(ChunkedLogProbFunction.apply, *inputs, autocast=autocast)
    with vcr1_trl.use_fused_head() as head:
        ours = Scored(head.apply, *inputs, autocast=autocast)
    assert ours.hidden_grad.dtype == ours.weight_grad.dtype == dtype
    our_error, their_error = ((run.values[0] - truth_N).abs().max().item() for run in (ours, theirs))
    assert our_error < 1e-5 < their_error
    scale = theirs.weight_grad.abs().max().item()
    assert (ours.weight_grad - theirs.weight_grad).abs().max().item() < 0.02 * scale  # bfloat16 probabilities: 2 x 2^-8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bias": torch.ones(VOCAB)}, "bias"),
        ({"softcap": 5.0}, "soft-caps"),
        ({"outputs": ("log_probs", "is_top1")}, "is_top1"),
        ({"scale": 0.0}, "logit_scale"),
        ({"dtype": torch.float16}, "float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_our_head_does_not_compute_goes_to_theirs_with_one_warning(change: dict[str, Any], reason: str):
    hidden_ND, weight_VD, target_N = head_inputs(dtype=change.get("dtype", torch.float32))
    outputs = change.get("outputs", LOSS_OUTPUTS)
    arguments = (change.get("bias"), target_N, 0.7, 64, change.get("softcap"), change.get("scale", 1.0), outputs)
    with vcr1_trl.use_fused_head() as head:
        with pytest.warns(UserWarning, match=reason):
            ours = head.apply(hidden_ND, weight_VD, *arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            head.apply(hidden_ND, weight_VD, *arguments)
    assert head.fused_calls == 0
    assert list(head.trl_calls.values()) == [2]
    theirs = ChunkedLogProbFunction.apply(hidden_ND, weight_VD, *arguments)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine is None) == (wanted is None)
        assert wanted is None or torch.equal(mine, wanted)


def test_a_second_call_replaces_the_first_and_undo_restores_theirs():
    first = vcr1_trl.use_fused_head()
    second = vcr1_trl.use_fused_head(entropy_grad=False, keep="probs")
    assert trl_symbols._ChunkedLogProbFunction is second
    first.undo()  # no longer in place: changes nothing
    assert trl_symbols._ChunkedLogProbFunction is second
    second.undo()
    assert trl_symbols._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_probs_need_to_know_that_there_is_no_entropy_bonus():
    with pytest.raises(ValueError, match="entropy_grad=False"):
        vcr1_trl.use_fused_head(keep="probs")


def test_options_that_the_head_does_not_have_are_refused_before_the_first_step():
    for options, message in (({"keep": "all"}, "keep is 'all'"), ({"chunk_rows": 0}, "chunk_rows is 0"),
                             ({"backend": "cuda"}, "backend is 'cuda'")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            vcr1_trl.use_fused_head(**options)


def test_the_gradient_of_an_entropy_bonus_is_not_given_away(model_folder: Path, tmp_path: Path):
    trainer = build_trainer(model_folder, tmp_path, entropy_coef=0.05)
    with pytest.raises(ValueError, match="would lose its gradient"):
        vcr1_trl.use_fused_head(trainer, entropy_grad=False)
    with pytest.raises(ValueError, match="the trainer has an entropy bonus"):
        vcr1_trl.use_fused_head(trainer, keep="probs")


def test_other_releases_are_refused():
    with pytest.raises(ImportError, match=r"found trl 1\.16\.\d+, wanted trl >= 2\.0, < 2\.1"):
        check_version("trl", "2.0", "2.1")
    with pytest.raises(ImportError, match="no_such_trainer is not installed"):
        check_version("no_such_trainer", "1.0", "2.0")
