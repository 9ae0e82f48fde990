"""Readers of published benchmark files: parquet with images inside, or JSON with images beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from hive_scale import strict_json
from hive_scale.atomic import write_text
from hive_scale.data.images import check_length, read_image
from hive_scale.data.parquet import check_row_group
from hive_scale.evaluate.vqa_types import ImageFile, Question
from hive_scale.strict_json import dumps

Row = dict[str, Any]
Reader = Callable[[Path], list[Question]]
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")


def published_at(source: str) -> Callable[[Reader], Reader]:
    """Decorate a task's `read`: records of an unexpected shape raise a ValueError that names `source`."""

    def told(read: Reader) -> Reader:
        @wraps(read)
        def wrapped(folder: Path) -> list[Question]:
            try:
                return read(folder)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                what = f"a record is not as published ({type(error).__name__}: {error})"
                raise ValueError(f"{folder}: {what}; the files are at {source}") from None

        return wrapped

    return told


def rows(paths: Iterable[Path], image_column: str, columns: Sequence[str]) -> list[Row]:
    """Return `columns` of every row of parquet files; key "image" holds the row's ImageFile, or None.

    Images are the hub's structs of bytes and path. Their bytes are read on demand, one row group at a time. Raises
    ValueError for a file that lacks a column or is not parquet.
    """
    found: list[Row] = []
    for path in paths:
        with _told(path):
            file = parquet.ParquetFile(path)
        known = file.schema_arrow.names
        wanted = [image_column, *columns] if image_column else [*columns]
        if missing := [name for name in wanted if name not in known]:
            raise ValueError(f"{path} has no column '{missing[0]}': its columns are {', '.join(known)}")
        if image_column and not _holds_images(file.schema_arrow.field(image_column).type):
            raise ValueError(f"{path}: column '{image_column}' holds no images as the hub has them (bytes, path)")
        # of images read only the path, which tells whether there is one
        light = [*columns, f"{image_column}.path"] if image_column else [*columns]
        for group in range(file.num_row_groups):
            with _told(path):
                check_row_group(file, group, *columns)
                read = file.read_row_group(group, columns=light).to_pylist()
            for index, row in enumerate(read):
                held = row.pop(image_column, None) if image_column else None
                row["image"] = None if held is None else _inside(path, group, index, image_column)
                found.append(row)
        file.close()
    return found


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Convert pyarrow's own exceptions for truncated, damaged or non-parquet files to ValueError."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} cannot be read as parquet: {reason}") from None


def _holds_images(column: pyarrow.DataType) -> bool:
    return pyarrow.types.is_struct(column) and {"bytes", "path"} <= {field.name for field in column}


def _inside(path: Path, group: int, index: int, column: str) -> ImageFile:
    return ImageFile(f"{path}:{group}:{index}", partial(_cell, path, group, index, column))


def _cell(path: Path, group: int, index: int, column: str) -> bytes:
    content = _group(path, group, column)[index]["bytes"].as_py()
    if content is None:
        raise ValueError(f"{path}: row {index} of row group {group} names an image but does not hold it")
    check_length(content)
    return bytes(content)


@lru_cache(maxsize=2)
def _group(path: Path, group: int, column: str) -> Any:
    with _told(path), parquet.ParquetFile(path) as file:
        check_row_group(file, group, column)
        return file.read_row_group(group, columns=[f"{column}.bytes"]).column(column).combine_chunks()


def image_file(path: Path) -> ImageFile:
    """Return the image at `path`. Raises ValueError immediately if the file does not exist."""
    if not path.is_file():
        raise ValueError(f"there is no image {path}: unpack the task's images there")
    return ImageFile(str(path), partial(read_image, path))


def images_by_stem(folder: Path) -> dict[str, Path]:
    """Map the images of a folder by file name without ending."""
    return {path.stem: path for path in sorted(folder.glob("*")) if path.suffix in IMAGE_ENDINGS}


def read_json(path: Path) -> Any:
    try:
        return strict_json.read(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically: a reader finds the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dumps(value, indent=1) + "\n")


def missing_files_error(folder: Path, wanted: str, source: str) -> ValueError:
    """Return the error for a folder that holds none of a task's layouts."""
    held = sorted(path.name for path in folder.iterdir())[:6] if folder.is_dir() else []
    what = f"it holds {', '.join(held)}" if held else "it is empty" if folder.is_dir() else "there is no such folder"
    return ValueError(f"{folder}: {wanted} not found ({what}); the files are at {source}")
