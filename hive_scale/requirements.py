"""Whether this environment has what pyproject.toml asks for, said in one line before a library fails deep inside."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

REMEDY = "pip install -r requirements.lock (make install) gives a set that was tested together"


def requirements() -> list[Requirement]:
    """What the package needs at run time: of this checkout where it is one, else as installed."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        lines = tomllib.loads(project.read_text())["project"]["dependencies"]
    else:
        lines = metadata.requires("hive_scale") or []
    asked = [Requirement(line) for line in lines]
    return [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]


def problem() -> str | None:
    """One line on every requirement that is missing or of another version; None where there is nothing to say."""
    wrong = []
    for requirement in requirements():
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        # a local build such as 2.14.1+cu130 counts as its release, a pre-release as what it precedes
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, {requirement.specifier} was tried")
    return f"{'; '.join(wrong)}: {REMEDY}" if wrong else None
