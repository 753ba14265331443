"""The packed row is exact: loss and every gradient equal those of G separate rows through the stock model."""

import copy
import dataclasses
import itertools

import pytest
import torch

from tests.conftest import stock_inputs
from tests.learner.conftest import random_qwen3
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.learner.objective import grpo_objective
from vcr1_fast.learner.packing import pack
from vcr1_fast.settings.config import AlgorithmConfig, ModelConfig

TEMPERATURE = 0.9


def separate_rows_loss(hf, groups, weights, algorithm, temperature=TEMPERATURE):
    """The same loss by the stock forward, one padded-free row per completion, formulas written out."""
    total = torch.zeros((), dtype=next(hf.parameters()).dtype)
    for group, group_weights in zip(groups, weights, strict=True):
        prompt = group.prompt
        for completion, advantage, weight in zip(group.completions, group.advantages, group_weights, strict=True):
            ids = torch.cat([prompt.token_ids_L, completion.token_ids_R])
            extra = prompt.next_position + torch.arange(completion.num_tokens)
            positions = torch.cat([prompt.position_ids_3L, extra.expand(3, -1)], dim=1)
            logits = hf(
                input_ids=ids[None],
                **stock_inputs(prompt, total.dtype),
                position_ids=positions[:, None],
                use_cache=False,
            ).logits[0]
            predicting = logits[prompt.token_ids_L.numel() - 1 : -1] / temperature
            logprob = torch.log_softmax(predicting, -1).gather(1, completion.token_ids_R[:, None])[:, 0]
            engine_logprob = completion.logprobs_R.to(total.dtype)
            old = logprob.detach() if algorithm.minibatches_per_rollout == 1 else engine_logprob
            ratio = torch.exp(logprob - old)
            clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
            surrogate = torch.where(clipped * advantage < ratio * advantage, clipped * advantage, ratio * advantage)
            total = total - weight * surrogate.sum()
    return total


def packed_loss(hf, groups, weights, algorithm, config=ModelConfig(), dtype=None):  # noqa: B008 - frozen
    policy = PolicyModel(hf, config, dtype or next(hf.parameters()).dtype).train()
    row = pack(groups, weights)
    if algorithm.minibatches_per_rollout > 1:
        row = dataclasses.replace(row, old_logprob_N=row.engine_logprob_N)
    batch = policy.device_batch(row)
    return policy(batch, TEMPERATURE, grpo_objective(batch, None, algorithm))[0]


def gradients(hf, loss):
    hf.zero_grad()
    loss.backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in hf.named_parameters()}


def weights_of(groups):
    return [[0.1 * (i + 1) for i in range(len(g.completions))] for g in groups]


def require_exact(stock, groups, weights, algorithm=AlgorithmConfig()):  # noqa: B008 - frozen
    """Loss and gradients of the packed row against those of the stock model, which are returned.

    In float64, but for the norms, which transformers computes in float32."""
    ours = copy.deepcopy(stock.double())
    want_loss = separate_rows_loss(stock, groups, weights, algorithm)
    got_loss = packed_loss(ours, groups, weights, algorithm)
    assert abs(got_loss.item() - want_loss.item()) <= 1e-6 * max(abs(want_loss.item()), 1.0)
    want, got = gradients(stock, want_loss), gradients(ours, got_loss)
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-6 * want[name].norm() + 1e-9, name
    return want


TWO_VIDEOS = [dict(seed=14, lengths=(9, 6, 4), shown=[("video", (4, 4, 8), 1.0), ("video", (5, 4, 4), 0.5)])]
BESIDE = [dict(seed=10, lengths=(5, 8, 2), shown=[("image", (1, 4, 6), 0.0), ("video", (2, 4, 4), 1.0)])]
TEXT = [dict(seed=11, lengths=(3, 5), shown=[]), dict(seed=12, lengths=(2,), shown=[], advantages=(-0.7,))]
IMAGES = [dict(seed=13, lengths=(4, 3), shown=[("image", (1, 8, 4), 0.0), ("image", (1, 4, 4), 0.0)])]
SHOWN = {
    "two_videos": TWO_VIDEOS, "image_beside_video": BESIDE, "text": TEXT, "mixed": TEXT[:1] + BESIDE + IMAGES,
}  # fmt: skip
# G = 1; unequal lengths; one token (its only prediction comes from the prompt's row); an empty completion;
# a row whose weights are all 0; two prompts of different sizes in one row.
CASES = {
    "one_completion": [dict(seed=0, lengths=(6,), advantages=(1.3,))],
    "unequal": [dict(seed=1, lengths=(4, 9, 1, 6))],
    "empty_completion": [dict(seed=2, lengths=(5, 0, 3))],
    "slow_video": [dict(seed=3, lengths=(5, 7), second_per_grid_s=2.5)],
    "fast_video": [dict(seed=4, lengths=(5, 7), second_per_grid_s=0.35, grid=(5, 4, 4))],
    "times_in_words": [dict(seed=7, lengths=(5, 7), in_words=True), dict(seed=8, lengths=(2, 4))],
    "two_prompts": [
        dict(seed=5, lengths=(3, 8, 2)),
        dict(seed=6, lengths=(7, 1), grid=(2, 8, 4), second_per_grid_s=0.5, text=11),
    ],
    **SHOWN,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("minibatches", [1, 2], ids=["on_policy", "engine_logprobs"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_and_every_gradient_equal_separate_rows(make_model, make_group, case, minibatches, tied):
    groups = [make_group(**options) for options in case]
    algorithm = AlgorithmConfig(minibatches_per_rollout=minibatches)
    want = require_exact(make_model(tied=tied), groups, weights_of(groups), algorithm)
    is_seen = any(group.prompt.media for group in groups)
    assert any("visual" in name and want[name].norm() > 0 for name in want) == is_seen


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_in_float32_it_is_no_further_from_the_truth_than_the_stock_model(make_model, make_group, case):
    """The largest relative error of a gradient: 1.2e-5 to 2.7e-5 in separate rows, 0.5 to 0.8 times as much packed."""
    groups = [make_group(**options) for options in case]
    weights = weights_of(groups)
    hf, algorithm = make_model(), AlgorithmConfig()
    exact = copy.deepcopy(hf).double()
    truth = gradients(exact, separate_rows_loss(exact, groups, weights, algorithm))

    def error(loss) -> float:
        model = copy.deepcopy(hf)
        found = gradients(model, loss(model, groups, weights, algorithm))
        return max(float((found[n] - value).norm() / value.norm()) for n, value in truth.items() if value.norm() > 1e-9)

    assert error(packed_loss) <= 1.2 * error(separate_rows_loss)


QWEN3_CASES = {
    "times_in_words": [dict(seed=1, lengths=(4, 9, 1, 6), in_words=True)],
    "two_prompts": [
        dict(seed=5, lengths=(3, 8, 0, 2), in_words=True),
        dict(seed=6, lengths=(7, 1), grid=(2, 8, 4), in_words=True, text=11),
    ],
    **{name: [dict(group, in_words=True) for group in case] for name, case in SHOWN.items()},
}


@pytest.mark.parametrize("case", QWEN3_CASES.values(), ids=QWEN3_CASES.keys())
def test_qwen3_vl_is_as_exact_and_its_deepstack_features_count(make_group, case):
    groups = [make_group(**options, num_values=1536) for options in case]
    want = require_exact(random_qwen3(), groups, weights_of(groups))
    for index in range(3):
        name = f"model.visual.deepstack_merger_list.{index}.linear_fc2.weight"
        is_seen = any(group.prompt.media for group in groups)
        assert (want[name].norm() > 1e-3 * max(value.norm() for value in want.values())) == is_seen


@pytest.mark.parametrize("weights", [(0.2, 0.0, 0.5), (0.0, 0.0, 0.0)])
def test_masked_answers_leave_their_siblings_alone(make_model, make_group, weights):
    want = require_exact(make_model(), [make_group(seed=8, lengths=(4, 6, 3))], [weights])
    assert any(gradient.abs().max() > 0 for gradient in want.values()) == any(weights)


def test_a_wrong_position_is_caught(make_model, make_group):
    """The comparison above can fail: one position off by one moves the gradient far more than its bound."""
    group = make_group(seed=9, lengths=(4, 6))
    shifted = group.prompt.position_ids_3L.clone()
    shifted[0, 7] += 1
    wrong = dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, position_ids_3L=shifted))
    want, got = (
        gradients(hf, loss(hf, [shown], [[0.1, 0.1]], AlgorithmConfig()))
        for hf, loss, shown in ((make_model(), separate_rows_loss, group), (make_model(), packed_loss, wrong))
    )
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert (got[name] - want[name]).norm() > 1e-3 * want[name].norm()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradient_checkpointing_changes_nothing(make_model, make_group, mode):
    group = make_group(seed=10, lengths=(4, 6))
    plain, recomputed = make_model(), make_model()
    want = gradients(plain, packed_loss(plain, [group], [[0.1, 0.2]], AlgorithmConfig()))
    config = ModelConfig(gradient_checkpointing=mode)
    got = gradients(recomputed, packed_loss(recomputed, [group], [[0.1, 0.2]], AlgorithmConfig(), config))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-9)


def test_bfloat16_error_is_that_of_the_stock_path(make_model, make_group):
    """Under autocast both paths round; ours must not be worse than twice the stock path."""
    group = make_group(seed=11, lengths=(8, 5, 7))
    truth_model = make_model().double()
    truth = gradients(truth_model, separate_rows_loss(truth_model, [group], [[0.1] * 3], AlgorithmConfig()))
    stock, ours = make_model(), make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock_loss = separate_rows_loss(stock, [group], [[0.1] * 3], AlgorithmConfig())
    want = gradients(stock, stock_loss)
    got = gradients(ours, packed_loss(ours, [group], [[0.1] * 3], AlgorithmConfig(), dtype=torch.bfloat16))

    def error(of):
        return sum(((of[n].double() - truth[n]) ** 2).sum() for n in truth) ** 0.5

    assert error(got) <= 2 * error(want)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"])
def test_fused_head_and_plain_head_give_the_same_update(make_model, make_group, loss):
    """Every variant, off-policy, with a KL and an entropy term; one group whose advantages are 0 among others."""
    groups = [make_group(seed=20, lengths=(4, 9, 1)), make_group(seed=21, lengths=(3, 2), advantages=(0.0, 0.0))]
    weights = [[0.1, 0.2, 0.3], [0.2, 0.1]]
    row = pack(groups, weights)
    row = dataclasses.replace(row, old_logprob_N=row.engine_logprob_N)
    ref_logprob_N = row.engine_logprob_N - 0.1
    results = []
    for kernels, beta, entropy_coef in itertools.product(("auto", "off"), (0.0, 0.2), (0.0, 0.01)):
        hf = make_model()
        policy = PolicyModel(hf, ModelConfig(kernels=kernels), torch.float32)
        algorithm = AlgorithmConfig(loss=loss, minibatches_per_rollout=2, beta=beta, entropy_coef=entropy_coef)
        batch = policy.device_batch(row)
        objective = grpo_objective(batch, ref_logprob_N if beta else None, algorithm)
        value, sums = policy(batch, TEMPERATURE, objective)
        results.append((value.detach(), {k: float(v) for k, v in sums.items()}, gradients(hf, value)))
    for fused, plain in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=1e-6)
        assert fused[1] == pytest.approx(plain[1], rel=1e-4, abs=1e-4)
        for name, grad in plain[2].items():
            difference = (fused[2][name] - grad).norm()
            assert float(difference) <= 1e-5 * float(grad.norm()) + 1e-9, name
