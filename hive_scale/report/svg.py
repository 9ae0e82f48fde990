"""SVG figures with real text and theme variables for colours, so that one drawing serves light and dark pages."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text

from hive_scale.atomic import write_text

# Placeholder colours for matplotlib, which are replaced by the page's CSS variables.
INK, FAINT = "#010101", "#020202"
SERIES = tuple(f"#0101{number:02x}" for number in range(16, 24))
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)"} | {
    colour: f"var(--s{number})" for number, colour in enumerate(SERIES)
}
# Okabe and Ito's palette, safe for colour-blind readers; the darkest colours are lightened for dark pages.
LIGHT = "--ink:#1c2126;--faint:#c9ced4;--page:#ffffff;--card:#f6f7f9;" + (
    "--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#b35a8c;--s4:#b58900;--s5:#3f9bd0;--s6:#666b70;--s7:#7a4fb5;"
)
DARK = "--ink:#e4e7ea;--faint:#4a5058;--page:#14171a;--card:#1d2125;" + (
    "--s0:#56b4e9;--s1:#ff8a3d;--s2:#2fc99b;--s3:#e39ac4;--s4:#e0bf3f;--s5:#8fd0f5;--s6:#a4a9ae;--s7:#b799e8;"
)
THEME = f":root{{{LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hive_scale",  # makes files reproducible
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "legend.fontsize": 7,
} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), INK
)
NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_numbers = count()


def draw(width: float, height: float, paint: Callable[[Figure], None]) -> str:
    """Let `paint` draw a figure of this size in inches; return it as an <svg> element for a page."""
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        _set_as_written(figure)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    own = f"f{next(_numbers)}-"  # figures on one page need distinct ids
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{own}", svg)
    return re.sub(r'<svg ([^>]*?)width="[^"]*pt" ', r"<svg \1", re.sub(r' height="[^"]*pt"', "", svg, count=1), count=1)


def _set_as_written(figure: Figure) -> None:
    """Show all texts literally: disable mathematics between $ signs, and replace characters that XML forbids.

    Tick labels of logarithmic axes keep their mathematics.
    """
    ticks = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in _labels(axis)}
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist not in ticks):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text(in_xml(text.get_text()))


def in_xml(text: str) -> str:
    """Replace the characters of `text` that XML, and thus SVG and HTML, forbids."""
    return NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _labels(axis: Axis) -> list[Text]:
    return [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]


def save(svg: str, path: Path) -> None:
    """Write `svg` as a standalone file that follows the reader's light or dark theme."""
    head, rest = svg.split(">", 1)
    write_text(path, f"{head}><style>{THEME}svg{{background:var(--page)}}</style>{rest}")


def image(axes: Axes, pixels: Any, title: str = "") -> None:
    """Show an image, uint8 or float (H, W, 3), without ticks."""
    axes.imshow(pixels, interpolation="none")
    bare(axes, title)


def overlay(axes: Axes, pixels: Any, values: Any, title: str = "", opacity: float = 0.6) -> None:
    """Show `values` (side, side), 0 to 1, over an image (H, W, 3): dark is 0, bright is 1."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels, interpolation="none")
    axes.imshow(
        values,
        cmap="turbo",
        vmin=0,
        vmax=1,
        alpha=opacity,
        interpolation="bilinear",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )
    bare(axes, title)


def bare(axes: Axes, title: str = "") -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, fontsize=7, pad=2)
