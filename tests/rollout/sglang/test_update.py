"""What the worker's side of an update decides by itself; contract_checks.py holds its requests against SGLang's."""

from __future__ import annotations

import random
import socket

import pytest

from vcr1_fast.rollout.sgl import update as sglang_update


def test_two_engines_of_a_machine_get_two_ports(monkeypatch: pytest.MonkeyPatch):
    """SGLang binds its port some 15 s after it got it: until then another engine must not get it, too."""
    first = sglang_update.quiet_port()
    with socket.create_server(("", 0)) as taken:
        drawn = iter([first, taken.getsockname()[1], first + 1, first + 2, first + 3])  # one of the last will be free
        monkeypatch.setattr(random.SystemRandom, "randrange", lambda *_: next(drawn))
        assert first < sglang_update.quiet_port() <= first + 3
