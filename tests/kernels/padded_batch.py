"""Random padded (B, T) batches as the trainers hold them, and the packed [N] vectors of the same tokens.

Shape letters: B sequences, T padded length, N tokens under the mask, one sequence after the other.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from vcr1_kernels.losses import LossWeights, PolicyLoss, TokenVectors

LENGTHS = (9, 4, 0, 7, 1, 5, 9, 6)  # the third sequence is fully masked
MAX_LENGTH = 9
RELATIVE = 1e-12
ABSOLUTE = 1e-14  # terms of order 1 that cancel: 50 float64 steps


@dataclass(frozen=True)
class PaddedBatch:
    """float64. Ratios lie on both sides of the clip bounds, and at exactly 1; advantages have both signs, and 0."""

    mask_BT: Tensor  # bool; with a hole inside a sequence, as a tool's answer leaves
    logprob_BT: Tensor
    entropy_BT: Tensor
    old_BT: Tensor
    ref_BT: Tensor
    sampling_BT: Tensor
    advantage_B: Tensor

    @property
    def sequence_lens(self) -> tuple[int, ...]:
        return tuple(self.mask_BT.sum(-1).tolist())

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Fresh (logprob, entropy) to differentiate."""
        return self.logprob_BT.clone().requires_grad_(), self.entropy_BT.clone().requires_grad_()

    def tokens(self, weights: LossWeights, *, on_policy: bool = False):
        """The packed vectors."""
        lens_B = torch.tensor(self.sequence_lens)
        return TokenVectors(
            advantage_N=self.advantage_B.repeat_interleave(lens_B),
            weight_N=weights.policy_S.repeat_interleave(lens_B),
            old_logprob_N=None if on_policy else self.old_BT[self.mask_BT],
            ref_logprob_N=self.ref_BT[self.mask_BT],
            sampling_logprob_N=self.sampling_BT[self.mask_BT],
            sequence_lens=self.sequence_lens,
            kl_weight_N=weights.kl_S.repeat_interleave(lens_B),
            entropy_weight_N=weights.entropy_S.repeat_interleave(lens_B),
        )

    def extreme(self) -> "PaddedBatch":
        """Some log-ratios beyond every clamp: +-25 against the old policy, +-30 and 4 against the reference."""
        old_BT, ref_BT = self.old_BT.clone(), self.ref_BT.clone()
        old_BT[0, :2] = self.logprob_BT[0, :2] + torch.tensor([25.0, -25.0], dtype=torch.float64)
        old_BT[1, :2] = self.logprob_BT[1, :2] + torch.tensor([25.0, -25.0], dtype=torch.float64)
        old_BT[5, :] = self.logprob_BT[5, :] - 11.0  # mean log-ratio of a sequence above 10
        ref_BT[3, :3] = self.logprob_BT[3, :3] + torch.tensor([30.0, -30.0, 4.0], dtype=torch.float64)
        return replace(self, old_BT=old_BT, ref_BT=ref_BT)


def make_batch(seed: int) -> PaddedBatch:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(len(LENGTHS), MAX_LENGTH, generator=generator, dtype=torch.float64)

    mask_BT = torch.arange(MAX_LENGTH) < torch.tensor(LENGTHS).unsqueeze(1)
    mask_BT[3, 2] = False
    logprob_BT = -normal().abs() - 0.01
    old_BT = logprob_BT + 0.5 * normal()
    old_BT[:, ::4] = logprob_BT[:, ::4]
    advantage_B = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    advantage_B[0], advantage_B[1], advantage_B[5], advantage_B[6] = 1.3, -0.7, -1.1, 0.0
    old_BT[0, 1:4] -= 0.5  # the mean ratio of two sequences is clipped, one on each side
    old_BT[1, 1:4] += 0.5
    return PaddedBatch(
        mask_BT=mask_BT,
        logprob_BT=logprob_BT,
        entropy_BT=normal().abs(),
        old_BT=old_BT,
        ref_BT=logprob_BT + 0.7 * normal(),
        sampling_BT=old_BT + 0.4 * normal(),
        advantage_B=advantage_B,
    )


def assert_same_loss(batch: PaddedBatch, loss: PolicyLoss, tokens: TokenVectors, theirs: Tensor, leaves) -> dict:
    """Our loss on the packed vectors against `theirs`, made of `leaves`: value and both gradients. Returns our sums."""
    their_gradients = torch.autograd.grad(theirs, leaves, allow_unused=True)
    ours_N = [leaf.detach()[batch.mask_BT].requires_grad_() for leaf in leaves]
    value, sums = loss(ours_N[0], ours_N[1], tokens)
    our_gradients = torch.autograd.grad(value, ours_N, allow_unused=True)
    torch.testing.assert_close(value, theirs, rtol=RELATIVE, atol=ABSOLUTE)
    assert our_gradients[0].abs().max() > 1e-3  # something was compared
    for our_N, their_BT in zip(our_gradients, their_gradients, strict=True):
        our_BT = torch.zeros_like(batch.logprob_BT)
        if our_N is not None:
            our_BT[batch.mask_BT] = our_N
        their_BT = torch.zeros_like(our_BT) if their_BT is None else their_BT
        torch.testing.assert_close(our_BT, their_BT, rtol=RELATIVE, atol=ABSOLUTE)
    return sums


def clip_bounds(variant: str) -> tuple[float, float]:
    """(clip_low, clip_high) that clip some of `make_batch`: ratios of sequences are nearer to 1 than of tokens."""
    return (0.02, 0.03) if variant == "gspo" else (0.2, 0.28)


def assert_both_sides_clipped(variant: str, sums: dict) -> None:
    one_sided = variant == "cispo" and sums["clipped_low"] == 0  # TRL's has no lower bound
    assert variant == "sapo" or (sums["clipped_high"] > 0 and (one_sided or sums["clipped_low"] > 0))
