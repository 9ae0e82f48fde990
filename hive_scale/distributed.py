"""One process is a world of one: a process group always exists, so nothing asks whether it does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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

TOLD = 2.0  # seconds in which the others hear of a failure, as a rule


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
    return place_of(os.environ).rank


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
    # a HashStore needs neither port nor launcher
    dist.init_process_group(_backend(device), store=stores.HashStore(), rank=0, world_size=1)
    try:
        yield World(0, 1, device)
    finally:
        dist.destroy_process_group()


@contextmanager
def _among_others(place: Place, before: Callable[[World], None] | None) -> Iterator[World]:
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
        place = place_of(os.environ)
        if place.size > 1 and not _tried and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _meet(place).led_by_another(error, code)


_tried = False  # whether this process has ever gone to meet others


def _meet(place: Place) -> _Guard:
    global _tried
    _tried = True
    os.environ.update(place.master)
    return _Guard(Meeting(place).hold(), place.rank, place.size)


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


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


def _device(place: Place, store: Any = None) -> torch.device:
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
