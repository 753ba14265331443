"""Run by test_reader_choice on each of two ranks: what each takes for auto, and what it says of another's version.

Arguments: a folder, for a file rank_RANK, and an annotation file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vcr1_fast.learner.sharding import init_distributed, shutdown
from vcr1_fast.run import reader_choice
from vcr1_fast.settings.config import Config, ConfigError
from vcr1_fast.settings.io import load_config
from vcr1_fast.settings.video import ReaderName
from vcr1_fast.tasks import make_tasks
from vcr1_fast.video.clip import ClipRequest
from vcr1_fast.video.reader_speed import Speed

if __name__ == "__main__":
    world = init_distributed("cpu")
    cores: list[int] = []

    def measured(readers: Sequence[ReaderName], clips: Sequence[ClipRequest], on: Sequence[int]) -> list[Speed]:
        assert world.is_main, "only rank 0 measures"
        cores.extend(on)
        return [Speed(reader, reader, 1, dict.fromkeys(clips, 0.1 / (1 + i))) for i, reader in enumerate(readers)]

    reader_choice.measure_readers = measured
    reader_choice.candidates = lambda device: ["pyav", "decord"] if world.is_main else ["dali+pyav"]
    config: Config = load_config("tiny", [f"--data.train={sys.argv[2]}"])
    chosen = reader_choice.with_reader(config, world, make_tasks(config.task), None, trains=True).video.reader
    refused = ""
    reader_choice.require_one_reader("decord 0.6", world)
    try:
        reader_choice.require_one_reader(f"decord 0.{world.rank}", world)
    except ConfigError as error:
        refused = str(error)
    (Path(sys.argv[1]) / f"rank_{world.rank}").write_text(json.dumps([chosen, refused, cores]))
    shutdown(world)
