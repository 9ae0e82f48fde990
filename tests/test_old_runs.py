"""A run begun by an older version, with older names, resumes, exports and reports as it would have then.

`old_run.tar.gz` was stopped by a signal in its second stage, at commit 537feeb, so its config keys, checkpoint,
checksums and metrics are those of that version. The expected losses are of the same run, finished by that version.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from hive_scale.export import export_run, from_pretrained
from hive_scale.observability.metrics import read_metrics
from hive_scale.run import find_encoder

ROOT = Path(__file__).resolve().parents[1]
LOSSES = {
    "language": [5.56542515, 5.51426383, 5.57406721, 5.49948394],
    "joint": [5.50050927, 5.52666016, 5.49936896, 5.4776624],
}


def command(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).with_name("old_run.tar.gz")) as tar:
        tar.extractall(folder, filter="data")
    said = command("launchers/pretrain.py", "--config", folder / "old_run" / "config.yaml")
    assert "old name" not in said
    return folder / "old_run"


def test_it_goes_on_to_the_losses_of_the_version_that_began_it(run: Path) -> None:
    for stage, losses in LOSSES.items():
        assert [line["loss"] for line in read_metrics(run / stage / "metrics.jsonl")] == pytest.approx(losses, rel=1e-5)


def test_its_parts_are_given_away_and_load(run: Path, tmp_path: Path) -> None:
    export_run("hive", run, tmp_path / "hive")
    assert all(parameter.isfinite().all() for parameter in from_pretrained(tmp_path / "hive").parameters())
    assert find_encoder(run).is_dir()
    assert command("launchers/export.py", "verify", run).count("DAMAGED") == 0


def test_a_hive_that_an_older_version_exported_opens(run: Path, tmp_path: Path) -> None:
    export_run("hive", run, tmp_path / "hive")
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "hive", old)
    text = (old / "config.json").read_text()
    for new, then in (
        ("connector_weights", "connector"),
        ("encoder_layers", "depths"),
        ("encoder_layer_ratio", "density"),
    ):
        assert f'"{new}"' in text
        text = text.replace(f'"{new}"', f'"{then}"')
    (old / "config.json").write_text(text)
    (old / "hive_scale.sha256").unlink()
    ours, theirs = from_pretrained(tmp_path / "hive"), from_pretrained(old)
    assert all(torch.equal(one, theirs.get_parameter(name)) for name, one in ours.named_parameters())


def test_it_is_reported_on(run: Path, tmp_path: Path) -> None:
    command("launchers/visualize.py", "report", run, "--numbers_only", "--output", tmp_path / "report.html")
    assert "old" in (tmp_path / "report.html").read_text()
