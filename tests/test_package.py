"""The package works without its checkout: built, installed into an environment of its own, run from elsewhere.

Why: data files are easily missing from wheels, and a checkout on the path hides it. The environment has this one's
dependencies, by a path file, and of our code only the wheel.
"""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import ranks

from hive_scale.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
BRIEF = ["--preset", "debug", "blank_image_control=false", "log.wandb=off"]
BRIEF += [f"stages.{stage}.max_steps=2" for stage in ("projector", "language", "joint")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git knows, for a build leaves things behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink() or (ROOT / name).exists():
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", str(folder))
    ours = folder / "bin" / "python"
    packages = run(str(ours), "-c", "import site; print(site.getsitepackages()[0])").strip()
    run(str(ours), "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check", str(wheel))
    Path(packages, "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return ours


def run(*command: str, cwd: Path | None = None, fails: bool = False) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + (done.stderr if fails else "")


def test_the_wheel_holds_what_is_found_by_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for file in (*ROOT.glob("ds_configs/*.json"), *ROOT.glob("slurm/profiles/*.yaml")):
        assert any(name.endswith(f"/{file.name}") for name in names), file.name
    assert sum(name.endswith(".tar") for name in names) == 3
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"hive_scale"}  # nothing else at the top


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_from_anywhere(command: str, python: Path, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()  # a folder of the user's that is called like one of ours
    (tmp_path / "slurm" / "__init__.py").touch()
    assert "example" in run(str(python), "-m", "hive_scale", command, "--help", cwd=tmp_path)


def test_two_steps_of_each_stage(python: Path, tmp_path: Path) -> None:
    shown = run(str(python), "-m", "hive_scale", "pretrain", *BRIEF, "output=run", cwd=tmp_path)
    assert "joint" in shown
    assert (tmp_path / "run" / "joint" / "encoder" / "config.json").is_file()
    where = run(str(python), "-c", "import hive_scale; print(hive_scale.__file__)", cwd=tmp_path)
    assert not where.startswith(str(ROOT))


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hive_scale", "pretrain"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "hive_scale", "pretrain"],
}


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_several_processes(launcher: str, python: Path, tmp_path: Path) -> None:
    words = ["--ds_config", "zero2"] if launcher == "deepspeed" else []
    run(str(python), *ranks.at_free_port(LAUNCHERS[launcher]), *words, *BRIEF, "output=run", cwd=tmp_path)
    assert (tmp_path / "run" / "joint" / "weights.safetensors").is_file()


def test_jobs_are_written_with_the_installed_code(python: Path, tmp_path: Path) -> None:
    words = ["submit_pipeline", "--dry_run", "--profile", "laptop", "--ds_config", "zero2", *BRIEF, "output=run"]
    assert "#SBATCH" in run(str(python), "-m", "hive_scale", *words, cwd=tmp_path)
    shown = run(
        str(python), "-m", "hive_scale", "submit_pipeline", "--profile", "lapto", "--dry_run", cwd=tmp_path, fails=True
    )
    assert "laptop, one_node, preemptible" in shown
