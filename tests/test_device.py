"""Devices are found, seeded and measured in one place, so that a device other than a CUDA GPU works or is refused in a
line.

No GPU is needed: torch is patched to report one, with torch's own messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hive_scale import device
from hive_scale.config import EngineConfig
from hive_scale.device import choose_precision, default_precision, exact_fp32, kind, peaks, pinned_bytes, this_device
from hive_scale.distributed import World
from hive_scale.engine import check_device
from hive_scale.observability.rank_report import rank_report, read_reports

PACKAGE = Path(device.__file__).parent
CPU, CUDA, XPU, MPS = (torch.device(of) for of in ("cpu", "cuda", "xpu", "mps"))
# what must name a maker's things elsewhere, and why
NAMED = {
    "device.py": r".*",
    "distributed.py": r'device\.type == "cuda"|cuda:nccl',  # a session's backend by device
    "key_guesses.py": r'"cuda"\), "the device is found',  # what other programs call an option
    "observability/profiler.py": r'device\.type == "cuda"|torch\.cuda\.memory',  # the snapshots of its allocator
}
MAKERS = re.compile(r"torch\.(?:cuda|xpu|mps|backends\.(?:cuda|cudnn|mps))\b|[\"'](?:cuda|xpu|mps)(?::\w+)?[\"']")


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch find so many accelerators of a type; the list of those that were chosen."""

    def find(of: str | None, count: int = 1) -> list[torch.device]:
        chosen: list[torch.device] = []
        found = torch.device(of) if of else None
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
        return chosen

    return find


def test_no_other_file_asks_for_a_makers_gpu() -> None:
    strays = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MAKERS.search(line) and not re.search(NAMED.get(path.relative_to(PACKAGE).as_posix(), r"(?!)"), line)
    ]
    assert not strays, "go through hive_scale.device"


@pytest.mark.parametrize(("of", "kinds"), [(None, "cpu"), ("cuda", "cuda"), ("xpu", "xpu"), ("mps", "mps")])
def test_the_device_is_what_torch_finds(there: Any, of: str | None, kinds: str) -> None:
    chosen = there(of)
    assert kind() == kinds
    found = this_device()
    assert found == (torch.device(of, 0) if of else CPU)
    assert chosen == ([found] if of else [])


def test_each_process_of_a_node_has_its_own(there: Any) -> None:
    chosen = there("cuda", count=4)
    assert [this_device(rank, processes=8).index for rank in range(4)] == [0, 1, 2, 3] == [one.index for one in chosen]
    with pytest.raises(ValueError, match="this node has 4 GPUs and at least 5 processes: start one per GPU"):
        this_device(4, processes=8)


@pytest.mark.parametrize("of", ["xpu", "mps"])
def test_what_was_never_tried_is_refused_in_a_line(there: Any, of: str) -> None:
    there(of, count=8)
    with pytest.raises(ValueError, match=rf"^2 processes on devices of type {of} were never tried: start one"):
        this_device(0, processes=2)
    check_device(EngineConfig(), of)
    for config in (EngineConfig("bf16"), EngineConfig(cpu_offload=True), EngineConfig(ds_config="zero2.json")):
        check_device(config, "cuda")
        check_device(config, "cpu")
        with pytest.raises(ValueError, match=rf"^engine\.\S+ was never tried on a device of type {of}: set .*$"):
            check_device(config, of)


def test_an_accelerator_that_nobody_thought_of_is_refused(there: Any) -> None:
    there("hpu")
    with pytest.raises(ValueError, match="an accelerator of type hpu, for which nothing here was written"):
        this_device()


@pytest.mark.parametrize("native", [True, False])
def test_models_that_are_only_asked_compute_in_bf16_where_there_are_units_for_it(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    found = {one.type: default_precision(one) for one in (CPU, CUDA, XPU, MPS)}
    assert found == {"cpu": "fp32", "cuda": "bf16" if native else "fp32", "xpu": "bf16", "mps": "fp32"}


@pytest.fixture
def rounding() -> Iterator[None]:
    """torch as somebody has told it to round products to TF32; as it was, afterwards."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("rounding")
def test_fp32_is_exact_where_it_is_asked_for_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert choose_precision(CUDA, None) == ("bf16", "computes in bf16 on cuda")
    assert torch.get_float32_matmul_precision() == "high", "bf16 has no need to touch it"
    told = "computes in fp32 (IEEE's: no TF32) on cuda: --precision bf16 is several times as fast"
    assert choose_precision(CUDA, "fp32") == ("fp32", told)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert choose_precision(CPU, None) == ("fp32", "computes in fp32 on cpu")
    exact_fp32()  # twice is as well


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, 1), (4096, 4096), (4097, 8192), (9 * 10**9, 2**34)])
def test_pinned_memory_is_taken_in_powers_of_two(size: int, taken: int) -> None:
    assert pinned_bytes(size) == taken


def test_memory_is_that_of_the_fullest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {0: (10e9, 14e9, 8 << 30), 1: (11e9, 12e9, 4 << 30), 2: (9e9, 16e9, 2 << 30)}
    added = None
    for rank, (allocated, reserved, pinned) in memory.items():
        monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda _, held=allocated: held)
        monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda _, held=reserved: held)
        monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda held=pinned: {"allocated_bytes.peak": held})
        mine = rank_report(World(rank, 3, CUDA), waited=rank / 2)
        added = mine if added is None else [one + other for one, other in zip(added, mine, strict=True)]
    assert added is not None
    waits, held = read_reports(added, World(1, 3, CUDA))
    assert waits == [0.0, 0.5, 1.0]
    assert held.pop("host_gb") > 0.1
    assert held == {"memory_gb": 11.0, "reserved_gb": 16.0, "pinned_gb": 8.5899}


@pytest.mark.parametrize("of", [CPU, MPS])
def test_where_the_hosts_memory_is_the_devices_it_is_told_once(of: torch.device) -> None:
    assert list(peaks(of)) == ["memory"]
    assert 1e8 < peaks(of)["memory"] < 1e12
