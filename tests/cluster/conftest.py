"""One real Slurm for all tests here. Where none can be had they say why and are skipped; in CI that is a failure."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tars
from chains import recipe, why_not

from hive_scale.config import Config
from hive_scale.distributed import session
from hive_scale.pipeline import run_pipeline

SCRIPT = Path(__file__).with_name("cluster.sh")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cluster's directory; its commands answer while the fixture lasts."""
    if reason := why_not():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no Slurm here: {reason}")
    folder = tmp_path_factory.mktemp("slurm")
    os.environ["SLURM_TEST_PORT"] = str(free_ports())  # also for a test that starts a lost daemon again
    # what the daemons inherit must not be a pipe that somebody reads to its end
    with (folder / "start.txt").open("w") as out:
        started = subprocess.run(["bash", SCRIPT, "start", folder], stdout=out, stderr=out, check=False)
    try:
        if started.returncode:
            pytest.fail(f"no Slurm here: {(folder / 'start.txt').read_text()}")
        os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
        yield folder
    finally:
        subprocess.run(["bash", SCRIPT, "stop", folder], check=False)
        for name in ("SLURM_CONF", "SLURM_TEST_PORT"):
            os.environ.pop(name, None)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports() -> int:
    """The first of 20 ports in a row that nobody uses, beyond those of training runs and short of ephemeral ones."""
    # two test processes that start at once look in different places
    for first in random.sample(range(30000, 32740, 20), 137):
        try:
            for port in range(first, first + 20):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no 20 free ports in a row")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tars.write_set(folder / "train", [40, 40])
    tars.write_set(folder / "heldout", [8])
    return folder


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Config:
    """The same recipe, trained by one process and never disturbed."""
    config = recipe(tmp_path_factory.mktemp("reference"), pairs)
    with session() as world:
        run_pipeline(config, world)
    return config
