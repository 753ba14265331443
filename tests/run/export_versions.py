"""Does what a run exports load where it will be used? Called by export_versions.sh, in one environment after another.

    python -m tests.run.export_versions make FOLDER    starting model as published ones are stored, runs, what to expect
    python -m tests.run.export_versions check FOLDER   in an environment with any transformers: the same logits?

`make` uses this project and its transformers; `check` imports nothing but torch, transformers and safetensors.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import load_file, save_file

MAX_DIFFERENCE = 1e-5
RUNS = {"full": ("tiny", []), "lora": ("tiny", ["--model.lora.rank=4"]), "qwen3_vl": ("tiny3", [])}
CLASSES = {"tiny": "Qwen2_5_VL", "tiny3": "Qwen3VL"}
PATCH_PX = {"tiny": 14, "tiny3": 16}
MEAN_STD = {
    "tiny": {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
    "tiny3": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
}


def make(folder: Path) -> None:
    """A start from each packaged model, runs from them, and the logits of their exports."""
    from vcr1_fast import cli

    for packaged in CLASSES:
        write_start(packaged, folder / packaged)
    write_clips(folder)
    for name, (packaged, options) in RUNS.items():
        start = folder / packaged
        files = [
            f"--data.train=[{next(folder.glob('train_*.jsonl'))}]",
            "--data.eval=[]",
            f"--train.output_dir={folder / name}",
        ]
        sizes = ["--train.num_steps=1", "--train.prompts_per_step=2", "--optimizer.learning_rate=1e-3"]
        arguments = [packaged, *files, *sizes, *options, f"--model.path={start}"]
        code = cli.exit_code_of(lambda arguments=arguments: cli._run_with_settings("train", arguments))
        assert code == 0, f"the run {name} ended with {code}"
        inputs = make_inputs(packaged, folder / name / "model")
        logits = logits_of(packaged, folder / name / "model", inputs)
        save_file(inputs | {"logits": logits}, folder / f"{name}.safetensors")
        changed = load_file(folder / name / "model" / "model.safetensors"), load_file(start / "model.safetensors")
        assert any(not torch.equal(changed[0][key], changed[1][key]) for key in changed[1]), "training changed nothing"


def write_start(packaged: str, folder: Path) -> None:
    """A packaged model with the old names of weights and the other files of the published checkpoints."""
    from vcr1_fast.learner.families import family_of
    from vcr1_fast.run.model_folder import model_folder

    source = model_folder(packaged)
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    template = (source / "chat_template.jinja").read_text()
    write_json(folder / "chat_template.json", {"chat_template": template})
    pixels = {"patch_size": PATCH_PX[packaged], "temporal_patch_size": 2, "merge_size": 2} | MEAN_STD[packaged]
    pixels |= {"processor_class": f"{CLASSES[packaged]}Processor"}
    images = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 50176}
    write_json(folder / "preprocessor_config.json", pixels | images)
    if packaged == "tiny3":
        videos = {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "size": {"shortest_edge": 4096, "longest_edge": 2**24},
        }
        write_json(folder / "video_preprocessor_config.json", pixels | videos)
    # What the published files say, which transformers' own saving refuses
    write_json(folder / "generation_config.json", {"do_sample": False, "temperature": 0.1, "eos_token_id": 2})
    family = family_of(SimpleNamespace(model_type=json.loads((source / "config.json").read_text())["model_type"]))
    weights = load_file(source / "model.safetensors")
    named = {family.checkpoint_name(name): weight for name, weight in weights.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})


def write_clips(folder: Path) -> None:
    from vcr1_fast.synth.config import SynthConfig
    from vcr1_fast.synth.dataset import write_dataset

    write_dataset(SynthConfig(output_dir=str(folder), num_train=4, num_eval=1, kinds=("grounding",)))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def make_inputs(packaged: str, model: Path) -> dict[str, torch.Tensor]:
    """A clip of two frame pairs of 4 x 4 patches between words."""
    config = json.loads((model / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, 600, (12,), generator=generator).tolist()
    clip = [config["vision_start_token_id"], *[config["video_token_id"]] * 8, config["vision_end_token_id"]]
    ids = torch.tensor([[*words[:6], *clip, *words[6:]]])
    pixels = torch.randn(32, 6 * PATCH_PX[packaged] ** 2, generator=generator)
    return {"input_ids": ids, "pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[2, 4, 4]])}


@torch.no_grad()
def logits_of(packaged: str, model: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[1, T, V] float32. Positions are given, because releases make them by different rules."""
    model_class = getattr(transformers, f"{CLASSES[packaged]}ForConditionalGeneration")
    loaded, report = model_class.from_pretrained(model, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        left = [key for key in report[kind] if key != "lm_head.weight"]  # tied
        assert not left, f"{kind}: {left[:5]}"
    assert next(loaded.parameters()).dtype == torch.float32
    positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}  # rounding of sums is no answer
    return loaded.double().eval()(**wide, position_ids=positions, use_cache=False).logits.float()


def check(folder: Path) -> int:
    """Prints the largest difference of each run; 1 where one is too large."""
    if find_spec("torchvision") is not None:  # 4.51 runs without
        from tests.video.processor_oracle import define_missing_ops

        define_missing_ops()
    failed = 0
    for name, (packaged, _) in RUNS.items():
        if not hasattr(transformers, f"{CLASSES[packaged]}ForConditionalGeneration"):
            print(f"transformers {transformers.__version__}, {name}: it has no such model")
            continue
        kept = load_file(folder / f"{name}.safetensors")
        wanted = kept.pop("logits")
        difference = (logits_of(packaged, folder / name / "model", kept) - wanted).abs().max().item()
        failed |= not difference <= MAX_DIFFERENCE
        files = check_files(packaged, folder / name / "model")
        print(f"transformers {transformers.__version__}, {name}: logits differ by {difference:.1e} at most; {files}")
    return int(failed)


def check_files(packaged: str, model: Path) -> str:
    """Tokenizer, generation settings and, where an image processor can be had, the whole processor."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(tokenizer("a dog barks")["input_ids"]) == "a dog barks"
    transformers.GenerationConfig.from_pretrained(model)
    processor = transformers.AutoProcessor.from_pretrained(model)
    assert type(processor).__name__ == f"{CLASSES[packaged]}Processor", type(processor)
    text = "<|vision_start|><|image_pad|><|vision_end|> a dog"
    side = 2 * PATCH_PX[packaged]
    image = torch.randint(
        0, 256, (2 * side, 3 * side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).numpy()
    made = processor(text=[text], images=[image], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 4, 6]] and made["pixel_values"].shape[0] == 24
    assert (made["input_ids"] == 6).sum() == 6
    return "tokenizer, generation settings and processor load"


if __name__ == "__main__":
    action, where = sys.argv[1], Path(sys.argv[2])
    sys.exit(make(where) if action == "make" else check(where))
