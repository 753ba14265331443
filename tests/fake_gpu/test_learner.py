"""The learner's real step on fake GPUs: every configuration runs, and what it costs stays within its budget.

Not run here, because it needs values: which tokens are drawn, what a loss comes to, whether a gradient is finite.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vcr1_fast.fake_gpu.extrapolate import sizes_to_run, to_blocks
from vcr1_fast.fake_gpu.flash_packages import FLASH_VERSIONS
from vcr1_fast.fake_gpu.process import Case, run
from vcr1_fast.fake_gpu.sizes import num_blocks, with_blocks
from vcr1_fast.learner.memory_sums import plan_memory, plan_tokens
from vcr1_fast.learner.model_size import read_model_size
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config
from vcr1_fast.settings.io import load_config

CONFIG = str(Path(__file__).parents[2] / "configs" / "qwen2_5_vl_7b_cotraining_8xh100.yaml")
CLIP, SHORT_CLIP = (10, 34, 42), (2, 8, 12)  # 3,570 and 48 video tokens
ANSWERS = (300, 330, 360, 390, 420, 450, 480, 512)
WORLDS = (8, 64)
FULL = "--model.gradient_checkpointing=full"  # what fits would have it otherwise, with so few blocks
QWEN3 = {"full": (), "lora": ("--model.lora.rank=32",), "frozen tower": ("--model.freeze_vision=true",)}
BOTH = (SHORT_CLIP, (1, 34, 42), (1, 8, 12))  # a video and two images
LOSSES = ("dr_grpo", "dapo", "gspo", "cispo", "sapo")  # and grpo everywhere else


def case(name: str, num_gpus: int, *overrides: str, groups: int = 1, clip=CLIP, num_updates: int = 1, **more) -> Case:
    """A 7B or an 8B with fewer blocks, `groups` groups of 8 answers on rank 0."""
    size, blocks = ("Qwen3-VL-8B", 3) if name.startswith("qwen3") else ("Qwen2.5-VL-7B", 2)
    model = with_blocks(whole_config(PUBLIC_SIZES[size]), blocks, blocks - 1, 1)
    all_overrides = (f"--train.prompts_per_step={num_gpus * max(groups, 1)}", FULL, *overrides)
    updates = (((clip, ANSWERS),) * groups,) * num_updates
    return Case(name, num_gpus, CONFIG, model, updates, overrides=all_overrides, **more)


def cases(num_gpus: int) -> list[Case]:
    def one(name: str, *overrides: str, **more: Any) -> Case:
        return case(name, num_gpus, *overrides, **more)

    selective = "--model.gradient_checkpointing=selective"
    lora, frozen, idle = "--model.lora.rank=32", "--model.freeze_vision=true", {"groups": 0, "min_rows": 1}
    taught = Case(
        "sft", num_gpus, CONFIG, one("sft").hf_config, (((CLIP, (400,)),) * 2,), overrides=(FULL,), teaches=True
    )
    # eight blocks are two units of FSDP: the backward pass gathers the first one ahead and then has no use for it
    blocks = with_blocks(whole_config(PUBLIC_SIZES["Qwen2.5-VL-7B"]), 2, 7, 1)
    tower = "--model.freeze=[visual.patch_embed.*, visual.blocks.*]"
    projector = replace(one("trained projector", tower, clip=SHORT_CLIP), hf_config=blocks)
    copies, each_row = f"--train.replicate={num_gpus // 8}", "--train.reduce_gradients=each_row"
    rows = one("copy on each node, rows", copies, each_row, "--train.tokens_per_microbatch=8192", groups=3)
    replicated = [one("copy on each node", copies), rows] if num_gpus > 8 else []
    texts = {"full": (), "lora": (lora,), "frozen tower": (frozen,), "qwen3 full": ()}
    others = [one(f"{name}, text", *how, clip=()) for name, how in texts.items()]
    others += [one(f"{name}, both", clip=BOTH) for name in ("full", "qwen3 full")]
    return [
        one("full", num_updates=2),
        one("full, placeholder", **idle),
        one("selective", selective),
        one("selective, placeholder", selective, **idle),
        one("lora", lora),
        one("lora, placeholder", lora, **idle),
        one("frozen tower", frozen),
        one("frozen tower, placeholder", frozen, **idle),
        projector,
        *(one(f"qwen3 {name}", *how) for name, how in QWEN3.items()),
        one("qwen3 full, placeholder", **idle),
        *(others if num_gpus == WORLDS[0] else []),
        one("kl", "--algorithm.beta=0.04"),
        one("minibatches", "--algorithm.minibatches_per_rollout=2", groups=2),
        one("rows", "--train.tokens_per_microbatch=8192", groups=3),
        one("groups in a row", "--train.tokens_per_microbatch=32768", groups=3),
        one("float32", "--model.compute_dtype=float32", clip=SHORT_CLIP),
        one("plain", "--model.kernels=off", clip=SHORT_CLIP),
        one("stock", num_updates=2, ways=dict.fromkeys(("norm", "mlp", "rotary"), "plain")),
        *(one(version, flash=version) for version in FLASH_VERSIONS),
        taught,
        *replicated,
        *(one(loss, f"--algorithm.loss={loss}", clip=SHORT_CLIP) for loss in LOSSES),
        one(
            "corrected",
            "--algorithm.sampling_correction=token_truncate",
            "--algorithm.sampling_cap=2.0",
            clip=SHORT_CLIP,
        ),
    ]


@functools.cache
def reports(num_gpus: int) -> dict[str, dict[str, Any]]:
    return {report["name"]: report for report in run(cases(num_gpus))}


def last_update(num_gpus: int, name: str) -> dict[str, Any]:
    report = reports(num_gpus)[name]
    assert "error" not in report, report["traceback"]
    return report["updates"][-1]


def on_gpu(update: dict[str, Any]) -> list[list[Any]]:
    return [[name, size] for name, size in update["collectives"] if not name.startswith("host ")]


@pytest.mark.parametrize(("num_gpus", "name"), [(n, case.name) for n in WORLDS for case in cases(n)])
def test_an_update_runs_and_the_host_waits_twice_at_most(num_gpus: int, name: str):
    """Once for the sums, once for the gradient's norm; every copy is from pinned memory and waited for by nobody."""
    update = last_update(num_gpus, name)
    num_updates = 2 if name == "minibatches" else 1
    num_rows = {"minibatches": 2, "rows": 3, "copy on each node, rows": 3}.get(name, 1)
    assert sum(update["syncs"].values()) <= 2 * num_updates, update["syncs"]
    assert update["blocking_copies"] == {}
    assert sum(update["copies"].values()) <= 2 * num_rows, update["copies"]


@pytest.mark.parametrize("name", ["full", "selective", "lora", "frozen tower", "qwen3 full"])
@pytest.mark.parametrize("num_gpus", WORLDS)
def test_a_rank_without_rows_runs_the_same_collectives(num_gpus: int, name: str):
    """In number, kind, size and order: NCCL would wait an hour for one that the others do not join. So does one whose
    rows show no video, or something else."""
    busy, idle = last_update(num_gpus, name), last_update(num_gpus, f"{name}, placeholder")
    assert on_gpu(idle) == on_gpu(busy) != []
    others = [other for other in (f"{name}, text", f"{name}, both") if other in reports(num_gpus)]
    assert len(others) == {"full": 2, "qwen3 full": 2, "selective": 0}.get(name, 1) * (num_gpus == WORLDS[0])
    for other in others:
        assert on_gpu(last_update(num_gpus, other)) == on_gpu(busy), other


@pytest.mark.parametrize("num_gpus", WORLDS)
def test_selective_recomputation_runs_attention_once_and_of_products_keys_and_values_alone(num_gpus: int):
    """Full runs each of them once more: a third of what the blocks take; the head is never run again."""
    full, selective = last_update(num_gpus, "full"), last_update(num_gpus, "selective")
    assert full["attention_flop"] / selective["attention_flop"] == pytest.approx((2 + 2.5) / (1 + 2.5))
    text = whole_config(PUBLIC_SIZES["Qwen2.5-VL-7B"])["text_config"]
    tokens, hidden = 7006, text["hidden_size"]
    narrow = 2 * 2 * tokens * hidden * 512 * 2  # 2 layers, keys and values
    layer = 2 * tokens * hidden * (2 * hidden + 2 * 512 + 2 * text["intermediate_size"])  # without the MLP's last
    tower = 2 * 14280 * 1280 * (4 * 1280 + 2 * 3420)  # a block
    saved = full["gemm_flop"] - selective["gemm_flop"]
    assert saved == pytest.approx(2 * layer - narrow + 2 * tower, rel=0.02)


def test_kernels_for_norms_mlps_and_rotary_embeddings_move_less_than_half():
    """Of the bytes of all element-wise work, the optimizer's included. What is multiplied and attended to stays."""
    ours, stock = last_update(8, "full"), last_update(8, "stock")
    assert ours["moved_bytes"] < 0.5 * stock["moved_bytes"]
    assert (ours["gemm_flop"], ours["attention_flop"]) == (stock["gemm_flop"], stock["attention_flop"])


@pytest.mark.parametrize("version", FLASH_VERSIONS)
def test_a_package_of_flash_attention_does_the_work_of_the_one_in_torch_at_its_own_rate(version: str):
    """The same operators call it, in the decoder and in the tower; only where the gradients are allocated differs.

    Forward runs twice and backward takes 2.5 times its FLOPs, so attention's are 2 to 2.5 of them; no call is so short
    that its launch would count. Torch's own is version 2: 370 TFLOP/s forward, 300 backward. (The first of all cases
    also sends the tables of the row, in one copy of 28 kB.)
    """
    own, other = reports(8)["full"]["updates"][0], last_update(8, version)
    assert other["attention_flop"] == own["attention_flop"] > 0 and other["gemm_flop"] == own["gemm_flop"]
    own_peak, peak = (max(sum(kinds.values()) for kinds in update["peaks"].values()) for update in (own, other))
    assert peak == pytest.approx(own_peak, rel=0.01)
    forward, backward = (370e12, 300e12) if version == "fa2" else (640e12, 540e12)
    unit = own["attention_flop"] / 4.5
    saved_s = 2 * unit * (1 / 370e12 - 1 / forward) + 2.5 * unit * (1 / 300e12 - 1 / backward)
    assert own["predicted_s"] - other["predicted_s"] == pytest.approx(saved_s, abs=2.6e-6)


@pytest.mark.parametrize("num_gpus", WORLDS)
def test_gradients_of_several_rows_are_reduced_once(num_gpus: int):
    """One reduce-scatter for each unit and the rest, all of them after the last row's forward."""
    one, three = (on_gpu(last_update(num_gpus, name)) for name in ("full", "rows"))
    reduced = [size for name, size in one if "reduce_scatter" in name]
    assert [size for name, size in three if "reduce_scatter" in name] == reduced and len(reduced) == 6
    first = next(index for index, (name, _) in enumerate(three) if "reduce_scatter" in name)
    gathers = [index for index, (name, _) in enumerate(three) if "allgather" in name]
    assert sum(index < first for index in gathers) >= 3 * sum("allgather" in name for name, _ in one) - 4


HEAD, LAYER, REST = 544_997_376, 233_057_792, 1_508_864  # weights: 152,064 x 3,584, ...
# Of 2 blocks and the merger. The 3,420 rows of a block's two wide products are padded: to 3,424 for 8, 3,456 for 64.
TOWER = {8: 83_999_360, 64: 83_999_360 + 2 * 2 * (3_456 - 3_424) * (1_280 + 1)}


@pytest.mark.parametrize("num_gpus", WORLDS)
def test_what_is_large_travels_beside_other_work(num_gpus: int):
    """Nothing but the patch embedding and a norm is gathered before the first kernel and added up behind the last one;
    the embedding's gradient goes while the tower's is computed, and its weight does not come back for that."""
    update, tower = on_gpu(last_update(num_gpus, "full")), TOWER[num_gpus]
    gathered = [size // 2 for name, size in update if "allgather" in name]
    assert gathered == [REST, tower, HEAD, LAYER, LAYER, HEAD, LAYER, LAYER, tower]
    assert [size // 4 for name, size in update if "reduce_scatter" in name] == [HEAD, LAYER, LAYER, HEAD, tower, REST]


def test_a_copy_on_each_node_has_only_gradients_travel_between_nodes():
    """8 nodes: what the GPUs of one do by themselves, and an all-reduce of each share behind each reduce-scatter, in an
    update of several rows behind those of the last one alone."""
    replicated, rows = (on_gpu(last_update(64, name)) for name in ("copy on each node", "copy on each node, rows"))
    on_one = on_gpu(last_update(8, "full"))
    reduced = [size for name, size in on_one if "reduce_scatter" in name]
    shares = [size for name, size in replicated if name == "allreduce_"]
    assert shares == [size // 8 for size in reduced]
    assert [entry for entry in replicated if entry[0] != "allreduce_"] == on_one
    assert [size for name, size in rows if name == "allreduce_"] == shares
    assert [size for name, size in rows if "reduce_scatter" in name] == 3 * reduced
    first = next(index for index, (name, _) in enumerate(rows) if name == "allreduce_")
    assert sum("reduce_scatter" in name for name, _ in rows[:first]) == 2 * len(reduced) + 1
    kept, split = (last_update(64, name)["peaks"]["optimizer"]["weights"] for name in ("copy on each node", "full"))
    assert kept == pytest.approx(8 * split, rel=0.01)
    # By one ring, 360e9 bytes a second in a node and 40e9 between: 7/8 of what is whole, twice 7/8 of a share
    seconds = sum(size for _, size in on_one) * 7 / 8 / 360e9 + 2 * sum(shares) * 7 / 8 / 40e9
    assert last_update(64, "copy on each node")["collective_s"] == pytest.approx(seconds, rel=1e-3)


def test_what_cannot_run_is_reported_with_its_error():
    broken = case("broken", 8, "--model.lora.rank=8", "--model.lora.targets=[nowhere]")
    [report] = run([broken])
    assert report["name"] == "broken" and "model.lora.targets names nowhere" in report["error"]


@pytest.mark.parametrize("num_gpus", WORLDS)
def test_loading_takes_little_more_than_the_shards(num_gpus: int):
    """A whole model on every GPU would be 33 GB for 7B, where an eighth of it is 4."""
    report = reports(num_gpus)["full"]
    shards = sum(report["load"]["peaks"]["load"].values()) - 64 * 2**20
    one_block = 4 * 233_057_792  # a decoder layer of 7B in float32
    weights = report["updates"][-1]["peaks"]["optimizer"]["weights"]
    assert weights <= shards + 64 * 2**20 <= 1.25 * weights + one_block


@pytest.mark.slow
def test_the_whole_model_runs_and_is_what_few_blocks_foretell():
    """28 + 32 blocks at world 8, every count and the peak of every phase within 1 % of the extrapolation."""
    whole = whole_config(PUBLIC_SIZES["Qwen2.5-VL-7B"])
    blocks = num_blocks(whole)
    sizes = {f"{size}": size for size in sizes_to_run()}
    row = (((CLIP, ANSWERS),),)
    small = [Case(name, 8, CONFIG, with_blocks(whole, *size), row, overrides=(FULL,)) for name, size in sizes.items()]
    found = {
        report["name"]: report for report in run([*small, Case("whole", 8, CONFIG, whole, row, overrides=(FULL,))])
    }
    assert "error" not in found["whole"], found["whole"]
    for part in (lambda report: report["load"], lambda report: report["updates"][0]):
        foretold = to_blocks({size: part(found[name]) for name, size in sizes.items()}, blocks)
        measured = part(found["whole"])
        for count in ("launches", "gemm_flop", "attention_flop", "moved_bytes", "live_bytes", "predicted_s"):
            assert foretold[count] == pytest.approx(measured[count], rel=0.01, abs=1), count
        assert foretold["collectives"] == len(measured["collectives"])
        for phase, kinds in measured["peaks"].items():
            total = sum(foretold["peaks"][phase].values())
            assert total == pytest.approx(sum(kinds.values()), rel=0.01, abs=1e7), phase
    assert measured["gemm_flop"] + measured["attention_flop"] == pytest.approx(457e12, rel=0.01)
    # And the sums over the model's sizes, for a row of 7,006 tokens of which 3,570 are of 20 frames
    config = load_config(CONFIG, (FULL, "--train.prompts_per_step=8", "--video.min_frames=20", "--video.max_frames=20"))
    tokens = replace(plan_tokens(config, 8), row=7006, scored_rows=sum(ANSWERS))
    memory = plan_memory(config, read_model_size("Qwen2.5-VL-7B"), tokens, 8)
    summed = memory.static["weights, float32"] + sum(memory.update.values())  # moments come after the first update
    peak = max(sum(kinds.values()) for phase, kinds in measured["peaks"].items() if phase != "optimizer")
    assert 1e9 * summed == pytest.approx(peak, rel=0.1)
