"""Kernels for GRPO training of language models: torch and Triton only, usable without vcr1_fast."""
