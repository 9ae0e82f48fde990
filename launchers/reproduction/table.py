"""Figures of a reproduction in one table, beside the paper's."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from hive_scale.strict_json import read
from launchers.reproduction.steps import record

ENCODERS = {"base": "Base", "sa": "SA", "hive": "HIVE"}
# arXiv 2604.00086, Tables 1 (SigLIP: CIFAR-100, Tiny-ImageNet) and 2 (GQA)
PAPER = {"base": ("90.08", "82.27", "57.74"), "sa": ("89.97", "82.46", "57.69"), "hive": ("90.19", "82.48", "58.05")}


def collect(output: Path, seeds: int, sets: list[str]) -> dict[str, Any]:
    """Return every figure by encoder, as lists over seeds: percent, core minutes, and peak memory in 1e9 bytes."""
    made: dict[str, Any] = {}
    for key in ENCODERS:
        rows: dict[str, list[float]] = {}
        for seed in range(seeds):
            for name in sets:
                results = read(output / f"probes/{key}-{seed}/{name}.json")["results"]
                for kind in ("attentive", "linear"):
                    rows.setdefault(f"{name}, {kind}", []).append(results[kind]["mean"])
            scores = read(output / f"answers/{key}-{seed}/results.json")["easyvqa"]["scores"]
            rows.setdefault("easy-vqa", []).append(scores["accuracy"])
            rows.setdefault("easy-vqa, named", []).append(scores["named"])
            of = record(output / "steps", f"pretrain-{key}-{seed}" if key != "base" else f"base-{seed}")
            rows.setdefault("core minutes", []).append(of["cpu_seconds"] / 60)  # least affected by other load
            rows.setdefault("peak GB", []).append(of["peak_gb"])
        made[key] = rows
    return made


def markdown(made: dict[str, Any], note: str) -> str:
    """Format mean and standard deviation over seeds, with the paper's figures of other sets in the last columns."""
    columns = list(made["base"])
    lines = [
        f"{note}.",
        "",
        "| encoder | " + " | ".join(columns) + " | paper: CIFAR-100 | Tiny-ImageNet | GQA |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for key, name in ENCODERS.items():
        cells = [cell(made[key][column]) for column in columns]
        lines.append(f"| {name} | " + " | ".join([*cells, *PAPER[key]]) + " |")
    return "\n".join(lines) + "\n"


def cell(values: list[float], decimals: int = 1) -> str:
    """Mean of `values`, with their standard deviation if there are several."""
    mean = f"{statistics.mean(values):.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean
