"""The example of kernels/README.md runs as it stands there."""

from pathlib import Path

import torch

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_the_first_example_trains():
    lines = README.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    import torch"))
    end = next(i for i, line in enumerate(lines) if i > start and line and not line.startswith("    "))
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec("\n".join(line[4:] for line in lines[start:end]), names)
    hidden, weight = names["hidden"], names["weight"]
    assert isinstance(hidden, torch.Tensor) and hidden.grad is not None and hidden.grad.any()
    assert isinstance(weight, torch.Tensor) and weight.grad is not None and weight.grad.any()
