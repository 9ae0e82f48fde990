"""What is released is known: one commit gives the same bytes of the wheel, and each dependency's licence is listed.

Why: only then can anyone else rebuild what was published, and compare.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_is_the_same_bytes_whoever_builds_it_and_when(tmp_path: Path) -> None:
    built = []
    for name, mask, zone in (("one", 0o022, "UTC"), ("other", 0o077, "Asia/Tokyo")):
        words = ["make", "--silent", "--old-file", "install", "wheel", f"VENV={sys.prefix}", f"DIST={tmp_path / name}"]
        env = os.environ | {"TZ": zone, "PYTHONHASHSEED": str(len(built))}
        subprocess.run(words, cwd=ROOT, env=env, umask=mask, check=True, capture_output=True)
        (wheel,) = (tmp_path / name).iterdir()
        built.append(wheel.read_bytes())
    assert built[0] == built[1]
    assert len(built[0]) > 100_000


def test_the_licence_of_every_package_of_the_lock_is_listed() -> None:
    table = (ROOT / "docs" / "licences.md").read_text().splitlines()
    rows = [line.split("|")[1:3] for line in table if line.startswith("| ")]
    licences = {canonicalize_name(name.strip()): licence.strip() for name, licence in rows}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith((" ", "#")):
            one = Requirement(line)
            here = one.marker is None or one.marker.evaluate({"sys_platform": "linux"})
            name = canonicalize_name(one.name)
            assert not here or licences.get(name), f"{name} is not in docs/licences.md: make licences"
    assert [name for name, licence in licences.items() if licence == "UNKNOWN"] == ["cuda-toolkit"]
