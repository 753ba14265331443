"""Addresses of rollout workers as people write them. Called by the settings, the trainer and `vcr1-fast serve`."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence

Address = tuple[str, int]  # host and port
DEFAULT_PORT = 29800  # of the first worker; below the ports that Linux gives to outgoing connections
_WRITTEN = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s\[\]:]+)(?::(?P<first>\d{1,5})(?:-(?P<last>\d{1,5}))?)?")


def read_addresses(written: Sequence[str]) -> list[Address]:
    """`node:29800`, `[fd00::1]:29800`, or `node:29800-29807` for a worker on each of these ports, in order.

    Raises ValueError for anything else, and for an address that comes twice.
    """
    found: list[Address] = []
    for text in written:
        host, first, last = _read(text)
        if first is None or not 1 <= first <= last <= 65535:
            raise ValueError(f"{text!r} is no address of workers, wanted such as node:29800 or node:29800-29807")
        found += [(host, port) for port in range(first, last + 1)]
    twice = {address for address in found if found.count(address) > 1}
    if twice:
        raise ValueError(f"{show(min(twice))} is named twice: a worker serves one rank")
    return found


def as_setting(host: str, ports: Sequence[int]) -> str:
    """The inverse of `read_addresses` for one host, as the command line takes `rollout.sglang.addresses`: in quotes,
    without which YAML reads the brackets of IPv6 as a list."""
    is_range = len(ports) > 1 and list(ports) == list(range(ports[0], ports[0] + len(ports)))
    shown = [show((host, port)) for port in (ports[:1] if is_range else ports)]
    return json.dumps([f"{shown[0]}-{ports[-1]}"] if is_range else shown)


def read_bind(text: str) -> Address:
    """`host`, `host:port` or `[v6]:port`; without a port the default one, 0 for any free ones. Raises ValueError."""
    host, first, last = _read(text)
    if first is not None and (first != last or first > 65535):
        raise ValueError(f"{text!r} is no address to listen at, wanted HOST:PORT, the port of the first worker")
    return host, DEFAULT_PORT if first is None else first


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def show(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _read(text: str) -> tuple[str, int | None, int]:
    match = _WRITTEN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no address, wanted HOST:PORT, or [HOST]:PORT for one of IPv6")
    first = int(match["first"]) if match["first"] else None
    return match["host"].strip("[]"), first, int(match["last"] or match["first"] or 0)
