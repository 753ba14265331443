"""The bytes of a checkpoint -> disk, with what makes it whole; and the process that does it beside the steps.

`python -m vcr1_fast.run.checkpoint_writer SOCKET MEMORY PARENT`: a line of JSON on SOCKET is one job, see `_job`; the
files' bytes lie in MEMORY, a descriptor. The answer is a line, too. It never renames a folder: only the run does, which
holds the lock of its folder. It needs no torch, so it is there in a tenth of a second, and the kernel ends it with its
run.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import sys
import time
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vcr1_fast.run.model_folder import STATE_FILE
from vcr1_fast.video.loader_worker import end_with

FORMAT = 2  # of state.json and the tensor names; raise it with every change that old code cannot read
_PIECE_BYTES = 4 << 20  # written while the cache still has it from the CRC
_NUM_WRITERS = 4  # files written at once by one rank: a CRC holds one core, a network disk is slower than that
_RANK_POLL_S = 0.05
FileEntry = dict[str, Any]  # bytes, crc32: what state.json says of a file


def write_file(path: Path, parts: Iterable[memoryview]) -> FileEntry:
    """Write and flush the parts, one after the other. Raises OSError."""
    crc = num_bytes = 0
    with path.open("wb", buffering=0) as file:
        for part in parts:
            for begin in range(0, len(part), _PIECE_BYTES):
                piece = part[begin : begin + _PIECE_BYTES]
                crc, num_bytes = zlib.crc32(piece, crc), num_bytes + len(piece)
                while piece:
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return {"bytes": num_bytes, "crc32": f"{crc:08x}"}


def write_state(folder: Path, document: Mapping[str, Any], files: Mapping[str, FileEntry]) -> None:
    """state.json, which makes the folder a checkpoint: the `document`, every file, a CRC-32 of itself."""
    document = {**document, "format": FORMAT, "files": dict(sorted(files.items()))}
    text = json.dumps(document | {"crc32": crc32_of_document(document)}, indent=2) + "\n"
    write_file(folder / STATE_FILE, [memoryview(text.encode())])


def crc32_of_document(document: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(document, sort_keys=True).encode()):08x}"


def main() -> None:
    end_with(int(sys.argv[3]))
    run_is_gone = contextlib.suppress(BrokenPipeError, ConnectionResetError)  # found out before the kernel ends this
    with run_is_gone, socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rb") as jobs:
        for line in jobs:
            began = time.monotonic()
            try:
                _job(int(sys.argv[2]), **json.loads(line))
                answer = {"seconds": time.monotonic() - began}
            except Exception as error:
                answer = {"error": str(error) or type(error).__name__}
            connection.sendall(json.dumps(answer).encode() + b"\n")


def _job(
    memory: int,
    folder: str,
    files: list[tuple[str, int, int]],
    rank: int,
    world_size: int,
    document: dict[str, Any],
) -> None:
    """Write this rank's `files`: name below `folder`, first byte in the memory, number of bytes. The first rank then
    waits for the others', who may be on other machines and meet it on the disk that all share, and writes state.json.
    """
    aside = Path(folder)
    staged = memoryview(mmap.mmap(memory, os.fstat(memory).st_size, prot=mmap.PROT_READ))
    with ThreadPoolExecutor(_NUM_WRITERS, "checkpoint") as pool:
        entries = pool.map(lambda file: write_file(aside / file[0], [staged[file[1] : file[1] + file[2]]]), files)
        mine = {name: entry for (name, _, _), entry in zip(files, entries, strict=True)}
    if rank:
        path = _of_rank(aside, rank)
        write_file(path.with_suffix(".new"), [memoryview(json.dumps(mine).encode())])
        path.with_suffix(".new").rename(path)
        return
    for other in range(1, world_size):
        path = _of_rank(aside, other)
        while not path.exists():
            time.sleep(_RANK_POLL_S)
        mine |= json.loads(path.read_bytes())
        path.unlink()
    write_state(aside, document, mine)


def _of_rank(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


if __name__ == "__main__":
    main()
