"""HTML report in one file: no network, no scripts; light and dark themes, for desktop and phone."""

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
    """Content of the page. `maps` and `plots` are <svg> elements by title; texts are plain."""

    title: str
    notes: Sequence[str]
    runs: Sequence[Mapping[str, str]]  # one row per run
    recipe: Sequence[Mapping[str, str]]
    plots: Mapping[str, str]
    captions: Sequence[tuple[Tensor, Mapping[str, str]]] = ()  # image uint8 (3, H, W), and its captions by source
    maps: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, str] = field(default_factory=dict)
    faults: Sequence[Mapping[str, str]] = ()


def page(report: Report) -> str:
    """The page's text."""
    captions = [{"": _image(pixels), **texts} for pixels, texts in report.captions]
    return _template().render(report=report, captions=captions, theme=THEME)


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
    """Replace characters of a text that HTML forbids; escaping follows."""
    return value if isinstance(value, Markup) else in_xml(str(value))


def _image(pixels: Tensor) -> Markup:
    data = BytesIO()
    vision.to_pil_image(pixels).save(data, "PNG")
    return Markup('<img alt="" src="data:image/png;base64,{}">').format(b64encode(data.getvalue()).decode())
