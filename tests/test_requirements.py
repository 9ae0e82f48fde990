"""A wrong environment is reported in one line that says what to change, not by a traceback from deep inside.

Why: a Python or torch outside the range, or a missing package, is the first problem of a newcomer.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from hive_scale import __main__ as front

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "launchers" / "pretrain.py"
OTHER_PYTHONS = [  # whatever of them this machine has
    *(found for name in ("3.8", "3.9", "3.10", "3.14") for found in Path("/usr/bin").glob(f"python{name}")),
    *(
        found
        for name in ("3.8", "3.9", "3.10", "3.14")
        for found in Path.home().glob(f".pyenv/versions/{name}.*/bin/python")
    ),
]


def told(*command: str, path: Path | None = None) -> str:
    """The one line of an error."""
    env = {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("version", ["2.3.0", "3.0.0"])
def test_a_torch_outside_the_range(version: str, tmp_path: Path) -> None:
    folder = tmp_path / f"torch-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    line = told(sys.executable, str(LAUNCHER), path=tmp_path)
    assert f"torch is {version}, <2.15,>=2.11 was tried" in line
    assert "requirements.lock" in line


@pytest.mark.parametrize("launcher", ["pretrain.py", "benchmark.py", "reproduce.py"])
def test_nothing_installed(launcher: str) -> None:
    line = told(sys.executable, "-S", str(LAUNCHER.with_name(launcher)))
    assert "packaging is not installed" in line
    assert "requirements.lock" in line


@pytest.mark.skipif(not OTHER_PYTHONS, reason="no other Python on this machine")
def test_a_python_outside_the_range() -> None:
    for python in OTHER_PYTHONS:
        assert "hive_scale needs Python 3.11 to 3.13, and this is 3." in told(str(python), str(LAUNCHER))


def test_what_an_old_python_reads_it_can_parse() -> None:
    for path in (LAUNCHER, ROOT / "slurm" / "submit_pipeline.py", ROOT / "hive_scale" / "__main__.py"):
        ast.parse(path.read_text(), feature_version=(3, 8))
    ast.parse((ROOT / "hive_scale" / "__init__.py").read_text(), feature_version=(3, 8))


def test_the_pythons_told_are_those_of_the_project() -> None:
    asked = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    within = [minor for minor in range(5, 30) if asked.contains(f"3.{minor}.1")]
    assert (within[0], within[-1]) == (front.OLDEST[1], front.NEWEST[1])


def test_an_unknown_command_names_the_nearest_or_all() -> None:
    assert "did you mean pretrain?" in told(sys.executable, "-m", "hive_scale", "pretain", path=ROOT)
    assert "there are pretrain, submit_pipeline" in told(sys.executable, "-m", "hive_scale", "xyz", path=ROOT)


def test_a_preset_whose_llm_is_not_fetched_yet_does_not_ask_the_hub_for_it(tmp_path: Path) -> None:
    command = [sys.executable, str(LAUNCHER), "--preset", "demo", f"output={tmp_path / 'run'}", "log.wandb=off"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "./data/smollm2 is not there: make it with python -m hive_scale prepare_data smollm2" in done.stderr
    assert "data/emoji is not there: make it with python -m hive_scale prepare_data emoji --styles all" in done.stderr


def test_compilation_without_a_compiler_is_refused_before_training(tmp_path: Path) -> None:
    words = ["--preset", "debug", "engine.compile=true", f"output={tmp_path / 'run'}", "log.wandb=off"]
    command = [sys.executable, str(LAUNCHER), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)}, check=False)
    assert done.returncode == 2, done.stderr
    assert "engine.compile=true needs a C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr
