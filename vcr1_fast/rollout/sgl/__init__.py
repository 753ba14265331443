"""Behind sglang_engine.py: worker processes with one `sglang.Engine` each, and the ways to them.

    the trainer       workers.py: all workers of a rank, each a link.py: a child (process.py) or elsewhere (remote.py)
      asks            round.py: one `generate`; pixels.py
      gives weights   weights.py, adapters.py -> feed.py -> delivery.py (ipc.py, group.py)
    in between        messages.py; between machines handshake.py, tcp.py
    the worker        worker.py (serving.py under `vcr1-fast serve`), video.py, update.py
    inside SGLang     check.py, lora.py: its "custom weight loaders"

Not named `sglang`: a folder of that name beside ours is what a type checker takes `import sglang` for.
"""
