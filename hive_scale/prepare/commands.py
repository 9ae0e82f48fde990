"""Subcommands of ``launchers/prepare_data.py`` that convert data sets: arguments, progress and summary.

Heavy modules are imported when a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_scale.strangers import printable

if TYPE_CHECKING:
    from hive_scale.prepare.items import Source
    from hive_scale.prepare.published_sets import PublishedSet
    from hive_scale.prepare.writer import Shard

Subparsers = Any  # argparse has no public name for this type
NextCommand = Callable[[Path, int, int], str]  # (output, samples to train on, held-out samples) -> a command


def add_llava(subparsers: Subparsers) -> None:
    parser = _add_conversion(subparsers, "llava", run_table, "LLaVA's JSON of conversations with its images")
    parser.add_argument("table", type=Path, metavar="JSON", help="chat.json, blip_laion_cc_sbu_558k.json ...")
    _add_images_arguments(parser)


def add_table(subparsers: Subparsers) -> None:
    parser = _add_conversion(subparsers, "table", run_table, "images with captions in a CSV, TSV, JSON or JSONL")
    help = "a line or record per image or caption; also COCO's captions JSON and Flickr's lists"
    parser.add_argument("table", type=Path, metavar="FILE", help=help)
    _add_images_arguments(parser)


def _add_images_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder or zip that the names are relative to")
    _add_column_arguments(parser)
    _add_encoding_argument(parser)


def run_table(arguments: argparse.Namespace) -> None:
    from hive_scale.prepare import readers

    columns = arguments.image, arguments.caption
    _convert(arguments, readers.table(arguments.table, arguments.images, *columns, arguments.encoding))


def add_parquet(subparsers: Subparsers) -> None:
    summary = "parquet with images inside (LLaVA-NeXT, classification sets of the hub)"
    parser = _add_conversion(subparsers, "parquet", run_parquet, summary)
    parser.add_argument("files", nargs="+", metavar="FILES", help="paths or globs")
    _add_column_arguments(parser)


def run_parquet(arguments: argparse.Namespace) -> None:
    from hive_scale.prepare import readers

    _convert(arguments, readers.parquet(_globbed(arguments.files), arguments.image, arguments.caption))


def add_pairs(subparsers: Subparsers) -> None:
    summary = "images with their captions beside them, in folders or tars"
    parser = _add_conversion(subparsers, "pairs", run_pairs, summary)
    help = "folders (img2dataset's files layout, .caption files) or tars (of images and .json, .caption), or globs"
    parser.add_argument("places", nargs="+", metavar="PLACES", help=help)
    help = "ending of the captions' files, or column of the .json (.txt, .caption, .text, or else as in a table)"
    parser.add_argument("--caption", default="", metavar="NAME", help=help)
    _add_encoding_argument(parser)


def run_pairs(arguments: argparse.Namespace) -> None:
    from hive_scale.prepare.pairs import pairs

    _convert(arguments, pairs(_globbed(arguments.places), arguments.caption, arguments.encoding))


def _globbed(patterns: Sequence[str]) -> list[Path]:
    import glob

    return [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]


def add_classes(subparsers: Subparsers) -> None:
    parser = _add_conversion(subparsers, "classes", run_classes, "a folder of class folders (ImageNet, Food-101 ...)")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder above the class folders")


def run_classes(arguments: argparse.Namespace) -> None:
    from hive_scale.prepare import readers

    _convert(arguments, readers.classes(arguments.folder))


def add_published(subparsers: Subparsers, name: str, summary: str) -> None:
    parser = _add_conversion(subparsers, name, run_published, summary, output_required=False)
    help = "where its files were downloaded to; without: print where they come from"
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help=help)
    parser.description = f"{summary}, as tars. Without FOLDER it prints the commands that fetch it."


def run_published(arguments: argparse.Namespace) -> None:
    """Say where a published set comes from; or check what was fetched of it, convert it and check its count."""
    from hive_scale.prepare import readers
    from hive_scale.prepare.next_command import next_step
    from hive_scale.prepare.published_sets import SETS, check, find_files

    one = SETS[arguments.source]
    if arguments.folder is None:
        print(_fetching(arguments.source, one))
        return
    if arguments.output is None:
        raise ValueError("where shall the tars go? Say --output DIR")
    files = find_files(one, arguments.folder)
    for line in check(one, files):
        print(printable(line))
    if one.is_parquet:
        source = readers.parquet([path for paths in files.values() for path in paths])
        _check_count(one, source.length)
    else:
        table, images = (paths[0] for paths in files.values())
        source = readers.table(table, images)
    shards = _write(arguments, source)
    _check_count(one, sum(shard.samples + len(shard.skipped) for shard in shards))
    print(f"all {one.samples:,} records of the published set are there")
    counts = _samples_of(shards)
    encoder = "" if arguments.source == "cc3m" else "runs/paper_siglip"
    command = _command_of_set(arguments.source)
    print(next_step(arguments.output, counts["train"], counts["heldout"], command, encoder))


def _fetching(name: str, one: PublishedSet) -> str:
    """Return where the files of a set come from, and the commands that fetch and convert them."""
    from hive_scale.locate import command_name
    from hive_scale.prepare.published_sets import describe, download_command

    raw, output = f"downloads/{name}", f"data/{OUTPUTS[name]}"
    convert = f"{command_name('prepare_data')} {name} {raw} --output {output}"
    return "\n".join([describe(one), "fetch, check and convert it:", f"  {download_command(one, raw)}", f"  {convert}"])


def _check_count(one: PublishedSet, found: int) -> None:
    if found != one.samples:
        raise ValueError(
            f"{found:,} records where {one.repository} has {one.samples:,}: fetch its files again; to convert a part "
            "of it on purpose, use prepare_data.py llava or parquet"
        )


def _command_of_set(name: str) -> NextCommand:
    """Return what makes the command that trains on a published set, as docs/paper.md does."""
    from hive_scale.prepare.next_command import finetune_command, pretrain_command

    if name == "cc3m":
        return partial(pretrain_command, preset="paper_siglip", run="paper_siglip")
    key = "stages.connector.data" if name == "lcs" else "data"
    return partial(finetune_command, words=["runs/paper_siglip", "output=runs/vlm"], key=key)


OUTPUTS = {"cc3m": "cc3m_595k", "lcs": "lcs_558k", "llava_next": "llava_next"}  # below data/, where presets look


def _add_conversion(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    output_required: bool = True,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}, as tars. Run again to go on."
    )
    parser.add_argument("--output", type=Path, required=output_required, metavar="DIR", help="where the tars go")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds already")
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="samples per tar (%(default)s)")
    help = "share of the images that go to heldout-*.tar, such as 0.05 or 5%% (%(default)s)"
    parser.add_argument("--heldout", type=_share, default=0.002, metavar="SHARE", help=help)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")
    parser.set_defaults(run=run, again="the same command goes on")
    return parser


def _share(text: str) -> float:
    """The share that `text` names: 0.05, or 5% as in `data.heldout`. `ShardLayout` checks its range."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


_share.__name__ = "share"  # argparse's message for other texts names it


def _add_column_arguments(parser: argparse.ArgumentParser) -> None:
    help = "of the images (image, filepath, file_name ..., the first that is there)"
    parser.add_argument("--image", default="", metavar="COLUMN", help=help)
    help = "of the captions (the conversation, or else caption, text, txt, title, comment or the class)"
    parser.add_argument("--caption", default="", metavar="COLUMN", help=help)


def _add_encoding_argument(parser: argparse.ArgumentParser) -> None:
    help = "of the text (UTF-8, UTF-16 and cp1252 are recognised), such as shift_jis"
    parser.add_argument("--encoding", default="", metavar="NAME", help=help)


def _convert(arguments: argparse.Namespace, source: Source) -> None:
    """Write `source` as tars, and print the command that trains on them."""
    from hive_scale.prepare.next_command import next_step, pretrain_command

    counts = _samples_of(_write(arguments, source))
    print(next_step(arguments.output, counts["train"], counts["heldout"], pretrain_command))


def _write(arguments: argparse.Namespace, source: Source) -> list[Shard]:
    """Write `source` as tars with a progress bar, then print what was written and what was left out."""
    from rich.progress import Progress

    from hive_scale.prepare.writer import ShardLayout, convert

    for note in source.notes:
        print(printable(note))
    start, layout = time.monotonic(), ShardLayout(arguments.shard_size, arguments.heldout)
    with Progress() as progress:
        task = progress.add_task("converting", total=source.length)

        def advance(done: int, samples: int) -> None:
            progress.update(task, completed=done, description=f"{samples:,} samples")

        shards = convert(source, arguments.output, layout, arguments.workers, arguments.overwrite, advance)
        progress.update(task, completed=source.length)
    for line in (*_outcome(arguments, shards), f"{arguments.output}: done in {time.monotonic() - start:.1f} s"):
        print(printable(line))
    return shards


def _outcome(arguments: argparse.Namespace, shards: Sequence[Shard]) -> Iterator[str]:
    """Yield lines on what was written and what was left out."""
    from hive_scale.prepare.writer import JOURNAL

    counts = _samples_of(shards)
    for split, samples in counts.items():
        of_split = [shard for shard in shards if shard.name.startswith(split)]
        yield f"{split}: {samples:,} samples in {len(of_split):,} shards, {_megabytes(of_split)}"
    if not counts["heldout"] and arguments.heldout:
        share = min(0.5, max(0.05, 20 / max(1, counts["train"])))
        remedy = f"; --heldout {share:.2g} --overwrite sets about {counts['train'] * share:.0f} aside"
        remedy = remedy if counts["train"] > 1 else ""
        yield f"no heldout samples: too few for --heldout {arguments.heldout:g}{remedy}"
    if not counts["train"]:
        yield f"no train samples: all are held out with --heldout {arguments.heldout:g}; use a smaller share"
    if conversations := sum(shard.conversations for shard in shards):
        told = "their first answer is the caption; data.format=conversation trains on all answers"
        yield f"{conversations:,} samples have a conversation: {told}"
    if further := sum(shard.further for shard in shards):
        yield f"the first caption of an image is trained on; {further:,} others are kept in the .json, as captions"
    yield from _left_out(shards)
    if any(shard.skipped for shard in shards):
        yield f"each is named in {arguments.output / JOURNAL}"


def _left_out(shards: Sequence[Shard]) -> Iterator[str]:
    """Yield the ten most common kinds of reasons, each as the first record that has it."""
    counts, first = Counter[str](), dict[str, tuple[str, str]]()
    for _, reason, *where in (one for shard in shards for one in shard.skipped):
        kind = re.sub(r"'[^']*'|\S*[./]\S*", "...", reason)  # without names and what was found
        counts[kind] += 1
        first.setdefault(kind, (reason, where[0] if where else ""))  # journals of older versions have no place
    for kind, count in counts.most_common(10):
        reason, place = first[kind]
        alike = " or alike" if count > 1 and kind != reason else ""
        yield f"left out: {count:,} x {reason}{alike}" + (f"; first: {place}" if place else "")


def _samples_of(shards: Sequence[Shard]) -> dict[str, int]:
    splits = ("train", "heldout")
    return {split: sum(one.samples for one in shards if one.name.startswith(split)) for split in splits}


def _megabytes(shards: Sequence[Shard]) -> str:
    return f"{sum(shard.num_bytes for shard in shards) / 1e6:,.1f} MB"


PUBLISHED = {
    "cc3m": "LLaVA-CC3M-Pretrain-595K: where it comes from; checks and converts it",
    "lcs": "LLaVA-Pretrain (LCS-558K): where it comes from; checks and converts it",
    "llava_next": "LLaVA-NeXT-Data: where it comes from; checks and converts it",
}
CONVERTERS: tuple[Callable[[Subparsers], None], ...] = (
    *(add_llava, add_table, add_parquet, add_pairs, add_classes),
    *(partial(add_published, name=name, summary=summary) for name, summary in PUBLISHED.items()),
)
