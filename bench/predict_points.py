"""What predictions are held against: what other systems reported, and every update that was measured here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.step_model import GPU_POINTS, TINY_CHECK, TINY_POINTS
from bench.update_meter import ATTENTIONS, CONFIG, ROOT, Point
from vcr1_fast.fake_gpu.predict import Rates
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES, whole_config

RESULTS = ROOT / "bench" / "results"

# key: of a row of `bench predict`
PUBLIC: list[dict[str, Any]] = [
    {
        "system": "VideoChat-R1",
        "hardware": "8 A100",
        "case": "videochat_r1_8xh100",
        "quantity": "compl./s",
        "key": "completions_per_s",
        "reported": 0.27,
        "note": "an A100 has a third of an H100's arithmetic; generation by transformers; optimizer in host memory; "
        "lengths of clip and answers are our case's; decoding, rewards and waiting are in theirs alone",
    },
    {
        "system": "EasyVideoR1",
        "hardware": "32 H200",
        "case": "easyvideor1_group_8b_h200",
        "quantity": "update s",
        "key": "predicted_s",
        "reported": 54.0,
        "note": "our answers are 1,000 tokens each, theirs about that on average",
    },
    {
        "system": "EasyVideoR1",
        "hardware": "32 H200",
        "case": "easyvideor1_group_8b_h200",
        "quantity": "compl./s",
        "key": "completions_per_s",
        "reported": 0.061,
        "note": "as above; their step of 132 s has 19 s of log-probs, and decoding, rewards and waiting besides",
    },
]  # fmt: skip


def own_points(folder: Path = RESULTS) -> list[tuple[dict[str, Any], Point]]:
    """(row of a result of `bench step`, its point) of each update with the product's kernels in there."""
    sizes = {point.name: point for point in (*TINY_POINTS, TINY_CHECK, *GPU_POINTS)}
    found = []
    for file in sorted(folder.glob("step_*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        for row in result["rows"]:
            point = sizes.get(row["size"])
            if point is not None and row["way"].startswith("kernels"):
                name = f"{file.name} {row['size']} {row['way']}"
                found.append(({**row, "file": file.name}, _own_point(name, result, row, point.grid)))
    return found


def _own_point(name: str, result: dict[str, Any], row: dict[str, Any], grid: tuple[int, int, int]) -> Point:
    """At the rates for products and copies of the same run. On a CPU attention is taken to reach that of products."""
    limits, is_tiny = result["limits"], result["model"] == "tiny"
    gemm = limits["gemm_tflop_s"] * 1e12
    kinds: dict[str, Any] = (
        {} if result["is_gpu"] else {"attention_flop_s": {version: (gemm, gemm) for version in ATTENTIONS}}
    )
    rates = Rates(f"measured: {name}", gemm_flop_s=gemm, memory_bytes_s=limits["copy_gb_s"] * 1e9, **kinds)
    tiny = json.loads((ROOT / "vcr1_fast" / "tiny" / "config.json").read_text(encoding="utf-8"))
    return Point(
        name,
        tiny if is_tiny else whole_config(PUBLIC_SIZES[f"Qwen2.5-VL-{result['model']}"]),
        grid,
        (row["completion_tokens"],) * row["group_size"],
        num_gpus=1,
        gpu="H200",
        config=ROOT / "configs" / "tiny_grounding_cpu.yaml" if is_tiny else CONFIG,
        settings=(
            f"model.compute_dtype={result['dtype']}",
            f"model.gradient_checkpointing={'full' if row['gradient_checkpointing'] else 'none'}",
        ),
        text_tokens=row["prompt_tokens"] - grid[0] * grid[1] * grid[2] // 4,
        measured_rates=rates,
    )


def error_rows(measured: Sequence[dict[str, Any]], predicted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far off the prediction of each measured update is."""
    return [
        {
            "file": row["file"],
            "size": row["size"],
            "measured_ms": row["median_ms"],
            "predicted_ms": 1e3 * counts["predicted_s"],
            "error": 1e3 * counts["predicted_s"] / row["median_ms"] - 1,
        }
        for row, counts in zip(measured, predicted, strict=True)
    ]
