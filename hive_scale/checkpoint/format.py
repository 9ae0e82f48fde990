"""On-disk format of one step checkpoint: its manifest, verification of its files, and reading of ranges.

```
step_00001200/rank_00000.safetensors    ranges that one rank wrote, each named <kind>/<parameter>@<offset>
step_00001200/manifest.json             {"checksum", "content": {format, step, shapes, files, state}}, written last
```
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hive_scale import strict_json
from hive_scale.checkpoint.io import CorruptFile, file_hash, write_json
from hive_scale.distributed import Fragment
from hive_scale.strangers import some

Shape = tuple[int, ...]


class Range(NamedTuple):
    """Elements [offset, offset + length) of the flattened tensor `key`."""

    key: str
    offset: int
    length: int


class OwnedRange(NamedTuple):
    """The range and whole shape of one fragment, as ranks tell each other."""

    range: Range
    shape: Shape  # shape of the whole tensor


class Piece(NamedTuple):
    """A range that this rank writes: `range.length` elements from `start` of its fragment number `source`."""

    range: Range
    source: int
    start: int


def key_of(fragment: Fragment) -> str:
    """Name of a fragment's tensor in a checkpoint, such as ``master/projector.0.up.weight``."""
    return f"{fragment.kind}/{fragment.name}"


def owned_ranges(fragments: Iterable[Fragment]) -> list[OwnedRange]:
    """The range of each fragment in its flattened tensor, with the tensor's shape."""
    return [OwnedRange(Range(key_of(f), f.offset, f.data.numel()), tuple(f.shape)) for f in fragments]


def shapes_of(tables: Iterable[Sequence[OwnedRange]]) -> dict[str, Shape]:
    """Shapes by key over all ranks. Raises ValueError if two ranks disagree."""
    shapes: dict[str, Shape] = {}
    for table in tables:
        for row in table:
            first = shapes.setdefault(row.range.key, row.shape)
            if first != row.shape:
                raise ValueError(f"{row.range.key} has shape {first} on one rank and {row.shape} on another")
    return shapes


def divide(tables: Sequence[Sequence[OwnedRange]], rank: int) -> list[Piece]:
    """The pieces that `rank` writes, such that all ranks together write every range exactly once.

    `tables` has one table of owned ranges per rank. Ranges that several ranks hold (replicas) are shared: all ranges
    of one set of ranks are laid end to end, and cut evenly. Raises ValueError as `check_tiling` does.
    """
    holders: dict[Range, list[int]] = {}
    for holder, table in enumerate(tables):
        for row in table:
            if row.range.length:  # empty ranges occur: ZeRO-3 may give a rank no share of a small parameter
                holders.setdefault(row.range, []).append(holder)
    check_tiling(shapes_of(tables), holders)
    together: dict[tuple[int, ...], list[Range]] = {}
    for held, ranks in holders.items():
        together.setdefault(tuple(ranks), []).append(held)
    sources = {row.range: source for source, row in enumerate(tables[rank])}
    return [
        Piece(cut, sources[held], cut.offset - held.offset)
        for ranks, ranges in together.items()
        if rank in ranks
        for held, cut in _share(ranges, ranks.index(rank), len(ranks))
    ]


def check_tiling(shapes: Mapping[str, Shape], ranges: Iterable[Range]) -> None:
    """Raises ValueError that names the key if the ranges of a tensor leave a gap, overlap, or exceed its shape."""
    reached = dict.fromkeys(shapes, 0)
    for key, offset, length in sorted(ranges):
        if offset != reached[key]:
            raise ValueError(f"{key} has {'a hole' if offset > reached[key] else 'an overlap'} at {reached[key]}")
        reached[key] += length
    for key, end in reached.items():
        if end != prod(shapes[key]):
            raise ValueError(f"{key} has {end} elements where its shape {shapes[key]} has {prod(shapes[key])}")


def difference(stored: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> str:
    """Describe how two sets of named shapes differ; "" if they do not."""
    both = stored.keys() & wanted.keys()
    findings = {
        "missing": wanted.keys() - stored.keys(),
        "unexpected": stored.keys() - wanted.keys(),
        "of another shape": {f"{k} {stored[k]} instead of {wanted[k]}" for k in both if stored[k] != wanted[k]},
    }
    return "; ".join(f"{what}: {some(sorted(names), 10)}" for what, names in findings.items() if names)


def masters_in(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of the master weights by parameter, from shapes by kind/parameter."""
    kind = "master/"
    return {key.removeprefix(kind): shape for key, shape in shapes.items() if key.startswith(kind)}


def kinds_in(shapes: Iterable[str]) -> list[str]:
    """What is kept of parameters beside their masters, sorted, from keys kind/parameter."""
    return sorted({key.split("/", 1)[0] for key in shapes} - {"master"})


def _share(ranges: Sequence[Range], index: int, num: int) -> Iterable[tuple[Range, Range]]:
    """Yield (range, its part) for the `index`-th of `num` even cuts through `ranges` laid end to end."""
    total = sum(held.length for held in ranges)
    low, high = total * index // num, total * (index + 1) // num
    at = 0
    for held in ranges:
        begin, end = max(low - at, 0), min(high - at, held.length)
        if begin < end:
            yield held, Range(held.key, held.offset + begin, end - begin)
        at += held.length


FORMAT = 1
MANIFEST = "manifest.json"


def directory_name(step: int) -> str:
    """Directory name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def steps_in(directory: Path) -> list[Path]:
    """The published checkpoints in `directory`, oldest first, verified or not."""
    found = [path for path in directory.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint directory's name."""
    return int(path.name.removeprefix("step_"))


def tensor_name(stored: Range) -> str:
    """Name of a range in its file. It has the offset, since a rank may write several ranges of one tensor."""
    return f"{stored.key}@{stored.offset}"


def write_manifest(directory: Path, step: int, shapes: Mapping[str, Shape], files: Any, state: Any) -> None:
    """Write the manifest. `files` is {name: {"bytes", "xxh3_128", "ranges": [[key, offset, length], ...]}}."""
    content = {"format": FORMAT, "step": step, "shapes": shapes, "files": files, "state": state}
    write_json(directory / MANIFEST, {"checksum": _checksum(content), "content": content})


def audit(path: Path, share: int = 0, num_shares: int = 1) -> str:
    """Why the checkpoint at `path` is corrupt, or "". Hashes the `share`-th of `num_shares` shares of its files."""
    try:
        snapshot = StepCheckpoint(path)
    except ValueError as error:
        return str(error)
    return next(filter(None, map(snapshot.damage, sorted(snapshot.files)[share::num_shares])), "")


class StepCheckpoint:
    """A published checkpoint, opened for reading. `shapes` are those of whole parameters, by key."""

    def __init__(self, path: Path) -> None:
        """Read the manifest. Raises CorruptFile if it is missing, incomplete, altered, or of another format or step."""
        self.path = path
        self._open: dict[str, Any] = {}
        try:
            self._take(_read_manifest(path))
        except CorruptFile:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            # the checksum detects damage, but a manifest forged together with its checksum may hold anything
            raise CorruptFile(f"{MANIFEST} does not describe a checkpoint: {error}") from None

    def _take(self, content: dict[str, Any]) -> None:
        self.step: int = content["step"]
        self.state: dict[str, Any] = dict(content["state"])
        self.shapes: dict[str, Shape] = {key: tuple(shape) for key, shape in content["shapes"].items()}
        self.files: dict[str, dict[str, Any]] = content["files"]
        self._stored: dict[str, list[tuple[Range, str]]] = {key: [] for key in self.shapes}
        for shape in self.shapes.values():
            _check_counts(*shape)
        for name, file in self.files.items():
            ranges = [Range(*row) for row in file["ranges"]]
            _check_counts(file["bytes"], *(number for stored in ranges for number in stored[1:]))
            if not isinstance(file["xxh3_128"], str) or 4 * sum(stored.length for stored in ranges) > file["bytes"]:
                raise ValueError(f"{name} has no checksum, or holds less than its ranges")
            for stored in ranges:
                self._stored[stored.key].append((stored, name))
        check_tiling(self.shapes, (stored for found in self._stored.values() for stored, _ in found))

    def damage(self, name: str) -> str:
        """Why the file `name` is corrupt, or "". Reads all of it."""
        path, file = self.path / name, self.files[name]
        try:
            size = path.stat().st_size
            if not path.is_file():
                return f"{name} is no file"
            if size != file["bytes"]:
                return f"{name} has {size} bytes instead of {file['bytes']}"
            if file_hash(path) != file["xxh3_128"]:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return ""

    def read(self, key: str, offset: int, out: Tensor) -> None:
        """Fill 1-D `out` with elements of `key`, starting at `offset`. Raises CorruptFile if that fails."""
        for stored, name in self._stored[key]:
            low = max(offset, stored.offset)
            high = min(offset + out.numel(), stored.offset + stored.length)
            if low < high:
                found = self._slice(name, stored)[low - stored.offset : high - stored.offset]
                if found.shape != (high - low,):
                    raise CorruptFile(
                        f"{self.path / name}: {tensor_name(stored)} is not of the length that it should have"
                    )
                with torch.no_grad():
                    out[low - offset : high - offset].copy_(found)

    def masters(self) -> dict[str, Shape]:
        """Shapes of the trained parameters, by name."""
        return masters_in(self.shapes)

    def master(self, name: str, kind: str = "master") -> Tensor:
        """The whole fp32 master weight of a parameter, or what else of a `kind` is kept of it, in its shape."""
        key = f"{kind}/{name}"
        out = torch.empty(prod(self.shapes[key]))
        self.read(key, 0, out)
        return out.view(self.shapes[key])

    def _slice(self, name: str, stored: Range) -> Any:
        try:
            if name not in self._open:
                self._open[name] = safe_open(self.path / name, framework="pt")  # memory-mapped
            return self._open[name].get_slice(tensor_name(stored))
        except (SafetensorError, OSError) as error:
            raise CorruptFile(f"{self.path / name}: {error}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = strict_json.read(path / MANIFEST)
        content = manifest["content"]
        sound = manifest["checksum"] == _checksum(content)
    except OSError as error:
        raise CorruptFile(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, LookupError) as error:
        raise CorruptFile(f"{MANIFEST} is not what was written: {error}") from error
    if not sound:
        raise CorruptFile(f"{MANIFEST} does not match its checksum")
    if content["format"] != FORMAT:
        raise CorruptFile(f"{MANIFEST} has format {content['format']}, this version reads format {FORMAT}")
    if directory_name(content["step"]) != path.name:
        raise CorruptFile(f"{MANIFEST} is that of {directory_name(content['step'])}")
    if any(Path(name).name != name for name in content["files"]):
        raise CorruptFile(f"{MANIFEST} names files outside the checkpoint")
    return cast(dict[str, Any], content)


def _check_counts(*numbers: Any) -> None:
    for number in numbers:
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"{number} counts nothing")


def _checksum(content: Any) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, allow_nan=False).encode()))
