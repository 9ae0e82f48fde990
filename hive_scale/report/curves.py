"""Curves of `metrics.jsonl`, for one run or several, aligned by the number of samples seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hive_scale.report.svg import FAINT, SERIES, draw

Line = Mapping[str, Any]
SIZE = 3.7, 2.4  # inches, about the width of a phone
POINTS = 400  # most points per curve; longer curves are averaged
DASHES = ("-", "--", ":", "-.")
COMPONENTS = ("vision", "projector", "fusion", "language")


@dataclass(frozen=True)
class History:
    """Metrics of a run: the lines of each stage, in order."""

    name: str
    stages: Mapping[str, Sequence[Line]]

    def points(self) -> Iterator[tuple[int, Line]]:
        """Yield (samples seen in the whole run, line)."""
        for start, lines in self._starts():
            for line in lines:
                yield start + line.get("samples", 0), line

    def borders(self) -> list[int]:
        """Number of samples seen at the end of each stage but the last."""
        return [start for start, _ in self._starts()][1:]

    def _starts(self) -> Iterator[tuple[int, Sequence[Line]]]:
        start = 0
        for lines in self.stages.values():
            yield start, lines
            start += lines[-1].get("samples", 0) if lines else 0


class Curve(NamedTuple):
    """One curve of a plot."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    dash: str = "-"


def curves(runs: Sequence[History]) -> dict[str, str]:
    """Return plots as <svg> elements by title; plots without data are left out."""
    # a line lacks values that were not finite, or that older versions did not record
    pace = _with_fresh(runs)
    plots = {
        "Training loss": _each(runs, lambda line: line.get("loss")),
        "Held-out loss": _each(runs, lambda line: line.get("eval_loss")),
        "Learning rates": _by_key(runs, lambda line: line.get("lr", {})),
        "Gradient norm": _each(runs, lambda line: line.get("grad_norm")),
        "Gradient norm by component": _by_key(runs, lambda line: by_component(line.get("grad_rms", {}))),
        "Gates": _by_key(runs, lambda line: {f"gate {key}": value for key, value in line.get("gates", {}).items()}),
        "Samples per second": _each(pace, lambda line: line["fresh"] / line["seconds"] if "seconds" in line else None),
        "MFU": _each(runs, lambda line: line.get("mfu")),
        "Peak memory": _each(runs, lambda line: line.get("memory_gb")),
    }
    units = {
        "Training loss": "nats per token",
        "Held-out loss": "nats per token",
        "Gates": "tanh(g)",
        "MFU": "share of peak",
        "Peak memory": "GB, the fullest rank",
    }
    logarithmic = {"Learning rates", "Gradient norm", "Gradient norm by component"}
    drawn = {
        title: _plot(found, units.get(title, ""), title in logarithmic, runs[0].borders())
        for title, found in plots.items()
        if found
    }
    return drawn | layer_norms(runs) | ({"Where the time went": time_bars(runs)} if any(r.stages for r in runs) else {})


def layer_norms(runs: Sequence[History]) -> dict[str, str]:
    """Plot the gradient norm of every encoder layer over training, one plot per run that trained its encoder."""
    plots = {}
    for run in runs:
        points = [(x, _layers(line)) for x, line in run.points() if _layers(line)]
        if not points:
            continue
        depth = max(len(norms) for _, norms in points)
        shades = [_shade(number / max(1, depth - 1)) for number in range(depth)]
        xs = [x for x, _ in points]
        found = [
            Curve(f"layer {layer + 1}", xs, [norms.get(layer, math.nan) for _, norms in points], shades[layer])
            for layer in range(depth)
        ]
        title = "Gradient norm by encoder layer" + (f": {run.name}" if len(runs) > 1 else "")
        plots[title] = _plot(found, "", True, [])
    return plots


def time_bars(runs: Sequence[History]) -> str:
    """Plot the share of time by account, one bar per run; without recorded accounts, data wait against the rest."""
    accounts = [_spent(run) for run in runs]
    names = list(dict.fromkeys(name for spent in accounts for name, seconds in spent.items() if seconds > 0))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for row, spent in enumerate(accounts):
            left, total = 0.0, sum(spent.values()) or 1.0
            for name, colour in zip(names, cycle(SERIES), strict=False):
                share = spent.get(name, 0.0) / total
                axes.barh(row, share, left=left, color=colour, height=0.6, label=name if row == 0 else None)
                left += share
            label = f"{runs[row].name}: {spent.get('steps', 0.0) / total:.0%} of {_span(total)} in steps that count"
            axes.text(0, row - 0.36, label, fontsize=7, va="bottom")
        axes.set(yticks=[], xlim=(0, 1), ylim=(len(runs) - 0.4, -0.75), xticks=[0, 0.5, 1])
        axes.set_xticklabels(["0", "50 %", "100 %"])
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside lower center", ncols=4)

    return draw(SIZE[0], 1.1 + 0.5 * len(runs), paint)


def by_component(norms: Mapping[str, float]) -> dict[str, float]:
    """Norm of each component: the root of the summed squares of its layers' norms."""
    squares: dict[str, float] = {}
    for layer, norm in norms.items():
        component = layer.split(".")[0]
        squares[component] = squares.get(component, 0.0) + norm**2
    return {name: math.sqrt(squares[name]) for name in sorted(squares, key=_place)}


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> tuple[list[float], list[float]]:
    """Return x and y of at most `most` points, by averaging groups of neighbours."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    xs, ys = ([sum(point[axis] for point in group) / len(group) for group in groups] for axis in (0, 1))
    return xs, ys


def _each(runs: Sequence[History], value: Callable[[Line], Any]) -> list[Curve]:
    """One curve per run, in one colour per run."""
    found = []
    for run, colour in zip(runs, cycle(SERIES), strict=False):
        points = [(x, value(line)) for x, line in run.points() if value(line) is not None]
        if points:
            found.append(Curve(run.name, *thin(points), colour))
    return found


def _by_key(runs: Sequence[History], values: Callable[[Line], Mapping[str, float]]) -> list[Curve]:
    """One curve per run and key, in one colour per key and one dash per run."""
    keys = list(dict.fromkeys(key for run in runs for _, line in run.points() for key in values(line)))
    found = []
    for run, dash in zip(runs, cycle(DASHES), strict=False):
        for key, colour in zip(keys, cycle(SERIES), strict=False):
            points = [(x, values(line)[key]) for x, line in run.points() if key in values(line)]
            if points:
                label = f"{run.name}: {key}" if len(runs) > 1 else key
                found.append(Curve(label, *thin(points), colour, dash))
    return found


def _with_fresh(runs: Sequence[History]) -> list[History]:
    """Add to each line the number of samples of its own step, as "fresh"."""
    return [History(run.name, {name: list(_freshened(lines)) for name, lines in run.stages.items()}) for run in runs]


def _freshened(lines: Sequence[Line]) -> Iterator[Line]:
    before = 0
    for line in lines:
        samples = line.get("samples", before)
        yield {**line, "fresh": samples - before}
        before = samples


def _plot(found: Sequence[Curve], unit: str, logarithmic: bool, borders: Sequence[int]) -> str:
    def paint(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        for border in borders:
            axes.axvline(border, color=FAINT, linewidth=0.8)
        for number, curve in enumerate(found):
            marker = "o" if len(curve.xs) == 1 else None
            axes.plot(curve.xs, curve.ys, curve.dash, color=curve.colour, label=str(number), marker=marker)
        axes.set_xlabel("samples")
        axes.set_ylabel(unit)
        if logarithmic and any(y > 0 for curve in found for y in curve.ys):
            axes.set_yscale("log", nonpositive="mask")
        if len(found) > 1:
            legend = figure.legend(loc="outside lower center", ncols=min(3, len(found)))
            for text, curve in zip(legend.get_texts(), found, strict=True):
                text.set_text(curve.label)  # legends omit labels that begin with "_"

    rows = math.ceil(len(found) / 3) if len(found) > 1 else 0
    return draw(SIZE[0], SIZE[1] + 0.16 * rows, paint)


def _layers(line: Line) -> dict[int, float]:
    """Map encoder layer (from 0) to gradient norm."""
    parts = ((name.partition("."), norm) for name, norm in line.get("grad_rms", {}).items())
    return {int(layer): norm for (room, _, layer), norm in parts if room == "vision" and layer.isdecimal()}


def _spent(run: History) -> dict[str, float]:
    spent: dict[str, float] = {}
    for lines in run.stages.values():
        for account, seconds in _ledger(lines).items():
            spent[account] = spent.get(account, 0.0) + seconds
    return spent


def _ledger(lines: Sequence[Line]) -> Mapping[str, float]:
    if lines and "spent" in lines[-1]:
        ledger: Mapping[str, float] = lines[-1]["spent"]
        return ledger
    data = sum(line.get("data_seconds", 0.0) for line in lines)
    return {"steps": sum(line.get("seconds", 0.0) for line in lines) - data, "data": data}


def _shade(share: float) -> str:
    """Colour from blue (first layer) to red (last), readable on light and dark pages."""
    return f"#{round(60 + 180 * share):02x}{round(140 - 40 * share):02x}{round(230 - 160 * share):02x}"


def _place(component: str) -> int:
    return COMPONENTS.index(component) if component in COMPONENTS else len(COMPONENTS)


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
