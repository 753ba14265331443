"""Behind sglang_engine.py: worker processes with one `sglang.Engine` each, and the ways to them.

    the trainer       workers.py: all workers of a rank, each a link.py, which may have a child (process.py)
      asks            round.py: one `generate`
      gives weights   weights.py -> feed.py -> delivery.py (host_copy.py, group.py)
    in between        messages.py; the trainer's end channel.py, the worker's endpoint.py
    the worker        worker.py, video.py, update.py
    inside SGLang     check.py, penalty.py, features.py

Not named `sglang`: a folder of that name beside ours is what a type checker takes `import sglang` for.
"""
