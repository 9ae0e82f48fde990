"""The README can be read in one sitting, and the tree in docs/design.md names exactly the files that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("hive_scale", "launchers", "ds_configs", "slurm", "tests")


def tracked() -> set[str]:
    """Files a reader meets; test modules go by one line, and packages without code of their own by none."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *SHOWN]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = {name for name in listed if name.endswith((".py", ".json", ".yaml", ".sh")) and (ROOT / name).exists()}
    tests = {name for name in files if name.startswith("tests/test_")}
    packages = {name for name in files if name.endswith("/__init__.py") and name != "hive_scale/__init__.py"}
    empty = {name for name in packages if not re.search(r"^(def|class) ", (ROOT / name).read_text(), re.MULTILINE)}
    return (files - tests - empty) | {"tests/test_*.py"}


def drawn() -> set[str]:
    """Paths in the tree, which indents by two spaces and sets a file's purpose after its name."""
    (tree,) = re.findall(r"<!-- tree -->\n```\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)
    folders: list[str] = []
    paths = set()
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            paths.add("".join(folders) + name)
    return paths


def test_the_tree_names_every_file() -> None:
    shown = {path for path in drawn() if path.startswith(tuple(f"{folder}/" for folder in SHOWN))}
    assert tracked() - shown == set(), "missing from the tree in docs/design.md"
    assert shown - tracked() == set(), "in the tree of docs/design.md but not in the repository"


def test_the_readme_is_read_in_one_sitting() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert max(len(line) for line in lines if not line.startswith("|")) <= 160
