"""Benchmarks: `python -m bench NAME`. Each prints a card and a table, ends in one JSON line, and stores that line."""
