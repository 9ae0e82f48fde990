"""Snapshot of the code at submission: a job that starts next week, or again, runs the code that was submitted."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
DS_CONFIG = "ds_config.json"


def fingerprint(ds_config: str) -> str:
    """Short SHA-256 (12 hex digits) of the code and of the DeepSpeed JSON, if any."""
    digest = sha256()
    for path in sorted(path for path in PACKAGE.rglob("*") if _is_source(path)):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    if ds_config:
        digest.update(Path(ds_config).read_bytes())
    return digest.hexdigest()[:12]


def take(folder: Path, ds_config: str) -> Path:
    """Copy the code, and the DeepSpeed JSON beside it, to a subfolder of `folder` named by their fingerprint; return
    it.
    """
    target = folder / fingerprint(ds_config)
    if not target.exists():
        unnamed = target.with_suffix(".tmp")
        shutil.rmtree(unnamed, ignore_errors=True)
        shutil.copytree(PACKAGE, unnamed / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        if ds_config:
            shutil.copyfile(ds_config, unnamed / DS_CONFIG)
        unnamed.rename(target)
    return target


def _is_source(path: Path) -> bool:
    """True for files of the code. Hidden files are excluded: a .env holds secrets."""
    inside = path.relative_to(PACKAGE).parts
    return path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in inside)
