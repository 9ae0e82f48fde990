"""One process is a world of one: a process group always exists, so nothing asks whether it does."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import uuid4
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from hive_scale import phase_timer, placement
from hive_scale.device import this_device
from hive_scale.exit_codes import TryAgain, code_of, is_device_failure, say
from hive_scale.heartbeat import FAILURE, GRACE, HEARD, ORPHANED, Companion, leave, note_lost, this_node
from hive_scale.phase_timer import PhaseTimer
from hive_scale.placement import View
from hive_scale.strangers import printable
from hive_scale.strict_json import dumps, loads

stores: Any = dist  # which names its stores in public, but not in its type hints
JOINING = timedelta(minutes=2)  # where none has come for so long, none will
JOINING_WATCHED = timedelta(minutes=1)  # where somebody sits at a terminal: in one of a session's tasks, perhaps
SAYING = 15.0  # seconds between words about who is missing
TOLD = 2.0  # seconds in which the others hear of a failure, as a rule
PORTS = 8  # that are tried, where rank 0 may choose
ANSWER = 5.0  # seconds in which what listens at a port says whether it is a store


class Fragment(NamedTuple):
    """A range of one flattened parameter, or of its optimizer moment, that this rank owns.

    Every sharding owns contiguous ranges of flattened parameters; so one list of fragments describes them all.
    """

    name: str  # of the parameter, as in model.named_parameters()
    kind: str  # "master" (fp32 weight), "exp_avg" or "exp_avg_sq"
    shape: tuple[int, ...]  # of the whole parameter
    offset: int  # of this range in the flattened parameter
    data: Tensor  # 1-D fp32: a view of the very memory the optimizer uses


@dataclass(frozen=True)
class World:
    """This process among its fellows."""

    rank: int
    size: int
    device: torch.device
    store: Any = None  # what every rank reads and writes without the others' help; a world of one has none
    timer: PhaseTimer = field(default_factory=PhaseTimer, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all ranks, in double precision. A collective, on the host: no device waits."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return [float(value) for value in total]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put into each tensor its sum over all ranks. A collective, on the tensors' device, and a single one."""
        if self.size > 1 and tensors:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def of_main(self, text: str) -> str:
        """Rank 0's `text`, on every rank. A collective, on the host."""
        held = [text]
        if self.size > 1:
            dist.broadcast_object_list(held, device=torch.device("cpu"))
        return held[0]

    def exchange(self, topic: str, own: Any) -> list[Any]:
        """What each rank has given as its `own`, JSON's types, by rank. It needs the store alone, and no group.

        A collective; each `topic` serves once.
        """
        return exchange(self.store, self.rank, self.size, topic, own)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def exchange(store: Any, rank: int, size: int, topic: str, own: Any) -> list[Any]:
    """As `World.exchange`, through `store`."""
    if size == 1:
        return [own]
    store.set(f"exchange/{topic}/{rank}", dumps(own))
    if rank == 0:  # else all would read all
        found = [loads(store.get(f"exchange/{topic}/{other}")) for other in range(size)]
        store.set(f"exchange/{topic}", dumps(found))
    heard: list[Any] = loads(store.get(f"exchange/{topic}"))
    return heard


def rank() -> int:
    """This process's, as its launcher says, before and after a session, too."""
    return _place(os.environ).rank


class NotMet(TryAgain, ValueError):
    """Some rank has not come, and nobody sits there to be told: the next start may have all of them."""


@contextmanager
def session(before: Callable[[World], None] | None = None) -> Iterator[World]:
    """Join the group that the launcher's environment describes, or found a world of one.

    torchrun, accelerate and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT; srun, submitit and mpirun say the same in words of their own. gloo serves CPUs, NCCL GPUs. The first
    rank that raises ends all others within seconds, with its own exit code, and only its error is shown; one that
    is killed, or whose node is, ends them to be tried again.

    Args:
        before: what is to be done once all have met, and before they connect to each other.
    """
    place = _place(os.environ)
    phase_timer.begin()
    try:
        with (_alone if place.size == 1 else _among_others)(place, before) as world:
            yield world
    except Exception as error:
        _blame(error)
        raise


@contextmanager
def _alone(place: _Place, before: Callable[[World], None] | None) -> Iterator[World]:
    device = _device(place)
    if before:
        before(World(0, 1, device))
    # a HashStore needs neither port nor launcher
    dist.init_process_group(_backend(device), store=stores.HashStore(), rank=0, world_size=1)
    try:
        yield World(0, 1, device)
    finally:
        dist.destroy_process_group()


@contextmanager
def _among_others(place: _Place, before: Callable[[World], None] | None) -> Iterator[World]:
    guard, device = _meet(place), torch.device("cpu")
    guard.watch()  # before there is a device, which a fork is not to share
    try:
        device = _device(place, guard.store)
        if before:
            before(World(place.rank, place.size, device, guard.store))
        on = device if device.type == "cuda" else None
        dist.init_process_group(
            _backend(device), store=guard.store, rank=place.rank, world_size=place.size, device_id=on
        )
        yield World(place.rank, place.size, device, guard.store)
        dist.barrier()  # else the store may go before all have stopped looking at it
    except BaseException as error:
        if code := guard.led_by_another(error):
            leave(code)
        if device.type == "cuda":
            raise  # what is left of NCCL may wait for the others: it goes with the process
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    finally:
        guard.stop()
    dist.destroy_process_group()


def tell_others(error: BaseException, code: int) -> None:
    """Where `error` ends this process before it has joined the others: join them, to say so.

    torchrun's agent ends them by itself.
    """
    with suppress(Exception):
        place = _place(os.environ)
        if place.size > 1 and not _tried and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _meet(place).led_by_another(error, code)


_tried = False  # whether this process has ever gone to meet others


def _meet(place: _Place) -> _Guard:
    global _tried
    _tried = True
    os.environ.update(place.master)
    return _Guard(_Meeting(place).hold(), place.rank, place.size)


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


class _Meeting:
    """How the processes of one start find each other, and nobody else's words, in a store.

    The store of torchrun's agents outlives their restarts, with all that earlier attempts have left in it. So rank 0
    names the attempt, and answers each rank that greets it with a word of its own, which no earlier one can have used.
    """

    def __init__(self, place: _Place) -> None:
        self.rank, self.size, self.start = place.rank, place.size, place.start
        is_watched = place.by_slurm and sys.stdin is not None and sys.stdin.isatty()  # somebody sits and waits
        self.watched = is_watched
        self.patience = min(JOINING, JOINING_WATCHED) if is_watched else JOINING
        self.where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.missing = list(range(1, place.size)) if place.rank == 0 else [0]
        self._over = threading.Event()
        self._expect()

    def hold(self) -> Any:
        """The part of the store that is this attempt's. Raises ValueError, or NotMet, that says who has not come."""
        threading.Thread(target=self._say, daemon=True).start()
        try:
            store = self._open()
            attempt = self._gather(store) if self.rank == 0 else self._greet(store)
        except dist.DistError as error:
            raise self._in_vain(str(error).splitlines()[0], taken=self.rank == 0) from None
        finally:
            self._over.set()
        return stores.PrefixStore(attempt, store)

    def _open(self) -> Any:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return next(rendezvous("env://", self.rank, self.size, timeout=self.patience))[0]
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if not self.start:
            # rank 0 does not wait for the others here, since it could not say for whom
            return stores.TCPStore(
                host, port, self.size, self.rank == 0, self.patience, wait_for_workers=False, multi_tenant=True
            )
        store, port = self._found(host, port) if self.rank == 0 else self._find(host, port)
        os.environ["MASTER_PORT"], self.where = str(port), f"{host}:{port}"
        return store

    def _found(self, host: str, first: int) -> tuple[Any, int]:
        """A store at the port `first`, or at the next of `ports` that no other program has."""
        for last, port in enumerate(ports(first), 1 - PORTS):
            try:
                store = stores.TCPStore(
                    host, port, self.size, True, self.patience, wait_for_workers=False, multi_tenant=True
                )
            except dist.DistError:
                if last == 0:
                    raise
                continue
            named = stores.PrefixStore(self.start, store)
            named.set("open", "")
            return named, port
        raise AssertionError

    def _find(self, host: str, first: int) -> tuple[Any, int]:
        """The store that rank 0 has opened, at whichever port. Other programs, and other jobs' stores, are no such."""
        silent = set[int]()
        while True:
            for port in ports(first):
                with suppress(OSError, dist.DistError):
                    socket.create_connection((host, port), ANSWER).close()  # the store would wait for who is not there
                    if port not in silent and (store := self._store_at(host, port, silent)):
                        return store, port
            self._wait()

    def _store_at(self, host: str, port: int, silent: set[int]) -> Any:
        """This start's store, None if there is another, or something else, which may be `silent`."""
        made = list[Any]()

        def make() -> None:
            with suppress(dist.DistError):
                made.append(stores.TCPStore(host, port, self.size, False, self.patience, wait_for_workers=False))

        # torch waits without end for the answer of a program that awaits other words
        thread = threading.Thread(target=make, daemon=True)
        thread.start()
        thread.join(ANSWER)
        if thread.is_alive():
            silent.add(port)
        named = stores.PrefixStore(self.start, made[0]) if made else None
        return named if named and named.check(["open"]) else None

    def _gather(self, store: Any) -> str:
        attempt, answered = uuid4().hex, dict[int, bytes]()
        while self.missing:
            for rank in list(self.missing):
                word = store.get(f"hello/{rank}") if store.check([f"hello/{rank}"]) else None
                if store.check([f"{attempt}/here/{rank}"]):
                    self.missing.remove(rank)
                    store.add(f"{attempt}/arrived", 1)
                    self._expect()
                elif word is not None and word != answered.get(rank):
                    store.set(f"answer/{rank}", f"{word.decode()} {attempt}")
                    answered[rank] = word
            self._wait()
        store.set(f"{attempt}/all here", "")
        return attempt

    def _greet(self, store: Any) -> str:
        word, key = uuid4().hex, f"answer/{self.rank}"
        store.set(f"hello/{self.rank}", word)
        while not (store.check([key]) and store.get(key).decode().startswith(word)):
            self._wait()
        attempt: str = store.get(key).decode().split()[1]
        store.set(f"{attempt}/here/{self.rank}", "")
        self.missing.clear()  # the others are rank 0's to name
        arrived = 0
        while not store.check([f"{attempt}/all here"]):
            if (now := store.add(f"{attempt}/arrived", 0)) != arrived:
                arrived = now
                self._expect(GRACE)  # rank 0 gives up first
            self._wait()
        return attempt

    def _expect(self, longer: float = 0.0) -> None:
        """Wait for the missing as long as for the first of them: that others come is a sign that they may."""
        self._ends = time.monotonic() + self.patience.total_seconds() + longer

    def _wait(self) -> None:
        if time.monotonic() > self._ends:
            raise self._in_vain(f"not within {self.patience.total_seconds():.0f} s")
        time.sleep(0.02)

    def _in_vain(self, reason: str, taken: bool = False) -> ValueError:
        remedy = (
            "if another program has the port, set MASTER_PORT to a free one"
            if taken
            else f"start all {self.size} by one command; an interactive session for one process has one task (srun -n1)"
        )
        told = f"rank {self.rank} of {self.size} cannot meet {self._who()} at {self.where} ({reason}): {remedy}"
        return ValueError(told) if taken or self.watched else NotMet(told)

    def _who(self) -> str:
        if not self.missing:
            return "the others"
        first = ", ".join(str(rank) for rank in self.missing[:8])
        more = f" and {len(self.missing) - 8} more" if len(self.missing) > 8 else ""
        return f"rank{'s' * (len(self.missing) > 1)} {first}{more}"

    def _say(self) -> None:
        while not self._over.wait(SAYING):
            left = max(0.0, self._ends - time.monotonic())
            text = f"rank {self.rank} of {self.size} waits at {self.where} for {self._who()}, {left:.0f} s more"
            say(text)


class _Guard:
    """Ends this process when another rank has failed or gone, for its collectives would wait for minutes."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self._said = store.clone()  # a connection of its own: a wait in the other's would block it
        self._stopped = threading.Event()
        self._companion: Companion | None = None
        self._heard = ""

    def watch(self) -> None:
        self._companion = Companion(self.store, self.rank, self.size)
        threading.Thread(target=self._wait_for_word, args=(self._companion,), daemon=True).start()

    def led_by_another(self, error: BaseException, code: int | None = None) -> int:
        """Tell all ranks of `error` and its exit code.

        Returns:
            0, or the exit code of another rank that came first, and which this rank's error then follows from.
        """
        _blame(error)
        told = printable(f"{type(error).__name__}: {error}")
        mine = f"{code or code_of(error)} rank {self.rank} failed: {told}"
        first: str
        try:
            first = self._said.compare_set(FAILURE, "", mine).decode()
        except RuntimeError:
            first = self._heard or ORPHANED  # rank 0 may have gone since it has said why
        if first != mine:
            self._say(first)
        self._let_hear()
        return 0 if first == mine else _code(first)

    def _let_hear(self) -> None:
        """Stay until the others know, for with rank 0 the store goes, and torchrun ends all as soon as one has gone."""
        time.sleep(TOLD)
        others = self.size - 1 if self.rank == 0 else 0
        ends = time.monotonic() + GRACE
        with suppress(RuntimeError):
            while self._said.add(HEARD, 0) < others and time.monotonic() < ends:
                time.sleep(TOLD / 10)

    def stop(self) -> None:
        self._stopped.set()
        if self._companion is not None:
            self._companion.stop()

    def _wait_for_word(self, companion: Companion) -> None:
        self._heard = companion.wait()
        if not self._stopped.wait(GRACE):
            self._say(self._heard)
            leave(_code(self._heard))  # the main thread waits in a collective, out of the reach of exceptions

    def _say(self, failure: str) -> None:
        say(f"rank {self.rank} stops: {failure.partition(' ')[2]}")


def _blame(error: BaseException) -> None:
    """This node, if `error` says that a device of it is lost."""
    if is_device_failure(error):
        note_lost(this_node())


def _code(failure: str) -> int:
    return int(failure.partition(" ")[0])


@dataclass(frozen=True)
class _Place:
    rank: int
    size: int
    local_rank: int
    master: Mapping[str, str]  # environment variables that torch's rendezvous needs beyond the present ones
    by_slurm: bool = False  # a task of srun's
    start: str = ""  # tells this start from all others, where rank 0 may choose the port


# how launchers say rank, size, number on the node and processes there: those that may be started by Slurm's srun, whose
# words their processes then have, too, ...
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH's and Intel's mpiexec
)
# ... and those whose words srun may say
OTHERS = (
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)
STARTS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "FLUX_JOB_ID", "PALS_APID")  # each tells a start from others
JOBS = ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID")  # several starts may share one


def _place(env: Mapping[str, str]) -> _Place:
    """Where the launcher has put this process. Raises ValueError when its environment is half set."""
    if "WORLD_SIZE" in env:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing and env["WORLD_SIZE"] != "1":
            raise ValueError(
                f"WORLD_SIZE={env['WORLD_SIZE']} is set but not {', '.join(missing)}: unset WORLD_SIZE, or start "
                "with torchrun, accelerate launch, deepspeed, srun or mpirun"
            )
        return _Place(int(env.get("RANK", 0)), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), {})
    if (
        "SUBMITIT_LOCAL_GLOBALID" in env and env.get("SUBMITIT_EXECUTOR", "local") == "local"
    ):  # on a node that srun may have given, whose task it is not
        size, job = int(env["SUBMITIT_LOCAL_NTASKS"]), env["SUBMITIT_LOCAL_JOB_ID"]
        rank, local_rank = int(env["SUBMITIT_LOCAL_GLOBALID"]), int(env["SUBMITIT_LOCAL_LOCALID"])
        return _chosen(env, _Place(rank, size, local_rank, {}), "127.0.0.1", int(job), f"submitit {job}")
    for names in MPI:
        if all(name in env for name in names[:3]):
            return _by_mpi(env, *names)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # a task of srun: a batch script has no step
        size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))
        host = first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "localhost")))
        # jobs and steps that share a node need ports of their own
        job, step = env.get("SLURM_JOB_ID", "0"), env["SLURM_STEP_ID"]
        found = _Place(int(env["SLURM_PROCID"]), size, int(env.get("SLURM_LOCALID", 0)), {}, by_slurm=True)
        start = f"slurm {job}.{step} {env.get('SLURM_RESTART_COUNT', '0')}"  # a job that is queued again keeps its id
        return _chosen(env, found, host, 37 * int(job) + int(step), start)
    for names in OTHERS:
        if all(name in env for name in names[:2]):
            return _by_mpi(env, *names)
    if "PMIX_RANK" in env:
        raise ValueError(
            f"PMIX_RANK={env['PMIX_RANK']} is set but nothing says how many processes there are: start with Open MPI's "
            "mpirun, srun or torchrun, or set WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT; unset it for one process"
        )
    return _Place(0, 1, 0, {})


def _by_mpi(env: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> _Place:
    """The place of a process whose launcher says its own in variables of these names."""
    found = _Place(int(env[rank]), int(env[size]), int(env.get(local_rank, env[rank])), {})
    start = next((env[name] for name in STARTS if name in env), "")
    job = start or next((env[name] for name in JOBS if name in env), "")
    if env.get(local_size) == env[size] or env.get("FLUX_JOB_NNODES") == "1":
        host = "127.0.0.1"
    elif nodes := env.get("SLURM_JOB_NODELIST"):
        host = first_host(nodes)
    elif "MASTER_ADDR" in env or found.size == 1:
        host = ""
    else:
        raise ValueError(
            f"{size}={env[size]} is set but not MASTER_ADDR: hand on the name of rank 0's node, such as by "
            "mpirun -x MASTER_ADDR=NODE, or mpiexec -genv MASTER_ADDR NODE"
        )
    return _chosen(env, found, host, crc32(job.encode()), start)


def _chosen(env: Mapping[str, str], place: _Place, host: str, number: int, start: str) -> _Place:
    """`place` with where to meet: what the environment says, else at `host`, at a port that `number` tells.

    `start` is what only this start's processes have in common; nobody else's store is taken for theirs.
    """
    master = {"MASTER_ADDR": env.get("MASTER_ADDR", host), "MASTER_PORT": str(15000 + number % 15000)}
    if "MASTER_PORT" in env:
        return replace(place, master=master | {"MASTER_PORT": env["MASTER_PORT"]})
    return replace(place, master=master, start=start)


def ports(first: int) -> list[int]:
    """Where rank 0 may open its store: at the `first`, or behind it where other programs have that."""
    return [15000 + (first - 15000 + 997 * number) % 15000 for number in range(PORTS)]


def first_host(nodelist: str) -> str:
    """First host of Slurm's shorthand: ``gpu[007-010,12],cpu1`` begins with ``gpu007``."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\])?([^\[,]*)", nodelist)
    return "".join(part or "" for part in match.groups()) if match else nodelist


def _device(place: _Place, store: Any = None) -> torch.device:
    """The device that no other process has, from what all see; and the interface that gloo and NCCL are to take."""
    meeting = os.environ["MASTER_ADDR"] if place.size > 1 else ""
    found = exchange(store, place.rank, place.size, "views", placement.look(place.local_rank, meeting))
    views = [View(*one) for one in found]
    if place.size > 1:
        _use_interface(placement.interface(views, place.rank))
    return this_device(placement.deal(views)[place.rank], place.size)


def _use_interface(name: str) -> None:
    """Where nobody has named another. gloo would take the one of this machine's name, which Debian calls 127.0.1.1."""
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if name and not placement.is_loopback_interface(name):  # within a machine NCCL finds its way
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # exactly this, not all that begin so
