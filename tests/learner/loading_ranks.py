"""Run by test_loading on each of two ranks: what the learner loads, against a whole model that is then sharded.

Arguments: the folder of a model with a head of its own, and of one with a tied head.
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.learner.conftest import random_group
from tests.learner.live_bytes import LiveBytes, held_bytes
from tests.learner.test_step import make_config
from vcr1_fast.learner import step
from vcr1_fast.learner.lora import add_adapters
from vcr1_fast.learner.model import PolicyModel
from vcr1_fast.learner.packing import pack
from vcr1_fast.learner.sharding import World, exit_rank, init_distributed, named_weights, shard, shutdown, whole_tensor
from vcr1_fast.learner.step import Learner
from vcr1_fast.run.checkpoint import RunState, load_checkpoint, save_checkpoint
from vcr1_fast.run.model_folder import model_folder
from vcr1_fast.settings.config import Config, LoRAConfig


def whole_policy(config: Config, dtype: torch.dtype) -> PolicyModel:
    """The policy as `from_pretrained` builds it, on one process."""
    folder = model_folder(config.model.path)
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    if config.model.lora.rank:
        add_adapters(hf, config.model.lora, config.train.seed, dtype)
    return PolicyModel(hf, config.model, dtype).train()


def check(config: Config, world: World, dtype: torch.dtype) -> None:
    """Every weight and buffer bit for bit, in the dtype it is to have, and what the sharded policies then say."""
    learner, plain = Learner(config, world, 10), whole_policy(config, dtype)
    wanted = named_weights(plain)
    for policy, is_reference in ((learner.policy, False), (learner.reference, True)):
        if policy is None:
            assert config.algorithm.beta == 0 or config.model.lora.rank
            continue
        got = named_weights(policy)
        assert list(got) == list(wanted)
        for name, value in got.items():
            is_trained = wanted[name].requires_grad and not is_reference
            assert isinstance(value, DTensor) and value.requires_grad == is_trained
            assert value.dtype == (torch.float32 if is_trained else dtype), name
            assert torch.equal(whole_tensor(value), wanted[name].detach().to(value.dtype)), name
        buffers = dict(policy.named_buffers())
        assert buffers.keys() == dict(plain.named_buffers()).keys()
        assert all(torch.equal(buffers[name], value) for name, value in plain.named_buffers())
        embedding = policy.hf.model.language_model.embed_tokens.weight
        assert (policy.hf.lm_head.weight is embedding) == policy.hf.config.tie_word_embeddings
        assert isinstance(embedding, DTensor) and embedding.to_local().shape[0] == (34, 33)[world.rank]
    shard(plain, world, dtype)
    row = plain.device_batch(pack([random_group(7, (5, 3, 8))], [[1.0] * 3]))
    with torch.no_grad():
        want_N = plain(row, 1.0)[0]
        assert torch.equal(learner.policy(row, 1.0)[0], want_N)
        if learner.reference is not None:
            assert torch.equal(learner.reference(row, 1.0)[0], want_N)
    [report] = learner.update_grpo([random_group(world.rank, (5, 3, 8))])
    assert report.grad_norm > 0 and not report.skipped


def check_peak(config: Config, world: World) -> None:
    """At most 1.25 times the shards and a block; a whole model that is sharded afterwards does not stay below that."""
    with LiveBytes() as meter:
        learner = Learner(config, world, 10)
    block = sum(p.numel() * p.element_size() for p in learner.policy.hf.model.language_model.layers[0].parameters())
    bound = 1.25 * held_bytes(learner.policy) + block
    assert held_bytes(learner.policy) <= meter.peak <= bound, (meter.peak, bound)
    mapped = whole_policy(config, torch.float32)
    with LiveBytes() as meter:
        shard(copy.deepcopy(mapped), world, torch.float32)
    assert meter.peak > bound, (meter.peak, bound)


def check_resume(config: Config, world: World, folder: Path) -> None:
    """A checkpoint comes back into a learner whose shards have not been run yet."""
    first, second = (Learner(config, world, 10) for _ in range(2))
    group = random_group(world.rank, (5, 3, 8))
    first.update_grpo([group])
    state = RunState(1, 0, 0, 0, "", "")
    saved = save_checkpoint(folder, first.policy, first.optimizer, first.schedule, state, world, 1)
    load_checkpoint(saved, second.policy, second.optimizer, second.schedule, world)
    one, two = (learner.update_grpo([group])[0] for learner in (first, second))
    assert (one.sums, one.grad_norm, one.learning_rate) == (two.sums, two.grad_norm, two.learning_rate)
    ours, theirs = (named_weights(learner.policy) for learner in (first, second))
    assert all(torch.equal(whole_tensor(value), whole_tensor(theirs[name])) for name, value in ours.items())


def check_one_rank_fails(config: Config, world: World) -> None:
    load_weights = step.load_weights

    def fail(*_: object) -> None:
        raise PermissionError("no")

    step.load_weights = fail if world.rank else load_weights
    try:
        Learner(config, world, 10)
    except OSError as error:
        said = "no" if world.rank else "rank 1 failed while loading the model's weights; its own message says why"
        assert str(error) == said
    else:
        raise AssertionError("the failure of rank 1 was not seen")
    step.load_weights = load_weights


def main() -> None:
    world = init_distributed("cpu")
    config, tied = (make_config(Path(folder)) for folder in sys.argv[1:])
    half = replace(config.model, compute_dtype="bfloat16")
    with_kl = replace(config.algorithm, beta=0.04)
    check(config, world, torch.float32)
    check(replace(tied, algorithm=with_kl), world, torch.float32)
    check(replace(config, model=replace(half, freeze_vision=True), algorithm=with_kl), world, torch.bfloat16)
    # rank 3: shards of 2 rows and 1; an order of targets that is not the layer's
    lora = LoRAConfig(rank=3, alpha=6.0, targets=("up_proj", "v_proj", "q_proj"))
    check(replace(config, model=replace(half, lora=lora), algorithm=with_kl), world, torch.bfloat16)
    check_resume(tied, world, Path(sys.argv[1]).parent / "run")
    check_peak(replace(config, model=replace(config.model, path="tiny")), world)
    check_one_rank_fails(config, world)
    shutdown(world)
    exit_rank(0)


if __name__ == "__main__":
    main()
