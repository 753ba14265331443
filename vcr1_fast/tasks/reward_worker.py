"""The process in which a user's code scores answers: `python -m vcr1_fast.tasks.reward_worker FD`.

FD is one end of a socket, over which Python objects travel pickled: first the TaskConfig, answered by "" or by why the
user's code cannot be loaded; then (task, member, examples, answers), each answered by (True, what
`CheckedTask.call_here` gave) or (False, the message of its error). Started by `reward_process`.
"""

from __future__ import annotations

import random
import sys
import zlib
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import cast

import numpy as np

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.custom import CheckedTask
from vcr1_fast.video.loader_worker import give_up_after

GRACE_S = 10.0


def serve(connection: Connection) -> None:
    """Answer until the other end is closed."""
    config: TaskConfig = connection.recv()
    try:
        tasks = make_tasks(replace(config, reward_timeout_s=0.0, prompts={}))  # nothing is asked here
    except (Exception, SystemExit) as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send("")
    while True:
        task, member, examples, answers = connection.recv()
        _seed(task, member, [example.id for example in examples], answers)
        # The trainer ends this process in time, unless it is dead: then nobody else does.
        with give_up_after(config.reward_timeout_s + GRACE_S):
            try:
                reply = (True, cast(CheckedTask, tasks[task]).call_here(member, examples, answers))
            except ValueError as error:
                reply = (False, str(error))
        connection.send(reply)


def _seed(*question: object) -> None:
    """What a reward draws follows from what it is asked: the same in a run that was killed and resumed."""
    seed = zlib.crc32(repr(question).encode("utf-8", "backslashreplace"))
    random.seed(seed)
    np.random.seed(seed)


def main() -> None:
    with Connection(int(sys.argv[1])) as connection:
        try:
            serve(connection)
        except (EOFError, BrokenPipeError, ConnectionResetError):  # the trainer ended
            return


if __name__ == "__main__":
    main()
