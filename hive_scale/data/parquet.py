"""Parquet files of others: how large a row group may be, and errors in one line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

LARGEST_GROUP = 8 * 2**30  # bytes of a row group, unpacked: the hub writes a hundred images, some a thousand


def parquet_error(path: Path, error: Exception) -> str:
    """What pyarrow's error says of a file, in one line."""
    return f"{path} cannot be read as parquet: {next(iter(str(error).splitlines()), type(error).__name__)}"


def check_row_group(file: ParquetFile, group: int, *columns: str) -> None:
    """Raises ValueError if `columns` (default: all) of a row group say that they take more than `LARGEST_GROUP`."""
    told = file.metadata.row_group(group)
    chunks = [told.column(number) for number in range(told.num_columns)]
    wanted = [one for one in chunks if not columns or one.path_in_schema.split(".")[0] in columns]
    size = sum(one.total_uncompressed_size for one in wanted)
    if not 0 <= size <= LARGEST_GROUP:
        raise ValueError(f"{size:,} bytes in a row group, more than {LARGEST_GROUP:,}: write it with smaller ones")
