"""The store of weights, the names they get, and the comparison inside SGLang's process, on modules of its layout."""

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors import safe_open
from torch import nn

from vcr1_fast.learner.families.qwen2_5_vl import Qwen25VL
from vcr1_fast.rollout import sglang_engine
from vcr1_fast.rollout.sgl import check as sglang_check
from vcr1_fast.rollout.sgl.host_copy import HostCopy
from vcr1_fast.rollout.sgl.weights import Bucket, bytes_of, checkpoint_weights, in_buckets
from vcr1_fast.rollout.weight_table import WeightTable
from vcr1_fast.settings.error import ConfigError
from vcr1_fast.settings.learning import SGLangConfig

checkpoint_name = Qwen25VL().checkpoint_name


def test_names_are_those_of_the_checkpoint(make_tiny_model, tmp_path):
    model = make_tiny_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        on_disk = set(file.keys())
    assert {checkpoint_name(name) for name in model.state_dict()} == on_disk
    assert {checkpoint_name(name) for name in on_disk} == on_disk


def test_weights_of_a_folder_are_the_models(make_tiny_model, tmp_path):
    model = make_tiny_model()
    model.save_pretrained(tmp_path)
    read = dict(checkpoint_weights(tmp_path))
    assert all(torch.equal(read[checkpoint_name(name)], value) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="has no weights"):
        list(checkpoint_weights(tmp_path / "none"))


def test_the_engine_sends_weights_and_factors_under_the_names_of_the_checkpoint(
    make_tiny_model, tiny_tokenizer, tmp_path, monkeypatch
):
    class Noting:
        def __init__(self, *_: object) -> None:
            self.came: list[str] = []

        def load(self, weights: Iterable[tuple[str, torch.Tensor]], _: int) -> None:
            self.came = [name for name, _ in weights]

    make_tiny_model(tied=True).save_pretrained(tmp_path)
    monkeypatch.setattr(sglang_engine, "Workers", Noting)
    engine = sglang_engine.SGLangEngine(tmp_path, tiny_tokenizer, SGLangConfig())
    given = ("model.visual.w", "visual.v", "model.language_model.q_proj.lora_A", "lm_head.weight")
    engine.load_weights([(name, torch.ones(1)) for name in given], 1)
    assert cast(Noting, engine._workers).came == ["visual.w", "visual.v", "model.q_proj.lora_A"]


def weights(seed: int = 0, **shapes: tuple[int, ...]) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or {"a": (30, 10), "b": (500, 1), "c": (7,), "d": (20, 20)}
    return [(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()]


def held(buckets: list[Bucket]) -> dict[str, torch.Tensor]:
    return {slot.name: slot.of(bucket.filled).clone() for bucket in buckets for slot in bucket.slots}


def assert_without_gaps(buckets: list[Bucket]) -> None:
    """SGLang lays a bucket that it gets by broadcast out by itself: one weight after the other, from 0."""
    for bucket in buckets:
        assert [slot.start for slot in bucket.slots] == [0, *(slot.stop for slot in bucket.slots[:-1])]
        assert len({slot.dtype for slot in bucket.slots}) == 1  # so that each starts at a multiple of its item size


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 1500, 1 << 20])
def test_buckets_hold_every_weight_once_in_order_and_the_last_one_says_so(bucket_bytes, is_shared):
    """One a weight, two or three, one for all."""
    sent = [*weights(), ("count", torch.arange(3)), ("e", torch.ones(2))]
    seen: list[tuple[dict[str, torch.Tensor], bool]] = []
    addresses: list[int] = []
    for bucket, is_last in in_buckets(sent, bucket_bytes, torch.bfloat16, [] if is_shared else None):
        seen.append((held([bucket]), is_last))
        assert_without_gaps([bucket])
        addresses.append(bytes_of(bucket.memory).data_ptr())
    assert [name for names, _ in seen for name in names] == [name for name, _ in sent]
    assert [is_last for _, is_last in seen] == [False] * (len(seen) - 1) + [True]
    assert torch.equal(seen[0][0]["a"], sent[0][1].bfloat16())
    assert torch.equal(seen[-2][0]["count"], torch.arange(3))
    assert all(first != second for first, second in pairwise(addresses))  # one is filled while the other is read
    assert list(in_buckets([], bucket_bytes, torch.bfloat16)) == []


def test_a_copy_holds_the_last_value_of_every_weight():
    """Also after a push of some of them, and one that broke off: its weights that come later get further buckets."""
    copy, all_weights = HostCopy(), dict(weights()) | {"count": torch.arange(3)}

    def push(names: str) -> None:
        for bucket, _ in in_buckets([(name, all_weights[name]) for name in names.split()], 1500, torch.float32):
            copy.keep(bucket)

    push("a b")
    push("a b c d count")
    assert_without_gaps(copy.all())
    all_weights |= {"d": torch.ones(20, 20), "c": torch.zeros(7)}
    push("c d")
    kept = held(copy.all())
    assert list(kept) == list(all_weights)
    assert all(torch.equal(kept[name], value) for name, value in all_weights.items())
    copy.close()


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ([("e", torch.ones(1))], "weight 'e' is none of the engine's"),
        ([("a", torch.ones(10, 30))], "has shape"),
        ([("c", torch.ones(7)), ("c", torch.ones(7))], "given twice"),
        ([], "no load may"),
    ],
)
def test_after_a_broken_load_everything_must_come_again(second, words):
    table = WeightTable()
    assert [name for name, _ in table.checked(weights())] == ["a", "b", "c", "d"]
    assert table.is_whole
    with pytest.raises(ValueError, match=words):
        list(table.checked(second))
    assert not table.is_whole
    with pytest.raises(ValueError, match="3 weights are missing"):
        list(table.checked([("a", torch.ones(30, 10))]))
    assert len(list(table.checked(weights(1)))) == 4
    assert table.is_whole
    list(table.checked(weights()[:1]))  # frozen ones may be left out
    table.forget()
    with pytest.raises(ValueError, match="release of memory, must name every weight"):
        list(table.checked(weights()[:1]))


def test_a_first_load_that_breaks_off_does_not_say_which_weights_there_are():
    table = WeightTable()
    with pytest.raises(ValueError, match="given twice"):
        list(table.checked([("a", torch.ones(1)), ("a", torch.ones(1))]))
    assert not table.is_named
    assert len(list(table.checked(weights()))) == 4


def test_checksum_by_hand_and_what_it_sees(monkeypatch):
    """Words of 1, 2 and -1 in float32, which are 0x3F800000, 0x40000000 and 0xBF800000: the first is the lower half."""
    words = [0x40000000_3F800000, 0xBF800000]
    value = torch.tensor([1.0, 2.0, -1.0])
    assert sglang_check.checksum(value) == [sum(words) % (1 << 64), (words[0] + 2 * words[1]) % (1 << 64)]
    assert sglang_check.checksum(torch.tensor([0.0, 1.0, 2.0, -1.0])[1:]) == sglang_check.checksum(value)
    assert sglang_check.checksum(torch.tensor([0.0, 1.0, 2.0])[1:]) == [words[0]] * 2  # begins within a word
    assert sglang_check.checksum(torch.full((2,), -1, dtype=torch.int64)) == [2**64 - 2, 2**64 - 3]
    matrix = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = sglang_check.checksum(matrix)
    wider = torch.zeros(50, 9).bfloat16()
    wider[:, :7] = matrix
    monkeypatch.setattr(sglang_check, "_PART_BYTES", 250)  # in pieces of 16 rows of 14 bytes
    assert sglang_check.checksum(matrix) == sglang_check.checksum(wider[:, :7]) == whole
    swapped = matrix.clone()
    swapped[4:8], swapped[28:32] = matrix[28:32], matrix[4:8]  # seven whole words
    assert sglang_check.checksum(swapped)[0] == whole[0]
    assert sglang_check.checksum(swapped)[1] != whole[1]
    swapped = matrix.clone()
    swapped[[3, 30]] = swapped[[30, 3]]
    assert sglang_check.checksum(swapped) != whole
    changed = matrix.clone()
    changed[17, 3] += 2**-6 * changed[17, 3].abs()
    assert sglang_check.checksum(changed)[0] != whole[0]


class FusedModel(nn.Module):
    """The kinds of weights that SGLang's Qwen2.5-VL has: fused, renamed, reshaped, padded, tied."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.ModuleDict({"attn": nn.ModuleDict({"qkv_proj": nn.Linear(4, 12)})})
        self.visual["patch"] = nn.Linear(8, 5, bias=False)
        block = {"qkv_proj": nn.Linear(4, 8 + 2 * 2), "gate_up_proj": nn.Linear(4, 12, bias=False)}
        embedding = nn.Embedding(64, 4)
        self.model = nn.ModuleDict({"embed_tokens": embedding})
        self.lm_head = embedding
        block["down_proj"] = nn.Linear(6, 4, bias=False)
        self.model["block"] = nn.ModuleDict(block)
        with torch.no_grad():  # 61 ids made 64, 5 hidden units of the MLP made 6
            self.lm_head.weight[61:] = 0
            block["gate_up_proj"].weight[[5, 11]] = 0
            block["down_proj"].weight[:, 5] = 0


def checkpoint_of(model: FusedModel) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    qkv, bias = state["model.block.qkv_proj.weight"], state["model.block.qkv_proj.bias"]
    gate_up = state["model.block.gate_up_proj.weight"]
    return {
        "visual.attn.qkv.weight": state["visual.attn.qkv_proj.weight"],
        "visual.attn.qkv.bias": state["visual.attn.qkv_proj.bias"],
        "visual.patch.weight": state["visual.patch.weight"].view(5, 2, 2, 2),
        "model.embed_tokens.weight": state["model.embed_tokens.weight"][:61],
        "model.block.q_proj.weight": qkv[:8],
        "model.block.k_proj.weight": qkv[8:10],
        "model.block.v_proj.weight": qkv[10:],
        "model.block.q_proj.bias": bias[:8],
        "model.block.k_proj.bias": bias[8:10],
        "model.block.v_proj.bias": bias[10:],
        "model.block.gate_proj.weight": gate_up[:5],
        "model.block.up_proj.weight": gate_up[6:11],
        "model.block.down_proj.weight": state["model.block.down_proj.weight"][:, :5],
    }


def compare(model: nn.Module, parts: list[dict[str, torch.Tensor]], folder: Path) -> list[str]:
    wrong: list[str] = []
    for index, part in enumerate(parts):
        entries = [
            {"name": name, "dtype": "float32", "shape": list(sent.shape), "checksum": sglang_check.checksum(sent)}
            for name, sent in part.items()
        ]
        order = {"file": str(folder / "wrong"), "is_first": index == 0, "is_last": index == len(parts) - 1}
        note = torch.frombuffer(bytearray(json.dumps(order | {"entries": entries}).encode()), dtype=torch.uint8)
        sglang_check.compare(model, [("", note)])
        wrong += json.loads((folder / "wrong").read_text())
    return wrong


@pytest.mark.parametrize("num_parts", [1, 3])
def test_a_model_that_holds_everything_passes(tmp_path, num_parts):
    model = FusedModel()
    items = list(checkpoint_of(model).items())
    parts = [dict(items[i::num_parts]) for i in range(num_parts)]
    assert compare(model, parts, tmp_path) == []


@pytest.mark.parametrize("name", list(checkpoint_of(FusedModel())))
def test_each_wrong_or_missing_weight_is_named(tmp_path, name):
    model = FusedModel()
    sent = checkpoint_of(model)
    changed = sent | {name: sent[name].clone()}
    changed[name] = changed[name].contiguous()
    changed[name].view(-1)[-1] += 1e-3
    assert any(repr(name) in problem for problem in compare(model, [changed], tmp_path))
    del sent[name]
    problems = compare(model, [sent], tmp_path)  # two for the tied one, under both its names
    assert problems and all("were not sent" in problem for problem in problems)


def test_what_sglang_adds_must_be_zero(tmp_path):
    model = FusedModel()
    sent = checkpoint_of(model)
    with torch.no_grad():
        model.get_submodule("model.block.down_proj").get_parameter("weight")[0, 5] = 1e-3
    assert any("not zero there" in problem for problem in compare(model, [sent], tmp_path))


def test_swapped_and_unknown_names_are_seen(tmp_path):
    model = FusedModel()
    sent = checkpoint_of(model)
    swapped = sent | {"model.block.k_proj.weight": sent["model.block.v_proj.weight"]}
    assert compare(model, [swapped], tmp_path)
    assert compare(model, [sent | {"model.new.weight": torch.ones(1)}], tmp_path) == [
        "'model.new.weight' is not a weight of SGLang's model"
    ]
