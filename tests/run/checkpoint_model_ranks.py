"""Run by test_checkpoint_model on each of two ranks: the model of a checkpoint that one process saved.

Arguments: the checkpoint, and the folder of the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.run.test_checkpoint_model import asked
from vcr1_fast.learner.sharding import init_distributed, shutdown
from vcr1_fast.run.checkpoint_model import with_model_of_checkpoint

if __name__ == "__main__":
    world = init_distributed("cpu")
    config = with_model_of_checkpoint(asked(Path(sys.argv[1]), Path(sys.argv[2])), world)
    print(config.model.path)
    shutdown(world)
