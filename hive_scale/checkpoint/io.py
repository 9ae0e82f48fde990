"""File output of checkpoints: streamed safetensors, a fast checksum computed while writing, and syncing to disk."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from mmap import mmap
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from hive_scale.checksums import PIECE, write_sums
from hive_scale.checksums import CorruptFile as CorruptFile  # re-exported for the package's other modules
from hive_scale.phase_timer import tick
from hive_scale.strict_json import dumps

# bytes per piece; large, since writing and hashing each release the GIL once per piece
# Bytes after which a file being written is synced to disk. The page cache may take in all of it at once, and a single
# sync at the end would then show no progress for minutes.
SYNC = 1 << 30
LOOK = 1.0  # seconds between looks at files that a library writes

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


def safetensors_header(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file with `tensors`, each (name, dtype, shape), whose data follow in this order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + num_bytes(dtype, shape)
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # padding, which aligns the data
    return len(text).to_bytes(8, "little") + text


def num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def write_file(path: Path, header: bytes, reads: Iterable[Callable[[], Tensor]]) -> str:
    """Write `header` and the tensors that `reads` return to a new file, synced to disk. Returns its xxh3-128 in hex.

    Only one tensor at a time is in memory. Raises OSError, and leaves the incomplete file to the caller.
    """
    digest = xxhash.xxh3_128(header)
    with open(path, "xb") as file:
        file.write(header)
        for read in reads:
            _append(file, digest, read())
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to a new file, synced to disk. Raises OSError."""
    with open(path, "x") as file:
        file.write(dumps(value))
        file.flush()
        os.fsync(file.fileno())


def file_hash(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hex. It detects damage, not deliberate changes."""
    digest = xxhash.xxh3_128()
    for piece in read_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def read_pieces(path: Path, start: int = 0) -> Iterator[memoryview]:
    """Yield the file's bytes from `start` on. Each piece is valid until the next is requested: they share a buffer."""
    buffer = memoryview(bytearray(min(PIECE, max(1, path.stat().st_size))))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while size := file.readinto(buffer):
            tick()
            yield buffer[:size]


def sync_directory(path: Path) -> None:
    """Sync the directory `path`, so that renames and new files in it survive a power cut."""
    _sync(path)


def _sync(path: Path) -> None:
    if path.is_file() and path.stat().st_size > SYNC:  # in parts, which `os.fsync` cannot
        with open(path, "r+b") as file, mmap(file.fileno(), 0) as pages:
            for at in range(0, len(pages), SYNC):
                pages.flush(at, min(SYNC, len(pages) - at))
                tick()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        tick()
    finally:
        os.close(descriptor)


@contextmanager
def published(directory: Path, replace: bool = True) -> Iterator[Path]:
    """A new directory to fill, which becomes `directory` at the end: complete or absent. May `replace` what is there.

    Its files are listed with their checksums, see `checksums`. Raises OSError, also if what must stay is there by then.
    """
    partial = directory.with_name(f".{directory.name}.hive_scale.tmp")  # a name that no other program uses
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with _watching_growth(partial):
        yield partial
    write_sums(partial)
    for path in (*(path for path in partial.rglob("*") if path.is_file()), partial):
        _sync(path)
    if replace and directory.is_symlink():
        directory.unlink()
    elif replace and directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)
    sync_directory(directory.parent)


@contextmanager
def _watching_growth(folder: Path) -> Iterator[None]:
    """Say by `tick` that a library gets on that writes into `folder`, and tells nobody how far it is."""
    done = threading.Event()

    def look() -> None:
        before = 0
        while not done.wait(LOOK):
            with suppress(OSError):  # files come and go
                stats = [path.stat() for path in folder.rglob("*")]
                if (now := sum(stat.st_size + stat.st_blocks for stat in stats)) != before:
                    before = now
                    tick()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _append(file: BinaryIO, digest: xxhash.xxh3_128, tensor: Tensor) -> None:
    """Write and hash the tensor's bytes, with a `tick` per piece as a sign of progress on slow disks."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for at in range(0, len(data), PIECE):
        piece = data[at : at + PIECE]
        file.write(piece)
        if hasattr(os, "posix_fadvise"):  # starts writing to disk now, which makes the final sync a fifth shorter
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest.update(piece)
        if file.tell() // SYNC > (file.tell() - len(piece)) // SYNC:
            file.flush()
            os.fsync(file.fileno())
        tick()
