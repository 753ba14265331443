"""vcr1-fast: GRPO training of video language models. See README.md for the map; importing this imports nothing heavy."""

__version__ = "0.1.0"
