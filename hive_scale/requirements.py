"""Check the installed packages against pyproject.toml, to report a mismatch before a library fails deep inside."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def requirements() -> list[Requirement]:
    """The package's runtime requirements: from pyproject.toml in a checkout, else from the installed metadata."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        lines = tomllib.loads(project.read_text())["project"]["dependencies"]
    else:
        lines = metadata.requires("hive_scale") or []
    asked = [Requirement(line) for line in lines]
    return [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]


def problem() -> str | None:
    """One line that names every requirement that is missing or has the wrong version; None if all are met."""
    wrong = []
    for requirement in requirements():
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        # a local build such as 2.14.1+cu130 counts as its release; pre-releases are allowed
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, {requirement.specifier} was tried")
    return "; ".join(wrong) or None
