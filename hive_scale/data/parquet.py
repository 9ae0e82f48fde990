"""Checks for parquet files from elsewhere: limit the size of a row group, and shorten errors to one line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

LARGEST_GROUP = 8 * 2**30  # uncompressed bytes; row groups on the hub hold a hundred images, sometimes a thousand


def parquet_error(path: Path, error: Exception) -> str:
    """Return a one-line message for an exception that pyarrow raised while reading `path`."""
    return f"{path} cannot be read as parquet: {next(iter(str(error).splitlines()), type(error).__name__)}"


def check_row_group(file: ParquetFile, group: int, *columns: str) -> None:
    """Raise ValueError if `columns` (default: all) of a row group declare more than `LARGEST_GROUP` bytes."""
    told = file.metadata.row_group(group)
    chunks = [told.column(number) for number in range(told.num_columns)]
    wanted = [one for one in chunks if not columns or one.path_in_schema.split(".")[0] in columns]
    size = sum(one.total_uncompressed_size for one in wanted)
    if not 0 <= size <= LARGEST_GROUP:
        raise ValueError(f"{size:,} bytes in a row group, more than {LARGEST_GROUP:,}: write it with smaller ones")
