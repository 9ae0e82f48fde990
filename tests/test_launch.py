"""Each launcher's command, exactly as in the README, trains the same run on CPUs over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

ROOT = Path(__file__).resolve().parents[1]
BRIEF = ["blank_image_control=false", *(f"stages.{stage}.max_steps=2" for stage in ("projector", "language", "joint"))]
COMMANDS = {
    "python": "python launchers/pretrain.py",
    "deepspeed": "deepspeed launchers/pretrain.py --ds_config ds_configs/zero2.json",
    "deepspeed-2": "deepspeed --num_gpus 2 launchers/pretrain.py --ds_config ds_configs/zero3_offload.json",
    "torchrun": "torchrun --nproc_per_node 2 launchers/pretrain.py",
    "accelerate": "accelerate launch --multi_gpu --num_processes 2 launchers/pretrain.py --ds_config zero1",
}


def launch(command: str, output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [*ranks.at_free_port(command.split()), *BRIEF, *words, f"output={output}"],
        cwd=ROOT,
        env=env | {"PATH": beside, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def held_out(output: Path) -> list[float]:
    """Of each stage's end, in order."""
    losses = []
    for stage in ("projector", "language", "joint"):
        lines = (output / stage / "metrics.jsonl").read_text().splitlines()
        losses += [record["eval_loss"] for record in map(json.loads, lines) if "eval_loss" in record][-1:]
    return losses


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    output = tmp_path_factory.mktemp("python")
    done = launch(COMMANDS["python"], output)
    assert done.returncode == 0, done.stderr
    return held_out(output)


@pytest.mark.parametrize(
    "name",
    ["deepspeed", "accelerate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepspeed-2", "torchrun"))],
)
def test_every_launcher_trains_the_same_run(name: str, plain: list[float], tmp_path: Path) -> None:
    done = launch(COMMANDS[name], tmp_path)
    assert done.returncode == 0, done.stderr
    assert held_out(tmp_path) == pytest.approx(plain, abs=5e-4)


def test_a_contradiction_is_told_once_and_ends_the_job(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"gradient_clipping": 7.0, "zero_optimization": {"stage": 2}}))
    done = launch("torchrun --nproc_per_node 2 launchers/pretrain.py", tmp_path / "run", f"engine.ds_config={path}")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "gradient_clipping=7.0 contradicts" in done.stderr
