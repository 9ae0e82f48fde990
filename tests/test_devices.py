"""The planner knows the GPUs that people own, by the names that drivers, shops and people give them.

Why: a run was planned for five GPUs only, and a device whose name held another's ("RTX 3090 Ti", a MIG slice of an
H100) was taken for that one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hive_scale import device as devices
from hive_scale.commands import plan
from hive_scale.plan.devices import GIB, GPUS, described, find, gpu_here, peak_flops


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA GeForce RTX 3090", "rtx3090"),  # as drivers have it
        ("NVIDIA GeForce RTX 3090 Ti", "rtx3090ti"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx4070ti-super"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("4090", "rtx4090"),  # as people have it
        ("RTX_5070-TI", "rtx5070ti"),
        ("rtx 3080 12 GB", "rtx3080-12"),
        ("A100 SXM 80GB", "a100-80"),
        ("h100_sxm5", "h100"),
        ("H100-PCIe", "h100-pcie"),
        ("H100 NVL 94GB", "h100-nvl"),
        ("L40S 48GB", "l40s"),
        ("RTX A6000", "a6000"),
        ("B200 180GB", "b200"),
    ],
)
def test_a_gpu_goes_by_its_names(name: str, key: str) -> None:
    assert find(name) is GPUS[key]


def test_every_key_and_title_names_its_own_entry() -> None:
    for key, gpu in GPUS.items():
        assert find(key) is find(key.upper().replace("-", " ")) is find(gpu.title) is gpu


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rtx409", "did you mean rtx4090 or"),
        ("a100", "did you mean a100-40 or a100-80 or a100-40-pcie or a100-80-pcie?"),
        ("rtx 3090 16GB", "did you mean rtx3090"),
        ("h10", "did you mean h100 or"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "known are rtx2060"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "known are rtx2060"),
        ("", "known are rtx2060"),
    ],
)
def test_what_is_no_gpu_of_the_table_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="no such GPU: ") as error:
        find(name)
    assert hint in str(error.value)


def test_peaks_are_those_of_the_vendors_tables() -> None:
    """TFLOPS of white papers, against what the GeForce rows compute from cores and clocks."""
    printed = {"rtx3080": (29.8, 59.5), "rtx4090": (82.6, 165.2), "rtx4080": (48.7, 97.5), "rtx5090": (104.8, 209.5)}
    for key, (fp32, tensor) in (printed | {"rtx2080-super": (11.2, 44.6), "a6000": (38.7, 154.8)}).items():
        assert GPUS[key].fp32 == pytest.approx(fp32 * 1e12, rel=0.005), key
        assert GPUS[key].tensor == pytest.approx(tensor * 1e12, rel=0.005), key
    without = {key for key, gpu in GPUS.items() if not gpu.has_bf16}
    assert {"v100-16", "v100s", "t4", "rtx2060", "rtx2080ti", "quadro-rtx-8000"} < without
    assert not {"rtx3050", "a10", "rtx5090", "mi300x"} & without
    assert GPUS["v100-32"].peak("bf16") == GPUS["v100-32"].fp32
    for key, gpu in GPUS.items():
        assert gpu.fp32 < gpu.tensor, key
        assert gpu.bandwidth > gpu.network, key


def test_a_gpu_is_described_or_changed_by_its_figures() -> None:
    made = described(None, 12, 50, 400)
    assert made is not None
    assert (made.memory, made.peak("bf16"), made.peak("fp32"), made.bandwidth) == (12 * 10**9, 50e12, 50e12, 400e9)
    changed = described(GPUS["h100"], 64, None, None)
    assert changed is not None
    assert (changed.memory, changed.tensor, changed.title) == (64 * 10**9, GPUS["h100"].tensor, "H100 80GB HBM3")
    assert described(None, None, None, None) is None
    with pytest.raises(ValueError, match="--gpu_memory_gb, --gpu_tflops, --gpu_bandwidth_gb_s: give all three"):
        described(None, 12, None, None)
    with pytest.raises(ValueError, match="--gpu_tflops -1 must be above 0"):
        described(GPUS["h100"], None, -1, None)


def test_the_own_gpu_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's name and memory stand in for a GPU, which this machine lacks."""
    card = torch.device("cuda", 0)
    for name, value in {"kind": "cuda", "this_device": card, "memory_of": (0, 23 * GIB)}.items():
        monkeypatch.setattr(devices, name, lambda *_, value=value: value)
    monkeypatch.setattr(devices, "name_of", lambda _: "NVIDIA GeForce RTX 3090 Ti")
    found = gpu_here()
    assert found is not None
    assert (found.title, found.memory) == ("RTX 3090 Ti", 23 * GIB)
    assert peak_flops(card, "bf16") == GPUS["rtx3090ti"].tensor
    monkeypatch.setattr(devices, "name_of", lambda _: "NVIDIA GeForce RTX 4090 Laptop GPU")
    assert peak_flops(card, "bf16") is None
    with pytest.raises(ValueError, match="RTX 4090 Laptop GPU is not in the planner's table: describe it by"):
        gpu_here()


def test_the_plan_names_the_gpu_and_says_that_it_has_no_bf16(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*words: str) -> tuple[int, Any]:
        monkeypatch.setattr("sys.argv", ["plan.py", "--preset", "debug", "--stage", "joint", *words])
        return plan.main(), capsys.readouterr()

    code, said = planned("--gpu", "V100 32GB", "engine.precision=bf16")
    assert code == 0
    assert "1 x Tesla V100-SXM2-32GB (--gpu)" in said.out
    assert "has no bf16: the plan is at its fp32 speed" in said.out
    code, said = planned("--gpu_memory_gb", "0.9", "--gpu_tflops", "50", "--gpu_bandwidth_gb_s", "400")
    assert code == 1
    assert "1 x GPU of 0.9 GB, 50 TFLOPS and 400 GB/s" in said.out
    code, said = planned("--gpu", "rtx409")
    last = said.err.splitlines()[-1]  # other tests of this process may have left a library something to warn of
    assert (code, last) == (2, "error: gpu rtx409: no such GPU: did you mean rtx4090 or l40 or a40?")
