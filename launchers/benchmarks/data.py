"""Our loader beside others' on the same pictures: what a sample costs, raw and decoded, and what resuming costs."""

from __future__ import annotations

import argparse
import random
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time, sleep
from typing import TYPE_CHECKING, Any

from benchmarks.table import describe_machine, show, spread

if TYPE_CHECKING:
    from benchmarks.data_peers import Peer, Raw

HELP = "loading: cost of a sample raw and decoded, of resuming, and whether the ranks' number matters"
BARE = "bare decode loop"
SHARDS = 12
Cost = tuple[float, float]  # seconds and processor seconds per sample


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=300, help="in the set that is timed (300)")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="worker processes (0 1 2)")
    parser.add_argument("--samples", type=int, default=1024, help="decoded per timed round (1024)")
    parser.add_argument("--positions", nargs="+", type=int, default=[100_000, 1_000_000], help="to resume from")
    parser.add_argument("--folder", type=Path, help="keeps the sets that are made, to be used again")


def run(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)  # a core per process
    number = 1200  # of stamps: for resuming, places matter, not pictures
    if arguments.quick:
        number = 240
        arguments.pictures, arguments.samples, arguments.workers, arguments.positions = 96, 64, [0, 1], [200]
    with TemporaryDirectory() as folder:
        root = arguments.folder or Path(folder)
        photos = make_set(root / "photos", arguments.pictures, (448, 336), detail=24)
        stamps = make_set(root / "stamps", number, (16, 16), detail=4)
        peers, small = open_peers(photos, root / "photos_as"), open_peers(stamps, root / "stamps_as")
        costs = raw_rows(peers, arguments) + decoded_rows(peers, arguments)
        kilobytes = sum(path.stat().st_size for path in photos) / arguments.pictures / 1e3
        pictures = f"{arguments.pictures:,} JPEGs of 448 x 336, {kilobytes:.0f} kB a sample, decoded to 384 x 384"
        caption = f"{describe_machine()}; {pictures}; {arguments.rounds} rounds"
        columns = ("samples", "loader", "workers", "samples/s", "CPU us / sample", "ratio", "quartiles")
        show(columns, costs, caption, arguments.markdown)
        print(flush=True)  # the rest may take half an hour
        states = [state_row(peer, arguments.positions, number) for peer in small]
    resumed = [f"resume at {position:,}, s" for position in arguments.positions]
    columns = ("loader", *resumed, "2 -> 1 -> 3 ranks: lost", "repeated")
    show(columns, states, f"{describe_machine()}; {number:,} small pictures", arguments.markdown)


def make_set(folder: Path, count: int, size: tuple[int, int], detail: int) -> list[Path]:
    """Tars of pictures with texture and noise, by a fixed seed, if they are not there yet."""
    import webdataset

    if not folder.exists():
        folder.mkdir(parents=True)
        rng = random.Random(0)
        for shard in range(SHARDS):
            with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
                for i in range(shard, count, SHARDS):
                    caption = " ".join(["word"] * min(60, max(4, round(rng.lognormvariate(2.23, 0.45)))))
                    tar.write({"__key__": f"{i:09d}", "jpg": _picture(rng, size, detail), "txt": caption.encode()})
    return sorted(folder.glob("*.tar"))


def _picture(rng: random.Random, size: tuple[int, int], detail: int) -> bytes:
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


# -- what a sample costs --------------------------------------------------------------------------------------


def raw_rows(peers: list[Peer], arguments: argparse.Namespace) -> list[list[str]]:
    """Processor time beside webdataset's: bytes found, read and shuffled in one process."""
    costs: dict[str, list[Cost]] = {peer.name: [] for peer in peers}
    for _ in range(arguments.rounds):
        for peer in peers:
            samples = peer.raw()
            next(samples)
            costs[peer.name].append(_cost(samples, arguments.pictures))
    base = [processor for _, processor in costs["webdataset"]]
    return [
        _row("raw", name, 0, found, [one[1] / other for one, other in zip(found, base, strict=True)])
        for name, found in costs.items()
    ]


def decoded_rows(peers: list[Peer], arguments: argparse.Namespace) -> list[list[str]]:
    """Throughput beside that of as many processes that do nothing but decode what they hold in memory.

    Each loader takes turns with those, since a machine's speed changes from one second to the next, and in a process
    of its own, since some leave threads behind.
    """
    rows = []
    for workers in arguments.workers:
        bare: list[Cost] = []
        others = []
        for peer in peers:
            with ProcessPoolExecutor(1, get_context("fork")) as alone:
                turns = alone.submit(_turns, peer, workers, arguments.samples, arguments.rounds).result()
            bare += [other for _, other in turns]
            ratios = [other[0] / cost[0] for cost, other in turns]
            others.append(_row("decoded", peer.name, workers, [cost for cost, _ in turns], ratios))
            print(" | ".join(others[-1]), file=sys.stderr, flush=True)
        rows += [_row("decoded", BARE, workers, bare, [1.0, 1.0]), *others]
    return rows


def _turns(peer: Peer, workers: int, count: int, rounds: int) -> list[tuple[Cost, Cost]]:
    """What `count` samples cost the loader and the bare loop, `rounds` times."""
    held = list(islice(peer.raw(), count))
    turns = []
    for cost in islice(_decoded(peer, workers, count), rounds):
        _await_rest()
        turns.append((cost, _bare(held, workers)))
    return turns


def _row(what: str, name: str, workers: int, costs: list[Cost], ratios: list[float]) -> list[str]:
    wall, processor = (median(one[i] for one in costs) for i in (0, 1))
    return [
        what,
        name,
        str(workers),
        f"{1 / wall:.0f}",
        f"{processor * 1e6:.0f}",
        f"{median(ratios):.2f}",
        spread(ratios),
    ]


def _decoded(peer: Peer, workers: int, count: int) -> Iterator[Cost]:
    batches = peer.batches(workers)
    size = len(next(batches))
    while True:
        for _ in range(2 * workers + 2):  # those fetched ahead, made before what is timed was, and two to warm up
            next(batches)
        yield _cost((None for batch in batches for _ in range(len(batch))), count // size * size)


def _await_rest() -> None:
    """Until the workers have fetched ahead what they may, or seem to do something else."""
    used = -1.0
    for _ in range(60):
        now = _workers_seconds()
        if now <= used + 0.01:
            return
        used = now
        sleep(0.05)


def _bare(held: list[Raw], processes: int) -> Cost:
    """In processes of their own if in any, as workers are."""
    count = len(held)
    if not processes:
        return _cost(_decode(held), count)
    context = get_context("fork")
    ready = context.Barrier(processes + 1)
    parts = [context.Process(target=_decode_all, args=(held[i::processes], ready)) for i in range(processes)]
    for part in parts:
        part.start()
    ready.wait()
    began, used = perf_counter(), _processor_seconds()
    ready.wait()
    cost = (perf_counter() - began) / count, (_processor_seconds() - used) / count
    for part in parts:
        part.join()
    return cost


def _decode_all(held: list[Raw], ready: Any) -> None:
    for _ in _decode(held[:64]):  # as warm as a worker, which has been at it for long
        pass
    ready.wait()
    for _ in _decode(held):
        pass
    ready.wait()


def _decode(held: list[Raw]) -> Iterator[None]:
    from benchmarks.data_peers import IMAGE_SIZE
    from hive_scale.data.transform import picture

    for _, jpg, _ in held:
        picture(jpg, IMAGE_SIZE, "resize", 10**8)
        yield


def _cost(samples: Iterator[object], count: int) -> Cost:
    began, used = perf_counter(), _processor_seconds()
    for _ in islice(samples, count):
        pass
    return (perf_counter() - began) / count, (_processor_seconds() - used) / count


def _processor_seconds() -> float:
    """Of this process and its workers so far, those that have ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process_time() + ended.ru_utime + ended.ru_stime + _workers_seconds()


def _workers_seconds() -> float:
    import psutil

    times = (one.cpu_times() for one in psutil.Process().children(recursive=True))
    return sum(time.user + time.system for time in times)


# -- what a stop costs ----------------------------------------------------------------------------------------


def state_row(peer: Peer, positions: list[int], number: int) -> list[str]:
    """Seconds to the first sample after each position; of `number` samples, those lost and repeated in an epoch."""
    row = [peer.name, *(_seconds_to_first(peer, position) for position in positions), *_exact(peer, number)]
    print(" | ".join(row), file=sys.stderr, flush=True)
    return row


def _seconds_to_first(peer: Peer, position: int) -> str:
    """The median of three, of one if that takes long."""
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
    except Exception as error:  # a peer's, of any kind: what it says is the result
        return [type(error).__name__, "-"]
    counts = Counter(keys)
    return [str(number - len(counts)), str(sum(counts.values()) - len(counts))]
