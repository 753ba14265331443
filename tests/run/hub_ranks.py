"""Run by test_hub on each of two ranks: what becomes of some paths, as a list in the file rank_RANK of a folder.

Arguments: that folder, and the paths.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from vcr1_fast.learner.sharding import init_distributed, shutdown
from vcr1_fast.run.hub import with_hub_model
from vcr1_fast.run.model_folder import model_folder
from vcr1_fast.settings.config import Config

if __name__ == "__main__":
    world = init_distributed("cpu")
    said: list[object] = []
    for asked in sys.argv[2:]:
        try:
            path = with_hub_model(Config(model=replace(Config().model, path=asked)), world).model.path
            said.append([path, str(model_folder(path))])
        except (OSError, ValueError) as error:
            said.append(str(error))
    (Path(sys.argv[1]) / f"rank_{world.rank}").write_text(json.dumps(said))
    shutdown(world)
