"""Safetensors files that carry their own checksum, and the names of a stage's results.

The checksum is the xxh3-128 of the file, stored in its metadata, and computed with the field for itself set to zeros.
Damaged files are refused, and any safetensors reader can open sound ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hive_scale.checkpoint.format import Shape
from hive_scale.checkpoint.io import CorruptFile, file_hash, read_pieces, safetensors_header, write_file

CHECKSUM = "xxh3_128"
_BLANK = "0" * 32


class LazyTensor(NamedTuple):
    """A tensor that is read from its file, or memory, when `read` is called."""

    dtype: torch.dtype
    shape: Shape
    read: Callable[[], Tensor]


def write_checksummed(path: Path, sources: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file with its checksum, by atomic rename. Returns the checksum; the caller syncs."""
    # widest dtype first, so that every tensor is aligned
    ordered = sorted(sources.items(), key=lambda item: -item[1].dtype.itemsize)
    specs = [(name, source.dtype, source.shape) for name, source in ordered]
    header = safetensors_header(specs, {**metadata, CHECKSUM: _BLANK})
    unnamed = unnamed_path(path)
    checksum = write_file(unnamed, header, (source.read for _, source in ordered))
    with open(unnamed, "r+b") as file:
        file.seek(header.index(_checksum_field(_BLANK)))
        file.write(_checksum_field(checksum))
        file.flush()
        os.fsync(file.fileno())
    unnamed.rename(path)
    return checksum


def verify_checksum(path: Path, expected: str | None, required: bool = False) -> str:
    """Verify a safetensors file. Returns its stored checksum, or its hash if it has none.

    Raises CorruptFile if the file does not match its own checksum, has another one than `expected`, or has none though
    it is `required`: damage may have hit the name of the field.
    """
    try:
        with safe_open(path, framework="pt") as file:
            checksum = (file.metadata() or {}).get(CHECKSUM)
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from error
    if expected not in (None, checksum):
        raise CorruptFile(f"{path} is not the file that its index names")
    if checksum is None and required:
        raise CorruptFile(f"{path} does not bear the checksum that it was written with")
    if checksum is None:
        return file_hash(path)
    with open(path, "rb") as file:
        length = file.read(8)
        header = length + file.read(int.from_bytes(length, "little"))
    digest = xxhash.xxh3_128(header.replace(_checksum_field(checksum), _checksum_field(_BLANK), 1))
    for piece in read_pieces(path, len(header)):
        digest.update(piece)
    if digest.hexdigest() != checksum:
        raise CorruptFile(f"{path} does not match its checksum")
    return str(checksum)


def _checksum_field(checksum: str) -> bytes:
    return f'"{CHECKSUM}":"{checksum}"'.encode()


def unnamed_path(path: Path) -> Path:
    """Temporary path for writing `path`; removes what a killed run left there."""
    unnamed = path.with_name(f"{path.name}.tmp")
    unnamed.unlink(missing_ok=True)
    return unnamed


WEIGHTS = "weights.safetensors"
ENCODER = "encoder"


def is_stage_done(stage_dir: Path) -> bool:
    """True if the stage has finished, and its weights and encoder are there."""
    return find_weights(stage_dir / WEIGHTS) is not None and (stage_dir / ENCODER).is_dir()


def find_weights(path: Path) -> Path | None:
    """`path` if it exists, else its index if it was written in shards and exists, else None."""
    return next((found for found in (path, index_of(path)) if found.is_file()), None)


def index_of(path: Path) -> Path:
    return path if path.suffix == ".json" else path.with_name(f"{path.name}.index.json")
