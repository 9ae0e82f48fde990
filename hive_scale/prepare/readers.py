"""Stream public data sets in their layouts as `Item`s; at most one shard's items are in memory at once."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hive_scale.data.class_folders import ENDINGS, class_files, class_folders
from hive_scale.data.conversation import is_text, parse_messages
from hive_scale.data.parquet import check_row_group, parquet_error
from hive_scale.prepare.image_sources import ImageSource, InFile, InParquet, Place
from hive_scale.strict_json import check_depth

if TYPE_CHECKING:
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile

PIECE = 2**20  # characters of JSON read at a time
LONGEST_ROW = 2**20  # characters of a CSV or TSV row, within which a quotation mark must be closed
LONGEST_RECORD = 64 * PIECE  # characters of a JSON record
CAPTIONS = ("caption", "text", "txt")  # caption columns, in order of preference


@dataclass(frozen=True)
class Item:
    """One sample before its image is read. If `place` is None it cannot be used, for `reason`."""

    place: Place | None
    caption: str
    record: Mapping[str, Any]
    group: str  # items of one group, such as all about one image, stay on one side of the split
    done: int  # position in the source, in the unit of Source.length
    reason: str = ""


@dataclass(frozen=True)
class Unreadable:
    """A row or record that cannot be read, with the reason."""

    reason: str


Record = dict[str, Any] | Unreadable


@dataclass(frozen=True)
class Source:
    """Stream of items. `length` is the final value of `Item.done`; `identity` distinguishes sources."""

    items: Callable[[], Iterator[Item]]
    length: int
    identity: dict[str, Any] = field(default_factory=dict)


def table(path: Path, images: Path, image: str = "image", caption: str = "") -> Source:
    """Read a JSON array, JSON lines, CSV or TSV whose records name images in `images`, a folder or a zip.

    A record has a conversation (LLaVA's ``conversations``, or ``messages``) or a caption in column `caption`. Raises
    ValueError if `path` or `images` cannot be used.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there: give the JSON, JSONL, CSV or TSV file that names the images")
    source = ImageSource(images)

    def items() -> Iterator[Item]:
        with path.open("rb") as file:
            for record in _rows(file, path) if path.suffix in (".csv", ".tsv") else json_records(file, path):
                if isinstance(record, Unreadable):
                    yield Item(None, "", {}, "", file.tell(), record.reason)
                    continue
                name = record.get(image)
                if isinstance(name, list) and len(name) == 1:
                    [name] = name
                name = name if isinstance(name, str) else ""
                place = source.find(name) if name else None
                missing = f"there is no {name} in {images}" if name else "no image: text alone"
                yield _item(place, missing, record, caption, name, file.tell())

    return Source(items, path.stat().st_size, {"table": _identity(path), "columns": [image, caption]})


def parquet(files: Sequence[Path], image: str = "image", caption: str = "") -> Source:
    """Read parquet files with images in column `image`, and a conversation, a caption or a label per row.

    Raises ValueError for a file that is damaged or lacks the column.
    """
    from pyarrow.parquet import ParquetFile

    opened = {}
    for path in files:
        try:
            opened[path] = ParquetFile(path)
        except Exception as error:  # pyarrow raises its own types for truncated, damaged or non-parquet files
            raise ValueError(parquet_error(path, error)) from None
        told = opened[path].metadata
        if told.num_rows != sum(told.row_group(group).num_rows for group in range(told.num_row_groups)):
            raise ValueError(f"{path} has other rows than it says ({told.num_rows:,}): fetch it again")
        if image not in opened[path].schema_arrow.names:
            names = ", ".join(opened[path].schema_arrow.names)
            raise ValueError(f"{path} has no column '{image}': name the images' with --image ({names})")

    def items() -> Iterator[Item]:
        done = 0
        for path, file in opened.items():
            for group in range(file.num_row_groups):
                for row, record in enumerate(_group(file, path, group, image)):
                    done += 1
                    if isinstance(record, Unreadable):
                        yield Item(None, "", {}, str(done), done, record.reason)
                    else:
                        place = InParquet(path, image, group, row)
                        yield _item(place, "", record, caption, str(record.get("id") or done), done)

    rows = sum(file.metadata.num_rows for file in opened.values())
    return Source(items, rows, {"parquet": [_identity(path) for path in files], "columns": [image, caption]})


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

    def items() -> Iterator[Item]:
        done = 0
        for label, name in enumerate(names):
            images, others = class_files(folder / name)
            for path in [*images, *others]:
                done += 1
                record = {"label": label, "class": name, "image": str(path.relative_to(folder))}
                place = InFile(path) if path.suffix.lower() in ENDINGS else None
                missing = f"{path.name} is no {', '.join(ENDINGS)}"
                yield Item(place, name.replace("_", " "), record, str(path), done, missing)

    count = sum(len(files) for name in names for files in class_files(folder / name))
    return Source(items, count, {"classes": [str(folder.resolve()), count]})


def json_records(file: BinaryIO, path: Path) -> Iterator[Record]:
    """Yield the objects of a JSON array or of JSON lines one by one, since such files reach gigabytes.

    Array elements that are not objects, and lines that are not JSON, yield an `Unreadable`. Raises ValueError for an
    array that does not end or holds invalid JSON: the start of the next record is then unknown.
    """
    text = _decoded(file)
    try:
        scanner = _Scanner(text, path)
        if scanner.next() == "[" and path.suffix not in (".jsonl", ".ndjson"):
            for value in scanner.array():
                yield _object(value)
            return
        text.seek(0)
        while line := text.readline(LONGEST_RECORD):
            if len(line) == LONGEST_RECORD:
                raise ValueError(f"{path}: a line has more than {LONGEST_RECORD:,} characters: is it JSON?")
            if line.strip():
                yield _line(line)
    finally:
        text.detach()


def _decoded(file: BinaryIO, newline: str | None = None) -> TextIOWrapper:
    # invalid UTF-8 becomes lone surrogates, which cannot be written: this loses the record, not the file
    return TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _line(line: str) -> Record:
    try:
        return _object(json.loads(line))
    except json.JSONDecodeError as error:
        return Unreadable(f"its line is not JSON: {error.msg}")
    except (ValueError, RecursionError):
        return Unreadable("its line is not JSON that can be read: a number too long, or nested too deeply")


def _object(value: Any) -> Record:
    if not isinstance(value, dict):
        return Unreadable(f"no {{...}}, but a {type(value).__name__}")
    try:
        check_depth(value)
    except ValueError as error:
        return Unreadable(str(error))
    return value


class _Scanner:
    """Parses JSON values one after another from a text that is never held in memory as a whole."""

    def __init__(self, text: TextIOWrapper, path: Path) -> None:
        self._text, self._path = text, path
        self._buffer, self._at, self._passed = "", 0, 0

    def array(self) -> Iterator[Any]:
        """Yield the elements of the array that begins here. Raises ValueError if anything follows it."""
        self._at += 1
        while self.next() not in ("]", ""):
            yield self._value()
            if self.next() == ",":
                self._at += 1
            elif self.next() not in ("]", ""):
                raise self._wrong("',' or ']' is missing")
        if not self.next():
            raise self._wrong("its list does not end: the file was cut short")
        self._at += 1
        if self.next():
            raise self._wrong("more follows behind the end of its list")

    def next(self) -> str:
        """Peek at the next character that is not white space; "" at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more(PIECE):
                return ""

    def _value(self) -> Any:
        size = PIECE
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:  # also raised if the record's end is not in the buffer yet
                wrong = self._wrong(error.msg, error.pos)
                if len(self._buffer) - self._at > LONGEST_RECORD or not self._more(size):
                    raise wrong from None
            except (ValueError, RecursionError):
                raise self._wrong("a number is too long, or a record nested too deeply") from None
            else:
                # a number may continue beyond the buffer
                if end < len(self._buffer) or not self._more(size):
                    self._at = min(end, len(self._buffer))
                    return value
            size *= 2  # doubling keeps rescans of a long record few

    def _more(self, size: int) -> bool:
        piece = self._text.read(size)
        self._passed += self._at
        self._buffer, self._at = self._buffer[self._at :] + piece, 0
        return bool(piece)

    def _wrong(self, message: str, at: int | None = None) -> ValueError:
        place = self._passed + (self._at if at is None else at)
        return ValueError(f"{self._path} is not JSON at character {place}: {message}")


def _rows(file: BinaryIO, path: Path) -> Iterator[Record]:
    """Yield the rows of a CSV or TSV by header; a row with a wrong number of fields yields an `Unreadable`."""
    csv.field_size_limit(LONGEST_ROW)
    text = _decoded(file, newline="")
    delimiter = "\t" if path.suffix == ".tsv" else ","
    lines = _Lines(iter(partial(text.readline, LONGEST_RECORD), ""))
    header: list[str] = []
    try:
        for first in lines:
            if not first.strip("\r\n"):
                continue
            fields = _fields(first, lines, delimiter, len(header))
            if fields and header:
                yield dict(zip(header, fields, strict=True))
            elif header:
                yield Unreadable(f"not {len(header)} fields as in the header, or a quotation mark without its partner")
            elif not fields:
                raise ValueError(f"{path}: a quotation mark of the header has no partner: mend its first line")
            header = header or fields or []
    finally:
        text.detach()


class _Lines(Iterator[str]):
    """Iterator over lines that accepts lines back, to be read again."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: deque[str] = deque()

    def __next__(self) -> str:
        return self._again.popleft() if self._again else next(self._lines)

    def give_back(self, lines: Sequence[str]) -> None:
        self._again.extendleft(reversed(lines))


def _fields(first: str, lines: _Lines, delimiter: str, width: int) -> list[str] | None:
    """Return the fields of the row that begins with line `first`; None if they are not `width` (0: any number).

    A quotation mark may extend a field over several lines. In a TSV it may also be an ordinary character, as in CC3M
    and CC12M. A TSV line with `width` fields of its own is therefore a row, if the quoted parse does not fit, or if
    the lines the quotation mark would swallow are complete rows.
    """
    swallowed: list[str] = []

    def pull() -> Iterator[str]:
        yield first
        size = len(first)
        while size <= LONGEST_ROW and (line := next(lines, None)) is not None:
            swallowed.append(line)
            yield line
            size += len(line)

    try:
        fields = next(csv.reader(pull(), delimiter=delimiter, strict=True))
    except csv.Error:
        fields = []
    fits = len(fields) == (width or len(fields))
    plain = first.rstrip("\r\n").split(delimiter)
    are_rows = swallowed and all(line.count(delimiter) == width - 1 for line in swallowed if line.strip("\r\n"))
    if delimiter == "\t" and len(plain) == width and (not fits or are_rows):
        fields = plain
    elif fits:
        return fields
    lines.give_back(swallowed)
    return fields if fields is plain else None


def _item(place: Place | None, missing: str, record: dict[str, Any], caption: str, group: str, done: int) -> Item:
    try:
        text = _caption(record, caption)
    except ValueError as error:
        return Item(None, "", record, group, done, str(error))
    return Item(place, text, record, group, done, missing)


def _caption(record: Mapping[str, Any], column: str) -> str:
    """Return the text paired with the image in pre-training; for a conversation, its first answer."""
    if column:
        if column not in record:
            raise ValueError(f"no column '{column}'")
        text = record[column]
    elif record.get("conversations") or record.get("messages"):
        text = next(turn["content"] for turn in parse_messages(record) if turn["role"] == "assistant")
    else:
        names = (*CAPTIONS, "class")
        text = next((record[name] for name in names if isinstance(record.get(name), str)), "")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"neither a conversation nor a caption in {', '.join(list(record)[:6]) or 'no columns'} (--caption COLUMN)"
        )
    if not is_text(text):
        raise ValueError("the caption is no UTF-8")
    return text.strip()


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return class names by column, which the hub's files carry in their schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        labels = {column: feature for column, feature in features.items() if feature.get("_type") == "ClassLabel"}
        return {column: [str(name) for name in feature["names"]] for column, feature in labels.items()}
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError):  # missing, or of another shape
        return {}


def _identity(path: Path) -> list[Any]:
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]
