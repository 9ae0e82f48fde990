"""Heartbeats between ranks: a companion process of each rank reports its rank's death and ends it after another's.

A thread could do neither: none survives in a killed process, and none runs while a C call holds the GIL (an import, a
kernel compilation, a deadlock). So each rank forks a companion that shares only the store's address with it. Each
companion sends a heartbeat through the store every second. Rank 0's companion listens to all others, every other one
to rank 0's. Failures are noticed as follows:

- a rank is killed or aborts: by its own companion, within LOOK;
- a node with its companions dies or is cut off: by their silence, after SILENT;
- a rank does not exit by itself within GRACE + STUCK after another failed: its companion kills it.

A rank that hangs is none of these: see `resilience.watchdog`. If a companion was itself suspended (Slurm suspends
whole jobs), it restarts its timeouts. All times are of the monotonic clock.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from hive_scale.exit_codes import TRY_AGAIN, say

LOOK, BEAT = 0.25, 1.0  # seconds between checks of one's own rank, and between heartbeats
SILENT = 15.0  # seconds without heartbeat after which a node counts as dead; switches and file servers may pause
GRACE = 5.0  # seconds that a rank has to exit by itself after another has failed
STUCK = 10.0  # further seconds, after which a rank is killed
FAILURE = "hive_scale/failure"  # store key of the first failure: exit code, rank and reason
HEARD = "hive_scale/heard"  # store key: how many ranks other than 0 have read FAILURE
ALIVE, NODE = "hive_scale/alive", "hive_scale/node"  # store keys of each rank's heartbeat count and node name
ORPHANED = f"{TRY_AGAIN} rank 0, which holds the job together, has gone"
ASKED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}

_companion = 0  # process id of this process's companion; 0: none
_lost_nodes: Path | None = None


class Companion:
    """The companion process of this rank. It runs from construction until `stop`, or until this process ends."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        """Fork the companion. Do so before a device is initialised: a forked process must not share one."""
        global _companion
        self.rank, parent = rank, os.getpid()
        self._reads, writes = os.pipe()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the companion keeps this mask
        self._pid = os.fork()
        if self._pid == 0:
            _accompany(store, rank, size, parent, writes)
        _companion = self._pid
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(writes)

    def wait(self) -> str:
        """Block until another rank fails or dies; return its exit code and the reason, as one text."""
        try:
            told = os.read(self._reads, 1 << 16).decode()
        finally:
            os.close(self._reads)
        return told or f"{TRY_AGAIN} the process that watches over rank {self.rank} has gone"

    def stop(self) -> None:
        global _companion
        _companion = 0
        with suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def leave(code: int) -> NoReturn:
    """Exit at once with `code`. The companion is told, so that it does not report this rank, or its node, as lost."""
    if _companion:
        with suppress(OSError):
            os.kill(_companion, signal.SIGTERM)
    os._exit(code)


def note_lost_nodes(folder: Path) -> None:
    """Set the folder in which `note_lost` leaves names of lost nodes."""
    global _lost_nodes
    _lost_nodes = folder


def note_lost(node: str) -> None:
    """Record that a rank or a device on `node` was lost: a file of that name, if `note_lost_nodes` set a folder."""
    if _lost_nodes is not None and re.fullmatch(r"[\w.-]+", node):
        with suppress(OSError):
            _lost_nodes.mkdir(parents=True, exist_ok=True)
            (_lost_nodes / node).touch()


def this_node() -> str:
    """This node's name: Slurm's, or else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _accompany(store: Any, rank: int, size: int, parent: int, writes: int) -> NoReturn:
    """The companion's main function; never returns."""
    try:
        _close_all_but({0, 1, 2, writes})  # connections and file locks must not outlive the rank
        _Watch(store, rank, size, parent, writes).run()
    except BaseException as error:
        say(f"the process that watches over rank {rank} ends: {type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _close_all_but(kept: Iterable[int]) -> None:
    for descriptor in {int(name) for name in os.listdir("/dev/fd")} - set(kept):
        with suppress(OSError):
            os.close(descriptor)


class _Watch:
    """The companion's loop. Its main thread never calls the store, which may block for good; a second thread does."""

    def __init__(self, store: Any, rank: int, size: int, parent: int, writes: int) -> None:
        self.store, self.rank, self.parent, self.writes = store, rank, parent, writes
        self.others = range(1, size) if rank == 0 else [0]  # ranks whose heartbeats are checked
        self.failure = ""  # the first failure, to be passed to the rank; "": none
        self.node, self.node_of_main = this_node(), ""
        self.heard = self.resumed = time.monotonic()  # when the store last answered; when a suspension last ended
        self.counts = dict.fromkeys(self.others, 0)
        self.since = dict.fromkeys(self.others, self.heard)
        self._said: Any = None

    def run(self) -> None:
        threading.Thread(target=self._talk, daemon=True).start()
        told = 0.0
        while os.getppid() == self.parent:
            asleep = time.monotonic()
            time.sleep(LOOK)
            now = time.monotonic()
            if now - asleep > SILENT / 3:
                self.resumed = now
            if not self.failure and self._is_silent(self.heard):
                self.failure = f"{ORPHANED}, or its node {self.node_of_main}: nothing heard for {SILENT:.0f} s"
                note_lost(self.node_of_main)
            if self.failure and not told:
                os.write(self.writes, self.failure.encode()[:4000])
                told = now
            elif told and now - max(told, self.resumed) > GRACE + STUCK:
                self._end_it()
                return
        last_words = threading.Thread(target=self._gone, daemon=True)
        last_words.start()
        last_words.join(SILENT)

    def _is_silent(self, since: float) -> bool:
        return time.monotonic() - max(since, self.resumed) > SILENT

    def _talk(self) -> None:
        try:
            store, self._said = self.store.clone(), self.store.clone()  # separate connections for separate threads
            store.set(f"{NODE}/{self.rank}", self.node)
            while not self.failure:
                store.add(f"{ALIVE}/{self.rank}", 1)
                if store.check([FAILURE]):
                    self.failure = store.get(FAILURE).decode()
                    store.add(HEARD, int(self.rank != 0))
                for other in self.others:
                    self._listen_to(other, store)
                self.heard = time.monotonic()
                time.sleep(BEAT)
        except RuntimeError:
            self.failure = self.failure or ORPHANED

    def _listen_to(self, other: int, store: Any) -> None:
        count = store.add(f"{ALIVE}/{other}", 0)
        if count != self.counts[other]:
            self.counts[other], self.since[other] = count, time.monotonic()
            if other == 0 and not self.node_of_main:
                self.node_of_main = store.get(f"{NODE}/0").decode()
        elif self._is_silent(self.since[other]) and not self.failure:
            node = store.get(f"{NODE}/{other}").decode() if store.check([f"{NODE}/{other}"]) else ""
            word = f"{TRY_AGAIN} rank {other} on {node} has been silent for {SILENT:.0f} s: its node has gone"
            if store.compare_set(FAILURE, "", word).decode() == word:
                note_lost(node)

    def _gone(self) -> None:
        """Report to the other ranks that this companion's rank has gone."""
        if self.failure:
            return
        was_asked = bool(signal.sigpending() & ASKED)  # it was told to end: by the job's end, by a user, or by `leave`
        how = "has ended" if was_asked else "has gone without a word (killed, aborted or crashed)"
        word = f"{TRY_AGAIN} rank {self.rank} on {self.node} {how}"
        try:
            is_first = self._said is not None and self._said.compare_set(FAILURE, "", word).decode() == word
        except RuntimeError:
            is_first = self.rank == 0  # the store ended with rank 0, so nobody can have reported before
        if is_first and not was_asked:
            note_lost(self.node)

    def _end_it(self) -> None:
        say(f"rank {self.rank} does not end by itself (stopped, or in a C call that holds Python's lock): it is killed")
        os.kill(self.parent, signal.SIGKILL)
