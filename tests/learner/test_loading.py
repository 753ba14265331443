"""A model that is built empty and then filled is the one that `from_pretrained` gives, on one rank and on two."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.learner.conftest import random_group
from tests.learner.test_step import make_config
from tests.live_bytes import LiveBytes
from tests.ranks import on_ranks
from vcr1_fast.learner import loading, step
from vcr1_fast.learner.families.qwen2_5_vl import Qwen25VL
from vcr1_fast.learner.loading import check_weights, empty_model, load_weights
from vcr1_fast.learner.lora import add_adapters
from vcr1_fast.learner.model import PolicyModel, load_hugging_face, load_tokenizer
from vcr1_fast.learner.packing import pack
from vcr1_fast.learner.sharding import World, named_weights, shard, whole_tensor
from vcr1_fast.learner.step import Learner
from vcr1_fast.run.checkpoint import RunState, load_checkpoint, save_checkpoint
from vcr1_fast.run.model_folder import SINGLE_FILE, model_folder, weight_files
from vcr1_fast.settings.config import Config, ConfigError, LoRAConfig

CPU = torch.device("cpu")
FAMILY = Qwen25VL()


def save(model: Qwen2_5_VLForConditionalGeneration, folder: Path, form: str) -> Path:
    """published: one file, old names. split: several, with an index, and a stale one. modules: transformers' names."""
    model.save_pretrained(folder, max_shard_size="20KB" if form == "split" else "1GB")
    if form == "split":
        assert len(weight_files(folder)) > 3
        stale = {name: value + 1 for name, value in read(folder).items()}
        save_file(stale, folder / "model-00099-of-00099.safetensors")
    else:
        assert "model.norm.weight" in load_file(folder / SINGLE_FILE)
    if form == "modules":
        names = {name: value for name, value in model.state_dict().items() if name in dict(model.named_parameters())}
        save_file(names, folder / SINGLE_FILE, {"format": "pt"})
    return folder


def held_bytes(module: torch.nn.Module) -> int:
    """Of this rank's parts of all weights."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in module.parameters())


def read(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in weight_files(folder) for name, value in load_file(path).items()}


def require_same(ours: Qwen2_5_VLForConditionalGeneration, theirs: Qwen2_5_VLForConditionalGeneration) -> None:
    for named in ("state_dict", "named_parameters", "named_buffers", "named_non_persistent_buffers"):
        mine, other = (dict(getattr(model, named)()) for model in (ours, theirs))
        assert list(mine) == list(other)
        for name, value in mine.items():
            assert value.dtype == other[name].dtype and value.device.type == "cpu", name
            assert value.requires_grad == other[name].requires_grad and torch.equal(value, other[name]), name
    tied = [model.lm_head.weight is model.model.language_model.embed_tokens.weight for model in (ours, theirs)]
    assert tied[0] == tied[1] == ours.config.tie_word_embeddings
    assert ours.config.to_dict() | {"_name_or_path": ""} == theirs.config.to_dict() | {"_name_or_path": ""}
    assert not any(module.training for module in ours.modules())


@pytest.mark.parametrize("form", ["published", "split", "modules"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_loaded_is_what_from_pretrained_loads(make_model, tmp_path, tied, form):
    folder = save(make_model(tied=tied), tmp_path / "model", form)
    for dtype in (torch.float32, torch.bfloat16):
        ours = load_hugging_face(str(folder), dtype, CPU)
        require_same(ours, Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype))


def test_a_tied_head_may_be_stored_under_either_name_or_both(make_model, tmp_path):
    folder = save(make_model(tied=True), tmp_path / "model", "published")
    # from a copy: older safetensors map a file into memory, where what is written to it below would show
    copy = shutil.copytree(folder, tmp_path / "copy")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(copy, dtype=torch.float32)
    stored = read(copy)
    head = {"lm_head.weight": stored.pop("model.embed_tokens.weight")}
    both = head | {"model.embed_tokens.weight": head["lm_head.weight"].clone()}
    for names in (head, both):
        save_file(stored | names, folder / SINGLE_FILE)
        require_same(load_hugging_face(str(folder), torch.float32, CPU), model)
    both["lm_head.weight"] = both["lm_head.weight"] + 1
    save_file(stored | both, folder / SINGLE_FILE)
    with pytest.raises(ConfigError, match=r"embed_tokens.weight and lm_head.weight in .* differ, but tie_word_embed"):
        load_hugging_face(str(folder), torch.float32, CPU)


GATES = {f"visual.blocks.{i}.mlp.{name}_proj.weight": None for i in (0, 1) for name in ("up", "down", "gate")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"json: 1 missing \(model.language_model.norm.weight\): give a complete"),
        ({"lm_head.weight": None}, r"json: 1 missing \(lm_head.weight\)"),
        (GATES, r"json: 6 missing \(model.visual.blocks.0.mlp.gate_proj.weight, (model\S*weight, ){3}\.\.\.\)"),
        ({"model.layers.2.x": torch.zeros(1)}, r"json: 1 unexpected \(model.language_model.layers.2.x\)"),
        ({"model.norm.weight": torch.zeros(31)}, r"norm.weight is F32 \[31\], wanted floating \[32\]"),
        ({"model.norm.weight": torch.zeros(32).char()}, r"norm.weight is I8 \[32\], wanted floating \[32\]"),
        ({"model.visual.merger.ln_q.weight": torch.ones(16)}, r"1 given twice \(model.visual.merger.ln_q.weight\)"),
    ],
)
def test_other_weights_are_refused_before_anything_is_allocated(make_model, tmp_path, changes, message):
    folder = save(make_model(), tmp_path, "published")
    stored = read(folder) | changes
    save_file({name: value for name, value in stored.items() if value is not None}, folder / SINGLE_FILE)
    hf = empty_model(folder, torch.float32)
    with pytest.raises(ConfigError, match=message):
        load_weights(hf, folder, CPU, FAMILY)
    assert all(weight.is_meta for weight in hf.parameters())


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "the tokenizer in .* cannot be read"), (None, "no whole tokenizer")]
)
def test_a_tokenizer_that_cannot_be_used_is_said_so(make_model, tmp_path, content, message):
    folder = save(make_model(), tmp_path, "published")
    (folder / "tokenizer_config.json").write_text("{}")
    if content:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load_tokenizer(str(folder))
    assert "\n" not in str(raised.value)


def test_weights_are_checked_without_loading_them(make_model, tmp_path):
    """For an engine that passes over names that it does not know, and keeps random numbers for others."""
    check_weights(save(make_model(), tmp_path, "published"))


@pytest.mark.parametrize("style", ["published", "modules"])
@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_fsdp_wrapped_module._orig_mod.model."])
def test_names_of_a_wrapper_are_named(make_model, tmp_path, style, prefix):
    folder = save(make_model(), tmp_path, style)
    save_file({f"{prefix}{name}": value for name, value in read(folder).items()}, folder / SINGLE_FILE)
    message = rf"\d+ missing \(.*; \d+ unexpected \({prefix}.*: its names begin with '{prefix}', .* take that off"
    with pytest.raises(ConfigError, match=message):
        check_weights(folder)


def test_adapters_beside_their_base_are_named(make_model, tmp_path):
    folder = save(make_model(), tmp_path, "published")
    stored = read(folder)
    stored["model.layers.0.self_attn.q_proj.base_layer.weight"] = stored.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(stored, folder / SINGLE_FILE)
    with pytest.raises(ConfigError, match=r"1 missing \(.*PEFT's adapters .*: merge them"):
        check_weights(folder)


def test_another_architecture_is_refused(make_model, tmp_path):
    folder = save(make_model(), tmp_path, "published")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for content, message in (
        (
            json.dumps(config | {"model_type": "qwen2_vl"}),
            "model_type in .* is 'qwen2_vl', wanted qwen2_5_vl or .*: set",
        ),
        ((model_folder("tiny3") / "config.json").read_text(), "weights in .* are not those of its config.json"),
        (
            json.dumps(config | {"quantization_config": {"quant_method": "awq"}}),
            r"quantized \(awq, .* in bfloat16",
        ),
        (json.dumps(config | {"text_config": {"hidden_size": "big"}}), "config.json does not describe a model"),
        ("{}", "model_type in .* is None, wanted qwen2_5_vl"),
        ("[]", r"config.json is damaged \(a JSON list, wanted an object\): download"),
        ("{", r"config.json is damaged \("),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_hugging_face(str(folder), torch.float32, CPU)


def test_a_buffer_that_transformers_does_not_compute_is_an_error(monkeypatch):
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "_init_weights", lambda self, module: None)
    with pytest.raises(RuntimeError, match=r"_init_weights does not compute model.visual.rotary_pos_emb.inv_freq"):
        empty_model(model_folder("tiny"), torch.float32)


def test_an_empty_model_has_shapes_and_buffers_only():
    with LiveBytes() as meter:
        hf = empty_model(model_folder("tiny"), torch.float32)
    buffers = dict(hf.named_buffers())
    assert all(weight.is_meta for weight in hf.parameters()) and not any(b.is_meta for b in buffers.values())
    head_size = 32
    base = hf.config.text_config.rope_parameters["rope_theta"]
    wanted = [base ** (-2 * i / head_size) for i in range(head_size // 2)]
    assert buffers["model.language_model.rotary_emb.inv_freq"].tolist() == pytest.approx(wanted, rel=1e-6)
    assert meter.peak_bytes < held_bytes(hf) / 100


def test_pieces_do_not_change_what_is_read(monkeypatch, tmp_path):
    whole = {"visual.x": torch.randn(7, 5), "visual.y": torch.randn(9), "visual.one": torch.randn(1, 40)}
    save_file({name: value.bfloat16() for name, value in whole.items()}, tmp_path / SINGLE_FILE)
    monkeypatch.setattr(loading, "PIECE_BYTES", 2 * 5 * 4)  # two rows of x, ten of y, less than the row of one
    asked: list[int] = []
    real = loading._pieces

    def pieces(tensor: Tensor, first_row: int):
        for here, there in real(tensor, first_row):
            asked.append(there.stop - there.start)
            yield here, there

    monkeypatch.setattr(loading, "_pieces", pieces)
    module = torch.nn.Module()
    for name, value in whole.items():
        module.register_parameter(name.removeprefix("visual."), torch.nn.Parameter(value.to("meta")))
    load_weights(module, tmp_path, CPU, FAMILY, "model.visual.")
    assert asked == [1, 2, 2, 2, 1, 9]  # one, x, y
    assert all(torch.equal(w, whole[f"visual.{name}"].bfloat16().float()) for name, w in module.named_parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts mapped pages there")
def test_only_the_rows_that_are_asked_for_are_read(tmp_path):
    """So the ranks of one machine together read each byte of a file once."""

    def mapped_kib() -> int:
        found = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1])

    save_file({"a": torch.ones(4096, 4096, dtype=torch.bfloat16)}, tmp_path / SINGLE_FILE)  # 32 MiB
    part = torch.empty(256, 4096)  # a sixteenth
    with safe_open(tmp_path / SINGLE_FILE, "pt") as file:
        before = mapped_kib()
        loading._copy_rows(file.get_slice("a"), part)
        assert 2048 <= mapped_kib() - before < 8192  # of 2 MiB; the kernel maps some pages around a fault
    assert (part == 1).all()


def test_one_process_holds_the_weights_and_nothing_else_while_it_loads():
    with LiveBytes() as meter:
        hf = load_hugging_face("tiny", torch.float32, CPU)
    assert held_bytes(hf) <= meter.peak_bytes < 1.01 * held_bytes(hf)


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
    assert held_bytes(learner.policy) <= meter.peak_bytes <= bound, (meter.peak_bytes, bound)
    mapped = whole_policy(config, torch.float32)
    with LiveBytes() as meter:
        shard(copy.deepcopy(mapped), world, torch.float32)
    assert meter.peak_bytes > bound, (meter.peak_bytes, bound)


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
    def fail(*_: object) -> None:
        raise PermissionError("no")

    said = "no" if world.rank else "rank 1 failed while loading the model's weights; its own message says why"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=f"^{said}$"):
        if world.rank:
            patch.setattr(step, "load_weights", fail)
        Learner(config, world, 10)


def check_two_ranks(world: World, *folders: str) -> None:
    """What the learner loads, against a whole model that is then sharded; `folders`: see the test."""
    config, tied = (make_config(Path(folder)) for folder in folders)
    half = replace(config.model, compute_dtype="bfloat16")
    with_kl = replace(config.algorithm, beta=0.04)
    check(config, world, torch.float32)
    check(replace(tied, algorithm=with_kl), world, torch.float32)
    check(replace(config, model=replace(half, freeze_vision=True), algorithm=with_kl), world, torch.bfloat16)
    # rank 3: shards of 2 rows and 1; an order of targets that is not the layer's
    lora = LoRAConfig(rank=3, alpha=6.0, targets=("up_proj", "v_proj", "q_proj"))
    check(replace(config, model=replace(half, lora=lora), algorithm=with_kl), world, torch.bfloat16)
    check_resume(tied, world, Path(folders[0]).parent / "run")
    check_peak(replace(config, model=replace(config.model, path="tiny")), world)
    check_one_rank_fails(config, world)


def test_two_ranks_hold_what_sharding_a_whole_model_gives(make_model, tmp_path):
    folders = []
    for tied in (False, True):
        model = make_model(tied=tied)
        model.resize_token_embeddings(67)  # odd: FSDP pads the shorter shard when the policy runs first
        folders.append(str(save(model, tmp_path / str(tied), "split")))
    on_ranks(check_two_ranks, *folders)
