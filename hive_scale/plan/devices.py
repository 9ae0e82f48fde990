"""Table of GPUs: peak rates and memory from vendors' data sheets, and the bandwidth of their links."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
# GPU memory unavailable to tensors: bytes of the CUDA context with its libraries, and the share lost to fragmentation.
CONTEXT, FRAGMENTATION = 0.8e9, 0.05


def usable(memory: float) -> float:
    """Bytes that are available to tensors on a device of `memory` bytes."""
    return (memory - CONTEXT) * (1 - FRAGMENTATION)


@dataclass(frozen=True)
class Gpu:
    """One GPU model. Peaks are dense, in FLOP/s, with float32 accumulation; bandwidths are bytes/s in one direction."""

    title: str  # the driver's name for it, without its maker
    memory: int  # bytes that the driver reports: cards whose GDDR6 has ECC lose a sixteenth
    tensor: float  # of fp16, and of bf16 if it has that
    fp32: float
    bandwidth: float  # of device memory
    per_node: int
    link: float  # to another GPU of the same node
    network: float  # to a GPU of another node
    host: float  # to host memory
    has_bf16: bool = True
    compiles: bool = True  # False if blocks are not compiled by default, or that is not known

    def peak(self, precision: str) -> float:
        """Peak FLOP/s of dense matrix products in `precision`. Without bf16 units, torch computes bf16 as fp32."""
        return self.tensor if precision == "bf16" and self.has_bf16 else self.fp32


class Board(NamedTuple):
    """How GPUs are usually built into a node: the last fields of `Gpu`. Assumptions, not data sheets."""

    per_node: int
    link: float
    network: float
    host: float


# PCIe 3, 4 and 5 give about 10, 20 and 40 GB/s. Network: 100 Gb/s for a node of four, 100 Gb/s for each server GPU, and
# 200 or 400 Gb/s for each with NVLink switches, as in NVIDIA's DGX and AMD's MI300X machines.
DESK3, DESK4, DESK5 = (Board(4, rate, 3e9, rate) for rate in (10e9, 20e9, 40e9))
SERVER3, SERVER4, SERVER5 = (Board(8, rate, 12e9, rate) for rate in (10e9, 20e9, 40e9))
DGX1, DGX_A100, DGX_H100 = Board(8, 150e9, 12e9, 10e9), Board(8, 300e9, 25e9, 20e9), Board(8, 450e9, 50e9, 50e9)
DGX_B200, GH200, MI300 = Board(8, 900e9, 50e9, 50e9), Board(4, 450e9, 50e9, 400e9), Board(8, 450e9, 50e9, 50e9)
NVL = Board(8, 300e9, 25e9, 50e9)  # PCIe cards in pairs or fours, joined by NVLink bridges
MI200 = Board(8, 100e9, 25e9, 20e9)


def _gpu(
    title: str, gib: float, tensor: float, fp32: float, bandwidth: float, board: Board, has_bf16: bool = True
) -> Gpu:
    """Peaks in TFLOPS, memory in GiB, its bandwidth in GB/s."""
    return Gpu(title, int(gib * GIB), tensor * 1e12, fp32 * 1e12, bandwidth * 1e9, *board, has_bf16)


def _amd(title: str, gib: float, tensor: float, fp32: float, bandwidth: float, board: Board) -> Gpu:
    return replace(_gpu(title, gib, tensor, fp32, bandwidth, board), compiles=False)


def _geforce(
    title: str, gib: int, cores: int, ghz: float, bandwidth: float, board: Board = DESK4, ratio: int = 2
) -> Gpu:
    """A GeForce: two fp32 operations per core and clock, and `ratio` times that of its tensor cores.

    The ratio is that of "Peak FP16 (BF16) Tensor TFLOPS with FP32 Accumulate" in NVIDIA's architecture white papers,
    and gives their figures: 56.9 of the RTX 2080 Ti at 1.635 GHz, 71 of the 3090, 165.2 of the 4090, 209.5 of the 5090.
    """
    fp32 = 2e-3 * cores * ghz
    return _gpu(title, gib, ratio * fp32, fp32, bandwidth, board, has_bf16=board is not DESK3)


def _turing(title: str, gib: int, cores: int, ghz: float, bandwidth: float) -> Gpu:
    return _geforce(title, gib, cores, ghz, bandwidth, DESK3, ratio=4)


def _blackwell(title: str, gib: int, cores: int, ghz: float, bandwidth: float) -> Gpu:
    return _geforce(title, gib, cores, ghz, bandwidth, DESK5)


GPUS = {
    # CUDA cores, boost clock and bandwidth of NVIDIA's product pages (GeForce 20 to 50 series, reference clocks)
    "rtx2060": _turing("RTX 2060", 6, 1920, 1.68, 336),
    "rtx2060-super": _turing("RTX 2060 SUPER", 8, 2176, 1.65, 448),
    "rtx2070": _turing("RTX 2070", 8, 2304, 1.62, 448),
    "rtx2070-super": _turing("RTX 2070 SUPER", 8, 2560, 1.77, 448),
    "rtx2080": _turing("RTX 2080", 8, 2944, 1.71, 448),
    "rtx2080-super": _turing("RTX 2080 SUPER", 8, 3072, 1.815, 496),
    "rtx2080ti": _turing("RTX 2080 Ti", 11, 4352, 1.545, 616),
    "rtx3050": _geforce("RTX 3050", 8, 2560, 1.777, 224),
    "rtx3060": _geforce("RTX 3060", 12, 3584, 1.777, 360),
    "rtx3060ti": _geforce("RTX 3060 Ti", 8, 4864, 1.665, 448),
    "rtx3070": _geforce("RTX 3070", 8, 5888, 1.725, 448),
    "rtx3070ti": _geforce("RTX 3070 Ti", 8, 6144, 1.77, 608),
    "rtx3080": _geforce("RTX 3080", 10, 8704, 1.71, 760),
    "rtx3080-12": _geforce("RTX 3080 12GB", 12, 8960, 1.71, 912),
    "rtx3080ti": _geforce("RTX 3080 Ti", 12, 10240, 1.665, 912),
    "rtx3090": _gpu("RTX 3090", 24, 71, 35.6, 936, DESK4),
    "rtx3090ti": _geforce("RTX 3090 Ti", 24, 10752, 1.86, 1008),
    "rtx4060": _geforce("RTX 4060", 8, 3072, 2.46, 272),
    "rtx4060ti": _geforce("RTX 4060 Ti", 8, 4352, 2.535, 288),
    "rtx4060ti-16": _geforce("RTX 4060 Ti 16GB", 16, 4352, 2.535, 288),
    "rtx4070": _geforce("RTX 4070", 12, 5888, 2.475, 504),
    "rtx4070-super": _geforce("RTX 4070 SUPER", 12, 7168, 2.475, 504),
    "rtx4070ti": _geforce("RTX 4070 Ti", 12, 7680, 2.61, 504),
    "rtx4070ti-super": _geforce("RTX 4070 Ti SUPER", 16, 8448, 2.61, 672),
    "rtx4080": _geforce("RTX 4080", 16, 9728, 2.505, 717),
    "rtx4080-super": _geforce("RTX 4080 SUPER", 16, 10240, 2.55, 736),
    "rtx4090": _geforce("RTX 4090", 24, 16384, 2.52, 1008),
    "rtx5050": _blackwell("RTX 5050", 8, 2560, 2.57, 320),
    "rtx5060": _blackwell("RTX 5060", 8, 3840, 2.497, 448),
    "rtx5060ti": _blackwell("RTX 5060 Ti", 8, 4608, 2.572, 448),
    "rtx5060ti-16": _blackwell("RTX 5060 Ti 16GB", 16, 4608, 2.572, 448),
    "rtx5070": _blackwell("RTX 5070", 12, 6144, 2.512, 672),
    "rtx5070ti": _blackwell("RTX 5070 Ti", 16, 8960, 2.452, 896),
    "rtx5080": _blackwell("RTX 5080", 16, 10752, 2.617, 960),
    "rtx5090": _blackwell("RTX 5090", 32, 21760, 2.407, 1792),
    # Data sheets of NVIDIA's workstation cards; their tensor figures "with sparsity" (and in FP8 or FP4) are reduced to
    # dense 16-bit products: half, a quarter, an eighth
    "titan-rtx": _gpu("TITAN RTX", 24, 130.5, 16.3, 672, DESK3, has_bf16=False),
    "quadro-rtx-5000": _gpu("Quadro RTX 5000", 16, 89.2, 11.2, 448, DESK3, has_bf16=False),
    "quadro-rtx-6000": _gpu("Quadro RTX 6000", 24, 130.5, 16.3, 672, DESK3, has_bf16=False),
    "quadro-rtx-8000": _gpu("Quadro RTX 8000", 48, 130.5, 16.3, 672, DESK3, has_bf16=False),
    "a4000": _gpu("RTX A4000", 16, 76.7, 19.2, 448, DESK4),
    "a4500": _gpu("RTX A4500", 20, 94.6, 23.7, 640, DESK4),
    "a5000": _gpu("RTX A5000", 24, 111.1, 27.8, 768, DESK4),
    "a5500": _gpu("RTX A5500", 24, 136.4, 34.1, 768, DESK4),
    "a6000": _gpu("RTX A6000", 48, 154.8, 38.7, 768, DESK4),
    "rtx-4000-ada": _gpu("RTX 4000 Ada Generation", 20, 106.9, 26.7, 360, DESK4),
    "rtx-4500-ada": _gpu("RTX 4500 Ada Generation", 24, 158.5, 39.6, 432, DESK4),
    "rtx-5000-ada": _gpu("RTX 5000 Ada Generation", 32, 261.1, 65.3, 576, DESK4),
    "rtx-6000-ada": _gpu("RTX 6000 Ada Generation", 48, 364.2, 91.1, 960, DESK4),
    "rtx-pro-6000": _gpu("RTX PRO 6000 Blackwell Workstation Edition", 96, 500, 125, 1792, DESK5),
    # Data sheets of NVIDIA's data-center GPUs (V100, T4, A10, A30, A40, A100, L4, L40, L40S, H100, H200, HGX B200)
    "t4": _gpu("Tesla T4", 15, 65, 8.1, 320, SERVER3, has_bf16=False),
    "v100-16": _gpu("Tesla V100-SXM2-16GB", 16, 125, 15.7, 900, DGX1, has_bf16=False),
    "v100-32": _gpu("Tesla V100-SXM2-32GB", 32, 125, 15.7, 900, DGX1, has_bf16=False),
    "v100-16-pcie": _gpu("Tesla V100-PCIE-16GB", 16, 112, 14, 900, SERVER3, has_bf16=False),
    "v100-32-pcie": _gpu("Tesla V100-PCIE-32GB", 32, 112, 14, 900, SERVER3, has_bf16=False),
    "v100s": _gpu("Tesla V100S-PCIE-32GB", 32, 130, 16.4, 1134, SERVER3, has_bf16=False),
    "a10": _gpu("A10", 22.5, 125, 31.2, 600, SERVER4),
    "a10g": _gpu("A10G", 22.5, 70, 35, 600, SERVER4),
    "a30": _gpu("A30", 24, 165, 10.3, 933, SERVER4),
    "a40": _gpu("A40", 45, 149.7, 37.4, 696, SERVER4),
    "a100-40": _gpu("A100-SXM4-40GB", 40, 312, 19.5, 1555, DGX_A100),
    "a100-80": _gpu("A100-SXM4-80GB", 80, 312, 19.5, 2039, DGX_A100),
    "a100-40-pcie": _gpu("A100-PCIE-40GB", 40, 312, 19.5, 1555, SERVER4),
    "a100-80-pcie": _gpu("A100 80GB PCIe", 80, 312, 19.5, 1935, SERVER4),
    "l4": _gpu("L4", 22.5, 121, 30.3, 300, SERVER4),
    "l40": _gpu("L40", 45, 181, 90.5, 864, SERVER4),
    "l40s": _gpu("L40S", 45, 362, 91.6, 864, SERVER4),
    "h100": _gpu("H100 80GB HBM3", 80, 989, 67, 3350, DGX_H100),
    "h100-pcie": _gpu("H100 PCIe", 80, 756, 51, 2000, SERVER5),
    "h100-nvl": _gpu("H100 NVL", 93.5, 835, 60, 3900, NVL),
    "h200": _gpu("H200", 140, 989, 67, 4800, DGX_H100),
    "h200-nvl": _gpu("H200 NVL", 140, 835, 60, 4800, NVL),
    "gh200": _gpu("GH200 480GB", 95.5, 989, 67, 4000, GH200),
    "b200": _gpu("B200", 179, 2250, 75, 7700, DGX_B200),
    # Data sheets of AMD; an MI250X is two devices to torch, and the row is one of them
    "mi210": _amd("MI210", 64, 181, 22.6, 1638, SERVER4),
    "mi250x": _amd("MI250X", 64, 191.5, 23.9, 1638, MI200),
    "mi300x": _amd("MI300X", 192, 1307.4, 163.4, 5300, MI300),
    "mi325x": _amd("MI325X", 256, 1307.4, 163.4, 6000, MI300),
    "mi355x": _amd("MI355X", 288, 2500, 157.3, 8000, MI300),
    "rx7900xtx": _amd("Radeon RX 7900 XTX", 24, 122.8, 61.4, 960, DESK4),
}
# what names of one GPU may or may not have: its maker and series, the memory's kind and unit, the usual socket
MAKER = re.compile(
    r"nvidia|amd|geforce|tesla|instinct|radeon|rtx|rx(?=[ -]?\d)|generation|edition|blackwell|workstation"
)
KIND = re.compile(r"hbm\d?e?|sxm\d?|oam|(?<=\d) ?gi?b\b")


def _words(name: str) -> tuple[str, ...]:
    """The parts of a GPU's name that tell it from others, sorted: ``RTX 3080 Ti`` and ``rtx3080ti`` have the same."""
    return tuple(sorted(re.findall(r"[a-z]+|\d+", KIND.sub(" ", MAKER.sub(" ", name.lower())))))


_NAMED = {_words(name): gpu for key, gpu in GPUS.items() for name in (key, gpu.title)}


def _look_up(name: str) -> Gpu | None:
    """The GPU called `name`, in which its memory as sold ("L40S 48GB") may be told, too."""
    words = _words(name)
    if words in _NAMED:
        return _NAMED[words]
    for place, word in enumerate(words):
        found = _NAMED.get(words[:place] + words[place + 1 :])
        if found and word.isdecimal() and abs(int(word) * GIB - found.memory) <= 0.1 * found.memory:
            return found
    return None


def find(name: str) -> Gpu:
    """The GPU called `name`, whatever its case and separators. Raises ValueError that suggests the nearest names."""
    if found := _look_up(name):
        return found
    words, plain = _words(name), {"".join(_words(key)): key for key in GPUS}
    near = [key for key in GPUS if words and {*words} <= {*_words(key)}]  # "a100", of which there are several
    near = near or [plain[one] for one in get_close_matches("".join(words), plain, n=3, cutoff=0.6)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(GPUS)}"
    raise ValueError(f"gpu {name}: no such GPU: {hint}")


def this_gpu(device: torch.device) -> Gpu | None:
    """The table's entry for `device`; None if it is not in the table, or a CPU."""
    from hive_scale.device import name_of  # imported here, so that planning needs no torch

    return _look_up(name_of(device))


def gpu_here() -> Gpu | None:
    """This machine's GPU of CUDA or ROCm, with the memory that it has; None without one.

    Raises ValueError if it is unknown.
    """
    from hive_scale.device import CPU, kind, memory_of, name_of, this_device

    if kind() == CPU.type or not (name := name_of(device := this_device())):
        return None
    if found := this_gpu(device):
        return replace(found, memory=memory_of(device)[1])
    raise ValueError(
        f"this machine's {name} is not in the planner's table: describe it by --gpu_memory_gb --gpu_tflops "
        "--gpu_bandwidth_gb_s, or name another with --gpu"
    )


def described(
    base: Gpu | None, memory_gb: float | None, tflops: float | None, bandwidth_gb_s: float | None
) -> Gpu | None:
    """`base` with the figures that are given, or without a base the GPU that they describe; None if nothing is given.

    Args:
        base: the GPU that was named, if any.
        memory_gb: 1e9 bytes.
        tflops: dense, of the precision that is planned.
        bandwidth_gb_s: of device memory.

    Raises:
        ValueError: A figure is missing without a base, or not above 0.
    """
    given = {"--gpu_memory_gb": memory_gb, "--gpu_tflops": tflops, "--gpu_bandwidth_gb_s": bandwidth_gb_s}
    told = {name: value for name, value in given.items() if value is not None}
    if wrong := [f"{name} {value:g}" for name, value in told.items() if not 0 < value < float("inf")]:
        raise ValueError(f"{wrong[0]} must be above 0")
    if not told:
        return base
    if base is None and len(told) < len(given):
        raise ValueError(f"a GPU that --gpu does not name is described by {', '.join(given)}: give all three")
    memory, peak, bandwidth = (value or 0.0 for value in given.values())
    made = base or Gpu(
        f"GPU of {memory:g} GB, {peak:g} TFLOPS and {bandwidth:g} GB/s", 0, 0, 0, 0, *DESK4, compiles=False
    )
    return replace(
        made,
        memory=int(memory * 1e9) or made.memory,
        tensor=peak * 1e12 or made.tensor,
        fp32=peak * 1e12 or made.fp32,
        bandwidth=bandwidth * 1e9 or made.bandwidth,
        has_bf16=made.has_bf16 or bool(peak),
    )


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of `device`; None if `this_gpu` is None."""
    gpu = this_gpu(device)
    return gpu.peak(precision) if gpu else None
