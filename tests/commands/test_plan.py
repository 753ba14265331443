"""The dry run: parameters, tokens and bytes by hand, and activations against what autograd really keeps."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from vcr1_kernels.head_chunks import head_peak_bytes

import vcr1_fast.cli as cli
from vcr1_fast.commands.dry_run import groups_held
from vcr1_fast.commands.plan import disk_gb, plan_command
from vcr1_fast.fake_gpu.predict import Rates
from vcr1_fast.fake_gpu.shim import FakeGpuError
from vcr1_fast.learner.attention import use_causal_attention
from vcr1_fast.learner.memory_sums import (
    check_memory,
    clip_tokens,
    decoder_bytes,
    largest_group,
    max_video_tokens,
    plan_memory,
    plan_tokens,
    reduces_once,
    tower_bytes,
    video_tokens,
    with_recompute,
)
from vcr1_fast.learner.model import load_hugging_face
from vcr1_fast.learner.model_size import read_model_size
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES
from vcr1_fast.run.model_folder import PACKAGED
from vcr1_fast.settings.config import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    EvalVideoConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
    VideoConfig,
)


def test_parameters_are_counted_exactly():
    """Public ones: what transformers builds from their configurations. Packaged ones: what their weight files hold."""
    assert read_model_size("nowhere/Qwen2.5-VL-3B-Instruct").params == 3_754_622_976
    assert read_model_size("nowhere/Qwen2.5-VL-7B-Instruct").params == 8_292_166_656
    assert read_model_size("nowhere/Qwen2.5-VL-7B-Instruct").tower_params == 676_550_144
    assert read_model_size("nowhere/Qwen3-VL-4B-Instruct").params == 4_437_815_808
    assert read_model_size("nowhere/Qwen3-VL-8B-Instruct").params == 8_767_123_696
    assert read_model_size("nowhere/Qwen3-VL-8B-Instruct").tower_params == 576_388_336
    for model, number in (("tiny", 1_112_000), ("tiny3", 1_170_192)):
        weights = safe_open(PACKAGED[model] / "model.safetensors", "pt")
        counted = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        assert read_model_size(model).params == counted == number


def test_what_is_assumed_is_said():
    assert "Qwen2.5-VL-3B, assumed because model.path 'x/my-3b' does not exist" in read_model_size("x/my-3b").source
    assert "Qwen2.5-VL-7B, assumed" in read_model_size("nowhere").source
    assert read_model_size("tiny").source.endswith("config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is damaged"),
        ("[1]", "is damaged"),
        ("{}", "model_type in .* is None, wanted qwen2_5_vl or qwen3_vl"),
        ('{"model_type": "qwen3_5"}', "model_type in .* is 'qwen3_5', wanted qwen2_5_vl or qwen3_vl"),
        ('{"model_type": "qwen2_5_vl", "vision_config": {}, "hidden_size": 8}', "does not describe a model"),
    ],
)
def test_a_checkpoint_that_is_not_known(tmp_path: Path, content: str, message: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_model_size(str(tmp_path))


def test_published_and_nested_configurations_read_alike(tmp_path: Path):
    flat = PUBLIC_SIZES["Qwen2.5-VL-3B"]
    nested = {"vision_config": flat["vision_config"], "tie_word_embeddings": True, "text_config": flat}
    for name, content in (("flat", flat), ("nested", nested)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"} | content))
    read = [replace(read_model_size(str(tmp_path / name)), source="") for name in ("flat", "nested")]
    assert read[0] == read[1]


def test_video_tokens_by_hand():
    """60 frames: 2 * 3584 / 60 = 119.5 tokens a pair, so 119 * 30. 4 frames: at most 768 a pair. 768 frames: 9.3 would
    be left, but 1.05 * 16 = 16.8 is the floor, so 16 * 384."""
    config = VideoConfig()
    assert video_tokens(60, config) == clip_tokens(30.0, config) == 3570
    assert video_tokens(4, config) == clip_tokens(0.5, config) == 1536
    assert video_tokens(768, config) == clip_tokens(1000.0, config) == max_video_tokens(config) == 6144
    assert max_video_tokens(VideoConfig(max_frames=400)) == 3584


def config_7b(**model) -> Config:
    return Config(
        model=ModelConfig(path="Qwen2.5-VL-7B", compute_dtype="bfloat16", **model),
        data=DataConfig(eval=("e.jsonl",)),
        video=VideoConfig(max_frames=400),
        rollout=RolloutConfig(group_size=8, max_new_tokens=1024, max_batch_rows=8),
        train=TrainConfig(prompts_per_step=8, tokens_per_microbatch=32768),
    )


def test_tokens_of_a_step_by_hand():
    """Prompt 3584 + 256 = 3840; group 3840 + 8 * 1023 = 12,024; two fit into 32,768."""
    on_2 = plan_tokens(config_7b(), 2)
    assert (on_2.prompt, on_2.group, on_2.groups_per_gpu, on_2.groups_per_row) == (3840, 12024, 4, 2)
    assert (on_2.row, on_2.scored_rows, on_2.unshared_group) == (24048, 16384, 8 * (3840 + 1023))
    on_8 = plan_tokens(config_7b(), 8)
    assert (on_8.groups_per_gpu, on_8.groups_per_row, on_8.row) == (1, 1, 12024)
    too_large = plan_tokens(replace(config_7b(), train=TrainConfig(tokens_per_microbatch=100)), 2)
    assert (too_large.groups_per_row, too_large.row) == (1, 12024)


def test_memory_of_7b_on_8_gpus_by_hand():
    config, size = config_7b(gradient_checkpointing="full"), read_model_size("Qwen2.5-VL-7B")
    memory = plan_memory(config, size, plan_tokens(config, 8), 8)
    params = 8.292166656
    # A context of 1 GB; 2^28 bytes of frames, four times that with one side resized in float32, and 3 x 2 x 3584 x 28^2
    # bytes of frames resized
    decoding = (1_000_000_000 + 5 * 2**28 + 6 * 3584 * 784) / 1e9
    learner = {"weights, float32": params / 2, "AdamW, float32": params, "rollout engine": 2 * params}
    assert memory.static == pytest.approx({**learner, "video decoding": decoding})
    on_cpu = plan_memory(replace(config, video=VideoConfig(reader="pyav")), size, plan_tokens(config, 8), 8)
    assert on_cpu.static == pytest.approx(learner)
    # At the head: its chunk and gradient, its gathered weight, and what the other parts keep: 12,024 tokens x 28 layers
    # x 2 x 3584, and 4 x 3584 patches x (pixels 2352 + 32 x 2 x 1280). 10.7 GB; backward of the last layer has 10.0.
    assert memory.update == pytest.approx(
        {
            "decoder activations": 12024 * 28 * 7168 / 1e9,
            "tower activations": 14336 * (2352 + 81920) / 1e9,
            "head": head_peak_bytes(8192, 3584, 152064, torch.bfloat16) / 1e9,
            "gathered blocks": 2 * 152064 * 3584 / 1e9,
        }
    )
    # 28 layers x 4 bytes x 512 = 57,344 bytes a token; one prompt with 8 completions, then 8 prompts with one each
    assert memory.rollout["KV cache"] == pytest.approx(57344 * (3840 + 8 * 1024) / 1e9)
    assert memory.evaluation["KV cache"] == pytest.approx(57344 * 8 * (3840 + 1024) / 1e9)
    assert memory.rollout["prefill"] == pytest.approx(3840 * (8 * 3584 + 6 * 18944) / 1e9)
    rollout = sum(memory.by_phase()["rollout"].values())
    assert rollout == pytest.approx(3.5 * params + decoding + sum(memory.rollout.values()))


def test_whole_gradients_wait_for_the_last_row_where_they_fit():
    """33.2 GB more at 7B: not beside the worst step of 4 rows on 80 GB, but on 141; adapters always."""
    size = read_model_size("nowhere")
    one_row = config_7b(gradient_checkpointing="full")
    rows = replace(one_row, train=replace(one_row.train, prompts_per_step=32, tokens_per_microbatch=8192))
    assert reduces_once(one_row, size, 8, 80) and reduces_once(rows, size, 1, 80)
    assert [reduces_once(rows, size, 8, gb) for gb in (80, 141)] == [False, True]
    lora = replace(rows, model=replace(rows.model, lora=LoRAConfig(rank=32)))
    assert reduces_once(lora, size, 8, 80)
    forced = replace(rows, train=replace(rows.train, reduce_gradients="once"))
    assert reduces_once(forced, size, 8, 80)
    tokens = plan_tokens(rows, 8)
    plain, waiting = (plan_memory(rows, size, tokens, 8, has_whole_gradients=has).by_phase() for has in (False, True))
    assert sum(waiting["update"].values()) - sum(plain["update"].values()) == pytest.approx(4 * size.params / 1e9)


def test_what_is_recomputed_is_what_does_not_fit():
    """One group of 12,024 tokens on each of 8 GPUs, by layer and token: none keeps 158,720 bytes, selective 4 x (2 x
    3,584 + 18,944) = 104,448, full 7,168. The rest takes 43 GB with the engine's weights, head and gradients."""
    size = read_model_size("Qwen2.5-VL-7B")
    chosen = {gb: with_recompute(config_7b(), size, 8, gb).model.gradient_checkpointing for gb in (80, 110, 141)}
    assert chosen == {80: "full", 110: "selective", 141: "none"}
    kept = {
        mode: plan_memory(config_7b(gradient_checkpointing=mode), size, plan_tokens(config_7b(), 8), 8).update
        for mode in ("none", "selective")
    }
    assert kept["none"]["decoder activations"] == pytest.approx(12024 * 28 * 158720 / 1e9)
    assert kept["selective"]["decoder activations"] == pytest.approx(12024 * 28 * 104448 / 1e9)
    assert kept["selective"]["tower activations"] == pytest.approx(14336 * (2352 + 32 * (12 * 1280 + 4 * 3420)) / 1e9)
    given = config_7b(gradient_checkpointing="none")
    assert with_recompute(given, size, 8, 80) is given


def test_what_settings_add_and_save():
    config, size = config_7b(gradient_checkpointing="full"), read_model_size("Qwen2.5-VL-7B")
    tokens = plan_tokens(config, 8)
    base = plan_memory(config, size, tokens, 8)
    with_kl = plan_memory(replace(config, algorithm=AlgorithmConfig(beta=0.04)), size, tokens, 8)
    assert with_kl.static["reference"] == pytest.approx(2 * 8.292166656 / 8)
    assert "reference" not in base.static
    rows = replace(tokens, groups_per_gpu=2)
    frozen = plan_memory(replace(config, model=replace(config.model, freeze_vision=True)), size, rows, 8)
    assert frozen.static["weights, float32"] == pytest.approx((4 * 8.292166656 - 2 * 0.676550144) / 8)
    assert frozen.static["AdamW, float32"] == pytest.approx(8.292166656 - 0.676550144)
    assert set(frozen.update) == {"decoder activations", "gathered blocks", "gradients, float32", "head"}
    rows = replace(tokens, groups_per_gpu=2, scored_rows=131072)
    head = plan_memory(config, size, rows, 8).update  # where the gradients of the row before are, too
    assert head["head"] == pytest.approx(head_peak_bytes(131072, 3584, 152064, torch.bfloat16) / 1e9)
    assert head["gathered blocks"] == pytest.approx(2 * 152064 * 3584 / 1e9)  # its weight
    assert head["decoder activations"] == pytest.approx(12024 * 28 * 7168 / 1e9)
    assert head["gradients, float32"] == pytest.approx(8.292166656 / 2)
    stored = plan_memory(replace(config, model=replace(config.model, gradient_checkpointing="none")), size, tokens, 8)
    assert stored.update["decoder activations"] == pytest.approx(12024 * 28 * 158720 / 1e9)
    alone = plan_memory(config, size, plan_tokens(config, 1), 1)
    assert alone.static["AdamW, float32"] == pytest.approx(8 * 8.292166656)
    assert alone.update["gathered blocks"] == pytest.approx(2 * 8.292166656)  # autocast's copies
    assert plan_memory(replace(config, data=DataConfig()), size, tokens, 8).evaluation == {}


def test_moments_of_8_bits_copies_and_frozen_weights_are_counted():
    config, size = config_7b(gradient_checkpointing="full"), read_model_size("Qwen2.5-VL-7B")
    tokens, params = plan_tokens(config, 8), 8.292166656
    eight = plan_memory(replace(config, optimizer=OptimizerConfig(name="adamw_8bit")), size, tokens, 8)
    assert eight.static["AdamW, 8 bit"] == pytest.approx(2 * (1 + 4 / 256) * params / 8)  # a scale to 256 codes
    two = replace(config, train=replace(config.train, replicate=2))
    copies = plan_memory(two, size, plan_tokens(two, 16), 16)
    assert copies.static == pytest.approx(plan_memory(config, size, tokens, 8).static)
    words = 152064 * 3584 / 1e9
    frozen = replace(config, model=replace(config.model, freeze=("model.embed_tokens.*",)))
    static = plan_memory(frozen, size, tokens, 8).static
    assert static["AdamW, float32"] == pytest.approx(params - words)
    assert static["weights, float32"] == pytest.approx((4 * params - 2 * words) / 8)


def test_the_largest_group_of_a_gpu_is_as_long_as_memory_is(capsys):
    """Its row of the largest size fits into nine tenths of the GPU, and 100 tokens more do not."""
    config, size = config_7b(gradient_checkpointing="full"), read_model_size("Qwen2.5-VL-7B")
    tokens = plan_tokens(config, 8)
    most = largest_group(config, size, tokens, 8, 80)
    for row, fits in ((most, True), (most + 100, False)):
        longer = replace(tokens, row=row, video=row - 8 * 1023 - 256)
        assert (sum(plan_memory(config, size, longer, 8).by_phase()["update"].values()) <= 72) == fits
    assert plan_command(config, 8, is_fast=True)["largest_group"]["80 GB (A100, H100)"] == most
    assert f"{most:,}" in capsys.readouterr().out


def test_evaluation_is_counted_with_the_videos_that_it_sees(capsys):
    """13,824 tokens of video and 256 of text: 65,536 // (14,080 + 1,024) = 4 prompts at once, where 8 were of 3,840."""
    config, size = config_7b(gradient_checkpointing="full"), read_model_size("Qwen2.5-VL-7B")
    video = EvalVideoConfig(total_pixels=13824 * 28 * 28)
    more = replace(config, eval=EvalConfig(video=video))
    tokens, plain = plan_tokens(more, 8), plan_tokens(config, 8)
    assert (plain.eval_prompt, tokens.eval_prompt) == (3840, 14080)
    assert replace(tokens, eval_prompt=3840) == plain
    memory = plan_memory(more, size, tokens, 8)
    assert memory.evaluation["KV cache"] == pytest.approx(57344 * 4 * (14080 + 1024) / 1e9)
    was = plan_memory(config, size, plain, 8)
    assert (memory.update, memory.rollout, memory.static) == (was.update, was.rollout, was.static)
    for settings, is_told in ((config, False), (more, True)):
        plan_command(settings, 8, is_fast=True)
        assert ("prompt in evaluation" in capsys.readouterr().out) == is_told


def test_the_plan_has_what_checkpoints_take_of_host_memory_and_disk(capsys):
    """12 bytes for each of 8,292,166,656 weights: 99.506 GB; two are kept, one is written, with keep_best one more."""
    config, size = config_7b(), read_model_size("Qwen2.5-VL-7B")
    assert plan_command(config, 8, is_fast=True)["staging_gb"] == 99.51
    assert "host memory for checkpoints, GB: 99.5 over all machines (12.4 a rank)" in capsys.readouterr().out
    assert disk_gb(config, size)["checkpoints"] == pytest.approx(3 * 99.506, abs=0.01)
    best = CheckpointConfig(asynchronous=False, keep_best="eval/temporal_grounding/miou")
    assert disk_gb(replace(config, checkpoint=best), size)["checkpoints"] == pytest.approx(4 * 99.506, abs=0.01)
    between = replace(config, checkpoint=CheckpointConfig(asynchronous=False))
    assert plan_command(between, 8, is_fast=True)["staging_gb"] == 0


def test_adapters_need_no_masters_no_reference_and_no_copies():
    """Rank 32 on the seven matrices: 28 x 32 x (2 (2 x 3584 + 3584 + 512) + 3 (3584 + 18944)) = 80,740,352."""
    config, size = config_7b(gradient_checkpointing="full"), read_model_size("Qwen2.5-VL-7B")
    config = replace(config, algorithm=AlgorithmConfig(beta=0.04))
    config = replace(config, model=replace(config.model, lora=LoRAConfig(rank=32)))
    tokens, adapters = plan_tokens(config, 8), 80.740352e-3
    memory = plan_memory(config, size, tokens, 8)
    assert memory.static["frozen weights and adapters"] == pytest.approx((2 * 8.292166656 + 4 * adapters) / 8)
    assert memory.static["AdamW, float32"] == pytest.approx(adapters)
    assert "reference" not in memory.static and "weights, float32" not in memory.static
    head = head_peak_bytes(8192, 3584, 152064, torch.bfloat16, trains_weight=False)
    assert memory.update["head"] == pytest.approx(head / 1e9)
    assert memory.update["decoder activations"] == pytest.approx(12024 * 28 * 7168 / 1e9)
    alone = plan_memory(config, size, plan_tokens(config, 1), 1)
    assert "gathered blocks" not in alone.update
    fewer = replace(config, model=replace(config.model, lora=LoRAConfig(rank=8, targets=("q_proj", "v_proj"))))
    few = plan_memory(fewer, size, tokens, 8).static["AdamW, float32"]
    assert few == pytest.approx(28 * 8 * (2 * 3584 + 3584 + 512) / 1e9)


@pytest.mark.parametrize(
    ("changes", "gpu_gb", "message"),
    [
        ({}, 80, None),
        ({"beta": 1.0}, 40, "update needs about 44 GB for a group of 12,024 tokens, the largest that video and"),
        ({}, 45, "train.max_group_tokens=4300, above which a group is left out and counted"),
        ({"max_group_tokens": 4300}, 45, None),
        ({"max_batch_tokens": 1 << 22}, 80, "evaluation needs about 243 GB for the largest batch, but a GPU"),
    ],
)
def test_a_worst_case_that_cannot_fit_is_refused_before_anything_is_loaded(changes: dict, gpu_gb: float, message):
    config = config_7b(gradient_checkpointing="full")
    config = replace(config, algorithm=AlgorithmConfig(beta=changes.get("beta", 0.0)))
    config = replace(config, train=replace(config.train, max_group_tokens=changes.get("max_group_tokens")))
    if "max_batch_tokens" in changes:
        config = replace(config, rollout=RolloutConfig(max_batch_tokens=changes["max_batch_tokens"]))
    if message is None:
        check_memory(config, 8, gpu_gb)
    else:
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_memory(config, 8, gpu_gb)


def saved_bytes(parameters: set[int], forward) -> int:
    """Bytes of all storages that autograd keeps for the backward pass, weights left out."""
    kept: dict[int, int] = {}
    tensors = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("model", "tower_rest"), [("tiny", 0.1), ("tiny3", 0.2)])
def test_activations_are_what_autograd_keeps(model: str, tower_rest: float):
    """The formulas leave out the last norm, rotary tables and mergers: 5 % of a tiny decoder, of the towers 7 % and,
    with four mergers for four blocks, 17 %."""
    hf = load_hugging_face(model, torch.bfloat16, torch.device("cpu")).train()
    hf.model.visual.set_attn_implementation("sdpa")
    parameters = {parameter.untyped_storage().data_ptr() for parameter in hf.parameters()}
    size, num_tokens = read_model_size(model), 512
    use_causal_attention(hf.model.language_model)
    inputs = torch.randn(1, num_tokens, size.hidden, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(num_tokens).view(1, 1, -1).expand(3, 1, -1)
    decoder = saved_bytes(
        parameters,
        lambda: (
            hf.model.language_model(inputs_embeds=inputs, position_ids=positions, use_cache=False).last_hidden_state
        ),
    )
    assert 1.0 < decoder / decoder_bytes(size, num_tokens, "none", has_kernels=False)[0] < 1.1

    frame_px = 64 * size.video.factor_px**2
    config = Config(
        model=ModelConfig(kernels="off"),
        video=VideoConfig(min_frames=16, max_frames=16, min_frame_pixels=frame_px, max_frame_pixels=frame_px),
    )
    tokens = replace(plan_tokens(config, 8, size.video.factor_px), groups_per_row=1)
    assert tokens.video == 8 * 67  # 1.05 * 64 tokens a pair
    num_patches = 4 * 8 * 67
    pixels = torch.randn(8 * 256, size.video.patch_values, dtype=torch.bfloat16)
    tower = saved_bytes(parameters, lambda: hf.model.visual(pixels, grid_thw=torch.tensor([[8, 16, 16]])).pooler_output)
    assert 1.0 < tower / (8 * 256) / (tower_bytes(size, tokens, config)[0] / num_patches) < 1 + tower_rest


def test_dry_run_says_what_does_not_fit(tmp_path: Path, capsys):
    config = replace(config_7b(gradient_checkpointing="full"), rollout=RolloutConfig(max_batch_tokens=1 << 22))
    result = plan_command(config, 8, is_fast=True)
    out = capsys.readouterr().out
    assert result["exceeds"] == {"80 GB (A100, H100)": ["evaluation"], "141 GB (H200)": ["evaluation"]}
    # 3.5 P = 29.0, KV 57,344 x 256 x 4,864 = 71.4, prefill 256 x 3,840 x 142,336 = 139.9, video decoding 2.4
    assert "evaluation needs 243 GB, more than 80 GB" in out and "a smaller rollout.max_batch_tokens" in out
    assert "not found: e.jsonl" in out
    # the default budget of 65,536 tokens holds 13 videos of 4,864
    bounded = replace(config, rollout=RolloutConfig())
    memory = plan_memory(bounded, read_model_size("Qwen2.5-VL-7B"), plan_tokens(bounded, 8), 8)
    assert memory.evaluation["KV cache"] == pytest.approx(57344 * 13 * 4864 / 1e9)
    assert (
        plan_command(config_7b(gradient_checkpointing="full"), 8, is_fast=True)["exceeds"]["80 GB (A100, H100)"] == []
    )
    with pytest.raises(ConfigError, match="there are 3 ranks"):
        plan_command(config, 3, is_fast=True)


def dry_run(capsys, *tokens: str) -> tuple[dict, str]:
    """What the command prints last, and everything before it."""
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *tokens])
    assert end.value.code == 0
    *told, line = capsys.readouterr().out.splitlines()
    return json.loads(line), "\n".join(told)


def test_a_fast_dry_run_says_that_it_is_sums(capsys):
    line, _ = dry_run(
        capsys, "tiny", "--dry-run=2", "--fast", "--rollout.group_size=4", "--task.prompts.captioning=none.txt"
    )
    assert (line["num_gpus"], line["num_params"], line["is_measured"]) == (2, 1_112_000, False)
    assert line["learner"] is None and line["predicted"] is None
    assert line["missing_files"][-1] == "none.txt"


def test_rows_that_show_more_than_the_sums_reckon_with_are_named(capsys, tmp_path: Path):
    """Of tiny's 16 frames a video has 72 tokens, of 84 x 84; of two and an image of 9 tokens there are 153."""
    rows = tmp_path / "rows.jsonl"
    choice = '{"task": "multiple_choice", "query": "q", "options": ["a", "b"], "answer": "A", '
    rows.write_text(choice + '"videos": ["a.mp4", "b.mp4"], "image": "i.png"}\n' + choice + '"image": "i.png"}\n')
    options = (
        f"--data.train=[{rows}]",
        "--data.eval=[]",
        "--video.max_image_pixels=7056",
        "--video.total_pixels=56448",
    )
    line, told = dry_run(capsys, "tiny", "--dry-run=1", "--fast", *options)
    video = line["tokens"]["video"]
    assert f"of 2 rows with images or several videos the largest shows up to {2 * video + 9:,} tokens" in told
    assert line["missing_videos"] == 3


def test_a_dry_run_runs_the_step(capsys, monkeypatch, tmp_path: Path):
    """The packaged model: its numbers by hand where they are simple, the rest must be there."""
    (tmp_path / "rows.jsonl").write_text(
        '{"id": "a", "task": "temporal_grounding", "video": "a.mp4", "query": "a dog barks", "duration_s": 8.0, '
        '"intervals_s": [[1.0, 3.0]]}\n'
    )
    files = (f"--data.train=[{tmp_path}/rows.jsonl]", f"--data.eval=[{tmp_path}/none.jsonl]")
    slow = Rates(source="of a slow GPU", memory_bytes_s=1e8)
    monkeypatch.setattr("vcr1_fast.commands.dry_run.present_rates", lambda: slow)
    line, told = dry_run(capsys, "tiny", "--dry-run=8", *files)
    assert line["is_measured"] and set(line["phases_gb"]) == {"load", "update", "rollout", "evaluation", "export"}
    assert set(line["predicted"]) >= {"step_s", "run_h", "update_s", "rollout_s"}
    assert line["predicted"]["run_h"] * 3600 == pytest.approx(line["predicted"]["step_s"] * line["steps"])
    learner = line["learner"]
    assert (learner["syncs"], learner["blocking_copies"]) == (2, 0)
    assert learner["launches_per_decoder_layer"] > 50 and learner["collectives"] > 0 and learner["tflop"] >= 0
    # 12 bytes a parameter, the checkpoints that are kept and one being written; bfloat16 export
    assert line["disk_gb"]["export"] == pytest.approx(2 * 1_112_000 / 1e9, abs=0.005)
    assert line["missing_files"] == [f"{tmp_path}/none.jsonl"] and line["missing_videos"] == 1
    assert "predicted by rates that are of a slow GPU (GEMM 680 TFLOP/s, attention fa2 370" in " ".join(told.split())
    # 0.1 GB/s: an update takes at least the time of its traffic, which is rounded to 0.1 GB
    assert line["predicted"]["update_s"] >= (learner["elementwise_gb"] - 0.05) / 0.1 > 0


def test_without_a_compiler_the_sums_stand_in(capsys, monkeypatch):
    def fail(*_):
        raise FakeGpuError("found no C++ compiler: install g++, or name one in CXX")

    monkeypatch.setattr("vcr1_fast.commands.plan.measure", fail)
    line, told = dry_run(capsys, "tiny", "--dry-run=2")
    assert not line["is_measured"] and line["phases_gb"]["update"] > 0
    assert "no step was run on fake GPUs (found no C++ compiler" in told and "sums" in told


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["eval", "tiny", "--dry-run"], "vcr1-fast eval has no --dry-run"),
        (["train", "tiny", "--dry-run=x"], "--dry-run is 'x', wanted a number of GPUs"),
        (["train", "tiny", "--dry-run=0"], "--dry-run is '0', wanted a number of GPUs"),
        (["train", "tiny", "--fast"], "--fast goes with --dry-run alone"),
    ],
)
def test_dry_runs_that_make_no_sense(capsys, tokens, message):
    with pytest.raises(SystemExit) as end:
        cli.main(tokens)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_clips_of_all_groups_that_wait_are_held():
    """64 groups on each of 8 GPUs, a quarter more that go on, and with a lag those of the next step, too."""
    train = replace(Config().train, prompts_per_step=512)
    config = replace(Config(), train=train, rollout=replace(Config().rollout, over_provision=0.25))
    assert groups_held(config, 8) == 80
    assert groups_held(replace(config, rollout=replace(config.rollout, max_policy_lag=1)), 8) == 144
