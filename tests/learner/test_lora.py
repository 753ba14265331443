"""LoRA: the adapters' gradients are those that the chain rule gives from the whole model's, on one rank and on two."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.learner.conftest import random_group
from tests.learner.test_step import LENGTHS, make_config, update_and_capture
from tests.ranks import on_ranks
from tests.recording_engine import RecordingEngine
from vcr1_fast.learner.gathering import whole_weights
from vcr1_fast.learner.lora import LoRALinear, adapter_factors, add_adapters, lora_layers, merged_parts, split_weights
from vcr1_fast.learner.packing import pack
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World, whole_tensor
from vcr1_fast.learner.step import Learner
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.run.checkpoint import RunState, load_checkpoint, save_checkpoint
from vcr1_fast.run.export import export_adapter, export_hugging_face, plan_export
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.settings.config import ConfigError, LoRAConfig
from vcr1_fast.types import RolloutGroup, SamplingParams

LORA = LoRAConfig(rank=3, alpha=6.0)
PER_LAYER = 7


@pytest.fixture
def model_path(make_model, tmp_path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def groups():
    return [random_group(seed, lengths) for seed, lengths in enumerate(LENGTHS)]


def with_lora(config, lora: LoRAConfig = LORA):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))


def disturb(module: nn.Module) -> None:
    """Adapters that say something: B is 0 at the start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in adapter_factors(module).values():
            factor.add_(0.1 * torch.randn(factor.shape, generator=generator).to(factor.device))


def test_layer_is_the_formula_and_at_first_the_layer_itself():
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(5, 4)
    layer = LoRALinear(base, 2, 0.5, generator)
    x = torch.randn(2, 3, 5, generator=generator)
    assert torch.equal(layer(x), base(x))
    assert layer.lora_A.abs().max() <= 5**-0.5 and layer.lora_A.std() > 0.1
    with torch.no_grad():
        layer.lora_B.normal_(generator=generator)
    whole = base.weight + 0.5 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), nn.functional.linear(x, whole, base.bias), rtol=1e-5, atol=1e-6)


def test_gradients_follow_from_those_of_the_whole_model(model_path, groups):
    """With W' = W + s B A: dA = s B^T dW', dB = s dW' A^T, and nothing else gets one."""
    config = make_config(model_path)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, max_grad_norm=1e9))
    learner = Learner(with_lora(config), World(), 10)
    disturb(learner.policy)
    factors = {name: value.detach().clone() for name, value in adapter_factors(learner.policy.hf).items()}

    sums = Learner(config, World(), 10)
    with torch.no_grad():
        for name, value in whole_weights(merged_parts(split_weights(learner.policy.hf)[0], factors, LORA.scale)):
            sums.policy.hf.get_parameter(name).copy_(value)
    [want], whole = update_and_capture(sums, groups)
    [got], parts = update_and_capture(learner, groups)

    assert got.sums["loss"] == pytest.approx(want.sums["loss"], rel=1e-5)
    assert parts.keys() == factors.keys() and len(factors) == 2 * 2 * PER_LAYER
    for name, gradient in parts.items():
        stem, factor = name.rsplit(".", 1)
        a_RK, b_NR, d_NK = factors[f"{stem}.lora_A"], factors[f"{stem}.lora_B"], whole[f"{stem}.weight"]
        derived = LORA.scale * (b_NR.T @ d_NK if factor == "lora_A" else d_NK @ a_RK.T)
        assert (gradient - derived).norm() <= 1e-5 * derived.norm() + 1e-9, name


def test_only_adapters_are_trained(model_path, groups):
    learner = Learner(with_lora(make_config(model_path)), World(), 10)
    before = copy.deepcopy(learner.policy.hf.state_dict())
    learner.update_grpo(groups)
    after = learner.policy.hf.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert changed == {name for name in after if name.endswith("lora_B")}  # A moves once B is not 0
    learner.update_grpo(groups)
    changed = {name for name, value in learner.policy.hf.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {name for name in after if name.endswith(("lora_A", "lora_B"))}


def test_kl_is_taken_to_the_starting_weights_without_a_second_model(model_path, groups):
    learner = Learner(with_lora(make_config(model_path, beta=0.1)), World(), 10)
    assert learner.reference is None
    disturb(learner.policy)
    start = Learner(make_config(model_path), World(), 10)
    row = learner.policy.device_batch(pack(groups[:1], [[1.0] * 3]))
    with torch.no_grad():
        want_N, other_N = start.policy(row, 1.0)[0], learner.policy(row, 1.0)[0]
    got_N = learner._reference_logprobs(row)
    assert got_N is not None and torch.equal(got_N, want_N) and not torch.allclose(got_N, other_N, atol=1e-2)
    assert all(layer.is_on for layer in lora_layers(learner.policy))


@pytest.mark.parametrize("targets", [("q_proj", "proj_q"), ("lm_head",)])
def test_a_target_that_no_layer_has_is_named(model_path, targets):
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_path)
    with pytest.raises(ConfigError, match=f"names {targets[-1]}, but a decoder layer has q_proj, k_proj"):
        add_adapters(hf, LoRAConfig(rank=2, targets=targets), 0)


def test_gradient_checkpointing_changes_nothing(model_path, groups):
    results = []
    for mode in ("none", "selective", "full"):
        config = with_lora(make_config(model_path))
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, gradient_checkpointing=mode))
        learner = Learner(config, World(), 10)
        disturb(learner.policy)
        results.append(update_and_capture(learner, groups)[1])
    for other in results[1:]:
        assert all(torch.allclose(value, other[name], rtol=1e-5, atol=1e-8) for name, value in results[0].items())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_frozen_weights_are_kept_in_the_dtype_that_is_computed_in(model_path, groups, device):
    """Measured from float32, that costs no more than autocast's casts of float32 masters do."""
    config = with_lora(make_config(model_path))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, device=device))
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="bfloat16"))
    world = World(device=torch.device(device))
    exact, kept, masters = (Learner(each, world, 10) for each in (config, half, half))
    assert {w.dtype for w in split_weights(kept.policy.hf)[0].values()} == {torch.bfloat16}
    assert {w.dtype for w in adapter_factors(kept.policy.hf).values()} == {torch.float32}
    for name, weight in split_weights(masters.policy.hf)[0].items():
        weight.data = split_weights(exact.policy.hf)[0][name].data.clone()
    gradients = []
    for learner in (exact, kept, masters):
        disturb(learner.policy)
        gradients.append(update_and_capture(learner, groups)[1])
    want, got, plain = (torch.cat([gradient.flatten() for gradient in each.values()]) for each in gradients)
    assert 0.005 < (plain - want).norm() < 0.2  # gradients are clipped to norm 1
    assert (got - want).norm() < 1.5 * (plain - want).norm()


def test_checkpoint_holds_the_adapters_alone_and_brings_them_back(model_path, groups, tmp_path):
    config = with_lora(make_config(model_path))
    learner = Learner(config, World(), 10)
    learner.update_grpo(groups)
    parts = (learner.policy, learner.optimizer, learner.schedule)
    saved = save_checkpoint(tmp_path / "run", *parts, RunState(1, 0, 0, 0, "", ""), SINGLE_PROCESS, 1)
    names = set(load_file(next(saved.glob("shard-*.safetensors"))))
    assert {name for name in names if name.startswith("model.")} == {
        f"model.hf.{name}" for name in adapter_factors(learner.policy.hf)
    }
    fresh = Learner(config, World(), 10)
    load_checkpoint(saved, fresh.policy, fresh.optimizer, fresh.schedule, SINGLE_PROCESS)
    results = [update_and_capture(each, groups)[1] for each in (learner, fresh)]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    whole = Learner(make_config(model_path), World(), 10)
    with pytest.raises(ConfigError, match=r"is of another model: .*set model\.path, model\.lora"):
        load_checkpoint(saved, whole.policy, whole.optimizer, whole.schedule, SINGLE_PROCESS)


def logits(model, group: RolloutGroup) -> torch.Tensor:
    prompt = group.prompt
    with torch.no_grad():
        return model(
            input_ids=prompt.token_ids_L[None],
            position_ids=prompt.position_ids_3L[:, None],
            pixel_values_videos=prompt.media[0].values_PC,
            video_grid_thw=torch.tensor([prompt.media[0].grid_thw]),
        ).logits


def test_exported_model_and_adapter_say_what_the_policy_says(model_path, groups, tmp_path):
    peft = pytest.importorskip("peft")
    learner = Learner(with_lora(make_config(model_path)), World(), 10)
    disturb(learner.policy)
    policy = learner.policy
    whole = export_hugging_face(policy, plan_export(model_path, tmp_path / "whole"))
    adapter = export_adapter(policy, tmp_path / "adapter", LORA, str(model_path))
    load = Qwen2_5_VLForConditionalGeneration.from_pretrained
    sums, stock = load(whole), load(model_path)
    assert sums.state_dict().keys() == stock.state_dict().keys()
    with_adapter = peft.PeftModel.from_pretrained(load(model_path), adapter)
    assert len([m for m in with_adapter.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]) == 2 * PER_LAYER
    want = logits(sums, groups[0])
    assert (want - logits(stock, groups[0])).abs().max() > 0.1
    torch.testing.assert_close(logits(with_adapter, groups[0]), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(FileExistsError, match=r"has no adapter_config\.json"):
        export_adapter(policy, whole, LORA, str(model_path))


def test_local_engine_draws_from_the_sums(make_tiny_model, tiny_tokenizer, make_prompt):
    """Log-probs of the engine, which has no adapters, are the learner's before and after an update."""
    from tests.rollout.sampled_policy import policy_of
    from tests.rollout.sglang.parity import difference

    hf = make_tiny_model(seed=4)
    add_adapters(hf, LORA, 0)
    policy = policy_of(hf)
    engine = LocalEngine(make_tiny_model(seed=5), tiny_tokenizer)
    sync, prompts = WeightSync(policy, engine), [make_prompt((2, 4, 4), "when"), make_prompt((3, 8, 4), "where")]
    first = sync.push()
    worst, spread = difference(policy, prompts, engine.generate(prompts, SamplingParams(2, 8)))
    assert worst < 1e-4 and spread > 0.5
    disturb(policy)
    assert difference(policy, prompts, engine.generate(prompts, SamplingParams(2, 8)))[0] > 1e-2
    second = sync.push()
    assert difference(policy, prompts, engine.generate(prompts, SamplingParams(2, 8)))[0] < 1e-4
    assert second.num_tensors == 3 * PER_LAYER < first.num_tensors  # what is frozen and has no adapter stays


def train_and_push(world: World, model: str, out: str, dtype: str) -> None:
    """An update of adapters with a KL term, and what a push carries after it."""
    config = with_lora(make_config(Path(model), 1, beta=0.04))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype))
    learner = Learner(config, world, 10)
    share = [random_group(seed, lengths) for seed, lengths in enumerate(LENGTHS)][world.rank :: world.world_size]
    learner.update_grpo(share)
    [report], gradients = update_and_capture(learner, share)  # A has a gradient once B is not 0
    sums = RecordingEngine()
    WeightSync(learner.policy, sums).push()
    factors = {name: whole_tensor(factor).clone() for name, factor in adapter_factors(learner.policy.hf).items()}
    if world.is_main:
        torch.save({"gradients": gradients, "merged": sums.loaded, "factors": factors, "norm": report.grad_norm}, out)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_two_ranks_train_and_push_what_one_does(model_path, tmp_path, dtype, bound):
    """In bfloat16 shards hold weights of two dtypes; sums of 200 products in another order move by a few spacings."""
    files = [tmp_path / f"{num_ranks}.pt" for num_ranks in (1, 2)]
    train_and_push(World(), str(model_path), str(files[0]), dtype)
    on_ranks(train_and_push, model_path, files[1], dtype)
    one, two = (torch.load(file, weights_only=True) for file in files)
    assert two["norm"] == pytest.approx(one["norm"], rel=bound)
    for name in ("gradients", "merged", "factors"):
        assert one[name].keys() == two[name].keys() and one[name]
        for key, want in one[name].items():
            assert want.dtype == two[name][key].dtype
            assert (two[name][key] - want).norm() <= bound * want.norm() + 1e-9, (name, key)
