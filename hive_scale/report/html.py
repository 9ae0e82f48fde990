"""The run report: one HTML file that needs no network and no script, light or dark, on a desk or a phone."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from typing import Any

import torchvision.transforms.v2.functional as vision
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from torch import Tensor

from hive_scale.report.svg import THEME, in_xml


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
    """The page's text."""
    drawn = {"plots": _elements(report.plots), "maps": _elements(report.maps)}
    captions = [{"": _image(pixels), **texts} for pixels, texts in report.captions]
    return _template().render(report={**vars(report), **drawn}, captions=captions, theme=Markup(THEME))


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("hive_scale", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["columns"] = lambda rows: list(dict.fromkeys(key for row in rows for key in row))
    return environment.get_template("page.html.jinja")


def _plain(value: Any) -> Any:
    """What is written of a value: a text without the characters that no page may have. Escaping comes after it."""
    return value if isinstance(value, Markup) else in_xml(str(value))


def _elements(drawn: Mapping[str, str]) -> dict[str, Markup]:
    return {title: Markup(svg) for title, svg in drawn.items()}  # of our own making: `svg` has escaped what is in them


def _image(pixels: Tensor) -> Markup:
    data = BytesIO()
    vision.to_pil_image(pixels).save(data, "PNG")
    return Markup('<img alt="" src="data:image/png;base64,{}">').format(b64encode(data.getvalue()).decode())
