"""`python -m vcr1_fast.tiny.cold_start`: rebuild the packaged model from nothing.

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

from vcr1_fast.run.model_folder import VIDEO_FILE
from vcr1_fast.settings.config import Config
from vcr1_fast.settings.io import load_settings
from vcr1_fast.sft import sft
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset
from vcr1_fast.tiny.build import build_tiny

PACKAGE = Path(__file__).parent
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


def rebuild(folder: Path, destination: Path, clips: SynthConfig = POOR_CLIPS, overrides: Sequence[str] = ()) -> None:
    """Train in `folder` and copy the model's files to `destination`. Half an hour on 2 cores that do other things too.

    `overrides`: settings such as `--sft.num_steps=2` on top of sft.yaml.
    """
    data = folder / "sft_data"
    write_dataset(replace(clips, output_dir=str(data)))
    build_tiny(folder / "untrained")
    config = load_settings(Config, str(PACKAGE / "sft.yaml"), list(overrides))
    files = {split: tuple(str(data / f"{split}_{kind}.jsonl") for kind in clips.kinds) for split in ("train", "eval")}
    config = replace(
        config,
        model=replace(config.model, path=str(folder / "untrained")),
        data=replace(config.data, train=files["train"], eval=files["eval"]),
        train=replace(config.train, output_dir=str(folder / "sft")),
    )
    sft(config)
    for name in MODEL_FILES:
        shutil.copyfile(folder / "sft" / "model" / name, destination / name)
        (destination / name).chmod(0o644)  # safetensors writes for its owner alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs", "tiny"), help="where clips and the run go")
    parser.add_argument("--destination", type=Path, default=PACKAGE, help="where the model's files go")
    arguments = parser.parse_args()
    rebuild(arguments.folder, arguments.destination)
    print(f"wrote {', '.join(MODEL_FILES)} to {arguments.destination}")


if __name__ == "__main__":
    main()
