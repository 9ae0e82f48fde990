"""Data loaders compared on the same images: cost of a sample, raw and decoded, and cost of resuming."""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING

from benchmarks.data_costs import decoded_rows, raw_rows
from benchmarks.table import describe_machine, show

if TYPE_CHECKING:
    from benchmarks.data_peers import Peer

HELP = "loading: cost of a sample raw and decoded, of resuming, and whether the ranks' number matters"
SHARDS = 12


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=300, help="in the set that is timed (300)")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="worker processes (0 1 2)")
    parser.add_argument("--samples", type=int, default=1024, help="decoded per timed round (1024)")
    parser.add_argument("--positions", nargs="+", type=int, default=[100_000, 1_000_000], help="to resume from")
    parser.add_argument("--folder", type=Path, help="keeps the sets that are made, to be used again")


def run(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)  # one core per process
    number = 1200  # small images; resuming depends on positions, not on content
    if arguments.quick:
        number = 240
        arguments.images, arguments.samples, arguments.workers, arguments.positions = 96, 64, [0, 1], [200]
    with TemporaryDirectory() as folder:
        root = arguments.folder or Path(folder)
        photos = make_set(root / "photos", arguments.images, (448, 336), detail=24)
        stamps = make_set(root / "stamps", number, (16, 16), detail=4)
        peers, small = open_peers(photos, root / "photos_as"), open_peers(stamps, root / "stamps_as")
        costs = raw_rows(peers, arguments) + decoded_rows(peers, arguments)
        kilobytes = sum(path.stat().st_size for path in photos) / arguments.images / 1e3
        images = f"{arguments.images:,} JPEGs of 448 x 336, {kilobytes:.0f} kB a sample, decoded to 384 x 384"
        caption = f"{describe_machine()}; {images}; {arguments.rounds} rounds"
        columns = ("samples", "loader", "workers", "samples/s", "CPU us / sample", "ratio", "quartiles")
        show(columns, costs, caption, arguments.markdown)
        print(flush=True)  # the rest may take half an hour
        states = [state_row(peer, arguments.positions, number) for peer in small]
    resumed = [f"resume at {position:,}, s" for position in arguments.positions]
    columns = ("loader", *resumed, "2 -> 1 -> 3 ranks: lost", "repeated")
    show(columns, states, f"{describe_machine()}; {number:,} small images", arguments.markdown)


def make_set(folder: Path, count: int, size: tuple[int, int], detail: int) -> list[Path]:
    """Write tars of images with texture and noise, from a fixed seed, if they do not exist."""
    import webdataset

    if not folder.exists():
        folder.mkdir(parents=True)
        rng = random.Random(0)  # nosec B311 # for texture only, nothing secret
        for shard in range(SHARDS):
            with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
                for i in range(shard, count, SHARDS):
                    caption = " ".join(["word"] * min(60, max(4, round(rng.lognormvariate(2.23, 0.45)))))
                    tar.write({"__key__": f"{i:09d}", "jpg": _image(rng, size, detail), "txt": caption.encode()})
    return sorted(folder.glob("*.tar"))


def _image(rng: random.Random, size: tuple[int, int], detail: int) -> bytes:
    from PIL import Image

    coarse = Image.frombytes("RGB", (detail, detail), rng.randbytes(3 * detail * detail)).resize(size, 3)
    noise = Image.effect_noise(size, 12).convert("RGB")
    buffer = BytesIO()
    Image.blend(coarse, noise, 0.3).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def open_peers(tars: list[Path], folder: Path) -> list[Peer]:
    from benchmarks.data_others import Energon, Streaming
    from benchmarks.data_peers import ImageFolder, Ours, WebDataset

    found: list[Peer] = []
    for peer in (Ours, WebDataset, Streaming, Energon, ImageFolder):
        try:
            found.append(peer(tars, folder / peer.__name__))
        except ImportError as error:
            print(f"{peer.name} is left out: {error}", file=sys.stderr)
    return found


def state_row(peer: Peer, positions: list[int], number: int) -> list[str]:
    """Seconds to the first sample after each position; and of `number` samples, those lost or repeated in an epoch."""
    row = [peer.name, *(_seconds_to_first(peer, position) for position in positions), *_exact(peer, number)]
    print(" | ".join(row), file=sys.stderr, flush=True)
    return row


def _seconds_to_first(peer: Peer, position: int) -> str:
    """Median of three runs, or a single run if it takes long."""
    found: list[float] = []
    try:
        peer.save(position)
        while sum(found) < 10 and len(found) < 3:
            began = perf_counter()
            next(peer.resumed(position))
            found.append(perf_counter() - began)
    except NotImplementedError:
        return "-"
    return f"{median(found):.3f}"


def _exact(peer: Peer, number: int) -> list[str]:
    from benchmarks.data_peers import GLOBAL

    total = number // GLOBAL
    keys: list[str] = []
    state = None
    try:
        for world, steps in ((2, total // 3), (1, total // 3), (3, total - 2 * (total // 3))):
            seen, state = peer.part(state, world, steps)
            keys += seen
    except NotImplementedError:
        return ["-", "-"]
    except Exception as error:  # a peer may raise anything; its message is shown as the result
        return [type(error).__name__, "-"]
    counts = Counter(keys)
    return [str(number - len(counts)), str(sum(counts.values()) - len(counts))]
