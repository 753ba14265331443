"""The disk tier of the cache: a folder that processes and runs share, with one checked file for each entry.

    FOLDER/3f/3f0c...e1.safetensors   an entry; its name is its key, the first two digits choose the sub-folder
    FOLDER/tmp/                       entries being written; renamed when complete, so no one sees half an entry
    FOLDER/lock                       held (flock) by the process that drops old entries; its bytes are marks of others

An entry is a safetensors file, so any tool can look at it. Its metadata begin with the CRC-32 of every other byte of
the file. CRC-32 because zlib does 4.2 GB/s on one core where blake2b does 0.9, and accidents are all it is for.
Nothing is synced to the disk: what a power failure leaves half written, the checksum finds.

Files are read, not memory-mapped: the checksum touches every byte anyway, and a mapped file that someone truncates
ends the process with SIGBUS, which no `try` catches.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

logger = logging.getLogger(__name__)

FILE_FORMAT = "1"
SUFFIX = ".safetensors"
ENTRY_NAME = re.compile(r"[0-9a-f]{32,128}\.safetensors")
SHARD_NAME = re.compile(r"[0-9a-f]{2}")
TEMPORARY, LOCK = "tmp", "lock"
HEAD = b'{"__metadata__":{"crc32":"'  # what follows the 8 bytes of header length, then come the 8 digits
CRC_START, CRC_END = 8 + len(HEAD), 8 + len(HEAD) + 8
MAX_HEADER_BYTES = 1 << 20
CHUNK_BYTES = 1 << 20  # read or written and summed while it is in the L2 cache

TOUCH_AFTER_S = 60.0  # an entry's time of last use is this coarse, so that reading does not mean writing
STALE_TEMPORARY_S = 3600.0  # a write lasts seconds; an hour allows for the clocks of several machines
SCAN_FRAC = 1 / 128  # of the budget: what one process writes at most before it looks at the folder again
HIGHEST_FRAC, LOWEST_FRAC = 0.95, 0.85  # of the budget: dropping begins above the one and ends at the other
MANY_WRITERS = 16
MAX_LOOKS = 8  # at the folder, one after the other, because others wrote meanwhile; then they look themselves
FREE_FRAC, FREE_BYTES = 0.05, 4 << 30  # of the disk, whichever is less, is left free: checkpoints need room too

# The machine's fault or gone in the meantime; the file itself may be sound.
NOT_DAMAGED = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """Named tensors and some text. Whoever gets one shares it with all others: it must not be written to."""

    tensors: Mapping[str, torch.Tensor]  # on the CPU, contiguous
    metadata: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write_entry(file: BinaryIO, key: str, entry: Entry) -> None:
    """Write the whole of a new file. Raises OSError."""
    # Wide types first, which keeps each tensor aligned to its own width without gaps; safetensors forbids gaps.
    ordered = sorted(entry.tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    about = {"crc32": "00000000", "format": FILE_FORMAT, "key": key, "entry": json.dumps(dict(entry.metadata))}
    fields: dict[str, object] = {"__metadata__": about}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        fields[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    assert header.startswith(HEAD)
    head = len(header).to_bytes(8, "little") + header
    file.write(head)
    crc = zlib.crc32(head)
    for _, tensor in ordered:
        raw = tensor.reshape(-1).view(torch.uint8).numpy().data
        for at in range(0, len(raw), CHUNK_BYTES):
            crc = zlib.crc32(raw[at : at + CHUNK_BYTES], crc)
            file.write(raw[at : at + CHUNK_BYTES])
    file.seek(CRC_START)
    file.write(b"%08x" % crc)


def read_entry(file: FileIO, key: str) -> Entry:
    """What `write_entry` wrote for `key`. Raises ValueError for anything else, OSError where it cannot be read."""
    num_bytes = os.fstat(file.fileno()).st_size  # 0 for pipes and devices
    if num_bytes < CRC_END:
        raise ValueError(f"{num_bytes} bytes are no entry")
    start = bytearray(CRC_END)
    _fill(file, memoryview(start))
    header_end = 8 + int.from_bytes(start[:8], "little")
    if not start.startswith(HEAD, 8) or not CRC_END <= header_end <= min(num_bytes, MAX_HEADER_BYTES):
        raise ValueError("it does not begin like an entry")
    head = start + bytearray(header_end - CRC_END)
    _fill(file, memoryview(head)[CRC_END:])
    try:
        return _read_data(file, head, num_bytes - header_end, key)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:  # nothing of the header is sure yet
        raise ValueError(f"its header makes no sense: {error!r}") from error


def _read_data(file: FileIO, head: bytearray, num_bytes: int, key: str) -> Entry:
    fields = json.loads(head[8:])
    about = fields.pop("__metadata__")
    if (about["format"], about["key"]) != (FILE_FORMAT, key):
        raise ValueError(f"it is of format {about['format']} for {about['key']}, wanted {FILE_FORMAT} for {key}")
    wanted_bytes = max((field["data_offsets"][1] for field in fields.values()), default=0)
    if num_bytes != wanted_bytes:
        raise ValueError(f"it holds {num_bytes} bytes of data, wanted {wanted_bytes}")
    wanted_crc = int(head[CRC_START:CRC_END], 16)
    head[CRC_START:CRC_END] = b"00000000"
    crc = zlib.crc32(head)
    data = np.empty(num_bytes, dtype=np.uint8)  # numpy asks for huge pages, torch does not: 2.5 x faster for 116 MB
    view = data.data
    for at in range(0, num_bytes, CHUNK_BYTES):
        _fill(file, view[at : at + CHUNK_BYTES])
        crc = zlib.crc32(view[at : at + CHUNK_BYTES], crc)
    if crc != wanted_crc:
        raise ValueError(f"the CRC-32 of its bytes is {crc:08x}, it says {wanted_crc:08x}")
    whole = torch.from_numpy(data)
    tensors = {
        name: whole[slice(*field["data_offsets"])].view(DTYPES[field["dtype"]]).reshape(field["shape"])
        for name, field in fields.items()
    }
    return Entry(tensors, json.loads(about["entry"]))


def _fill(file: FileIO, view: memoryview) -> None:
    num_read = 0
    while num_read < len(view):
        got = file.readinto(view[num_read:])
        if not got:
            raise ValueError("it is cut short")
        num_read += got


class DiskTier:
    """Any number of threads and processes may use one folder, each with an object of its own.

    The budget holds approximately. A process looks at the folder after its first write and then whenever it has
    written 1/128 of the budget (or 1/16 of what is still free, if that is more), and drops the entries that were used
    longest ago when they take more than 95 %, down to 85 %. With P processes writing at once the folder therefore
    stays under 0.95 + P / 128 of the budget and one entry each, but for what is written during one look.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Makes the folder. If that fails there is a warning and nothing is stored; nothing is raised."""
        self.folder, self.max_bytes = folder, max_bytes
        self.is_off = False  # nothing more is written; entries are still read
        self.num_healed = self.num_evicted = 0
        self.num_bytes: int | None = None  # of the folder, when this process last looked
        self._unscanned_bytes = self._scan_after_bytes = 0
        self._lock = threading.Lock()
        try:
            (folder / TEMPORARY).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._turn_off(error)

    def has(self, key: str) -> bool:
        """Whether there is a file for it, sound or not."""
        return self._path(key).exists()

    def read(self, key: str) -> Entry | None:
        """The entry, or None. A file that is damaged, foreign or unreadable is removed and counted."""
        path = self._path(key)
        try:
            with FileIO(path, "rb", opener=_open_at_once) as file:
                entry = read_entry(file, key)
        except OSError as error:
            if error.errno not in NOT_DAMAGED:
                self._remove_damaged(path, error)
            return None
        except (ValueError, MemoryError) as error:
            self._remove_damaged(path, error)
            return None
        self.touch(key)
        return entry

    def touch(self, key: str) -> None:
        """Note that the entry was used just now, unless it was noted within the last minute."""
        path = self._path(key)
        with suppress(OSError):  # dropped meanwhile, or a folder that is not ours to write to
            if time.time() - path.stat().st_mtime > TOUCH_AFTER_S:
                os.utime(path)

    def write(self, key: str, entry: Entry) -> None:
        """Store the entry, unless it is there already. On any failure of the disk this is the last one stored."""
        if self.is_off or entry.num_bytes > self.max_bytes:
            return
        path = self._path(key)
        try:
            if path.exists():  # another process was faster; equal keys mean equal contents
                return
            temporary = self.folder / TEMPORARY / f"{key}.{os.getpid()}.{secrets.token_hex(4)}"
            try:
                with open(temporary, "xb") as file:
                    write_entry(file, key, entry)
                path.parent.mkdir(exist_ok=True)
                os.replace(temporary, path)
            except BaseException:
                _remove(str(temporary))
                raise
            self._count_written(entry.num_bytes)
        except OSError as error:
            self._turn_off(error)

    def make_room(self) -> None:
        """Look at the folder; drop what was used longest ago if it is too much.

        One process at a time does it. The others do not wait but leave a mark, for which it looks once more: what they
        wrote is seen also when they write nothing again.
        """
        with open(self.folder / LOCK, "ab", buffering=0) as lock:
            with suppress(OSError):  # a full disk
                lock.write(b".")  # before asking for the lock, so that who has it finds this when it lets go
            for _ in range(MAX_LOOKS):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
                except OSError:  # a file system without locks: two at once drop a little more than they need to
                    pass
                lock.truncate(0)
                self._drop_surplus()
                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_UN)
                if os.fstat(lock.fileno()).st_size == 0:
                    return

    def _drop_surplus(self) -> None:
        entries = list(self._entries())
        total_bytes = sum(size for _, size, _ in entries) + self._sweep_temporaries()
        disk = shutil.disk_usage(self.folder)
        spare_bytes = disk.free - int(min(FREE_BYTES, FREE_FRAC * disk.total))
        budget_bytes = max(0, min(self.max_bytes, total_bytes + spare_bytes))
        if total_bytes > HIGHEST_FRAC * budget_bytes:
            for _, size, path in sorted(entries):
                if total_bytes <= LOWEST_FRAC * budget_bytes:
                    break
                if _remove(path):
                    self.num_evicted += 1
                total_bytes -= size
        with self._lock:
            self.num_bytes, self._unscanned_bytes = total_bytes, 0
            free_bytes = budget_bytes - total_bytes
            self._scan_after_bytes = max(int(self.max_bytes * SCAN_FRAC), free_bytes // MANY_WRITERS)

    def _count_written(self, num_bytes: int) -> None:
        with self._lock:
            self._unscanned_bytes += num_bytes
            if self._unscanned_bytes < self._scan_after_bytes:
                return
        self.make_room()

    def _entries(self) -> Iterator[tuple[float, int, str]]:
        """(time of last use, bytes, path) of each entry. Nothing else that lies in the folder is ours to drop."""
        for shard in _listed(self.folder):
            if not SHARD_NAME.fullmatch(shard.name):
                continue
            for file in _listed(shard.path):
                with suppress(OSError):
                    if ENTRY_NAME.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                        status = file.stat(follow_symlinks=False)
                        yield status.st_mtime, status.st_size, file.path

    def _sweep_temporaries(self) -> int:
        """Remove what killed processes left behind; returns the bytes of those that may still be written."""
        num_bytes = 0
        for file in _listed(self.folder / TEMPORARY):
            with suppress(OSError):
                status = file.stat(follow_symlinks=False)
                if time.time() - status.st_mtime > STALE_TEMPORARY_S:
                    os.unlink(file.path)
                else:
                    num_bytes += status.st_size
        return num_bytes

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / (key + SUFFIX)

    def _remove_damaged(self, path: Path, error: Exception) -> None:
        with self._lock:
            self.num_healed += 1
        logger.warning("%s is not usable and is removed; the clip is read anew (%s)", path, error)
        _remove(str(path))

    def _turn_off(self, error: OSError) -> None:
        with self._lock:
            was_off, self.is_off = self.is_off, True
        if not was_off:
            logger.warning(
                "nothing more is stored in the cache %s: %s; the run goes on and still reads what is there. Check the "
                "space and the rights of that folder, or set video.cache_dir to another",
                self.folder,
                error,
            )


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # without it, opening a named pipe waits for ever


def _listed(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:  # not a folder, or gone
        return []


def _remove(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True
