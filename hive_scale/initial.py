"""The model that a first stage starts from: parts drawn from the seed, published ones, or those of another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hive_scale.checkpoint.handoff import Weights, read_weights
from hive_scale.checkpoint.runs import Run
from hive_scale.config import ModelConfig, holds_weights_alone, run_of
from hive_scale.model import build
from hive_scale.model.hive import Hive

PREFIXES = {"vision": ("vision.",), "language": ("language.",), "connector": ("projector.", "fusion.")}


def assemble(config: ModelConfig, seed: int) -> Hive:
    """float32 on the CPU. Raises ValueError that names what is missing, of another shape or not finite in a part."""
    paths = {"vision": config.vision.path, "language": config.language.path, "connector": config.connector}
    ours = {part: path for part, path in paths.items() if path and (part == "connector" or _is_ours(path))}
    model = build.assemble(config, seed, {part: _tensors(part, path) for part, path in ours.items()})
    if spoiled := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        more = f" and {len(spoiled) - 1} more" if len(spoiled) > 1 else ""
        raise ValueError(f"{spoiled[0]}{more} would begin with values that are not finite: give the part other weights")
    return model


def check_paths(config: ModelConfig) -> None:
    """Raises ValueError for a local path of a part that is not there; of a name on the hub nothing is known offline."""
    for part, path in (("vision", config.vision.path), ("language", config.language.path)):
        _check_there(f"model.{part}.path", path)
    _check_there("model.connector", config.connector)


def _check_there(key: str, path: str) -> None:
    if (path.startswith((".", "/", "~")) or holds_weights_alone(path)) and not Path(path).expanduser().exists():
        raise ValueError(f"{key}={path} is not there: give a directory, a safetensors file or a name on the hub")


def _is_ours(path: str) -> bool:
    return holds_weights_alone(path) or run_of(path) is not None


def _tensors(part: str, path: str) -> Mapping[str, Tensor]:
    """The part's tensors under its own names: of a whole HIVE its share, else all there are."""
    weights, prefixes = _open(part, path), PREFIXES[part]
    chosen = [name for name in weights if name.startswith(prefixes)]
    if part == "connector":
        return {name: weights[name] for name in chosen}
    (prefix,) = prefixes
    return {name.removeprefix(prefix): weights[name] for name in chosen or weights}


def _open(part: str, path: str) -> Weights:
    place = Path(path).expanduser()
    try:
        if (place / "config.yaml").is_file():
            run = Run(place)
            place = run.weights(run.stage())
        return read_weights(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.{part}: {path} cannot be begun with: {error}") from None
