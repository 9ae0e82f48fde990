"""What all tests share: hundreds of small runs, none of which need be drawn by wandb unless a test says so."""

import os

import pytest

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors; and the other cores have tests of their own


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `make test` files run side by side: tests of one share what it makes, those on Slurm share a cluster."""
    for item in items:
        here = "cluster" if "cluster" in item.path.parts else item.path.name
        item.add_marker(pytest.mark.xdist_group(here))
