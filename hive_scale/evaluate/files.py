"""Rows and pictures as benchmarks publish them: parquet with pictures inside, JSON with pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from hive_scale.evaluate.question import Picture

Row = dict[str, Any]
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")


def rows(paths: Iterable[Path], picture_column: str, columns: Sequence[str]) -> list[Row]:
    """`columns` of every row of parquet files, and under "picture" the row's Picture, or None.

    Pictures are the hub's structs of bytes and path; their bytes are read a row group at a time, when asked for.
    Raises ValueError for a file without one of the columns, or that is not parquet.
    """
    found: list[Row] = []
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
        except Exception as error:  # pyarrow raises errors of its own for what is cut or no parquet
            raise ValueError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None
        known = file.schema_arrow.names
        wanted = [picture_column, *columns] if picture_column else [*columns]
        if missing := [name for name in wanted if name not in known]:
            raise ValueError(f"{path} has no column '{missing[0]}': its columns are {', '.join(known)}")
        # of the pictures only the path, which says where there is one
        light = [*columns, f"{picture_column}.path"] if picture_column else [*columns]
        for group in range(file.num_row_groups):
            for index, row in enumerate(file.read_row_group(group, columns=light).to_pylist()):
                held = row.pop(picture_column, None) if picture_column else None
                row["picture"] = None if held is None else _inside(path, group, index, picture_column)
                found.append(row)
        file.close()
    return found


def _inside(path: Path, group: int, index: int, column: str) -> Picture:
    return Picture(f"{path}:{group}:{index}", partial(_cell, path, group, index, column))


def _cell(path: Path, group: int, index: int, column: str) -> bytes:
    content = _group(path, group, column)[index]["bytes"].as_py()
    if content is None:
        raise ValueError(f"{path}: row {index} of row group {group} names a picture but does not hold it")
    return bytes(content)


@lru_cache(maxsize=2)
def _group(path: Path, group: int, column: str) -> Any:
    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[f"{column}.bytes"]).column(column).combine_chunks()


def beside(path: Path) -> Picture:
    """The picture at `path`. Raises ValueError if there is none, at once."""
    if not path.is_file():
        raise ValueError(f"there is no picture {path}: unpack the task's pictures there")
    return Picture(str(path), path.read_bytes)


def pictures_by_stem(folder: Path) -> dict[str, Path]:
    """Every picture of a folder by its name without the ending."""
    return {path.stem: path for path in sorted(folder.glob("*")) if path.suffix in PICTURE_ENDINGS}


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """`value` as the whole content of `path`: another process, or a later one, finds all of it or what was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unnamed = path.with_name(f"{path.name}.tmp")
    unnamed.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    unnamed.replace(path)


def nothing_in(folder: Path, wanted: str, source: str) -> ValueError:
    """The error of a folder that holds none of a task's layouts."""
    held = sorted(path.name for path in folder.iterdir())[:6] if folder.is_dir() else []
    what = f"it holds {', '.join(held)}" if held else "it is empty" if folder.is_dir() else "there is no such folder"
    return ValueError(f"{folder}: {wanted} not found ({what}); the files are at {source}")
