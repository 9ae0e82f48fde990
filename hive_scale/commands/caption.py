"""Write a caption for each of your images, or answer a question about them, with a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hive_scale.cli import Parser
from hive_scale.exit_codes import ended
from hive_scale.strangers import printable

if TYPE_CHECKING:
    from torch import Tensor

    from hive_scale.captioner import Captioner

EXAMPLES = """\
examples:
  python -m hive_scale caption runs/mine photos/*.jpg                       a line for each image
  python -m hive_scale caption runs/mine/joint cat.jpg --prompt 'a photo of'  the caption goes on from there
  python -m hive_scale caption runs/vlm cat.jpg --prompt 'What colour is it?' of a model trained on conversations
  python -m hive_scale caption exported/hive cat.jpg                        what `export hive` wrote

In a browser, with the attention of each word: python -m hive_scale demo runs/mine
Exit codes: 0 done, 2 something to change in the command, or an image could not be read (the others are captioned).
"""
BATCH = 16  # images at once


def main() -> int:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("model", type=Path, metavar="RUN_OR_DIR", help="a run, a stage, or what `export hive` wrote")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP")
    parser.add_argument("--prompt", default="", help="a question, or the beginning of the caption")
    parser.add_argument("--max_tokens", type=int, default=40, help="of each text (40)")
    arguments = parser.parse_args()
    return ended(lambda: _caption(arguments))


def _caption(arguments: argparse.Namespace) -> int:
    if arguments.max_tokens < 1:
        raise ValueError(f"--max_tokens {arguments.max_tokens} must be at least 1")
    from hive_scale.locate import check_there

    check_there(arguments.model)  # before torch is imported, which takes seconds
    from hive_scale.captioner import Captioner
    from hive_scale.device import this_device

    captioner = Captioner.open(arguments.model, this_device())
    unread = 0
    for first in range(0, len(arguments.images), BATCH):
        found = _read(captioner, arguments.images[first : first + BATCH])
        unread += len(arguments.images[first : first + BATCH]) - len(found)
        texts = captioner.write([image for _, image in found], arguments.prompt, arguments.max_tokens) if found else []
        for (path, _), written in zip(found, texts, strict=True):
            print(f"{printable(str(path))}: {printable(written.text)}", flush=True)
    if unread:
        print(f"error: {unread} of {len(arguments.images)} images could not be read", file=sys.stderr)
    return 2 if unread else 0


def _read(captioner: Captioner, paths: list[Path]) -> list[tuple[Path, Tensor]]:
    """Those of `paths` that are images, with their pixels; the others are named."""
    found = []
    for path in paths:
        try:
            found.append((path, captioner.read(path)))
        except ValueError as error:
            print(f"left out: {printable(str(error))}", file=sys.stderr)
    return found
