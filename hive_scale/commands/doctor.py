"""Is this cluster fit for a long job? Devices, networks, ports, clocks, a shared folder and a short all-reduce."""

from __future__ import annotations

import argparse
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hive_scale.cli import Parser
from hive_scale.exit_codes import ended

if TYPE_CHECKING:
    from hive_scale.distributed import World

EXAMPLES = """\
examples:
  python -m hive_scale doctor --dir runs                                         this machine
  torchrun --nproc_per_node 8 -m hive_scale doctor --dir /shared/runs
  srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python -m hive_scale doctor --dir /shared/runs --seconds 120
  mpirun -np 16 -x MASTER_ADDR=node1 python -m hive_scale doctor

Start it exactly as the job will be: same launcher, nodes, environment and container. Rank 0 prints a line for each
thing and the hosts that it is true of; below WARN and FAIL stands what to do. Exit codes: 0 all is well, 1 something to
know (WARN), 2 something to change (FAIL, or the processes have not met). torchrun itself ends with 1 for both.
"""

MB = 1 << 20
SEEN = 10.0  # seconds within which a change in a shared folder must reach every node
PART = 64 * 1024  # bytes that each rank writes in the shared test file
# Seconds: delay of a change on other nodes above which to warn; clock skew above which to warn, and to fail.
FRESH, SKEW, WRONG = 0.5, 1.0, 60.0
SLOW = 1e9  # bytes/s of an all-reduce on GPUs, below which the network is suspect
Verdict = Literal["ok", "WARN", "FAIL"]
VERDICTS: tuple[Verdict, ...] = ("ok", "WARN", "FAIL")  # by exit code


class Line(NamedTuple):
    check: str
    verdict: Verdict
    told: str
    remedy: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    return min(2, ended(lambda: _examine(arguments)))  # processes that did not meet count as FAIL


def _examine(arguments: argparse.Namespace) -> int:
    from hive_scale.distributed import session
    from hive_scale.resilience.watchdog import watching

    if not 0 <= arguments.seconds < inf:
        raise ValueError(f"--seconds {arguments.seconds} is no length of time: give such as 5, or 0 for no all-reduce")
    found: list[Line] = []

    def before(world: World) -> None:
        checks = [_devices, _software, _order, _interfaces, _ports, _clocks]
        if arguments.dir is not None:
            checks.append(lambda world: _folder(world, arguments.dir))
        found.extend(_told(world, "before", [line for check in checks for line in check(world)]))
        if any(line.check in ("interfaces", "ports") and line.verdict == "FAIL" for line in found):
            raise ValueError("the processes cannot reach each other, so no all-reduce was tried: see the remedy above")

    with session(before) as world, watching(world):
        found.extend(_told(world, "after", _all_reduce(world, arguments.seconds)))
    return max(VERDICTS.index(line.verdict) for line in found)


def _told(world: World, topic: str, own: Sequence[Line]) -> list[Line]:
    """Exchange the lines of all ranks and return them; rank 0 prints equal ones once, with their hosts."""
    from hive_scale.observability.console import console
    from hive_scale.placement import ranks_of

    heard = world.exchange(topic, [socket.gethostname(), own])
    ranks = [(host, [Line(*line) for line in lines]) for host, lines in heard]
    same: dict[Line, list[int]] = {}
    for rank, (_, lines) in enumerate(ranks):
        for line in lines:
            same.setdefault(line, []).append(rank)
    checks = list(dict.fromkeys(line.check for line in same))
    for line in sorted(same, key=lambda line: checks.index(line.check)) if world.is_main else []:
        hosts = list(dict.fromkeys(ranks[rank][0] for rank in same[line]))
        where = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
        where += f" ({ranks_of(same[line])})" if len(same[line]) < world.size else ""
        console.print(f"{line.verdict:5}{line.check:12}{where}: {line.told}", soft_wrap=True)
        if line.remedy:
            console.print(f"{'':17}{line.remedy}", soft_wrap=True)
    return list(same)


def _devices(world: World) -> list[Line]:
    from hive_scale.device import is_accelerator, memory_of, name_of, pins_memory

    if not is_accelerator(world.device):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return [Line("devices", "ok", f"no accelerator; {cores} cores of the CPU")]
    name = name_of(world.device) or world.device.type
    if not pins_memory(world.device):
        return [Line("devices", "ok", name)]
    free, total = memory_of(world.device)
    told = f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if free < 0.95 * total:
        return [Line("devices", "WARN", told, "another process has memory of this device: see nvidia-smi, and end it")]
    return [Line("devices", "ok", told)]


def _software(world: World) -> list[Line]:
    import torch

    from hive_scale import __version__
    from hive_scale.device import library_version

    nccl = library_version(world.device)
    told = f"hive_scale {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    told += f", NCCL {nccl}" if nccl else ", gloo"
    others = world.exchange("software", told)
    if len(set(others)) > 1:
        return [Line("software", "FAIL", told, "give all nodes one environment, best in a shared folder or an image")]
    return [Line("software", "ok", told)]


def _order(world: World) -> list[Line]:
    from hive_scale.placement import machine

    machines = world.exchange("machines", machine())
    changes = sum(one != other for one, other in pairwise(machines))
    nodes = len(set(machines))
    told = f"{world.size} rank{'s' * (world.size > 1)} on {nodes} machine{'s' * (nodes > 1)}"
    if changes >= nodes:
        remedy = "start ranks node by node (srun --distribution=block), else engine.shard_size cuts over several nodes"
        return [Line("ranks", "WARN", f"{told}, in turn", remedy)]
    return [Line("ranks", "ok", told)]


def _interfaces(world: World) -> list[Line]:
    from hive_scale import placement

    known = placement.addresses()
    told = ", ".join(f"{name} {address}" for name, address in known if not placement.is_loopback_interface(name))
    if world.size == 1:
        return [Line("interfaces", "ok", told or "none but the loopback")]
    chosen = {name: os.environ.get(name, "").lstrip("=") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    name = chosen["GLOO_SOCKET_IFNAME"]
    told = f"{name or 'none told'} to the others; there are {told or 'none but the loopback'}"
    remedy = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (slurm.interface) to the one between the nodes"
    if name and not any(one == name for one, _ in known):
        return [Line("interfaces", "FAIL", f"{name}, which is named, is not there or has no address; {told}", remedy)]
    alone = placement.is_loopback_interface(name)
    if any(alone != other for other in world.exchange("loopback", alone)) and alone:
        return [Line("interfaces", "FAIL", f"{told}, and does not leave the machine", remedy)]
    return [Line("interfaces", "ok" if name else "WARN", told, "" if name else remedy)]


def _ports(world: World) -> list[Line]:
    """Check that neighbours can connect: gloo and NCCL connect any two ranks, at ports chosen by the system."""
    from hive_scale import placement

    if world.size == 1:
        return []
    name = os.environ.get("GLOO_SOCKET_IFNAME", "")
    own = next((address for one, address in placement.addresses() if one == name), "")
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    with socket.socket(family) as server:
        server.bind((own, 0))
        server.listen()
        there = world.exchange("ports", [own or socket.gethostname(), server.getsockname()[1]])
        shut = []
        for rank in {(world.rank + 1) % world.size, (world.rank - 1) % world.size}:
            try:
                socket.create_connection(tuple(there[rank]), 5.0).close()
            except OSError as error:
                shut.append(f"rank {rank} at {there[rank][0]}:{there[rank][1]} ({error})")
        world.exchange("ports tried", None)
    if shut:
        first, last = _port_range()
        remedy = f"open TCP ports {first} to {last} between the nodes, or name the right interface"
        return [Line("ports", "FAIL", f"cannot reach {' nor '.join(shut)}", remedy)]
    meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return [Line("ports", "ok", f"neighbours reach each other, and all meet at {meeting}")]


def _port_range() -> tuple[str, str]:
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first, last = path.read_text().split() if path.is_file() else ("32768", "60999")
    return first, last


def _clocks(world: World) -> list[Line]:
    """Compare clocks: each rank asks rank 0 for its time, and compares it with the midpoint of its wait."""
    worst = 0.0
    for rank in range(1, world.size):
        if world.rank == 0:
            for number in range(3):
                world.store.get(f"clock/{rank}/{number}/asked")
                world.store.set(f"clock/{rank}/{number}", str(time.time()))
        elif world.rank == rank:
            worst = min((_skew(world, number) for number in range(3)), key=abs)
    if world.size == 1:
        return []
    told = "within" if abs(worst) <= SKEW else f"{abs(worst):.1f} s {'ahead' if worst > 0 else 'behind'},"
    told = f"{told} {SKEW:g} s of rank 0's clock" if told == "within" else f"{told} by rank 0's clock"
    verdict: Verdict = "ok" if abs(worst) <= SKEW else "WARN" if abs(worst) <= WRONG else "FAIL"
    return [Line("clocks", verdict, told, "" if verdict == "ok" else "see that NTP runs everywhere (chronyc tracking)")]


def _skew(world: World, number: int) -> float:
    asked = time.time()
    world.store.set(f"clock/{world.rank}/{number}/asked", "")
    there = float(world.store.get(f"clock/{world.rank}/{number}"))
    return (asked + time.time()) / 2 - there


# ---------------------------------------------------------------- a folder


def _folder(world: World, folder: Path) -> list[Line]:
    """Check a shared folder as runs and caches use it: other nodes' writes become visible, and locks hold."""
    name, error = world.exchange("folder", _made(world, folder))[0]
    path = Path(name)
    if error:
        return [Line("folder", "FAIL", f"{folder}: {error}", "give a directory that can be written (--dir)")]
    try:
        waited = _waited(path.is_dir)
        if any(world.exchange("folder seen", waited is None)):
            remedy = "give a directory of a file system that all nodes share (--dir)"
            return [Line("folder", "FAIL", f"{folder} is not the same on all nodes", remedy)] if waited is None else []
        return [_locks(world, path / "lock"), _parts(world, path / "parts"), _replaced(world, path / "replaced")]
    finally:
        world.exchange("folder done", None)
        if world.is_main:
            shutil.rmtree(path, ignore_errors=True)


def _made(world: World, folder: Path) -> tuple[str, str]:
    """Create a new folder in `folder`, on rank 0; return its path and the error, if any."""
    path = folder.expanduser().absolute() / f".doctor-{secrets.token_hex(8)}"
    try:
        if world.is_main:
            path.mkdir(parents=True)
    except OSError as error:
        return str(path), error.strerror or str(error)
    return str(path), ""


def _locks(world: World, path: Path) -> Line:
    from hive_scale.shared_files import Held, has_locks, locked

    def take() -> str:
        try:
            stack.enter_context(locked(path, patience=0.0))
        except Held:
            return "held"
        return "taken"

    with ExitStack() as stack:
        mine = _safely(take) if world.is_main else ""
        first = world.exchange("lock held", mine)[0]
        mine = mine if world.is_main else _safely(take)
        world.exchange("lock tried", None)
    if failed := next((one for one in (first, mine) if one not in ("taken", "held")), ""):
        return Line("locks", "FAIL", f"no lock can be had: {failed}", "use another file system for runs and caches")
    if not world.is_main and mine == "taken":
        return Line("locks", "FAIL", "two ranks had one lock", "mount it so that locks hold (Lustre: -o flock)")
    if not has_locks(path.parent):
        remedy = "one that is left by a node that died must be deleted by hand; better mount it with locks"
        return Line("locks", "WARN", "the file system knows none: files stand for them", remedy)
    return Line("locks", "ok", "hold against all ranks")


def _parts(world: World, path: Path) -> Line:
    """Let each rank write its pages of a file that all have read before, as feature stores do."""
    from hive_scale.placement import ranks_of

    held: list[int] = []
    read: list[bytes] = []
    size = PART * world.size

    def begin() -> str:
        if world.is_main:
            path.write_bytes(bytes(size))
        return ""

    def look() -> str:
        held.append(os.open(path, os.O_RDWR))
        os.pread(held[0], size, 0)
        return ""

    def write() -> str:
        os.pwrite(held[0], bytes([world.rank % 255 + 1]) * PART, PART * world.rank)
        os.fsync(held[0])
        return ""

    def again() -> str:
        read.append(path.read_bytes())
        return ""

    failed = ""
    for name, step in (("begun", begin), ("read", look), ("written", write), ("read again", again)):
        failed = failed or next(filter(None, world.exchange(f"parts {name}", _safely(step))), "")
        if failed:
            break
    for descriptor in held:
        os.close(descriptor)
    if failed:
        return Line("coherence", "FAIL", failed, "see to the file system, or give another (--dir)")
    parts = [read[0][PART * rank : PART * (rank + 1)] for rank in range(world.size)]
    if stale := [rank for rank, part in enumerate(parts) if part != bytes([rank % 255 + 1]) * PART]:
        told = f"what {ranks_of(stale)} wrote cannot be read after it was synced"
        return Line("coherence", "FAIL", told, "keep features and runs elsewhere, or mount it without nocto")
    return Line("coherence", "ok", "each rank reads what all others wrote")


def _replaced(world: World, path: Path) -> Line:
    """Replace a small file, as state files are: how long until every rank sees the new one?"""
    from hive_scale.atomic import write_text

    for content in ("before", "after"):
        failed = world.exchange(f"{content} written", _safely(lambda: _wrote(write_text, world, path, content)))[0]  # noqa: B023
        if failed:
            return Line("renames", "FAIL", failed, "see to the file system, or give another (--dir)")
        waited = _waited(lambda: path.is_file() and path.read_text() == content)  # noqa: B023
        world.exchange(f"{content} read", None)
    if waited is None:
        remedy = "mount it so that names are looked up again (NFS: lookupcache=positive, actimeo of a few seconds)"
        return Line("renames", "FAIL", f"a file that was replaced stays the old one for {SEEN:g} s", remedy)
    if waited > FRESH:
        remedy = "nothing breaks by it; NFS looks again after acregmin and acdirmin seconds"
        return Line("renames", "WARN", f"a replaced file is seen only after some seconds ({waited:.1f})", remedy)
    return Line("renames", "ok", "a replaced file is seen at once")


def _wrote(write: Callable[[Path, str], Any], world: World, path: Path, content: str) -> str:
    if world.is_main:
        write(path, content)
    return ""


def _waited(is_there: Callable[[], bool]) -> float | None:
    """Seconds until `is_there` returns True; None after `SEEN` seconds."""
    began = time.monotonic()
    while time.monotonic() - began < SEEN:
        try:
            if is_there():
                return time.monotonic() - began
        except OSError:  # the file is just being replaced
            pass
        time.sleep(0.02)
    return None


def _safely(work: Callable[[], str]) -> str:
    """Return the result of `work`, or an OSError as text: the other ranks wait for either."""
    try:
        return work()
    except OSError as error:
        return f"{error.filename or 'a file'}: {error.strerror or error}"


# ---------------------------------------------------------------- collectives


def _all_reduce(world: World, seconds: float) -> list[Line]:
    """Run all-reduces like those of gradients for `seconds`, and check their sums."""
    import torch
    import torch.distributed as dist

    from hive_scale.device import is_accelerator, synchronize
    from hive_scale.phase_timer import tick

    if world.size == 1 or not seconds:
        why = "one process: nothing to add up" if world.size == 1 else "not tried (--seconds 0)"
        return [Line("all-reduce", "ok", why)]
    size = (64 if is_accelerator(world.device) else 8) * MB
    payload = torch.ones(size // 4, device=world.device)
    rounds: list[float] = []
    wrong, began = False, time.monotonic()
    while True:
        for _ in range(4):
            payload.fill_(1.0)
            synchronize(world.device)
            at = time.monotonic()
            dist.all_reduce(payload)
            synchronize(world.device)
            rounds.append(time.monotonic() - at)
            wrong = wrong or bool((payload != world.size).any())
        tick()
        over, failed = world.sum(world.is_main and time.monotonic() - began > seconds, wrong)
        if over or failed:
            break
    speed, told = _speed(world.size, size, rounds[1:])  # without the first, which sets up connections
    return [_judged(world.of_main(told), speed, bool(failed), is_accelerator(world.device))]


def _speed(ranks: int, size: int, rounds: Sequence[float]) -> tuple[float, str]:
    """(bytes/s that each rank sends in all-reduces of `size` bytes, summary text); `rounds` are in seconds."""
    middle, slowest = sorted(rounds)[len(rounds) // 2], max(rounds)
    speed = 2 * (ranks - 1) / ranks * size / middle
    told = f"{speed / 1e9:.2f} GB/s on the bus with {size // MB} MiB, {len(rounds)} times"
    return speed, f"{told}; the slowest took {slowest / middle:.1f} times as long as most"


def _judged(told: str, speed: float, failed: bool, accelerated: bool) -> Line:
    if failed:
        return Line("all-reduce", "FAIL", "a sum is wrong", "leave nodes out until it is right: one of them miscounts")
    if accelerated and speed < SLOW:
        remedy = "NCCL may go over a slow network: see NCCL_DEBUG=INFO, and set NCCL_IB_HCA or slurm.interface"
        return Line("all-reduce", "WARN", told, remedy)
    return Line("all-reduce", "ok", told)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--dir", type=Path, help="a folder for runs or features: its locks, and what is seen of others")
    parser.add_argument("--seconds", type=float, default=5.0, help="of all-reduces; 120 for a long check (%(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(argv)
