"""Which device and which network interface each process takes, told from what all of them see.

Launchers differ in what they show a process: every device of its node, those near its cores, or one alone. And what a
node's name means differs on that node itself, where Debian says 127.0.1.1. So nothing is taken from a process's
number alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import psutil

from hive_scale import device

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux's
SHARED = "NCCL_MULTI_RANK_GPU_ENABLE"  # lets NCCL, since 2.30, connect several MIG instances of one card


class View(NamedTuple):
    """What one process sees."""

    host: str  # name of its machine, for people
    machine: str  # tells it from all others
    local_rank: int  # number on its node, as its launcher says; only the device that it would rather have
    kind: str  # of device
    devices: list[tuple[str, str]]  # what tells each from all others, and its card
    address: str  # its own, on the way to where all meet


def look(local_rank: int, meeting: str) -> View:
    """What this process sees, for the others. `meeting` is the host where all meet; "" where there are no others."""
    kind = device.kind()
    visible = device.visible() if kind in device.DISTRIBUTED else []
    return View(socket.gethostname(), machine(), local_rank, kind, visible, own_address(meeting) if meeting else "")


def machine() -> str:
    """Tells this machine from others, also from those that go by the same name."""
    return BOOT_ID.read_text().strip() if BOOT_ID.is_file() else socket.gethostname()


def deal(views: Sequence[View]) -> list[int]:
    """A device for each rank alone: its index among those that the rank sees, 0 where it sees none.

    Its number on the node decides where that is possible. Raises ValueError where there are too few devices, or where
    kinds differ.
    """
    _check_kinds(views)
    owners: dict[tuple[str, str], int] = {}

    def place(rank: int, tried: set[tuple[str, str]]) -> bool:
        """Give `rank` a device, moving others that have one to another of theirs."""
        for key in _wanted(views[rank]):
            if key not in tried:
                tried.add(key)
                if key not in owners or place(owners[key], tried):
                    owners[key] = rank
                    return True
        return False

    for rank, view in enumerate(views):
        tried: set[tuple[str, str]] = set()
        if view.devices and not place(rank, tried):
            raise _shared(views, sorted({rank, *(owners[key] for key in tried)}), sorted(key[1] for key in tried))
    taken = {rank: identity for (_, identity), rank in owners.items()}
    chosen = [
        [identity for identity, _ in view.devices].index(taken[rank]) if view.devices else 0
        for rank, view in enumerate(views)
    ]
    _check_cards(views, chosen)
    return chosen


def interface(views: Sequence[View], rank: int) -> str:
    """The network interface through which `rank` and the others reach each other, "" where none can be told.

    It leads to where all meet. A rank whose way there does not leave the machine takes the one that leads to ranks
    whose way does.
    """
    own = views[rank].address
    far = next((view.address for view in views if view.address and not _is_loopback(view.address)), "")
    if own and _is_loopback(own) and far:
        own = own_address(far)
    return interface_of(own)


def own_address(host: str) -> str:
    """This machine's address on the route to `host`, "" where there is no route. Nothing is sent."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe, suppress(OSError):
                probe.connect(address)
                return _plain(probe.getsockname()[0])
    return ""


def interface_of(address: str) -> str:
    """The interface that has this `address`, "" if none has."""
    return next((name for name, address_of_it in addresses() if _is_same(address, address_of_it)), "")


def addresses() -> list[tuple[str, str]]:
    """Each interface of this machine with each of its IP addresses."""
    families = (socket.AF_INET, socket.AF_INET6)
    found = psutil.net_if_addrs().items()
    return [(name, _plain(one.address)) for name, ones in found for one in ones if one.family in families]


def is_loopback_interface(name: str) -> bool:
    """Whether `name` reaches this machine alone."""
    return any(_is_loopback(address) for one, address in addresses() if one == name)


def ranks_of(numbers: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0, 1 and 6 more``."""
    first = ", ".join(str(number) for number in numbers[:8])
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"rank{'s' * (len(numbers) > 1)} {first}{more}"


def _wanted(view: View) -> list[tuple[str, str]]:
    keys = [(view.machine, identity) for identity, _ in view.devices]
    first = view.local_rank % len(keys) if keys else 0
    return keys[first:] + keys[:first]


def _check_kinds(views: Sequence[View]) -> None:
    for rank, view in enumerate(views):
        if view.kind != views[0].kind:
            raise ValueError(
                f"rank {rank} on {view.host} computes on {view.kind}, rank 0 on {views[0].host} on {views[0].kind}: a "
                "driver may be down, or the launcher gives no device: see nvidia-smi there, or leave that node out"
            )


def _check_cards(views: Sequence[View], chosen: Sequence[int]) -> None:
    """MIG instances differ, yet NCCL takes ranks of one card for one."""
    if os.environ.get(SHARED) == "1":
        return
    seen: dict[tuple[str, str], int] = {}
    for rank, (view, index) in enumerate(zip(views, chosen, strict=True)):
        if view.devices and (card := view.devices[index][1]):
            other = seen.setdefault((view.machine, card), rank)
            if other != rank:
                raise ValueError(
                    f"ranks {other} and {rank} have instances of one card of {view.host} ({card}), which NCCL refuses: "
                    f"give each a card of its own, or, with NCCL from 2.30 on, set {SHARED}=1"
                )


def _shared(views: Sequence[View], ranks: Sequence[int], devices: Sequence[str]) -> ValueError:
    count = f"{len(devices)} device{'s' * (len(devices) > 1)}"
    return ValueError(
        f"{ranks_of(ranks)} on {views[ranks[0]].host} see {count} between them ({', '.join(devices[:8])}): start one "
        "process per GPU, and show each all GPUs of its node or one of its own (CUDA_VISIBLE_DEVICES, --gpus-per-task, "
        "--gpu-bind)"
    )


def _is_same(one: str, other: str) -> bool:
    return bool(one) and (one == other or (_is_loopback(one) and _is_loopback(other)))


def _is_loopback(address: str) -> bool:
    return ip_address(address).is_loopback


def _plain(address: str) -> str:
    """Without the interface that the kernel writes behind a link-local one."""
    return address.partition("%")[0]
