"""The head with its loss: hidden states and weight to loss and gradients, ours and the peers', on the same inputs.

One GRPO loss, on-policy, over 8 sequences of equal length: loss = -sum_i w_i A_i exp(logp_i - stop(logp_i)).

Shape letters: T tokens, D hidden size, V vocabulary, G sequences, R tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from vcr1_kernels import PolicyLoss, TokenVectors, fused_linear_logprob, fused_linear_policy_loss
from vcr1_kernels.linear_logprob import Keep

from bench import peers
from bench.harness import Outputs, Way

NUM_SEQUENCES = 8
REFERENCE_ROWS = 1024  # rows at a time, so that the reference never holds [T, V] either


@dataclass(frozen=True)
class HeadSize:
    name: str
    hidden: int
    vocab: int


HEADS = {
    "3B": HeadSize("3B", 2048, 151936),  # Qwen2.5-VL-3B
    "7B": HeadSize("7B", 3584, 152064),  # Qwen2.5-VL-7B
    "small": HeadSize("small", 64, 1187),  # CPU: an odd vocabulary, so that the last tile is ragged
}


@dataclass(frozen=True)
class HeadProblem:
    head: HeadSize
    hidden_TD: Tensor
    weight_VD: Tensor
    target_T: Tensor
    advantage_T: Tensor  # the same within a sequence
    weight_T: Tensor  # 1 / (R G)

    @property
    def num_tokens(self) -> int:
        return self.hidden_TD.shape[0]

    @property
    def sequence_lens(self) -> tuple[int, ...]:
        return (self.num_tokens // NUM_SEQUENCES,) * NUM_SEQUENCES

    def loss(self, logprob_C: Tensor, rows: slice = slice(None)) -> Tensor:
        """Of `rows`, whose log-probs these are."""
        ratio_C = torch.exp(logprob_C - logprob_C.detach())
        return -(self.weight_T[rows] * self.advantage_T[rows] * ratio_C).sum()


def make_head_problem(head: HeadSize, num_tokens: int, dtype: torch.dtype, device: torch.device) -> HeadProblem:
    """Random data with logits of standard deviation 2. Raises ValueError when T is not a multiple of 8."""
    if num_tokens % NUM_SEQUENCES:
        raise ValueError(f"the head benchmark got {num_tokens} tokens, wanted a multiple of {NUM_SEQUENCES}")
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    length = num_tokens // NUM_SEQUENCES
    return HeadProblem(
        head,
        hidden_TD=normal(num_tokens, head.hidden).to(dtype),
        weight_VD=(normal(head.vocab, head.hidden) * (2.0 / head.hidden**0.5)).to(dtype),
        target_T=torch.randint(0, head.vocab, (num_tokens,), generator=generator, device=device),
        advantage_T=normal(NUM_SEQUENCES).repeat_interleave(length),
        weight_T=torch.full((num_tokens,), 1.0 / num_tokens, device=device),
    )


def head_reference(problem: HeadProblem) -> Outputs:
    """Loss, log-probs and gradients by the definition: float64 on a CPU, float32 without TF32 on a GPU (where float64
    would take longer than the whole benchmark; its own error is near 1e-6)."""
    dtype = torch.float32 if problem.hidden_TD.is_cuda else torch.float64
    weight_VD = problem.weight_VD.to(dtype)
    grad_weight_VD = torch.zeros_like(weight_VD)
    logprobs, grads = [], []
    for start in range(0, problem.num_tokens, REFERENCE_ROWS):
        rows = slice(start, start + REFERENCE_ROWS)
        hidden_CD, target_C1 = problem.hidden_TD[rows].to(dtype), problem.target_T[rows, None]
        logprob_CV = torch.log_softmax(hidden_CD @ weight_VD.T, -1)
        logprobs.append(logprob_CV.gather(1, target_C1)[:, 0])
        coefficient_C1 = -(problem.weight_T * problem.advantage_T)[rows, None].to(dtype)  # d(loss) / d(logprob)
        grad_CV = logprob_CV.exp_().mul_(-coefficient_C1)
        grad_CV.scatter_add_(1, target_C1, coefficient_C1)
        grads.append(grad_CV @ weight_VD)
        grad_weight_VD += grad_CV.T @ hidden_CD
    logprob_T = torch.cat(logprobs)
    loss = problem.loss(logprob_T)
    return {"loss": loss, "logprob": logprob_T, "grad_hidden": torch.cat(grads), "grad_weight": grad_weight_VD}


def _gradients(problem: HeadProblem, logprob: peers.LogprobFunction, *, is_frozen: bool) -> Outputs:
    """Loss and gradients through a function that gives per-token log-probs; of a frozen weight there is none."""
    hidden_TD, weight_VD = _leaves(problem)
    logprob_T = logprob(hidden_TD, weight_VD.detach() if is_frozen else weight_VD, problem.target_T)
    loss = problem.loss(logprob_T)
    grads = torch.autograd.grad(loss, (hidden_TD,) if is_frozen else (hidden_TD, weight_VD))
    named = zip(("grad_hidden", "grad_weight"), grads, strict=False)
    return {"loss": loss, "logprob": logprob_T, **dict(named)}


def _leaves(problem: HeadProblem) -> tuple[Tensor, Tensor]:
    return problem.hidden_TD.detach().requires_grad_(), problem.weight_VD.detach().requires_grad_()


def our_logprob(keep: Keep) -> Callable[[], peers.LogprobFunction]:
    return lambda: (
        lambda hidden_TD, weight_VD, target_T: fused_linear_logprob(hidden_TD, weight_VD, target_T, keep=keep)[0]
    )


def our_policy_loss(problem: HeadProblem) -> Outputs:
    hidden_TD, weight_VD = _leaves(problem)
    # on the host, as a learner has them: choosing rows then needs no wait for the device
    vectors = (problem.advantage_T.cpu(), problem.weight_T.cpu())
    tokens = TokenVectors(*vectors, sequence_lens=problem.sequence_lens)
    loss, _ = fused_linear_policy_loss(hidden_TD, weight_VD, problem.target_T, PolicyLoss(variant="grpo"), tokens)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden_TD, weight_VD))
    return {"loss": loss, "grad_hidden": grad_hidden, "grad_weight": grad_weight}


def _finished_by_chunk(chunk_rows: Callable[[int], int]) -> Callable[[], Callable[[HeadProblem], Outputs]]:
    """Logits, loss and backward of one chunk after the other by autograd: 3 GEMMs, the logits in the inputs' dtype, the
    weight's gradient added up in the weight's. Written out here, because the classes that do so, XTuner's in
    v1/loss/chunk_loss.py and torchtitan's in components/loss.py, import their trainers."""

    def run(problem: HeadProblem) -> Outputs:
        hidden_TD, weight_VD = _leaves(problem)
        grad_hidden_TD = torch.empty_like(problem.hidden_TD)
        total = problem.weight_T.new_zeros(())
        size = chunk_rows(problem.num_tokens)
        for start in range(0, problem.num_tokens, size):
            rows = slice(start, start + size)
            hidden_CD = hidden_TD.detach()[rows].requires_grad_()
            logits_CV = (hidden_CD @ weight_VD.T).float()
            logprob_C = -torch.nn.functional.cross_entropy(logits_CV, problem.target_T[rows], reduction="none")
            loss = problem.loss(logprob_C, rows)
            loss.backward()
            assert hidden_CD.grad is not None
            grad_hidden_TD[rows] = hidden_CD.grad
            total += loss.detach()
        assert weight_VD.grad is not None
        return {"loss": total, "grad_hidden": grad_hidden_TD, "grad_weight": weight_VD.grad}

    return lambda: run


def _liger_grpo(autocast: bool) -> Callable[[], Callable[[HeadProblem], Outputs]]:
    def loader() -> Callable[[HeadProblem], Outputs]:
        loss_function = peers.liger_grpo_loss()

        def run(problem: HeadProblem) -> Outputs:
            hidden_TD, weight_VD = _leaves(problem)
            target_GR = problem.target_T.view(NUM_SEQUENCES, -1)
            advantage_G = problem.advantage_T.view(NUM_SEQUENCES, -1)[:, 0].contiguous()
            device_type = hidden_TD.device.type
            with torch.autocast(device_type, dtype=torch.bfloat16, enabled=autocast):
                hidden_GRD = hidden_TD.view(NUM_SEQUENCES, -1, hidden_TD.shape[1])
                loss = loss_function(hidden_GRD, weight_VD, target_GR, advantage_G)
            grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden_TD, weight_VD))
            return {"loss": loss, "grad_hidden": grad_hidden, "grad_weight": grad_weight}

        return run

    return loader


def _through_logprob(
    loader: Callable[[], peers.LogprobFunction], *, is_frozen: bool = False
) -> Callable[[], Callable[[HeadProblem], Outputs]]:
    def load() -> Callable[[HeadProblem], Outputs]:
        logprob = loader()
        return lambda problem: _gradients(problem, logprob, is_frozen=is_frozen)

    return load


Runner = Callable[[HeadProblem], Outputs]
TRAINED: dict[str, Callable[[], Runner]] = {
    "vcr1 policy loss": lambda: our_policy_loss,
    "vcr1 logprob, recompute": _through_logprob(our_logprob("none")),
    "vcr1 logprob, keep probs": _through_logprob(our_logprob("probs")),
    "torch eager": _through_logprob(lambda: peers.torch_logprob),
    "XTuner's way, 1024 rows": _finished_by_chunk(lambda num_tokens: 1024),
    "torchtitan's way, 8 chunks": _finished_by_chunk(lambda num_tokens: -(-num_tokens // 8)),
    "TRL chunked logprob": _through_logprob(peers.trl_chunked_logprob),
    "Liger GRPO": _liger_grpo(autocast=False),
    "Liger GRPO, autocast": _liger_grpo(autocast=True),
    "Liger scaled CE": _through_logprob(peers.liger_scaled_cross_entropy),
    "Liger scaled CE, torch": _through_logprob(peers.liger_scaled_cross_entropy_fallback),
    "verl Triton head": _through_logprob(peers.verl_linear_cross_entropy),
    "CCE, exact": _through_logprob(peers.cce(None)),
    "CCE, filtered": _through_logprob(peers.cce("high")),
}
FROZEN: dict[str, Callable[[], Runner]] = {
    name: _through_logprob(loader, is_frozen=True)
    for name, loader in {
        "vcr1 logprob": our_logprob("none"),
        "torch eager": lambda: peers.torch_logprob,
        "TRL chunked logprob": peers.trl_chunked_logprob,
        "Liger scaled CE, torch": peers.liger_scaled_cross_entropy_fallback,
    }.items()
}


def head_ways(problem: HeadProblem, runners: dict[str, Runner]) -> list[Way]:
    return [Way(name, lambda run=run: run(problem)) for name, run in runners.items()]
