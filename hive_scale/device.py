"""All that depends on the kind of device: any GPU that `torch.accelerator` finds, or the CPU.

To torch, ROCm's GPUs are of type CUDA. docs/devices.md says what was tried on which device.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

CPU = torch.device("cpu")
# device types on which multi-process training was tried, with NCCL or, on ROCm, RCCL
DISTRIBUTED = ("cuda",)
SINGLE = ("xpu", "mps")  # device types tried with one process only


def kind() -> str:
    """`torch.device.type` of this machine's accelerator: cuda (also for ROCm), xpu or mps; else cpu.

    Raises ValueError for an accelerator of any other type.
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


def is_compiled_by_default(kind: str) -> bool:
    """True for the kind of device on which compiled blocks were tried, and are faster: NVIDIA's GPUs."""
    return kind == "cuda" and not torch.version.hip


def this_device(local_rank: int = 0, processes: int = 1) -> torch.device:
    """The device of this process, which becomes torch's default device.

    Args:
        local_rank: index among the devices that this process sees.
        processes: number of processes of the whole job.

    Raises:
        ValueError: There are too few devices, or devices of this type are tried with one process only.
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
    """(unique id, card id) of each device that this process sees, by index.

    The unique id is the MIG instance's or the device's UUID, if there is one. The card id is its PCI address, by which
    NCCL tells ranks apart, or "" on ROCm, where nothing uses it.
    """
    found = []
    for index in range(torch.accelerator.device_count()):
        properties: Any = torch.cuda.get_device_properties(index)
        parts = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
        bus = ":".join(f"{part:02x}" for part in parts if part is not None)
        found.append((_mig_instance(index) or str(getattr(properties, "uuid", "")) or bus or str(index), bus))
    return [(identity, "" if torch.version.hip else bus) for identity, bus in found]


def _mig_instance(index: int) -> str:
    """The MIG instance at `index` of CUDA_VISIBLE_DEVICES, or "". torch's UUID may be the whole card's."""
    words = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return words[index] if index < len(words) and words[index].startswith("MIG-") else ""


def library_version(device: torch.device) -> str:
    """Version of NCCL, or RCCL; "" on devices that communicate by gloo."""
    library: Any = torch.cuda.nccl
    return ".".join(map(str, library.version())) if device.type == "cuda" else ""


def memory_of(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of the device's memory."""
    free, total = torch.accelerator.get_memory_info(device)
    return int(free), int(total)


def is_accelerator(device: torch.device) -> bool:
    return device.type != CPU.type


def pins_memory(device: torch.device) -> bool:
    """True if copies to `device` are faster from pinned host memory. A Mac has unified memory."""
    return device.type in ("cuda", "xpu")


class CopyStream:
    """A CUDA stream for copies to the device, so that they run beside the kernels of the current stream.

    Other devices have none: their copies are made at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def begin(self) -> AbstractContextManager[Any]:
        """Context in which copies are begun; they are not to be read before `end`."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def end(self, copies: Iterable[torch.Tensor]) -> None:
        """Let the current stream wait for all that was begun so far, of which it then uses `copies`."""
        if self.stream:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for tensor in copies:
                tensor.record_stream(current)  # else its memory could be given away while the current stream reads it


def pinned_bytes(size: int) -> int:
    """Bytes of pinned memory that torch allocates for `size` bytes: the next power of two."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def default_precision(device: torch.device) -> str:
    """The default compute precision for inference: bf16 if `device` supports it in hardware, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "xpu" else "fp32"


def choose_precision(device: torch.device, asked: str | None) -> tuple[str, str]:
    """The precision `asked` for, or the default of `device`, and a line that reports it. Turns TF32 off for fp32."""
    precision = asked or default_precision(device)
    if precision == "fp32":
        exact_fp32()
    name = {"fp32": "fp32 (IEEE's: no TF32)"}.get(precision, precision) if is_accelerator(device) else precision
    slow = precision == "fp32" and default_precision(device) != precision
    return precision, f"computes in {name} on {device.type}" + (": --precision bf16 is several times as fast" * slow)


def exact_fp32() -> None:
    """Make float32 mean IEEE float32 in this process: no TF32 in matrix products or convolutions.

    torch's default is IEEE for products, but TF32 for convolutions, such as patch embeddings.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished all its queued work."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)


def free_unused() -> None:
    """Return torch's cached device memory to the system, and reset the peak counters."""
    if kind() != CPU.type:
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


def peaks(device: torch.device) -> dict[str, int]:
    """Peak memory of this process so far, in bytes.

    "memory" is the device memory of tensors. "reserved" is what torch had allocated for them from the device: this is
    what other programs cannot use, and what runs out first. "host" is resident host memory, and "pinned" is host memory
    that torch has pinned, which the system may or may not count as resident. On devices without memory of their own (a
    CPU, a Mac), "memory" is resident host memory, and the other keys are absent.
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
    """Model name of `device` from its driver; "" for any but CUDA devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def seed_accelerator(number: int) -> None:
    """Seed the generator of the device in use, unless nothing has used the device yet.

    `torch.manual_seed` would add a pending call each time for a GPU that is never initialised.
    """
    of = torch.accelerator.current_accelerator()
    if of is None:
        return
    module = torch.get_device_module(of)
    # torch.mps has no is_initialized
    if getattr(module, "is_initialized", torch.accelerator.is_available)():
        module.manual_seed(number)
