"""Figures of a study: JSON, a table, and an image of what each arm reaches for its FLOPs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hive_scale.strict_json import read
from launchers.reproduction.steps import record
from launchers.reproduction.studies import Arm, Study
from launchers.reproduction.table import cell


def collect(study: Study, seeds: int) -> dict[str, Any]:
    """Return every figure by arm: lists over seeds, and the first seed's captions beside the true ones."""
    rows: dict[str, Any] = {"base": {"figures": _probes(study, "base", seeds)}}
    for arm in study.arms:
        figures: dict[str, list[float]] = {}
        for seed in range(seeds):
            heldout = read(study.output / f"heldout/{arm.key}-{seed}.json")
            of = record(study.output / "steps", f"pretrain-{arm.key}-{seed}")
            figures.setdefault("held-out loss", []).append(heldout["loss"])
            figures.setdefault("own image, %", []).append(heldout["own image"])
            figures.setdefault("core minutes", []).append(of["cpu_seconds"] / 60)  # least affected by other load
            figures.setdefault("peak GB", []).append(of["peak_gb"])
        figures |= _probes(study, arm.key, seeds)
        captions = read(study.output / f"heldout/{arm.key}-0.json")["captions"]
        steps = dict(arm.steps)
        rows[arm.key] = {"variant": arm.variant, "equal": arm.budget, "steps": steps, "GFLOP per sample": arm.gflops}
        rows[arm.key] |= {"figures": figures, "captions": captions}
    return rows


def _probes(study: Study, key: str, seeds: int) -> dict[str, list[float]]:
    """Accuracy in percent of the linear probe, by set and depth."""
    found: dict[str, list[float]] = {}
    for name in study.scale.probe:
        for depth in study.depths:
            paths = [study.output / f"probes/{key}-{seed}/{depth}/{name}.json" for seed in range(seeds)]
            found[f"{name}, block {depth}"] = [read(path)["results"]["linear"]["mean"] for path in paths]
    return found


def markdown(rows: Mapping[str, Any], arms: Sequence[Arm], note: str) -> str:
    """Format mean and standard deviation over seeds; the row of Base has the starting encoder's probes."""
    columns = list(rows[arms[0].key]["figures"])
    lines = [
        f"{note}.",
        "",
        "| variant | equal | steps | GFLOP per sample | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 4) + "|",
        _line(["Base", "", "", ""], rows["base"]["figures"], columns),
    ]
    for arm in arms:
        first = [arm.variant, arm.budget, str(sum(arm.steps.values())), f"{arm.gflops:.3g}"]
        lines.append(_line(first, rows[arm.key]["figures"], columns))
    return "\n".join(lines) + "\n"


def _line(first: list[str], figures: Mapping[str, list[float]], columns: Sequence[str]) -> str:
    decimals = {"held-out loss": 3, "peak GB": 2}
    cells = [cell(figures[name], decimals.get(name, 1)) if name in figures else "" for name in columns]
    return f"| {' | '.join([*first, *cells])} |"


def draw(rows: Mapping[str, Any], study: Study, path: Path) -> None:
    """Write an image: held-out loss against FLOPs of all steps, and probes over the encoder's depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    batch = study.scale.pretrain["stages"]["joint"].get("global_batch", 32)
    name = next(iter(study.scale.probe))
    for arm in study.arms:
        figures = rows[arm.key]["figures"]
        cost = arm.gflops * sum(arm.steps.values()) * batch / 1e3
        label = arm.variant if arm.budget == "steps" else f"{arm.variant}, equal FLOPs"
        left.errorbar([cost], *_mean(figures["held-out loss"]), marker="o", capsize=3, label=label)
        accuracies = [statistics.mean(figures[f"{name}, block {depth}"]) for depth in study.depths]
        right.plot(study.depths, accuracies, marker="o", linestyle="-" if arm.budget == "steps" else ":")
    base = [statistics.mean(rows["base"]["figures"][f"{name}, block {depth}"]) for depth in study.depths]
    right.plot(study.depths, base, color="black", linestyle="--", label="Base")
    left.set(xlabel="TFLOP of pre-training", ylabel="held-out loss, nats per token")
    left.legend(fontsize="small")
    right.set(xlabel="blocks of the encoder", ylabel=f"linear probe on {name}, %")
    right.legend()
    figure.savefig(path)


def _mean(values: Sequence[float]) -> tuple[list[float], list[float]]:
    return [statistics.mean(values)], [statistics.stdev(values) if len(values) > 1 else 0.0]
