"""Bytes on disk: safetensors written as a stream, a fast checksum on the way, and syncing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from hive_scale.checksums import CorruptFile as CorruptFile  # part of this room's public face
from hive_scale.checksums import write_sums
from hive_scale.phase_timer import tick
from hive_scale.strict_json import dumps

# Large pieces, since both the write and the checksum give up the GIL once per piece
PIECE = 1 << 24
# Bytes after which a file that is being written is brought down to the disk. Memory may take in all of it at once, and
# a single sync at the end would stand for minutes without a sign that it gets on.
SYNC = 1 << 30

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
    """The head of a safetensors file whose data follow in the order of `tensors`, each (name, dtype, shape)."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + num_bytes(dtype, shape)
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin aligned
    return len(text).to_bytes(8, "little") + text


def num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def write_file(path: Path, header: bytes, reads: Iterable[Callable[[], Tensor]]) -> str:
    """Write `header` and the bytes of what `reads` return to a new file, down to the disk; returns the xxh3-128.

    Only one tensor at a time is held. Raises OSError, leaving the cut file to the caller.
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
    """Write `value` to a new file, down to the disk."""
    with open(path, "x") as file:
        file.write(dumps(value))
        file.flush()
        os.fsync(file.fileno())


def file_hash(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hex. It finds damage; it is no defence against a forger."""
    digest = xxhash.xxh3_128()
    for piece in read_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def read_pieces(path: Path, start: int = 0) -> Iterator[memoryview]:
    """The file's bytes from `start` on; each piece is good until the next is asked for."""
    buffer = memoryview(bytearray(min(PIECE, max(1, path.stat().st_size))))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while size := file.readinto(buffer):
            tick()
            yield buffer[:size]


def sync_directory(path: Path) -> None:
    """Make renames and new files in `path` outlive a power cut."""
    _sync(path)


def _sync(path: Path) -> None:
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
    partial = directory.with_name(f".{directory.name}.hive_scale.tmp")  # a name that nobody else gives
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
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


def _append(file: BinaryIO, digest: xxhash.xxh3_128, tensor: Tensor) -> None:
    """Write the tensor's bytes, saying by `tick` that it gets on, however slow the disk."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for at in range(0, len(data), PIECE):
        piece = data[at : at + PIECE]
        file.write(piece)
        if hasattr(os, "posix_fadvise"):  # start writing to disk now: the sync at the end is a fifth shorter
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest.update(piece)
        if file.tell() // SYNC > (file.tell() - len(piece)) // SYNC:
            file.flush()
            os.fsync(file.fileno())
        tick()
