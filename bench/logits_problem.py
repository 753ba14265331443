"""The loss on logits that somebody else made: forward alone, and forward with the gradient (in place where offered).

Shape letters: T tokens, V vocabulary, G sequences, R tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from vcr1_kernels import PolicyLoss, TokenVectors, policy_loss

from bench import peers
from bench.harness import Absent, Outputs, Way
from bench.head_problem import NUM_SEQUENCES

Runner = Callable[["LogitsProblem"], Outputs]


@dataclass(frozen=True)
class LogitsProblem:
    logits_TV: Tensor  # destroyed by the in-place ways
    saved_TV: Tensor  # what they are restored from
    target_T: Tensor
    advantage_T: Tensor
    weight_T: Tensor

    @property
    def num_tokens(self) -> int:
        return self.logits_TV.shape[0]

    def restore(self) -> None:
        self.logits_TV.copy_(self.saved_TV)

    def loss(self, logprob_T: Tensor) -> Tensor:
        return -(self.weight_T * self.advantage_T * torch.exp(logprob_T - logprob_T.detach())).sum()


def make_logits_problem(num_tokens: int, vocab: int, dtype: torch.dtype, device: torch.device) -> LogitsProblem:
    generator = torch.Generator(device).manual_seed(0)
    saved_TV = torch.empty(num_tokens, vocab, dtype=dtype, device=device).normal_(0.0, 2.0, generator=generator)
    advantage_G = torch.randn(NUM_SEQUENCES, generator=generator, device=device)
    return LogitsProblem(
        saved_TV.clone(),
        saved_TV,
        target_T=torch.randint(0, vocab, (num_tokens,), generator=generator, device=device),
        advantage_T=advantage_G.repeat_interleave(num_tokens // NUM_SEQUENCES),
        weight_T=torch.full((num_tokens,), 1.0 / num_tokens, device=device),
    )


def logits_reference(problem: LogitsProblem) -> Outputs:
    """By the definition in float64: the loss of all rows, gradient and log-prob of the first and last 64 rows.

    Whole, the gradient would take more memory than any way does. The last rows lie past 2^31 elements from T = 14,200.
    """
    all_rows = torch.arange(problem.num_tokens, device=problem.saved_TV.device)
    checked = torch.unique(torch.cat([all_rows[:64], all_rows[-64:]]))
    logprobs, grads = [], []
    for rows in all_rows.split(64):
        logprob_CV = torch.log_softmax(problem.saved_TV[rows].double(), -1)
        logprobs.append(logprob_CV.gather(1, problem.target_T[rows, None])[:, 0])
    for rows in checked.split(64):
        logprob_CV, target_C1 = torch.log_softmax(problem.saved_TV[rows].double(), -1), problem.target_T[rows, None]
        coefficient_C1 = -(problem.weight_T * problem.advantage_T)[rows, None].double()
        grads.append((-coefficient_C1 * logprob_CV.exp()).scatter_add_(1, target_C1, coefficient_C1))
    logprob_T = torch.cat(logprobs)
    return {
        "loss": problem.loss(logprob_T),
        "logprob": logprob_T[checked],
        "grad_logits": torch.cat(grads),
        "checked_rows": checked,
    }


LossOf = Callable[[LogitsProblem, Tensor], Outputs]  # of these logits: "loss", and "logprob" where it is made


def _our_loss(problem: LogitsProblem, logits_TV: Tensor) -> Outputs:
    lens = (problem.num_tokens // NUM_SEQUENCES,) * NUM_SEQUENCES
    tokens = TokenVectors(problem.advantage_T, problem.weight_T, sequence_lens=lens)
    return {"loss": policy_loss(logits_TV, problem.target_T, PolicyLoss(variant="grpo"), tokens, inplace=True)[0]}


def _eager_logprob(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    return torch.log_softmax(logits_TV.float(), -1).gather(1, target_T[:, None])[:, 0]


def _through_logprob(loader: Callable[[], Callable[[Tensor, Tensor], Tensor]]) -> Callable[[], LossOf]:
    def load() -> LossOf:
        logprob = loader()

        def loss_of(problem: LogitsProblem, logits_TV: Tensor) -> Outputs:
            logprob_T = logprob(logits_TV, problem.target_T)
            return {"loss": problem.loss(logprob_T), "logprob": logprob_T}

        return loss_of

    return load


def _runner(loader: Callable[[], LossOf], *, has_gradient: bool) -> Callable[[], Runner]:
    def load() -> Runner:
        loss_of = loader()

        def run(problem: LogitsProblem) -> Outputs:
            if not has_gradient:
                with torch.no_grad():
                    return loss_of(problem, problem.logits_TV)
            logits_TV = problem.logits_TV.detach().requires_grad_()
            outputs = loss_of(problem, logits_TV)
            return outputs | {"grad_logits": torch.autograd.grad(outputs["loss"], logits_TV)[0]}

        return run

    return load


def _liger() -> Runner:
    """Liger wants [G, R + 1, V] and leaves the last row of each sequence out: G of the T rows are not scored by it."""
    loss_function = peers.liger_logits_grpo_loss()

    def run(problem: LogitsProblem) -> Outputs:
        length = problem.num_tokens // NUM_SEQUENCES
        used = NUM_SEQUENCES * length
        logits_GLV = problem.logits_TV[:used].view(NUM_SEQUENCES, length, -1).detach().requires_grad_()
        target_GR = problem.target_T[:used].view(NUM_SEQUENCES, length)[:, :-1].contiguous()
        advantage_G = problem.advantage_T[:used].view(NUM_SEQUENCES, length)[:, 0].contiguous()
        loss = loss_function(logits_GLV, target_GR, advantage_G)
        torch.autograd.grad(loss, logits_GLV)
        return {}  # other rows than the other ways score, so its values are not compared

    return run


_OTHERS = {
    "torch eager": _through_logprob(lambda: _eager_logprob),
    "TRL selective logprob": _through_logprob(peers.trl_selective_logprob),
}
FORWARD: dict[str, Callable[[], Runner]] = {
    name: _runner(loader, has_gradient=False)
    for name, loader in {"vcr1 policy_loss": lambda: _our_loss, **_OTHERS}.items()
}
TRAIN: dict[str, Callable[[], Runner]] = {
    name: _runner(loader, has_gradient=True)
    for name, loader in {"vcr1 policy_loss, in place": lambda: _our_loss, **_OTHERS}.items()
} | {"Liger triton_grpo_loss, in place": _liger}


def logits_ways(problem: LogitsProblem, table: dict[str, Callable[[], Runner]]) -> tuple[list[Way], list[Absent]]:
    runners, absent = peers.load_all(table)
    return [Way(name, lambda run=run: run(problem), setup=problem.restore) for name, run in runners.items()], absent
