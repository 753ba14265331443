"""The worker's side of `vcr1-fast serve`: everything is imported, then it waits for the trainer that serve.py brings.

    serve  -> worker   serve {engine_args, gpu}
    worker -> serve    waiting {sglang, torch, gpu}, or absent {reason}
    serve  -> worker   adopt {state of the TCP connection}, and the connection itself; or close
    serve  -> worker   close: end in order

So the worker never reads a byte of somebody without the key, and the seconds that SGLang's import takes are over before
a trainer comes. Runs in SGLang's interpreter.
"""

from __future__ import annotations

import contextlib
import sys
import threading

import torch

from vcr1_fast.rollout.sgl.messages import Channel, Message
from vcr1_fast.rollout.sgl.tcp import TcpChannel

HAND_OVER_S = 10.0


def await_trainer(parent: Channel, order: Message) -> Channel:
    """The channel to the trainer. Ends this process when serve says so, or is gone."""
    import sglang  # pyright: ignore[reportMissingImports]

    gpu = order.fields["gpu"]
    name = "none" if gpu is None else torch.cuda.get_device_name(gpu)
    parent.send("waiting", {"sglang": str(sglang.__version__), "torch": torch.__version__, "gpu": name})
    return adopted(parent)


def adopted(parent: Channel) -> Channel:
    """Waits for the hand-over; from then on serve's `close` ends the connection, and the worker with it."""
    message = parent.receive()
    if message.kind != "adopt":
        sys.exit(0)
    channel = TcpChannel.restored(parent.take_over(HAND_OVER_S), message.fields)
    threading.Thread(target=_obey, args=(parent, channel), daemon=True).start()
    return channel


def _obey(parent: Channel, channel: Channel) -> None:
    with contextlib.suppress(EOFError, OSError, ValueError):  # serve is gone; worker._follow ends this process
        parent.receive()
    channel.close()
