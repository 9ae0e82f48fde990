"""The weights that a stage passes to the next: all parameters by name, in checksummed safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from hive_scale import strict_json
from hive_scale.checkpoint.format import Shape, StepCheckpoint, audit, difference, steps_in
from hive_scale.checkpoint.io import DTYPES, CorruptFile, num_bytes, sync_directory, write_json
from hive_scale.checkpoint.io import file_hash as file_hash  # re-exported for the package's other modules
from hive_scale.checkpoint.stage_files import (
    CHECKSUM,
    WEIGHTS,
    LazyTensor,
    find_weights,
    index_of,
    unnamed_path,
    verify_checksum,
    write_checksummed,
)
from hive_scale.distributed import World
from hive_scale.node import once_per_node


class Weights(Mapping[str, Tensor]):
    """Tensors of one or several safetensors files, by name; each is read from disk when it is accessed.

    `identity` is a hash of these weights; checkpoints record it as their parent's.
    """

    def __init__(self, files: Iterable[Path], identity: str) -> None:
        self.identity = identity
        self._files: dict[str, Any] = {}
        self.metadata: dict[str, str] = {}  # metadata of the first file that has any
        for path in files:
            opened: Any = safe_open(path, framework="pt")  # memory-mapped
            self._files.update(dict.fromkeys(opened.keys(), opened))
            self.metadata = self.metadata or dict(opened.metadata() or {})

    def __getitem__(self, name: str) -> Tensor:
        return cast(Tensor, self._files[name].get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> Shape:
        """Shape of the tensor `name`, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def sources(self) -> dict[str, LazyTensor]:
        """All tensors, unread, in the form that `write_weights` takes."""
        dtypes = {name: _dtype(name, file.get_slice(name).get_dtype()) for name, file in self._files.items()}
        return {name: LazyTensor(dtypes[name], self.shape(name), partial(self.__getitem__, name)) for name in self}


def write_weights(
    path: Path,
    tensors: Mapping[str, Tensor | LazyTensor] | Iterable[tuple[str, Tensor | LazyTensor]],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write named tensors to `path` (``*.safetensors``), or above `max_shard_bytes`, to several files and an index.

    Returns the path that was published last: `path`, or ``<path>.index.json``. The result is complete or absent: each
    file is renamed once it is on disk, the index after all files. Tied tensors are written once, under the first name.
    Only one tensor at a time is read. Raises OSError.
    """
    sources = _untied(tensors.items() if isinstance(tensors, Mapping) else tensors)
    shards = _shards(sources, max_shard_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    index = index_of(path)
    if len(shards) == 1:
        write_checksummed(path, shards[0], metadata or {})
        index.unlink(missing_ok=True)  # left by an earlier, larger model
        sync_directory(path.parent)
        return path
    names = [f"{path.stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    checksums = {
        name: write_checksummed(path.with_name(name), shard, metadata or {})
        for name, shard in zip(names, shards, strict=True)
    }
    total = sum(num_bytes(source.dtype, source.shape) for source in sources.values())
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    unnamed = unnamed_path(index)
    write_json(unnamed, {"metadata": {"total_size": total, CHECKSUM: checksums}, "weight_map": weight_map})
    unnamed.rename(index)
    path.unlink(missing_ok=True)
    sync_directory(path.parent)
    return index


def read_weights(path: Path, world: World | None = None, checksummed: bool = False) -> Weights:
    """Open the weights at `path`: a safetensors file, its index, or a directory that holds one of these.

    Checksums are verified by reading whole files. Given a `world`, one rank per node does so and tells the others; this
    is then a collective. Raises FileNotFoundError, or CorruptFile with the remedy if a checksum does not match. Files
    without checksum, from other programs, are accepted, unless `checksummed` is set or they belong to a run.
    """
    if path.is_dir():
        candidates = (path / "weights.safetensors", path / "model.safetensors")
        path = next(filter(None, map(find_weights, candidates)), candidates[0])
    found = find_weights(path)
    if found is None:
        raise FileNotFoundError(f"there are no weights at {path}")
    checksummed |= _is_of_run(found)
    try:
        if found.suffix != ".json":
            return Weights([found], _once(world, partial(verify_checksum, found, None, checksummed)))
        return _read_sharded(found, world)
    except CorruptFile as error:
        raise CorruptFile(f"{error}: {_remedy(found)}") from None


def _read_sharded(found: Path, world: World | None) -> Weights:
    try:
        index = strict_json.read(found)
        weight_map, checksums = index["weight_map"], index.get("metadata", {}).get(CHECKSUM, {})
        # files lie beside the index: `with_name` raises ValueError for a name with a folder
        paths = [found.with_name(name) for name in sorted({*weight_map.values(), *checksums})]
        expected = [checksums.get(path.name) for path in paths]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CorruptFile(f"{found} is not what was written: {error}") from error

    def check() -> str:
        checked = [verify_checksum(path, checksum) for path, checksum in zip(paths, expected, strict=True)]
        return str(xxhash.xxh3_128_hexdigest("".join(checked).encode()))

    weights = Weights(paths, _once(world, check))
    if lost := sorted(weight_map.keys() - weights.keys()):
        raise CorruptFile(f"{found} names tensors that no file holds: {', '.join(lost)}")
    if checksums and (more := sorted(weights.keys() - weight_map.keys())):
        raise CorruptFile(f"{found} does not name tensors that its files hold: {', '.join(more)}")
    return weights


def _is_of_run(weights: Path) -> bool:
    return index_of(weights) == index_of(weights.with_name(WEIGHTS)) and (weights.parents[1] / "config.yaml").is_file()


def _remedy(weights: Path) -> str:
    """How to restore the file `weights`, for an error message."""
    stage = weights.parent
    if not _is_of_run(weights):
        return "get it again from where it came"
    if stage.name != "initial" and not steps_in(stage):
        return (
            f"restore it from a copy, or remove {weights.name}: the command that trained the run then trains this "
            "stage again"
        )
    source = (
        f"the stage's last checkpoint, {steps_in(stage)[-1].name}" if steps_in(stage) else "what the run began with"
    )
    return f"remove {weights.name}, and the command that trained the run makes it again from {source}"


def _once(world: World | None, make: Callable[[], str]) -> str:
    return make() if world is None else once_per_node(world, make)


class Merge(NamedTuple):
    """How weights are made of parameters that a stage has trained beside them, such as an adapter's.

    `made` has functions by the weight's name, of all weights before the stage, and of a reader of masters by name.
    """

    consumed: Collection[str] = ()  # names of those parameters, which are no weights themselves
    made: Mapping[str, Callable[[Mapping[str, Tensor], Callable[[str], Tensor]], Tensor]] = MappingProxyType({})


def merge_trained_weights(
    parent_weights: Path,
    checkpoint: Path,
    out: Path,
    merge: Merge = Merge(),  # noqa: B008 - a constant
    max_shard_bytes: int = 5_000_000_000,
    kind: str = "master",
) -> Path:
    """Write the next stage's weights: the parent's, with trained parameters replaced by the checkpoint's masters.

    Of another `kind`, such as "ema", the checkpoint's tensors of that kind take their place. Runs in one process, and
    holds one tensor at a time. Trained parameters become fp32, others keep the parent's dtype. Raises CorruptFile, or
    ValueError if the checkpoint's parameters are not the parent's.
    """
    if reason := audit(checkpoint):
        raise CorruptFile(f"{checkpoint} refused: {reason}")
    parent, snapshot = read_weights(parent_weights), StepCheckpoint(checkpoint)
    trained = {
        name: LazyTensor(torch.float32, shape, partial(snapshot.master, name, kind))
        for name, shape in snapshot.masters().items()
        if name not in merge.consumed
    }
    trained |= {
        name: LazyTensor(torch.float32, parent.shape(name), partial(make, parent, partial(snapshot.master, kind=kind)))
        for name, make in merge.made.items()
    }
    shapes = {name: one.shape for name, one in trained.items()}
    if differs := difference(shapes, {name: parent.shape(name) for name in parent if name in shapes}):
        raise ValueError(f"{checkpoint} was not trained from {parent_weights}: {differs}")
    metadata = {"format": "pt", "step": str(snapshot.step), "parent": parent.identity}
    return write_weights(out, parent.sources() | trained, metadata, max_shard_bytes)


def fill(named_tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Copy the weights at `path` into tensors of the same names, converting to their dtype and device.

    Raises ValueError that names tensors missing, unexpected or of another shape, before anything is changed; and
    raises as `read_weights` does.
    """
    weights = read_weights(path)
    tensors = _first_of_tied(named_tensors)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if differs := difference({name: weights.shape(name) for name in weights}, wanted):
        raise ValueError(f"{path} does not fit this model: {differs}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name])


def _untied(tensors: Iterable[tuple[str, Tensor | LazyTensor]]) -> dict[str, LazyTensor]:
    live: list[tuple[str, Tensor]] = []
    sources: dict[str, LazyTensor] = {}
    for name, tensor in tensors:
        if isinstance(tensor, LazyTensor):
            sources[name] = tensor
        else:
            live.append((name, tensor))
    for name, tensor in _first_of_tied(live).items():
        sources[name] = LazyTensor(tensor.dtype, tuple(tensor.shape), partial(_same, tensor))
    return sources


def _first_of_tied(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Drop later names of tensors that share memory, which a state dict lists under each name."""
    seen: dict[tuple[Any, ...], str] = {}
    kept: dict[str, Tensor] = {}
    for name, tensor in named:
        place = (tensor.data_ptr(), tensor.shape) if tensor.numel() else name  # empty tensors all have pointer 0
        if seen.setdefault(cast(Any, place), name) == name:
            kept[name] = tensor
    return kept


def _dtype(name: str, stored: str) -> torch.dtype:
    if stored not in DTYPES:
        raise ValueError(f"{name} is stored as {stored}, which is not written here: convert it to float32 or bfloat16")
    return DTYPES[stored]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _shards(sources: Mapping[str, LazyTensor], limit: int) -> list[dict[str, LazyTensor]]:
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, source in sources.items():
        more = num_bytes(source.dtype, source.shape)
        if shards[-1] and size + more > limit:
            shards.append({})
            size = 0
        shards[-1][name] = source
        size += more
    return shards
