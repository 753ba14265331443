"""`python -m vcr1_fast.tiny.build FOLDER`: an untrained tiny model with its tokenizer, as a Hugging Face folder.

The weights in the package are this model after supervised cold start (`vcr1-fast sft`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from vcr1_fast.run.model_folder import VIDEO_FILE
from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.synth.config import COLOURS, KINDS, SHAPES, SynthConfig
from vcr1_fast.synth.dataset import make_clip
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tiny.architecture import tiny_config, untrained_model
from vcr1_fast.tiny.published import write_as_published
from vcr1_fast.tiny.tokenizer import build_tokenizer
from vcr1_fast.types import Example
from vcr1_fast.video.formats import FORMATS

# Clips of 8 s, and frames of 3 x 3 tokens: 9 tokens a second.
VIDEO = {
    model_type: {"max_frames": 16} | dict.fromkeys(("min_frame_pixels", "max_frame_pixels"), (3 * video.factor_px) ** 2)
    for model_type, video in FORMATS.items()
}
_NUM_SAMPLE_CLIPS = 16  # enough that every word of the think texts occurs
_PAPER_KINDS = ("grounding", "tracking")  # prompts of recipe paper whose words the vocabulary has; others are spelled


def build_tiny(folder: Path, seed: int = 0, model_type: str = "qwen2_5_vl") -> None:
    """Write config, tokenizer and random float32 weights into `folder`. Raises OSError when it cannot be written."""
    tokenizer = build_tiny_tokenizer()
    model = untrained_model(tiny_config(tokenizer, model_type), seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    write_as_published(folder)
    (folder / VIDEO_FILE).write_text(json.dumps(VIDEO[model_type], indent=2) + "\n", encoding="utf-8")


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer over the questions and answers of all synthetic clips. Always the same."""
    return build_tokenizer(_corpus())


def _corpus() -> Iterator[str]:
    """Everything the tiny model reads or writes besides numbers."""
    yield "system\nYou are a helpful assistant."
    yield "user\n"
    yield "assistant\n"
    clips = SynthConfig()
    for kind in KINDS:
        rows = [make_clip(clips, "train", kind, index)[1] for index in range(_NUM_SAMPLE_CLIPS)]
        for config in (TaskConfig(), TaskConfig(think=False), TaskConfig(recipe="paper")):
            if config.recipe == "paper" and kind not in _PAPER_KINDS:
                continue
            tasks = make_tasks(config)
            for row in rows:
                task = tasks[str(row["task"])]
                example = Example("", task.name, "", str(row["query"]), clips.duration_s, task.parse_truth(row))
                yield task.question(example)
                yield task.target(example)
        yield from (f"<think>{row['reasoning']}</think>" for row in rows)
    yield from (f" {word}" for word in (*COLOURS, *SHAPES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--type", choices=sorted(FORMATS), default="qwen2_5_vl", help="model_type, the architecture")
    arguments = parser.parse_args()
    build_tiny(arguments.folder, arguments.seed, arguments.type)
    print(f"wrote an untrained tiny model to {arguments.folder}")


if __name__ == "__main__":
    main()
