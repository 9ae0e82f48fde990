"""Prepare Fashion-MNIST from its Debian package, in the layout of torchvision's download."""

from __future__ import annotations

import gzip
from io import BytesIO
from pathlib import Path, PurePosixPath

from hive_scale.prepare.packages import LARGEST, Package, fetch, members

PACKAGE = Package("debian", "dataset-fashion-mnist")


def prepare(output: Path, cache: Path) -> list[Path]:
    """Write ``FashionMNIST/raw/*-ubyte`` below `output`: 70,000 grey images of 28 x 28 pixels in ten classes.

    Returns the files. Raises ValueError if the package does not hold the four files, and what `fetch` raises.
    """
    found = members(fetch(PACKAGE, cache), lambda name: name.endswith("-ubyte.gz"))
    if len(found) != 4:
        raise ValueError(f"{PACKAGE} holds {len(found)} of the four files of Fashion-MNIST: report this release")
    written = []
    for name, content in found.items():
        path = output / "FashionMNIST" / "raw" / PurePosixPath(name).stem
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.GzipFile(fileobj=BytesIO(content)).read(LARGEST))
        written.append(path)
    return written
