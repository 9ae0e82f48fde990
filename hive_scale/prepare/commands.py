"""Subcommands of ``launchers/prepare_data.py`` that convert data sets: arguments, progress and summary.

Heavy modules are imported when a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_scale.strangers import printable

if TYPE_CHECKING:
    from hive_scale.prepare.readers import Source

Subparsers = Any  # argparse has no public name for this type


def add_llava(subparsers: Subparsers) -> None:
    parser = _add_conversion(subparsers, "llava", run_table, "LLaVA's JSON of conversations with its images")
    parser.add_argument("table", type=Path, metavar="JSON", help="chat.json, blip_laion_cc_sbu_558k.json ...")
    _add_images_arguments(parser)


def add_table(subparsers: Subparsers) -> None:
    parser = _add_conversion(subparsers, "table", run_table, "images with captions in a CSV, TSV, JSON or JSONL")
    parser.add_argument("table", type=Path, metavar="FILE", help="a line or record per image")
    _add_images_arguments(parser)


def _add_images_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder or zip that the names are relative to")
    _add_column_arguments(parser)


def run_table(arguments: argparse.Namespace) -> None:
    from hive_scale.prepare import readers

    _convert(arguments, readers.table(arguments.table, arguments.images, arguments.image, arguments.caption))


def add_parquet(subparsers: Subparsers) -> None:
    summary = "parquet with images inside (LLaVA-NeXT, classification sets of the hub)"
    parser = _add_conversion(subparsers, "parquet", run_parquet, summary)
    parser.add_argument("files", nargs="+", metavar="FILES", help="paths or globs")
    _add_column_arguments(parser)


def run_parquet(arguments: argparse.Namespace) -> None:
    import glob

    from hive_scale.prepare import readers

    files = [Path(path) for pattern in arguments.files for path in sorted(glob.glob(pattern)) or [pattern]]
    _convert(arguments, readers.parquet(files, arguments.image, arguments.caption))


def add_classes(subparsers: Subparsers) -> None:
    parser = _add_conversion(subparsers, "classes", run_classes, "a folder of class folders (ImageNet, Food-101 ...)")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder above the class folders")


def run_classes(arguments: argparse.Namespace) -> None:
    from hive_scale.prepare import readers

    _convert(arguments, readers.classes(arguments.folder))


def _add_conversion(
    subparsers: Subparsers, name: str, run: Callable[[argparse.Namespace], None], summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}, as tars. Run again to go on."
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the tars go")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds already")
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="samples per tar (%(default)s)")
    help = "share of the images that go to heldout-*.tar (%(default)s)"
    parser.add_argument("--heldout", type=float, default=0.002, metavar="SHARE", help=help)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")
    parser.set_defaults(run=run, again="the same command goes on")
    return parser


def _add_column_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", default="image", metavar="COLUMN", help="of the images (%(default)s)")
    help = "of the captions (the conversation, or else caption, text, txt or the class)"
    parser.add_argument("--caption", default="", metavar="COLUMN", help=help)


def _convert(arguments: argparse.Namespace, source: Source) -> None:
    """Write `source` as tars with a progress bar, then print what was written and what was left out."""
    from rich.progress import Progress

    from hive_scale.prepare.writer import JOURNAL, ShardLayout, convert

    start, layout = time.monotonic(), ShardLayout(arguments.shard_size, arguments.heldout)
    with Progress() as progress:
        task = progress.add_task("converting", total=source.length)

        def advance(done: int, samples: int) -> None:
            progress.update(task, completed=done, description=f"{samples:,} samples")

        shards = convert(source, arguments.output, layout, arguments.workers, arguments.overwrite, advance)
        progress.update(task, completed=source.length)
    for split in ("train", "heldout"):
        of_split = [shard for shard in shards if shard.name.startswith(split)]
        samples, num_bytes = sum(shard.samples for shard in of_split), sum(shard.num_bytes for shard in of_split)
        print(f"{split}: {samples:,} samples in {len(of_split):,} shards, {num_bytes / 1e6:,.1f} MB")
        if not samples and arguments.heldout:
            print(
                f"no {split} samples: too few for --heldout {arguments.heldout:g}; repeat the command with --overwrite "
                "--heldout 0.05, which sets a twentieth aside, or train with data.heldout=5%"
            )
    reasons = Counter(re.sub(r"\S*[./]\S*", "...", reason) for shard in shards for _, reason in shard.skipped)
    for reason, count in reasons.most_common(10):
        print(f"left out: {count:,} x {printable(reason)}")
    if reasons:
        print(f"each is named in {arguments.output / JOURNAL}")
    print(f"{arguments.output}: done in {time.monotonic() - start:.1f} s")


CONVERTERS = (add_llava, add_table, add_parquet, add_classes)
