"""The trained policy -> a folder that Hugging Face's `from_pretrained` loads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vcr1_fast.learner.sharding import SINGLE_PROCESS, World, named_weights, on_main_rank, whole_tensor
from vcr1_fast.run_folder import replace_folder

_EXTRA_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


def export_hugging_face(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    world: World = SINGLE_PROCESS,
    *,
    dtype: torch.dtype | None = None,
    source: str | Path | None = None,
) -> Path:
    """Write `policy.hf` as a folder that `from_pretrained` loads: safetensors, config, generation config, tokenizer.

    dtype: of the weights on disk; None keeps the float32 masters (bfloat16 halves the folder). source: folder of the
    starting model, whose image and video processor settings are copied when there are any. A collective: call on all
    ranks; one weight at a time is gathered, rank 0 holds all of them in host memory. The folder appears whole or not
    at all; an earlier export there is replaced. Raises OSError when it cannot be written or is something else.
    """
    final = Path(folder).absolute()
    aside = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    hf = policy.get_submodule("hf")
    assert isinstance(hf, PreTrainedModel), f"policy.hf is {type(hf).__name__}, wanted a Hugging Face model"
    whole: dict[str, Tensor] = {}
    for name, weight in named_weights(hf).items():
        value = whole_tensor(weight)
        if world.is_main:
            whole[name] = value.to("cpu", dtype if value.is_floating_point() else None)

    def write() -> None:
        if final.exists() and not (final / "config.json").is_file():
            raise FileExistsError(f"cannot export to {final}: it exists and is no model folder; choose another path")
        aside.mkdir(parents=True)
        try:
            hf.save_pretrained(aside, state_dict=whole)
            if dtype is not None:
                config = json.loads((aside / "config.json").read_text(encoding="utf-8"))
                config["dtype"] = str(dtype).removeprefix("torch.")
                (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            tokenizer.save_pretrained(str(aside))
            extra = [Path(source) / name for name in _EXTRA_FILES] if source is not None else []
            for path in extra:
                if path.is_file():
                    shutil.copy2(path, aside / path.name)
            replace_folder(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    on_main_rank("exporting the model", write, world)
    return final
