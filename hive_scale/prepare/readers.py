"""Stream data sets in their layouts as `Item`s; at most one shard's items are in memory at once.

The layout of a text file is recognised by its content: the first of `LAYOUTS` that recognises it reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_scale.data.class_folders import ENDINGS, class_files, class_folders
from hive_scale.data.parquet import check_row_group, parquet_error
from hive_scale.prepare import delimited, json_stream
from hive_scale.prepare.image_sources import ImageSource, InFile, InParquet, Place
from hive_scale.prepare.items import Item, Located, Record, Source, Unreadable, check_file, file_identity
from hive_scale.prepare.pairs import has_captions
from hive_scale.prepare.record_text import CAPTIONS, IMAGES, captions_of, image_name, is_conversation
from hive_scale.prepare.text_files import check_encoding, encoding_of, open_text

if TYPE_CHECKING:
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile

LOOKED_AT = 1000  # records that are read to recognise what a file holds
MOST_CAPTIONS = 1000  # rows in succession that are captions of one image


@dataclass(frozen=True)
class Layout:
    """A layout of text files. `recognises` and `records` are given the open file, at its start, and its path."""

    recognises: Callable[[TextIOWrapper, Path], bool]
    records: Callable[[TextIOWrapper, Path], Iterator[Located]]


LAYOUTS = (
    Layout(json_stream.is_coco, json_stream.coco_records),
    Layout(json_stream.is_list, json_stream.list_records),
    Layout(json_stream.is_lines, json_stream.line_records),
    Layout(delimited.is_caption_list, delimited.caption_list),
    Layout(lambda text, path: True, delimited.rows),
)


def records_of(path: Path, encoding: str) -> Iterator[tuple[str, Record, int]]:
    """Yield (file and row, record, bytes read so far) of a text file in any of `LAYOUTS`.

    Raises ValueError, with the path, for a file that ends too early or has no columns.
    """
    with path.open("rb") as file, open_text(file, encoding) as text:
        for layout in LAYOUTS:
            recognised = layout.recognises(text, path)
            text.seek(0)
            if recognised:
                break
        for where, record in layout.records(text, path):
            yield where, record, file.tell()


def table(path: Path, images: Path, image: str = "", caption: str = "", encoding: str = "") -> Source:
    """Read a file of any of `LAYOUTS`, whose records name images in `images`, a folder or a zip.

    A record has a conversation (LLaVA's ``conversations``, ``messages``, The Cauldron's ``texts``) or captions. Rows
    in succession about one image become one sample with all their captions, if the first rows show that the file is
    of this kind. `image` and `caption` name columns, `encoding` the file's encoding; "" means by their content.
    Raises ValueError if `path` or `images` cannot be used.
    """
    _check_table(path)
    source = ImageSource(images)
    chosen, note = (check_encoding(encoding), "") if encoding else encoding_of(path)
    first: list[tuple[str, Record, int]] = []
    with suppress(ValueError):  # raised again by `items`, where what is sound before it is kept
        first.extend(islice(records_of(path, chosen), LOOKED_AT))
    several = any(_about_one(one, other, image, caption) for one, other in pairwise(first))
    notes = [note, *_columns(first, image, caption)]
    notes += ["several rows per image: a sample per image"] * several

    def items() -> Iterator[Item]:
        records = records_of(path, chosen)
        for where, record, done in _by_image(records, image, caption) if several else records:
            if isinstance(record, Unreadable):
                yield Item(None, "", {}, "", done, record.reason, where)
                continue
            name, place, missing = "", None, ""
            try:
                name = image_name(record, image)
            except ValueError as error:
                missing = str(error)
            else:
                place = _found(source, name, where)
                missing = "" if place else source.missing(name)
            yield _item(place, missing, record, caption, name, done, where)

    identity: dict[str, Any] = {
        "table": file_identity(path),
        "columns": [image or "image", caption, *[encoding] * bool(encoding)],
    }
    identity |= {"captions": "by image"} if several else {}  # journals of older versions have a sample per row
    return Source(items, path.stat().st_size, identity, str(path), tuple(filter(None, notes)))


def _found(source: ImageSource, name: str, where: str) -> Place | None:
    try:
        return source.find(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_table(path: Path) -> None:
    """Raise ValueError, naming the command, if `path` is no text file."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: prepare_data.py pairs reads images with their captions beside them")
    if not path.is_file():
        raise ValueError(f"{path} is not there: give the JSON, JSONL, CSV or TSV file that names the images")
    check_file(path, "text")


def _columns(first: Sequence[tuple[str, Record, int]], image: str, caption: str) -> Iterator[str]:
    """Yield what a user is told about the columns of the file. Raises ValueError if no record can have an image."""
    record = next((record for _, record, _ in first if isinstance(record, dict)), None)
    if record is None:
        return
    where, names = first[0][0].partition(",")[0], ", ".join(map(str, list(record)[:20]))
    known = [name for name in IMAGES if name in record]
    said = [name for name in CAPTIONS if name in record]
    if image and not any(isinstance(one, dict) and image in one for _, one, _ in first):
        raise ValueError(f"{where} has no column '{image}', but {names}: name the images' with --image")
    if caption and not any(isinstance(one, dict) and caption in one for _, one, _ in first):
        raise ValueError(f"{where} has no column '{caption}', but {names}: name the captions' with --caption")
    if is_conversation(record) or not (known or image):
        return
    if (image or known[0]) != "image" or (caption or [*said, ""][0]) not in ("", "caption"):
        read = f"{image or known[0]} (images), {caption or [*said, 'none'][0]} (captions)"
        yield f"{where} has the columns {names}; read are {read}; --image and --caption choose others"


def _about_one(one: tuple[str, Record, int], other: tuple[str, Record, int], image: str, caption: str) -> bool:
    """True if two records are captions of one image, which can be told together."""
    names = []
    for _, record, _ in (one, other):
        if isinstance(record, Unreadable) or (is_conversation(record) and not caption):
            return False
        try:
            captions_of(record, caption)
            names.append(image_name(record, image))
        except ValueError:
            return False
    return names[0] == names[1]


def _by_image(
    records: Iterable[tuple[str, Record, int]], image: str, caption: str
) -> Iterator[tuple[str, Record, int]]:
    """Join records in succession that are captions of one image."""
    run: list[tuple[str, Record, int]] = []
    for one in records:
        if run and (len(run) == MOST_CAPTIONS or not _about_one(run[-1], one, image, caption)):
            yield _joined(run)
            run = []
        run.append(one)
    if run:
        yield _joined(run)


def _joined(run: Sequence[tuple[str, Record, int]]) -> tuple[str, Record, int]:
    """Join records to one: columns in which they differ, the captions above all, become lists."""
    records = [record for _, record, _ in run if isinstance(record, dict)]
    if len(records) < 2:
        return run[0]
    names = dict.fromkeys(name for record in records for name in record)
    values = {name: [record.get(name) for record in records] for name in names}
    joined = {name: found[0] if all(one == found[0] for one in found) else found for name, found in values.items()}
    return run[0][0], joined, run[-1][2]


def parquet(files: Sequence[Path], image: str = "", caption: str = "") -> Source:
    """Read parquet files with images in column `image`, and a conversation, a caption or a label per row.

    Without `image`, the column is found by its name or its type. Raises ValueError for a file that is damaged or lacks
    the column.
    """
    from pyarrow.parquet import ParquetFile

    opened = {}
    for path in files:
        check_file(path, "parquet")
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give its files, such as '{path}/*.parquet'")
        try:
            opened[path] = ParquetFile(path)
        except Exception as error:  # pyarrow raises its own types for truncated, damaged or non-parquet files
            raise ValueError(parquet_error(path, error)) from None
        told = opened[path].metadata
        if told.num_rows != sum(told.row_group(group).num_rows for group in range(told.num_row_groups)):
            raise ValueError(f"{path} has other rows than it says ({told.num_rows:,}): fetch it again")
        image = image or _image_column(opened[path])
        if not image and set(IMAGES) & set(opened[path].schema_arrow.names):
            kinds = ", ".join(f"{one.name}: {one.type}" for one in opened[path].schema_arrow)
            raise ValueError(
                f"{path} has no images inside, or several columns of them: name one with --image ({kinds})"
            )
        if image not in opened[path].schema_arrow.names:
            names = ", ".join(opened[path].schema_arrow.names)
            raise ValueError(f"{path} has no column '{image or IMAGES[0]}': name the images' with --image ({names})")

    def items() -> Iterator[Item]:
        done = 0
        for path, file in opened.items():
            before = done
            for group in range(file.num_row_groups):
                for row, record in enumerate(_group(file, path, group, image)):
                    done += 1
                    where = f"{path.name}, row {done - before}"
                    if isinstance(record, Unreadable):
                        yield Item(None, "", {}, str(done), done, record.reason, where)
                    else:
                        place = InParquet(path, image, group, row)
                        yield _item(place, "", record, caption, str(record.get("id") or done), done, where)

    rows = sum(file.metadata.num_rows for file in opened.values())
    return Source(items, rows, {"parquet": [file_identity(path) for path in files], "columns": [image, caption]})


def _image_column(file: ParquetFile) -> str:
    """Return the column of images: the first with a name of `IMAGES`, or else the only one of bytes; "" if none."""
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_list(kind) else kind
        return bool(pa.types.is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0))

    found = [field.name for field in file.schema_arrow if holds_bytes(field.type)]
    named = [name for name in IMAGES if name in found]
    return named[0] if named else found[0] if len(found) == 1 else ""


def _group(file: ParquetFile, path: Path, group: int, image: str) -> Iterable[Record]:
    """Return a row group's records without images: as many as the file declares, even if it is damaged."""
    count = file.metadata.row_group(group).num_rows
    others = [name for name in file.schema_arrow.names if name != image]
    try:
        check_row_group(file, group, *others)
        read = file.read_row_group(group, others) if others else None
        records = _without_nanoseconds(read).to_pylist() if read else [{} for _ in range(count)]
    except Exception as error:  # pyarrow raises its own types for damaged files
        return [Unreadable(f"row group {group} of {parquet_error(path, error)}")] * count
    for column, names in _class_names(file.schema_arrow.metadata).items():
        for record in records:
            if isinstance(number := record.get(column), int):
                record["class"] = names[number] if 0 <= number < len(names) else None
    return [*records, *[Unreadable(f"{path.name} ends early")] * (count - len(records))]


def _without_nanoseconds(table: Table) -> Table:
    """Cast nanosecond times, which pandas writes, to microseconds, the finest that Python's own types hold."""
    import pyarrow as pa

    for at, field_ in enumerate(table.schema):
        if getattr(field_.type, "unit", "") == "ns":
            coarse = pa.timestamp("us", field_.type.tz) if pa.types.is_timestamp(field_.type) else None
            coarse = coarse or (pa.duration("us") if pa.types.is_duration(field_.type) else pa.time64("us"))
            table = table.set_column(at, field_.name, table.column(at).cast(coarse, safe=False))
    return table


def classes(folder: Path) -> Source:
    """Read a folder of class folders, as in torchvision's ImageFolder; the class is both label and caption.

    Raises ValueError if there are no class folders.
    """
    names = [path.name for path in class_folders(folder)] if folder.is_dir() else []
    if not names:
        raise ValueError(f"{folder} holds no class folders: give the folder above them, such as imagenet/train")

    images, _ = class_files(folder / names[0])
    if has_captions(images):
        raise ValueError(f"{folder} holds captions beside its images: use prepare_data.py pairs {folder}")

    def items() -> Iterator[Item]:
        done = 0
        for label, name in enumerate(names):
            images, others = class_files(folder / name)
            for path in [*images, *others]:
                done += 1
                record = {"label": label, "class": name}
                place = InFile(path) if path.suffix.lower() in ENDINGS else None
                missing = f"{path.name} is no {', '.join(ENDINGS)}"
                where = str(path.relative_to(folder))
                yield Item(place, name.replace("_", " "), record | {"image": where}, str(path), done, missing, where)

    count = sum(len(files) for name in names for files in class_files(folder / name))
    return Source(items, count, {"classes": [str(folder.resolve()), count]})


def _item(
    place: Place | None, missing: str, record: dict[str, Any], caption: str, group: str, done: int, where: str
) -> Item:
    try:
        captions, kept = captions_of(record, caption)
    except ValueError as error:
        return Item(None, "", record, group, done, str(error), where)
    return Item(place, captions[0], kept, group, done, missing, where, len(captions) - 1)


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return class names by column, which the hub's files carry in their schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        labels = {column: feature for column, feature in features.items() if feature.get("_type") == "ClassLabel"}
        return {column: [str(name) for name in feature["names"]] for column, feature in labels.items()}
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError):  # missing, or of another shape
        return {}
