"""The 1 M parameter Qwen2.5-VL that ships with the package: weights, tokenizer, and how they were made."""
