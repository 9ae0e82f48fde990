"""Versions of the code that runs: recorded in every checkpoint and model card."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hive_scale

PEERS = ("torch", "transformers", "deepspeed")


@cache
def code_version() -> dict[str, str]:
    """Package versions by name. In a checkout, ours has the git commit, with "-dirty" if files have changed."""
    return {"hive_scale": _ours(), **{name: _installed(name) for name in PEERS}}


def _ours() -> str:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return hive_scale.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # git is not installed, or refuses this checkout
        return hive_scale.__version__
    return f"{hive_scale.__version__}+{found}"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
