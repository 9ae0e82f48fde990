"""The run report: one HTML file that needs no network and no script, light or dark, on a desk or a phone."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO

import torchvision.transforms.v2.functional as vision
from torch import Tensor

from hive_scale.report.svg import THEME, in_xml

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:90rem;padding:1rem;background:var(--page);color:var(--ink);
font:1rem/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:1.8rem 0 .6rem}h3{font-size:.95rem;margin:0 0 .4rem}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(21rem,100%),1fr));gap:.8rem}
figure{margin:0;padding:.7rem;background:var(--card);border-radius:.5rem;overflow-x:auto}
figure.wide svg{min-width:34rem;max-width:64rem}
svg{display:block;width:100%;height:auto}
.table{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:.3rem .7rem .3rem 0;border-bottom:1px solid var(--faint)}
td{min-width:5rem}td img{width:5rem;height:auto;border-radius:.3rem}
pre{overflow-x:auto;font-size:.75rem;margin:0}
.note{border-left:.3rem solid var(--s1);padding-left:.7rem}
"""


@dataclass(frozen=True)
class Report:
    """All that goes onto the page. `maps` and `plots` are <svg> elements by title; texts are plain."""

    title: str
    notes: Sequence[str]
    runs: Sequence[Mapping[str, str]]  # a row each
    recipe: Sequence[Mapping[str, str]]
    plots: Mapping[str, str]
    captions: Sequence[tuple[Tensor, Mapping[str, str]]] = ()  # uint8 (3, H, W), and what was or should be written
    maps: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, str] = field(default_factory=dict)
    faults: Sequence[Mapping[str, str]] = ()


def page(report: Report) -> str:
    parts = [
        f"<h1>{_html(report.title)}</h1>",
        *(f'<p class="note">{_html(note)}</p>' for note in report.notes),
        _section("Runs", [table(report.runs)]),
        _section("Recipe", [table(report.recipe)]),
        _section("Curves", [_grid(_plot(title, svg) for title, svg in report.plots.items())]),
        _section("Captions", [_captions(report.captions)] if report.captions else []),
        _section("Maps", [_plot(title, svg, "wide") for title, svg in report.maps.items()]),
        _section("Memory, planned and found", [_grid(_text(*item) for item in report.memory.items())]),
        _section("Data faults", [table(report.faults)]),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # nothing of what strangers wrote may run or be fetched, should it ever get out of its element
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{_html(report.title)}</title><style>{THEME}{STYLE}</style></head>"
    )
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """One column per key, in the order they are met."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{_html(column)}</th>" for column in columns)
    body = "".join(_row(_html(row.get(column, "")) for column in columns) for row in rows)
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>' if rows else ""


def _html(text: object) -> str:
    """`text` as a page shows it, in an element or an attribute: every text that is not ours goes through here."""
    return escape(in_xml(str(text)))


def _captions(captions: Sequence[tuple[Tensor, Mapping[str, str]]]) -> str:
    head = "".join(f"<th>{_html(column)}</th>" for column in ("", *captions[0][1]))
    rows = (_row([_image(pixels), *map(_html, texts.values())]) for pixels, texts in captions)
    return f'<div class="table"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _image(pixels: Tensor) -> str:
    data = BytesIO()
    vision.to_pil_image(pixels).save(data, "PNG")
    return f'<img alt="" src="data:image/png;base64,{b64encode(data.getvalue()).decode()}">'


def _section(title: str, parts: Iterable[str]) -> str:
    body = "".join(parts)
    return f"<h2>{_html(title)}</h2>{body}" if body else ""


def _grid(parts: Iterable[str]) -> str:
    body = "".join(parts)
    return f'<div class="plots">{body}</div>' if body else ""


def _plot(title: str, svg: str, kind: str = "") -> str:
    return f'<figure class="{kind}" data-plot="{_html(title)}"><h3>{_html(title)}</h3>{svg}</figure>'


def _text(title: str, text: str) -> str:
    return f"<figure><h3>{_html(title)}</h3><pre>{_html(text)}</pre></figure>"


def _row(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
