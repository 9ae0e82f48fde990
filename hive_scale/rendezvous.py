"""Rendezvous of the processes of one start: how they find each other, and report which ranks are missing."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from hive_scale.exit_codes import TryAgain, say
from hive_scale.heartbeat import GRACE
from hive_scale.launcher_env import Place

stores: Any = dist  # torch exports the store classes, but its type hints do not declare them
JOINING = timedelta(minutes=2)  # if no further rank arrives for so long, give up
JOINING_WATCHED = timedelta(minutes=1)  # the same where a user waits at a terminal, perhaps inside a single srun task
SAYING = 15.0  # seconds between messages about missing ranks
PORTS = 8  # number of ports that rank 0 tries, if it may choose
ANSWER = 5.0  # seconds that a port has to answer as a store


class NotMet(TryAgain, ValueError):
    """Some rank has not arrived, and no user is at a terminal: a restart may bring all of them."""


class Meeting:
    """Gathers the processes of one start in a store, apart from the entries of earlier attempts.

    torchrun's agents keep their store over restarts, with all entries of earlier attempts. So rank 0 makes a random
    name for this attempt, and each other rank greets it with a random word of its own, which the answer must repeat.
    """

    def __init__(self, place: Place) -> None:
        self.rank, self.size, self.start = place.rank, place.size, place.start
        is_watched = place.by_slurm and sys.stdin is not None and sys.stdin.isatty()  # a user waits at the terminal
        self.watched = is_watched
        self.patience = min(JOINING, JOINING_WATCHED) if is_watched else JOINING
        self.where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.missing = list(range(1, place.size)) if place.rank == 0 else [0]
        self._over = threading.Event()
        self._expect()

    def hold(self) -> Any:
        """The store with this attempt's prefix, once all have arrived.

        Raises NotMet, or ValueError if the user must act, with the missing ranks.
        """
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
            # rank 0 must not wait inside of torch, which could not say which ranks are missing
            return stores.TCPStore(
                host, port, self.size, self.rank == 0, self.patience, wait_for_workers=False, multi_tenant=True
            )
        store, port = self._found(host, port) if self.rank == 0 else self._find(host, port)
        os.environ["MASTER_PORT"], self.where = str(port), f"{host}:{port}"
        return store

    def _found(self, host: str, first: int) -> tuple[Any, int]:
        """Open a store at port `first`, or at the next of `ports` that is free. Returns (store, port)."""
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
        """Find the store that rank 0 has opened, among `ports`, skipping other programs and other jobs' stores.

        Returns (store, port). Raises NotMet or ValueError if it does not appear in time.
        """
        silent = set[int]()
        while True:
            for port in ports(first):
                with suppress(OSError, dist.DistError):
                    socket.create_connection((host, port), ANSWER).close()  # torch's client would wait for a listener
                    if port not in silent and (store := self._store_at(host, port, silent)):
                        return store, port
            self._wait()

    def _store_at(self, host: str, port: int, silent: set[int]) -> Any:
        """This start's store at `port`, or None. A port whose program does not answer is added to `silent`."""
        made = list[Any]()

        def make() -> None:
            with suppress(dist.DistError):
                made.append(stores.TCPStore(host, port, self.size, False, self.patience, wait_for_workers=False))

        # torch waits forever for an answer if another program listens at this port
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
        self.missing.clear()  # this rank has met rank 0, which alone can tell who else is missing
        arrived = 0
        while not store.check([f"{attempt}/all here"]):
            if (now := store.add(f"{attempt}/arrived", 0)) != arrived:
                arrived = now
                self._expect(GRACE)  # longer than rank 0 waits, so that rank 0 gives up first, with the names
            self._wait()
        return attempt

    def _expect(self, longer: float = 0.0) -> None:
        """Restart the waiting time: each rank that arrives is a sign that the others may still come."""
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


def ports(first: int) -> list[int]:
    """Ports at which rank 0 may open its store: `first`, then fallbacks in case other programs use it."""
    return [15000 + (first - 15000 + 997 * number) % 15000 for number in range(PORTS)]
