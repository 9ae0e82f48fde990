"""Output of all benchmarks: a table with command, machine and spread; and shared ways to measure."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any


def spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "-"
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{low:.3f} to {high:.3f}"


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, markdown: bool) -> None:
    caption = f"python launchers/benchmark.py {' '.join(sys.argv[1:])}: {caption}"
    if markdown:
        lines = [columns, ["---"] * len(columns), *rows]
        print("\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n`{caption}`")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, caption=caption)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def describe_machine() -> str:
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = f"{models[0].split(':')[1].strip() if models else 'CPU'}, {os.cpu_count()} cores"
    return f"{name}, torch {torch.__version__}"


def this_device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_bytes(run: Callable[[], None], device: Any) -> int:
    """Peak memory that `run` adds to this process: torch's count on a GPU, otherwise Linux's."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
