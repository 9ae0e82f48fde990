"""What says that a stage has ended: weights under their final name, and the encoder beside them."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = "weights.safetensors"
ENCODER = "encoder"


def is_done(stage_dir: Path) -> bool:
    """Whether the stage has ended, and left all that the next one and the user need."""
    return find_weights(stage_dir / WEIGHTS) is not None and (stage_dir / ENCODER).is_dir()


def find_weights(path: Path) -> Path | None:
    """`path` if it is there, else its index if it was written in shards, else None."""
    return next((found for found in (path, index_of(path)) if found.is_file()), None)


def index_of(path: Path) -> Path:
    return path if path.suffix == ".json" else path.with_name(f"{path.name}.index.json")
