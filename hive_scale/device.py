"""What a process computes on, known in this place alone: any maker's GPU that `torch.accelerator` finds, or the CPU.

ROCm's GPUs call themselves CUDA's to torch. What was tried on which is in docs/devices.md.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Any

import torch

CPU = torch.device("cpu")
# with those of these names training over several processes was tried, over NCCL or, on ROCm, RCCL
DISTRIBUTED = ("cuda",)
SINGLE = ("xpu", "mps")  # in one process each


def kind() -> str:
    """`torch.device.type` of what this machine computes on: cuda (ROCm's, too), xpu, mps, or cpu.

    Raises ValueError for an accelerator that was never thought of.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return CPU.type
    if found.type not in (*DISTRIBUTED, *SINGLE):
        raise ValueError(
            f"torch finds an accelerator of type {found.type}, for which nothing here was written: hide it from torch, "
            "and the CPU is used, or see docs/devices.md"
        )
    return found.type


def this_device(local_rank: int = 0, processes: int = 1) -> torch.device:
    """The device of the process `local_rank` of its node, which torch uses by default from now on.

    Args:
        local_rank: counts the devices that this process sees.
        processes: of the whole job.

    Raises:
        ValueError: there are fewer devices, or those here have not been tried by more than one process.
    """
    of = kind()
    if of == CPU.type:
        return CPU
    if processes > 1 and of not in DISTRIBUTED:
        raise ValueError(
            f"{processes} processes on devices of type {of} were never tried: start one, or see docs/devices.md"
        )
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise ValueError(f"this node has {count} GPUs and at least {local_rank + 1} processes: start one per GPU")
    device = torch.device(of, local_rank)
    torch.accelerator.set_device_index(device)
    return device


def visible() -> list[tuple[str, str]]:
    """Of each device that this process sees, by index: what tells it from all others, and the card it is on.

    The first is its UUID where torch gives one. The second is the card's place on the machine's bus, by which NCCL
    tells ranks apart, or "" where nothing goes by that.
    """
    found = []
    for index in range(torch.accelerator.device_count()):
        properties: Any = torch.cuda.get_device_properties(index)
        parts = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
        bus = ":".join(f"{part:02x}" for part in parts if part is not None)
        found.append((_mig_instance(index) or str(getattr(properties, "uuid", "")) or bus or str(index), bus))
    return [(identity, "" if torch.version.hip else bus) for identity, bus in found]


def _mig_instance(index: int) -> str:
    """The MIG instance that CUDA shows this process at `index`, as it was given: its UUID may be the card's."""
    words = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return words[index] if index < len(words) and words[index].startswith("MIG-") else ""


def library_version(device: torch.device) -> str:
    """Of what connects devices: NCCL's, or RCCL's; "" where gloo does."""
    library: Any = torch.cuda.nccl
    return ".".join(map(str, library.version())) if device.type == "cuda" else ""


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes of the device's memory that are free, and all."""
    free, total = torch.accelerator.get_memory_info(device)
    return int(free), int(total)


def is_accelerator(device: torch.device) -> bool:
    return device.type != CPU.type


def pins_memory(device: torch.device) -> bool:
    """Whether copies to `device` are faster from pages of the host that stay where they are. A Mac has one memory."""
    return device.type in ("cuda", "xpu")


def pinned_bytes(size: int) -> int:
    """What torch takes for `size` bytes of pinned memory: the next power of two."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def default_precision(device: torch.device) -> str:
    """What a model that is only asked computes in where nobody has said so: bf16 where `device` has units for it."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "xpu" else "fp32"


def choose_precision(device: torch.device, asked: str | None) -> tuple[str, str]:
    """The precision `asked` for, or the default of `device`, set up in this process; and what to tell of it."""
    precision = asked or default_precision(device)
    if precision == "fp32":
        exact_fp32()
    name = {"fp32": "fp32 (IEEE's: no TF32)"}.get(precision, precision) if is_accelerator(device) else precision
    slow = precision == "fp32" and default_precision(device) != precision
    return precision, f"computes in {name} on {device.type}" + (": --precision bf16 is several times as fast" * slow)


def exact_fp32() -> None:
    """From now on float32 means IEEE float32 in this process: no product or convolution of a GPU is rounded to TF32.

    torch's own default is that for products, but TF32 for convolutions, as of patch embeddings.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def synchronize(device: torch.device) -> None:
    """Wait for all that was given to `device` to do."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)


def free_unused() -> None:
    """Give back what torch keeps of the device's memory for later, and count peaks anew."""
    if kind() != CPU.type:
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


def peaks(device: torch.device) -> dict[str, int]:
    """Bytes that this process has held at most so far.

    "memory" is what tensors had of the device's memory and "reserved" what torch had taken of it for them, so what
    other programs miss and what runs out first; "host" is resident on the host, and "pinned" what torch has pinned
    there, which the system may or may not count as resident. Without a memory of the device's own, as on a CPU and a
    Mac, "memory" is resident on the host, and there is nothing else.
    """
    if not pins_memory(device):
        return {"memory": _resident()}
    found = {
        "memory": torch.accelerator.max_memory_allocated(device),
        "reserved": torch.accelerator.max_memory_reserved(device),
        "host": _resident(),
    }
    if device.type == "cuda":
        found["pinned"] = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
    return found


def _resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def name_of(device: torch.device) -> str:
    """What the driver calls `device`; "" for those without a driver that says."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def seed_accelerator(number: int) -> None:
    """Seed the generator of the device that is in use. One that nobody has used yet stays as it is.

    `torch.manual_seed` would queue a call, each time, for a GPU that never comes.
    """
    of = torch.accelerator.current_accelerator()
    if of is None:
        return
    module = torch.get_device_module(of)
    # MPS has no lazy start, and says nothing of one
    if getattr(module, "is_initialized", torch.accelerator.is_available)():
        module.manual_seed(number)
