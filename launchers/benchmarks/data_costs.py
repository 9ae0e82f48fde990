"""Cost of a sample: raw, beside webdataset; decoded, beside a loop that does nothing but decode."""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from statistics import median
from time import perf_counter, process_time, sleep
from typing import TYPE_CHECKING, Any

from benchmarks.table import spread

if TYPE_CHECKING:
    from benchmarks.data_peers import Peer, Raw

BARE = "bare decode loop"
Cost = tuple[float, float]  # (wall seconds, processor seconds) per sample


def raw_rows(peers: list[Peer], arguments: argparse.Namespace) -> list[list[str]]:
    """Processor time beside webdataset's to find, read and shuffle bytes in one process."""
    costs: dict[str, list[Cost]] = {peer.name: [] for peer in peers}
    for _ in range(arguments.rounds):
        for peer in peers:
            samples = peer.raw()
            next(samples)
            costs[peer.name].append(_cost(samples, arguments.images))
    base = [processor for _, processor in costs["webdataset"]]
    return [
        _row("raw", name, 0, found, [one[1] / other for one, other in zip(found, base, strict=True)])
        for name, found in costs.items()
    ]


def decoded_rows(peers: list[Peer], arguments: argparse.Namespace) -> list[list[str]]:
    """Throughput relative to the same number of processes that only decode images from memory.

    Loader and bare loop take turns, since a machine's speed changes from second to second. Each loader runs in a
    process of its own, since some leave threads behind.
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
    """Costs of `count` samples in the loader and in the bare loop, `rounds` times."""
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
    """Wait until the workers have prefetched what they may, or are idle."""
    used = -1.0
    for _ in range(60):
        now = _workers_seconds()
        if now <= used + 0.01:
            return
        used = now
        sleep(0.05)


def _bare(held: list[Raw], processes: int) -> Cost:
    """Decode the images `held` in memory, in `processes` processes; 0: in this one."""
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
    from hive_scale.data.transform import to_pixels

    for _, jpg, _ in held:
        to_pixels(jpg, IMAGE_SIZE, "resize", 10**8)
        yield


def _cost(samples: Iterator[object], count: int) -> Cost:
    began, used = perf_counter(), _processor_seconds()
    for _ in islice(samples, count):
        pass
    return (perf_counter() - began) / count, (_processor_seconds() - used) / count


def _processor_seconds() -> float:
    """Processor seconds of this process and all its workers so far, ended ones included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process_time() + ended.ru_utime + ended.ru_stime + _workers_seconds()


def _workers_seconds() -> float:
    import psutil

    times = (one.cpu_times() for one in psutil.Process().children(recursive=True))
    return sum(time.user + time.system for time in times)
