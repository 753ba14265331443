"""`python -m vcr1_fast.tiny.cold_start`: rebuild a packaged model from nothing, `--model tiny3` that of Qwen3-VL.

Untrained model and tokenizer, clips with poor labels, supervised steps, export into this package. The labels are poor
on purpose, as annotations made by hand are: the think block to learn is exact, but events begin and end up to 0.9 s
late, boxes are up to a sixth of the frame too large on each side, 6 of 10 questions that need care are answered with
the first option, and 6 of 10 damaged clips are called good. So the model learns to read and to answer in form, and
being right is left for GRPO to find from rewards.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vcr1_fast.run.model_folder import PACKAGED, VIDEO_FILE
from vcr1_fast.settings.config import Config
from vcr1_fast.settings.io import load_settings
from vcr1_fast.sft import sft
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset
from vcr1_fast.tiny.build import build_tiny

TYPES = {"tiny": "qwen2_5_vl", "tiny3": "qwen3_vl"}
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    VIDEO_FILE,
)
POOR_CLIPS = SynthConfig(
    num_train=1200, num_eval=64, label_lag_s=0.9, label_slack_frac=0.16, label_careless_frac=0.6, seed=1
)


def rebuild(
    folder: Path,
    destination: Path,
    model_type: str = "qwen2_5_vl",
    clips: SynthConfig = POOR_CLIPS,
    overrides: Sequence[str] = (),
) -> None:
    """Train in `folder` and copy the model's files to `destination`. Half an hour on 2 cores that do other things too.

    `overrides`: settings such as `--sft.num_steps=2` on top of sft.yaml.
    """
    data = folder / "sft_data"
    write_dataset(replace(clips, output_dir=str(data)))
    build_tiny(folder / "untrained", model_type=model_type)
    start = f"--model.path={folder / 'untrained'}"
    config = load_settings(Config, str(PACKAGED["tiny"] / "sft.yaml"), [start, *overrides])
    files = {split: tuple(str(data / f"{split}_{kind}.jsonl") for kind in clips.kinds) for split in ("train", "eval")}
    config = replace(
        config,
        data=replace(config.data, train=files["train"], eval=files["eval"]),
        train=replace(config.train, output_dir=str(folder / "sft")),
    )
    sft(config)
    for name in MODEL_FILES:
        shutil.copyfile(folder / "sft" / "model" / name, destination / name)
        (destination / name).chmod(0o644)  # safetensors writes for its owner alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(TYPES), default="tiny", help="which one")
    parser.add_argument("--folder", type=Path, help="where clips and the run go (default: runs/MODEL)")
    parser.add_argument("--destination", type=Path, help="where the model's files go (default: into the package)")
    arguments = parser.parse_args()
    destination = arguments.destination or PACKAGED[arguments.model]
    rebuild(arguments.folder or Path("runs", arguments.model), destination, TYPES[arguments.model])
    print(f"wrote {', '.join(MODEL_FILES)} to {destination}")


if __name__ == "__main__":
    main()
