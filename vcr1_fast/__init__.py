"""vcr1-fast: GRPO training of video language models. The map is in README.md."""

__version__ = "0.1.0"
