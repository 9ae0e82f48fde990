"""Visualise a run: gradient maps, attention maps, a report in one file; or send its metrics to wandb."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from hive_scale.cli import Parser
from hive_scale.exit_codes import ended

EXAMPLES = """\
examples:
  python launchers/visualize.py report runs/debug                           runs/debug/report.html
  python launchers/visualize.py report runs/debug runs/debug_concat         both, side by side
  python launchers/visualize.py gradients runs/debug                        on held-out images
  python launchers/visualize.py gradients runs/debug runs/debug_concat --images cat.jpg --captions 'a cat'
  python launchers/visualize.py attention runs/debug --image cat.jpg --caption 'a red cat' --tokens red,cat
  python launchers/visualize.py sync runs/debug                             what was logged offline, to wandb
"""


def main() -> int:
    arguments = _parse()
    return ended(lambda: _act(arguments))


def _act(arguments: argparse.Namespace) -> int:
    from hive_scale.locate import check_there

    for path in [*getattr(arguments, "runs", ()), *getattr(arguments, "images", ())] or [arguments.run]:
        check_there(path)  # before torch is imported, which takes long
    act: Callable[[argparse.Namespace], None] = arguments.act
    act(arguments)
    return 0


def _gradients(arguments: argparse.Namespace) -> None:
    from hive_scale.report.report import gradients, save_gradients
    from hive_scale.report.run_view import RunView, pairs_of

    runs = [RunView(path) for path in arguments.runs]
    pairs = [pairs_of(run, arguments.images, arguments.captions, arguments.count) for run in runs]
    maps = [gradients(run, own, arguments.stage) for run, own in zip(runs, pairs, strict=True)]
    output = arguments.output or arguments.runs[0] / "gradients.svg"
    _tell(save_gradients(maps, [run.history() for run in runs], output))


def _attention(arguments: argparse.Namespace) -> None:
    from hive_scale.report.attention_maps import attention_figure
    from hive_scale.report.report import attention
    from hive_scale.report.run_view import RunView
    from hive_scale.report.svg import save

    run = RunView(arguments.run)
    pixels, caption = (run.read_image(arguments.image), "") if arguments.image else run.heldout(1)[0]
    words = [word for word in arguments.tokens.split(",") if word]
    shown = attention(
        run, pixels, arguments.caption or caption, words, arguments.layers, arguments.head, arguments.stage
    )
    output = arguments.output or arguments.run / "attention.svg"
    save(attention_figure(shown), output)
    _tell([output])


def _report(arguments: argparse.Namespace) -> None:
    from hive_scale.report.report import report, save_report
    from hive_scale.report.run_view import RunView

    runs = [RunView(path) for path in arguments.runs]
    output = arguments.output or arguments.runs[0] / "report.html"
    save_report(report(runs, look=not arguments.numbers_only), output, arguments.plots)
    _tell([output])


def _sync(arguments: argparse.Namespace) -> None:
    import os

    from hive_scale.observability.trackers import replay
    from hive_scale.report.run_view import RunView

    run = RunView(arguments.run)
    for name in replay(run.dir, os.environ.get("WANDB_MODE", "online")):
        print(name)


def _tell(paths: list[Path]) -> None:
    for path in paths:
        print(path)


def _parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    gradients = commands.add_parser("gradients", help="d loss / d hidden state of each encoder layer, patch by patch")
    gradients.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    gradients.add_argument("--images", "--pictures", nargs="+", type=Path, default=[], help="default: held-out images")
    gradients.add_argument("--captions", nargs="+", default=[], help="one per image; default: the .txt beside it")
    gradients.add_argument("--count", type=int, default=4, help="of held-out images (4)")
    gradients.set_defaults(act=_gradients)
    attention = commands.add_parser("attention", help="which patches a word attends to, layer by layer")
    attention.add_argument("run", type=Path, metavar="RUN")
    attention.add_argument("--image", type=Path, help="default: a held-out image with its caption")
    attention.add_argument("--caption", "--prompt", default="", help="default: what the model writes of the image")
    attention.add_argument("--tokens", default="", metavar="A,B", help="words of the caption; default: the first eight")
    attention.add_argument("--layers", nargs="+", type=int, default=[], help="of the LLM, from 1; default: all fused")
    attention.add_argument("--head", type=int, help="one head, from 0; default: the mean of all")
    attention.set_defaults(act=_attention)
    report = commands.add_parser("report", help="one HTML file that needs no network")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--numbers_only", action="store_true", help="load no model: no captions, no maps")
    report.add_argument("--plots", type=Path, metavar="DIR", help="also write each curve as an SVG file")
    report.set_defaults(act=_report)
    sync = commands.add_parser("sync", help="draw what was logged offline to wandb, each stage as one run")
    sync.add_argument("run", type=Path, metavar="RUN")
    sync.set_defaults(act=_sync)
    for command in (gradients, attention):
        command.add_argument("--stage", default="", help="default: the last finished; 'initial': before training")
    for command in (gradients, attention, report):
        command.add_argument("--output", type=Path, metavar="FILE", help="default: in the (first) run's directory")
    return parser.parse_args()
