"""What a directory is to us: free for a run, one of our runs, or somebody else's. This module imports no torch.

A run's directory has a marker of its own. Directories of older versions have none: they are known by a config.yaml
that is one of ours. docs/runs.md has the rules as a table.
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
    """Whether `directory` is a run of ours, or else free for one: not there, empty, or with a start's first files."""
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set[str]()
    if read_marker(directory) or (CONFIG in names and _is_older_run(directory, names)):
        return "ours"
    if CONFIG in names and not (directory / CONFIG).stat().st_size:
        names.remove(CONFIG)  # by an older version on a full disk
    return "free" if all(fits(name, EARLY) for name in names) else "foreign"


def check_place(config: Config) -> None:
    """Raises ValueError if the run directory cannot be anybody's; looks, and changes nothing."""
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
    except RuntimeError:  # as Python before 3.13 has it
        raise ValueError(f"output={directory} is a link that leads to itself: choose another") from None


def at_home(config: Config, file: Path) -> Config:
    """`config`, which `file` says, at home: a run's own config.yaml means the run beside it, wherever that lies now."""
    home = file.parent
    if file.name != CONFIG or config.run_dir.resolve() == home.resolve() or look(home) != "ours":
        return config
    return replace(config, output=str(home))


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of `patterns`, as a shell has them, fits `name`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def read_marker(directory: Path) -> dict[str, Any]:
    """What the marker says; empty if there is none of ours."""
    try:
        content = strict_json.read(directory / MARKER, strict_json.LARGEST_LINE)  # a pipe, or a device, has no end
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("format"), int) else {}


def _is_older_run(directory: Path, names: set[str]) -> bool:
    """A saved config has every key of its time; beside a recipe there are no files of a run."""
    try:
        keys = set(config_merge.read_yaml(directory / CONFIG))
        configs.load(directory / CONFIG)
    except (ValueError, TypeError, OSError):
        return False
    return {"name", "output", "model", "data", "stages"} <= keys and bool(names & {LOCK, "initial", "data.json"})
