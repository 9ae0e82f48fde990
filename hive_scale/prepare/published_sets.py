"""The paper's data sets: where their files are published, and whether what was fetched is complete.

Sizes and counts are those of the hub's pages. No checksum is in this file, since the pages show none; `hf download`
records the hub's own checksum beside each file, and that one is verified.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hive_scale.prepare.items import LFS_POINTER
from hive_scale.strangers import some

UNITS = {"MB": 2, "GB": 3}
SHA256 = re.compile(r"[0-9a-f]{64}")
NUMBERED = re.compile(r"(.*-)(\d+)(-of-)(\d+)(\.parquet)")
RECORDED = Path(".cache") / "huggingface" / "download"  # where `hf download --local-dir` records what it fetched


@dataclass(frozen=True)
class PublishedSet:
    """A set on the Hugging Face hub: its files with their sizes as its page shows them, and its number of samples."""

    title: str
    repository: str
    files: Mapping[str, str]  # name or glob -> "6.46 GB"; files of a glob have this size together
    samples: int
    total_bytes: int | None = None  # of all files, where the page has the exact number
    terms: str = ""

    @property
    def is_parquet(self) -> bool:
        return any(name.endswith(".parquet") for name in self.files)


SETS = {
    "cc3m": PublishedSet(
        title="LLaVA-CC3M-Pretrain-595K, images of CC3M with their captions: the paper's pre-training data",
        repository="liuhaotian/LLaVA-CC3M-Pretrain-595K",
        files={"chat.json": "211 MB", "images.zip": "6.46 GB"},
        samples=595_375,
        terms="CC3M's: see the repository's page",
    ),
    "lcs": PublishedSet(
        title="LLaVA-Pretrain (LCS-558K), images of LAION, CC and SBU with BLIP's captions: a VLM's first stage",
        repository="liuhaotian/LLaVA-Pretrain",
        files={"blip_laion_cc_sbu_558k.json": "181 MB", "images.zip": "27.4 GB"},
        samples=558_128,
        terms="those of LAION, CC3M, SBU and BLIP: see the repository's page",
    ),
    "llava_next": PublishedSet(
        title="LLaVA-NeXT-Data, conversations about images: a VLM's second stage",
        repository="lmms-lab/LLaVA-NeXT-Data",
        files={"data/train-*.parquet": "92.1 GB"},
        samples=779_289,
        total_bytes=92_078_304_318,
        terms="Apache 2.0, as its page says, and those of its sources",
    ),
}


def download_command(one: PublishedSet, folder: str) -> str:
    """Return the command that fetches the set into `folder`, and goes on where it was interrupted."""
    names = " ".join(f"--include '{name}'" if "*" in name else name for name in one.files)
    return f"hf download {one.repository} {names} --repo-type dataset --local-dir {folder}"


def describe(one: PublishedSet) -> str:
    """Return what the set is and where its files come from, in lines."""
    sizes = ", ".join(f"{name} ({size})" for name, size in one.files.items())
    return "\n".join(
        [
            f"{one.title}; {one.samples:,} samples",
            f"  from   https://huggingface.co/datasets/{one.repository}",
            f"  files  {sizes}",
            f"  terms  {one.terms}",
        ]
    )


def find_files(one: PublishedSet, folder: Path) -> dict[str, list[Path]]:
    """Return the files of the set in `folder`, by the names in `one.files`.

    The unpacked folder may take the place of images.zip. Raises ValueError if files are missing.
    """
    found: dict[str, list[Path]] = {}
    for name in one.files:
        files = [path for at in (folder / name, folder / Path(name).name) for path in sorted(at.parent.glob(at.name))]
        unpacked = folder / Path(name).stem
        if not files and name.endswith(".zip") and unpacked.is_dir():
            files = [unpacked]
        if not files:
            raise ValueError(f"{folder} has no {name} ({one.files[name]}): {download_command(one, str(folder))}")
        found[name] = list(dict.fromkeys(files))
    return found


def check(one: PublishedSet, files: Mapping[str, Sequence[Path]]) -> Iterator[str]:
    """Check that files are complete; yield a line about each name of `one.files` on what was checked.

    Raises ValueError for a file of another size than published, with another checksum than the hub's, or missing from
    a numbered series.
    """
    for name, paths in files.items():
        if paths[0].is_dir():
            yield f"{paths[0]}: in place of {name}; images that are missing are counted as the set is converted"
            continue
        _check_series(paths)
        size = sum(path.stat().st_size for path in paths)
        _check_size(one, name, paths, size)
        published = f"{one.total_bytes:,} bytes" if one.total_bytes else one.files[name]
        verified = sum(_verify(path) for path in paths)
        told = f"the sha256 that the hub gave at download ({verified:,} of {len(paths):,} files)"
        told = (
            told if verified else "no checksum known: hf download --local-dir records the hub's, and other ways do not"
        )
        yield f"{name}: {size:,} bytes, published {published}; {told}"


def _check_size(one: PublishedSet, name: str, paths: Sequence[Path], size: int) -> None:
    remedy = f"fetch it again: {download_command(one, str(paths[0].parent))}"
    for path in paths:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{path} is only git-lfs's pointer to the file: git lfs pull, or {remedy}")
    least, most = _bounds(one.files[name])
    if one.total_bytes:
        least = most = one.total_bytes
    if not least <= size <= most:
        published = f"{one.total_bytes:,} bytes" if one.total_bytes else one.files[name]
        raise ValueError(f"{name} has {size:,} bytes where {published} are published: {remedy}")


def _bounds(size: str) -> tuple[int, int]:
    """Return the bytes that a page may show as `size`: rounded, in units of 1000 or of 1024."""
    number, unit = size.split()
    last = 10.0 ** -len(number.partition(".")[2])
    power = UNITS[unit]
    return int((float(number) - last) * 1000**power), int((float(number) + last) * 1024**power)


def _check_series(paths: Sequence[Path]) -> None:
    """Raise ValueError if files are missing among those named ...-00003-of-00250.parquet."""
    series = [found for path in paths if (found := NUMBERED.fullmatch(path.name))]
    if series:
        begin, _, of, count, ending = series[0].groups()
        there = {path.name for path in paths}
        names = [f"{begin}{number:0{len(count)}d}{of}{count}{ending}" for number in range(int(count))]
        if missing := [name for name in names if name not in there]:
            raise ValueError(f"{paths[0].parent} lacks {len(missing)} of {count} files: {some(missing)}; fetch them")


def _verify(path: Path) -> bool:
    """Verify the checksum that the hub gave for `path`, if one is recorded. Raises ValueError if it differs."""
    recorded = _recorded(path)
    if not recorded:
        return False
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != recorded:
        raise ValueError(f"{path} has sha256 {found}, and the hub's is {recorded}: delete it, and fetch it again")
    return True


def _recorded(path: Path) -> str:
    """Return the sha256 that `hf download` recorded for `path`, or "".

    In the hub's cache a file is a link to blobs/SHA256. With --local-dir the second line of a .metadata file has it.
    """
    if path.is_symlink() and SHA256.fullmatch(path.resolve().name):
        return path.resolve().name
    for above in list(path.absolute().parents)[:3]:
        note = above / RECORDED / f"{path.absolute().relative_to(above)}.metadata"
        if note.is_file():
            lines = note.read_text(encoding="utf-8", errors="replace").splitlines()
            return lines[1] if len(lines) > 1 and SHA256.fullmatch(lines[1]) else ""
    return ""
