"""Fetch a package archive once, verify it, and read members from it without unpacking it to disk.

Registries are reached through their own clients (npm, pip, apt-get), so proxies and mirrors configured there work.
Every version is pinned by the SHA-256 of its archive, except Debian's, which apt verifies by signature.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal

LARGEST = 2**30  # most bytes of a member; the largest fetched are models of about a hundred megabytes
_REMEDY = {
    "npm": "install Node.js with npm (Debian: apt-get install npm)",
    "apt-get": "this source is a Debian package, prepare it on Debian or Ubuntu",
    "dpkg-deb": "this source is a Debian package, prepare it on Debian or Ubuntu",
}


@dataclass(frozen=True)
class Package:
    """One archive of a registry. For Debian `version` and `sha256` are empty: the release determines them."""

    registry: Literal["npm", "pypi", "debian"]
    name: str
    version: str = ""
    sha256: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


def fetch(package: Package, cache: Path) -> Path:
    """Return the archive of `package` inside `cache`, downloading it if it is not there.

    Raises FileNotFoundError if the registry's client is missing, ConnectionError if it fails, and ValueError if the
    archive is not the pinned one; each names the remedy.
    """
    folder = cache / "packages" / package.registry
    folder.mkdir(parents=True, exist_ok=True)
    pattern = package.name.replace("@", "").replace("/", "-").replace("-", "[-_]") + "[-_]*"
    for found in sorted(folder.glob(pattern)):
        if not package.sha256 or _sha256(found) == package.sha256:
            return found
    with tempfile.TemporaryDirectory(dir=folder) as work:
        run_client(_download_command(package), Path(work), f"fetching {package}")
        [archive] = Path(work).iterdir()
        if package.sha256 and _sha256(archive) != package.sha256:
            raise ValueError(
                f"{package} from {package.registry} is not the archive this version was pinned to "
                f"(SHA-256 {package.sha256[:12]}...): ask your mirror's keeper"
            )
        return archive.replace(folder / archive.name)


def members(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return {name: content} of the regular files in a .tgz, .whl or .deb for which `wanted(name)` is true.

    Raises ValueError for a truncated or damaged archive, and for a name that points outside of its folder, which only
    a malicious package would contain.
    """
    found = {}
    try:
        for name, read in _entries(archive):
            path = PurePosixPath(name.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{archive.name} holds the path '{name}', which leaves its folder: not reading it")
            if wanted(str(path)):
                found[str(path)] = read()
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive} is cut short or damaged ({error}): delete it, and it is fetched again") from None
    return found


def _entries(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if not info.is_dir():
                    yield info.filename, partial(_unpacked, bundle, info)
        return
    with _tar_stream(archive) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            if member.isfile():
                yield member.name, partial(_content, tar, member)


def _unpacked(bundle: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    _check_size(info.filename, info.file_size)
    return bundle.read(info)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    _check_size(member.name, member.size)
    stream = tar.extractfile(member)
    assert stream is not None, "regular files have content"
    return stream.read()


def _check_size(name: str, size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"the package's {name} has {size:,} bytes, more than the {LARGEST:,} that are unpacked")


@contextmanager
def _tar_stream(archive: Path) -> Iterator[IO[bytes]]:
    if archive.suffix != ".deb":
        with archive.open("rb") as stream:
            yield stream
        return
    _require("dpkg-deb")
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout
        process.stdout.read()  # drain bytes behind tar's end mark; dpkg-deb fails if it cannot write them
    if process.returncode:
        raise ValueError(f"{archive} cannot be read to its end: delete it, and it is fetched again")


def _download_command(package: Package) -> list[str]:
    if package.registry == "npm":
        patience = ["--fetch-retries=1", "--fetch-retry-mintimeout=2000"]  # npm's defaults take over a minute
        return ["npm", "pack", "--ignore-scripts", *patience, f"{package.name}@{package.version}"]
    if package.registry == "debian":
        return ["apt-get", "download", package.name]
    wheel_only = ["--no-deps", "--only-binary", ":all:"]  # a source archive would run code on download
    pinned = f"{package.name}=={package.version}"
    return [sys.executable, "-m", "pip", "download", "--quiet", *wheel_only, pinned]


def run_client(command: list[str], folder: Path, doing: str) -> None:
    _require(command[0])
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        why = next((line for line in said if "error" in line.lower() or line.startswith("E:")), said[-1])
        hint = " (run 'apt-get update' first)" if command[0] == "apt-get" else ""
        raise ConnectionError(f"{doing} failed: {why.strip()}; check the network and the registry{hint}")


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise FileNotFoundError(f"{program} is not installed: {_REMEDY.get(program, 'install it')}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
