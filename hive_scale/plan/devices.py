"""Table of GPUs: peak rates and memory from vendors' data sheets, and the bandwidth of their links."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU model. Peaks are dense, in FLOP/s, with float32 accumulation; bandwidths are bytes/s in one direction."""

    title: str  # the driver's name for it, or a part of that
    memory: int
    bf16: float
    fp32: float
    bandwidth: float  # of device memory
    per_node: int
    link: float  # to another GPU of the same node
    network: float  # to a GPU of another node
    host: float  # to host memory

    def peak(self, precision: str) -> float:
        """Peak FLOP/s of dense matrix products in `precision`."""
        return self.bf16 if precision == "bf16" else self.fp32


# From vendors' data sheets; NVLink where the usual board has it. `network`: 100 Gb/s per node for the 3090, 200 and
# 400 Gb/s per GPU for A100 and H100, as in their DGX machines.
GPUS = {
    "rtx3090": Gpu("RTX 3090", 24 * GIB, 71e12, 35.6e12, 936e9, 4, 20e9, 3e9, 20e9),
    "a100-40": Gpu("A100-SXM4-40GB", 40 * GIB, 312e12, 19.5e12, 1555e9, 8, 300e9, 25e9, 20e9),
    "a100-80": Gpu("A100-SXM4-80GB", 80 * GIB, 312e12, 19.5e12, 2039e9, 8, 300e9, 25e9, 20e9),
    "h100": Gpu("H100", 80 * GIB, 989e12, 67e12, 3350e9, 8, 450e9, 50e9, 50e9),
    "h200": Gpu("H200", 140 * GIB, 989e12, 67e12, 4800e9, 8, 450e9, 50e9, 50e9),
}


def find(name: str) -> Gpu:
    """Return the GPU called `name`. Raises ValueError that suggests the nearest name."""
    if name not in GPUS:
        near = get_close_matches(name, GPUS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(GPUS)}"
        raise ValueError(f"--gpu {name}: no such GPU: {hint}")
    return GPUS[name]


def this_gpu(device: torch.device) -> Gpu | None:
    """Return the table's entry for `device`; None if it is not in the table, or a CPU."""
    from hive_scale.device import name_of  # imported here, so that planning needs no torch

    name = name_of(device)
    return next((gpu for gpu in GPUS.values() if gpu.title in name), None)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of `device`; None if `this_gpu` is None."""
    gpu = this_gpu(device)
    return gpu.peak(precision) if gpu else None
