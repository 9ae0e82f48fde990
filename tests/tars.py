"""Small tars for the data tests, written by webdataset as a user's would be."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import webdataset
from PIL import Image

Members = Mapping[str, bytes]  # extension -> content


def image_bytes(width: int = 24, height: int = 16, seed: int = 0, format: str = "JPEG", mode: str = "RGB") -> bytes:
    rng = random.Random(seed)
    small = Image.frombytes("RGB", (4, 4), rng.randbytes(48))
    buffer = BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(buffer, format)
    return buffer.getvalue()


def pair(seed: int, words: int | None = None) -> dict[str, bytes]:
    """An image, its caption of 1 to 20 words and its record."""
    count = words or random.Random(seed).randint(1, 20)
    return {
        "jpg": image_bytes(seed=seed),
        "txt": " ".join(f"w{seed}" for _ in range(count)).encode(),
        "json": b'{"seed": %d}' % seed,
    }


def write_tar(path: Path, samples: Sequence[tuple[str, Members]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
    return str(path)


def write_set(directory: Path, sizes: Sequence[int]) -> list[str]:
    """Shards of so many pairs, keyed by shard and place."""
    return [
        write_tar(directory / f"set-{s:04d}.tar", [(f"{s}-{i}", pair(100 * s + i)) for i in range(size)])
        for s, size in enumerate(sizes)
    ]
