"""One of two ranks: rank 1 sleeps in a step while rank 0 waits for it; both have a watchdog of a second."""

import sys
import time

from vcr1_fast.learner.sharding import all_max_int, init_distributed, shutdown
from vcr1_fast.run.telemetry import Telemetry


def sleeps_in_its_step() -> None:
    time.sleep(2.5)


def main() -> None:
    world = init_distributed("cpu")
    telemetry = Telemetry(f"{sys.argv[1]}/run", world.rank, watchdog_s=1.0)
    if world.rank == 1:
        sleeps_in_its_step()
    assert all_max_int(world.rank, world) == 1
    telemetry.log_step(1, {}, num_steps=1)
    telemetry.close()
    shutdown(world)
    time.sleep(1.2)  # closed: nothing more is printed
    print("done", file=sys.stderr, flush=True)


main()
