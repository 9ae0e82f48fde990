"""Tell whether a directory is free for a run, a run of this package, or foreign. This module imports no torch.

Each run directory has a marker file. Older versions wrote none: their runs are known by a config.yaml that loads.
docs/runs.md has the rules as a table.
"""

from __future__ import annotations

import os
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from hive_scale import config as configs
from hive_scale import config_merge, strict_json
from hive_scale.config import Config

State = Literal["free", "ours", "foreign"]
CONFIG = "config.yaml"
MARKER = ".hive_scale"
LOCK = ".lock"
BEGAN = "began.yaml"  # in a stage's folder: the run's config up to that stage, as it was when the stage began
EARLY = (
    LOCK,
    f"{LOCK}.soft",
    "logs",
    "slurm",
    "STOP",
    ".*.tmp",
    f"{CONFIG}.tmp",
    ".nfs*",
)  # what there may be before a run has begun


def look(directory: Path) -> State:
    """Classify `directory`: a run is ours; one that is absent, empty or has EARLY files only is free; else foreign."""
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set[str]()
    if read_marker(directory) or (CONFIG in names and _is_older_run(directory, names)):
        return "ours"
    if CONFIG in names and not (directory / CONFIG).stat().st_size:
        names.remove(CONFIG)  # an empty config.yaml is left over from an older version on a full disk
    return "free" if all(fits(name, EARLY) for name in names) else "foreign"


def check_place(config: Config) -> None:
    """Raises ValueError if `config`'s run directory is unsuitable, such as the home directory. Changes nothing."""
    if not config.output.strip():
        raise ValueError("output= is empty, by a variable that is not set, perhaps: give output=DIR")
    directory = config.run_dir
    if not str(directory).isprintable():
        raise ValueError(f"output={config.output!r} holds characters that cannot be printed: give another output=DIR")
    try:
        real, here = directory.resolve(), Path.cwd().resolve()
        home = Path(os.path.expanduser("~")).resolve()
        if real in (home, *home.parents):
            raise ValueError(f"output={directory} is your home directory, or holds it: give output=DIR of its own")
        if real in (here, *here.parents) and look(real) == "foreign":
            raise ValueError(
                f"output={directory} is the current directory, or holds it, with files that are no run's: give "
                "output=DIR of its own"
            )
    except OSError as error:
        raise ValueError(f"output={directory} cannot be read ({error.strerror}): choose another") from None
    except RuntimeError:  # Python before 3.13 raises this for a loop of links
        raise ValueError(f"output={directory} is a link that leads to itself: choose another") from None


def at_home(config: Config, file: Path) -> Config:
    """`config` as read from `file`; if that is a run's own config.yaml, `output` becomes where the run lies now."""
    home = file.parent
    if file.name != CONFIG or config.run_dir.resolve() == home.resolve() or look(home) != "ours":
        return config
    return replace(config, output=str(home))


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    """True if `name` matches one of `patterns`, in shell syntax."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def read_marker(directory: Path) -> dict[str, Any]:
    """The content of the run's marker file; empty if there is none, or it is not ours."""
    try:
        content = strict_json.read(directory / MARKER, strict_json.LARGEST_LINE)  # a pipe, or a device, has no end
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("format"), int) else {}


def _is_older_run(directory: Path, names: set[str]) -> bool:
    """True for a run of an older version: its config has every key of that time, and files of a run lie beside it."""
    try:
        keys = set(config_merge.read_yaml(directory / CONFIG))
        configs.load(directory / CONFIG)
    except (ValueError, TypeError, OSError):
        return False
    return {"name", "output", "model", "data", "stages"} <= keys and bool(names & {LOCK, "initial", "data.json"})
