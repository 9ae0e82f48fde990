"""The rules of the architecture hold: imports point down, each framework has one entry, the command line is fast."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hive_scale.registry import ADAPTERS, ENCODERS, FUSIONS, HOSTS, OPTIMIZERS
from hive_scale.strict_json import dumps

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hive_scale"

LEAVES = {
    *("config", "config_merge", "key_guesses", "credentials", "rundir", "version", "exit_codes", "registry"),
    *("strangers", "strict_json", "atomic", "checksums", "shared_files", "locate"),
    *("batch", "schedule", "seeding", "precision", "param_groups", "phase_timer", "chat_template"),
    *("distributed", "rendezvous", "launcher_env", "heartbeat", "device", "placement", "node"),
}
# a room and what it may read besides the leaves
ROOMS: dict[str, set[str]] = {
    "presets": set(),
    "cli": {"presets"},
    "requirements": set(),
    "model": set(),
    "data": set(),
    "engine": set(),
    "observability": set(),
    "resilience": {"observability"},
    "checkpoint": {"resilience"},
    "plan": {"model", "engine"},
    "prepare": {"data"},
    "evaluate": {"model", "data"},
    "export": {"model", "data", "observability", "checkpoint"},
    "feature_cache": {"model", "data", "observability"},
    "preflight": {"model", "data", "engine", "checkpoint", "feature_cache"},
    "header": {"model", "data", "engine", "observability", "checkpoint", "plan", "preflight"},
    "callbacks": {"engine", "train"},  # the types of what they are given
    "train": {
        *("model", "engine", "observability", "resilience", "checkpoint", "plan", "feature_cache", "preflight"),
        "callbacks",
    },
    "pipeline": {
        *("model", "engine", "observability", "resilience", "checkpoint", "export", "preflight", "train"),
        *("callbacks", "header", "plan"),
    },
    "launch": {"observability", "resilience"},
    "run": {"model", "checkpoint"},
    "captioner": {"model", "data", "export", "report", "run"},
    "report": {"model", "data", "observability", "resilience", "checkpoint", "evaluate", "preflight", "run"},
}
FACES = {"__init__", "__main__", "commands", "slurm"}  # what a person calls: they see every room
DOORS: dict[str, set[str]] = {
    "deepspeed": {"hive_scale/engine/deepspeed.py", "hive_scale/engine/deepspeed_config.py", "launchers/benchmarks/"},
    "webdataset": {"hive_scale/data/", "hive_scale/prepare/", "launchers/benchmarks/"},
    "wandb": {"hive_scale/observability/trackers.py"},
    "omegaconf": {"hive_scale/config.py", "hive_scale/config_merge.py", "hive_scale/presets.py"},
    "matplotlib": {
        "hive_scale/report/",
        "hive_scale/plan/sweep.py",
        "launchers/benchmarks/",
        "launchers/reproduction/study_table.py",
    },
    "submitit": {"hive_scale/slurm/"},
    "peft": {"hive_scale/model/adapters.py"},
    "gradio": {"hive_scale/commands/demo.py"},
    "transformers": {
        *("hive_scale/model/", "hive_scale/data/tokenizer.py", "hive_scale/data/byte_tokenizer.py"),
        *("hive_scale/export/", "hive_scale/prepare/smollm2.py"),
        "launchers/benchmarks/",  # as the peer that is measured
    },
    "huggingface_hub": {"hive_scale/locate.py", "hive_scale/export/"},
    "accelerate": {"hive_scale/model/build.py", "launchers/benchmarks/"},
}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files() -> list[Path]:
    return sorted(path for root in (PACKAGE, ROOT / "launchers", ROOT / "slurm") for path in root.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    here = room(path)
    if here in FACES:
        return
    read = {name.split(".")[1] for name in imports(path) if name.startswith("hive_scale.") and name.count(".")}
    if here in LEAVES:
        assert read <= LEAVES
    else:
        assert read - {here} <= LEAVES | ROOMS[here], f"room {here} may read the leaves and {ROOMS[here] or 'nothing'}"


def test_what_is_written_as_json_is_json() -> None:
    """Python's own writer says NaN, which no other reader takes: ours does not, nor one that is told so."""
    lax = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("json.dump", "json.dumps")
        and "allow_nan=False" not in [ast.unparse(keyword) for keyword in node.keywords]
    ]
    assert not lax, "use hive_scale.strict_json.dumps"


def test_numbers_that_are_not_finite_become_null() -> None:
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, 2)}], "d": "NaN"}
    assert json.loads(dumps(value)) == {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN"}
    assert dumps({"a": 1.0}, indent=1) == json.dumps({"a": 1.0}, indent=1)


@pytest.mark.parametrize("framework", DOORS)
def test_each_framework_enters_through_its_door(framework: str) -> None:
    users = [
        path.relative_to(ROOT).as_posix()
        for path in files()
        if any(name.split(".")[0] == framework for name in imports(path))
    ]
    for user in users:
        assert any(user.startswith(door) for door in DOORS[framework]), f"{user} imports {framework}"


def test_nobody_compares_the_name_of_an_entry() -> None:
    """What differs between entries is theirs to answer."""
    names = {name for one in (FUSIONS, ENCODERS, HOSTS, OPTIMIZERS, ADAPTERS) for name in one.names()}
    own = {*PACKAGE.glob("model/fusion/*.py"), *(PACKAGE / "model" / f"{one}.py" for one in ("encoders", "hosts"))}
    own |= {PACKAGE / one for one in ("registry.py", "engine/optimizer.py")}
    compared = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted({*PACKAGE.rglob("*.py")} - own)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare)
        for leaf in ast.walk(node)
        if isinstance(leaf, ast.Constant) and leaf.value in names
    ]
    assert not compared


def test_the_config_imports_no_torch() -> None:
    code = "import sys, hive_scale.config, hive_scale.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        "caption none image.jpg",
        "demo none",
        "prepare_data table none.csv images --output out",
        "prepare_data llava none.json images --output out",
        "prepare_data pairs none --output out",
        "prepare_data parquet none.parquet --output out",
        "prepare_data classes none --output out",
    ],
)
def test_a_path_that_is_not_there_is_said_before_torch_is_imported(words: str, tmp_path: Path) -> None:
    code = (
        "import sys; from hive_scale.__main__ import run\n"
        "code = run(sys.argv[1], sys.argv[2:])\n"
        "sys.exit(code if 'torch' not in sys.modules else 'torch was imported')"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *words.split()]
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert said.returncode == 2, said.stderr
    assert "none" in said.stderr


@pytest.mark.parametrize(
    "launcher",
    [*sorted((ROOT / "launchers").glob("*.py")), ROOT / "slurm" / "submit_pipeline.py"],
    ids=lambda path: path.stem,
)
def test_help_needs_no_torch_and_shows_examples(launcher: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    start = time.monotonic()
    shown = subprocess.run([sys.executable, "-c", code, str(launcher)], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, "torch was imported"
    assert "example" in shown.stdout.lower()
    assert time.monotonic() - start < 20  # a second in truth; a shared machine may be slow
