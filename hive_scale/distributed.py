"""The process group: ranks, collectives on the host, and the end of all ranks when one fails.

A single process is a world of size one with a process group of its own, so no caller checks for one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hive_scale import phase_timer, placement
from hive_scale.device import this_device
from hive_scale.exit_codes import code_of, is_device_failure, say
from hive_scale.heartbeat import FAILURE, GRACE, HEARD, ORPHANED, Companion, leave, note_lost, this_node
from hive_scale.launcher_env import Place, place_of
from hive_scale.phase_timer import PhaseTimer
from hive_scale.placement import View
from hive_scale.rendezvous import Meeting, stores
from hive_scale.strangers import printable
from hive_scale.strict_json import dumps, loads

EMA = "ema"  # kind of fragment of the exponential moving average of the masters
TOLD = 2.0  # seconds that this process waits for the others to hear of its failure
T = TypeVar("T")


class Fragment(NamedTuple):
    """A contiguous range of one flattened parameter, or of a state of its optimizer, that this rank owns.

    Every kind of sharding owns such ranges, so a list of fragments describes the state of any engine.
    """

    name: str  # parameter name, as in model.named_parameters()
    # "master" (fp32 weight), a state of the optimizer ("exp_avg" or "exp_avg_sq" for AdamW), or "ema" (the average)
    kind: str
    shape: tuple[int, ...]  # shape of the whole tensor: the parameter's, unless a state has another
    offset: int  # start of this range in the flattened tensor, in elements
    data: Tensor  # 1-D fp32 view of the memory that the optimizer itself uses


@dataclass(frozen=True)
class World:
    """This process's rank, the number of ranks, its device and the store that ranks share."""

    rank: int
    size: int
    device: torch.device
    store: Any = None  # key-value store shared by all ranks, usable without collectives; None in a world of one
    timer: PhaseTimer = field(default_factory=PhaseTimer, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all ranks, in double precision. A collective on the host: it waits for no device."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return [float(value) for value in total]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all ranks, in place. One collective for all, on the tensors' device."""
        if self.size > 1 and tensors:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def of_main(self, value: T) -> T:
        """Broadcast rank 0's `value` to every rank. A collective on the host."""
        held = [value]
        if self.size > 1:
            dist.broadcast_object_list(held, device=torch.device("cpu"))
        return held[0]

    def exchange(self, topic: str, own: Any) -> list[Any]:
        """All ranks' values of `own` (JSON types), ordered by rank. Uses the store, so it needs no process group.

        A collective; each `topic` can be used once.
        """
        return exchange(self.store, self.rank, self.size, topic, own)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def exchange(store: Any, rank: int, size: int, topic: str, own: Any) -> list[Any]:
    """Implement `World.exchange` through `store`."""
    if size == 1:
        return [own]
    store.set(f"exchange/{topic}/{rank}", dumps(own))
    if rank == 0:  # rank 0 gathers for all: size reads instead of size squared
        found = [loads(store.get(f"exchange/{topic}/{other}")) for other in range(size)]
        store.set(f"exchange/{topic}", dumps(found))
    heard: list[Any] = loads(store.get(f"exchange/{topic}"))
    return heard


def rank() -> int:
    """This process's rank as its launcher gives it; works outside of a `session`, too."""
    return place_of(os.environ).rank


@contextmanager
def session(before: Callable[[World], None] | None = None) -> Iterator[World]:
    """Join the process group that the launcher's environment describes; without a launcher, a world of one.

    torchrun, accelerate and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT; srun, submitit and mpirun have variables of their own. CPUs use gloo, GPUs NCCL. The first rank that
    raises ends all others within seconds, with its own exit code, and only its error is shown. If a rank or its node
    is killed, the others end with the exit code for "try again".

    Args:
        before: called once all ranks have met, and before they connect to each other.

    Raises ValueError if the environment is incomplete, devices do not suffice or other ranks do not come.
    """
    place = place_of(os.environ)
    phase_timer.begin()
    try:
        with (_alone if place.size == 1 else _among_others)(place, before) as world:
            yield world
    except Exception as error:
        _blame(error)
        raise


@contextmanager
def _alone(place: Place, before: Callable[[World], None] | None) -> Iterator[World]:
    device = _device(place)
    if before:
        before(World(0, 1, device))
    # a HashStore needs neither a port nor a launcher
    dist.init_process_group(backend(device), store=stores.HashStore(), rank=0, world_size=1)
    try:
        yield World(0, 1, device)
    finally:
        dist.destroy_process_group()


@contextmanager
def _among_others(place: Place, before: Callable[[World], None] | None) -> Iterator[World]:
    guard, device = _meet(place), torch.device("cpu")
    guard.watch()  # it forks, so it must come before the device is initialised
    try:
        device = _device(place, guard.store)
        if before:
            before(World(place.rank, place.size, device, guard.store))
        on = device if device.type == "cuda" else None
        dist.init_process_group(
            backend(device), store=guard.store, rank=place.rank, world_size=place.size, device_id=on
        )
        yield World(place.rank, place.size, device, guard.store)
        dist.barrier()  # the store ends with rank 0, so all ranks must be done with it first
    except BaseException as error:
        if code := guard.led_by_another(error):
            leave(code)
        if device.type == "cuda":
            raise  # destroying an NCCL group may wait for the other ranks; the end of the process frees it
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    finally:
        guard.stop()
    dist.destroy_process_group()


def tell_others(error: BaseException, code: int) -> None:
    """Report `error`, which ends this process before it has met the other ranks, to them: join them to do so.

    Under torchrun this is not needed: its agent ends the others.
    """
    with suppress(Exception):
        place = place_of(os.environ)
        if place.size > 1 and not _tried and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _meet(place).led_by_another(error, code)


_tried = False  # True once this process has tried to meet the others


def _meet(place: Place) -> _Guard:
    global _tried
    _tried = True
    os.environ.update(place.master)
    return _Guard(Meeting(place).hold(), place.rank, place.size)


def backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


class _Guard:
    """Ends this process when another rank has failed or gone; otherwise its collectives would hang for minutes."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self._said = store.clone()  # a connection of its own, since a blocking wait on the other would block it too
        self._stopped = threading.Event()
        self._companion: Companion | None = None
        self._heard = ""

    def watch(self) -> None:
        self._companion = Companion(self.store, self.rank, self.size)
        threading.Thread(target=self._wait_for_word, args=(self._companion,), daemon=True).start()

    def led_by_another(self, error: BaseException, code: int | None = None) -> int:
        """Publish `error` and its exit code as the job's first failure, unless another rank failed before.

        Returns:
            0 if this failure is the first, else the exit code of the first: this error is then a consequence.
        """
        _blame(error)
        told = printable(f"{type(error).__name__}: {error}")
        mine = f"{code or code_of(error)} rank {self.rank} failed: {told}"
        first: str
        try:
            first = self._said.compare_set(FAILURE, "", mine).decode()
        except RuntimeError:
            first = self._heard or ORPHANED  # the store is gone with rank 0, which may have published its failure
        if first != mine:
            self._say(first)
        self._let_hear()
        return 0 if first == mine else _code(first)

    def _let_hear(self) -> None:
        """Wait until the others have heard: the store ends with rank 0, and torchrun ends all when one has gone."""
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
            leave(_code(self._heard))  # the main thread may hang in a collective, where no exception reaches it

    def _say(self, failure: str) -> None:
        say(f"rank {self.rank} stops: {failure.partition(' ')[2]}")


def _blame(error: BaseException) -> None:
    """Note this node as lost if `error` says that one of its devices failed."""
    if is_device_failure(error):
        note_lost(this_node())


def _code(failure: str) -> int:
    return int(failure.partition(" ")[0])


def _device(place: Place, store: Any = None) -> torch.device:
    """Choose this process's device, from what all ranks see, and set the network interface for gloo and NCCL."""
    meeting = os.environ["MASTER_ADDR"] if place.size > 1 else ""
    found = exchange(store, place.rank, place.size, "views", placement.look(place.local_rank, meeting))
    views = [View(*one) for one in found]
    if place.size > 1:
        _use_interface(placement.interface(views, place.rank))
    return this_device(placement.deal(views)[place.rank], place.size)


def _use_interface(name: str) -> None:
    """Set the network interface for gloo and NCCL, unless the user has.

    By default gloo takes the interface of the host name, which Debian resolves to 127.0.1.1.
    """
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if name and not placement.is_loopback_interface(name):  # within one machine NCCL needs no interface
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": this exact name, not a prefix
