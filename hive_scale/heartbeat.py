"""A small process beside each rank tells the others when its rank has gone, and ends its rank when another has.

A thread could do neither: a killed process has none left, and one that is in a C call which holds Python's lock
(importing a library, a kernel being compiled, a deadlock) runs none. So each rank forks a companion that shares nothing
with it but the store's address. It says once a second through the store that it is there; rank 0's companion listens to
all, every other one to rank 0's. What is noticed, and how soon:

- a rank that is killed or aborts: by its own companion, in LOOK;
- a node that is gone or cut off, with its companions: by their silence, in SILENT;
- a rank that does not end by itself GRACE + STUCK after another has failed: its companion kills it.

A rank that stands still is none of these: see `watch.hang`. A companion that was itself stopped meanwhile (Slurm's
suspend stops a whole job) begins to count anew. All times are of the monotonic clock.
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

LOOK, BEAT = 0.25, 1.0  # seconds between looks at one's own rank, and between words to the others
SILENT = 15.0  # seconds without a word after which a node is taken for gone: switches and file servers pause, too
GRACE = 5.0  # seconds to leave by oneself after another rank has failed
STUCK = 10.0  # seconds more, after which a rank is killed
FAILURE = "hive_scale/failure"  # key of the store: the exit code, which rank failed first, and how
HEARD = "hive_scale/heard"  # how many ranks, beside rank 0, know of it
ALIVE, NODE = "hive_scale/alive", "hive_scale/node"
ORPHANED = f"{TRY_AGAIN} rank 0, which holds the job together, has gone"
ASKED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}

_companion = 0  # process id of this process's, if it has one
_lost_nodes: Path | None = None


class Companion:
    """Of this process, from now on until `stop`, or until this process ends."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        """To be made before a device is in use: what is forked from a process is not to share that."""
        global _companion
        self.rank, parent = rank, os.getpid()
        self._reads, writes = os.pipe()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # for good in the companion
        self._pid = os.fork()
        if self._pid == 0:
            _accompany(store, rank, size, parent, writes)
        _companion = self._pid
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(writes)

    def wait(self) -> str:
        """Blocks until another rank has failed or gone; says how, with the exit code in front."""
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
    """End this process at once with `code`, as it has decided: it is not lost, and its node is not to blame."""
    if _companion:
        with suppress(OSError):
            os.kill(_companion, signal.SIGTERM)
    os._exit(code)


def note_lost_nodes(folder: Path) -> None:
    """From now on the node of a rank that is lost, or whose device is, leaves its name in `folder`."""
    global _lost_nodes
    _lost_nodes = folder


def note_lost(node: str) -> None:
    """That a rank was lost on `node`, if anybody wants to know."""
    if _lost_nodes is not None and re.fullmatch(r"[\w.-]+", node):
        with suppress(OSError):
            _lost_nodes.mkdir(parents=True, exist_ok=True)
            (_lost_nodes / node).touch()


def this_node() -> str:
    """The name by which Slurm calls it, if it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _accompany(store: Any, rank: int, size: int, parent: int, writes: int) -> NoReturn:
    """All that the companion ever does."""
    try:
        _close_all_but({0, 1, 2, writes})  # connections and locks are to end with the rank
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
    """Runs in the companion. Its main thread never waits for the store, which may be gone without an answer."""

    def __init__(self, store: Any, rank: int, size: int, parent: int, writes: int) -> None:
        self.store, self.rank, self.parent, self.writes = store, rank, parent, writes
        self.others = range(1, size) if rank == 0 else [0]  # whom to listen to
        self.failure = ""  # of which the rank is to be told
        self.node, self.node_of_main = this_node(), ""
        self.heard = self.resumed = time.monotonic()  # the last answer of the store; when a suspension ended
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
            store, self._said = self.store.clone(), self.store.clone()  # connections of its own
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
        """The rank is: whether it has said so or not, the others are to know."""
        if self.failure:
            return
        was_asked = bool(signal.sigpending() & ASKED)  # to end, as a rule with all others, or by `leave`
        how = "has ended" if was_asked else "has gone without a word (killed, aborted or crashed)"
        word = f"{TRY_AGAIN} rank {self.rank} on {self.node} {how}"
        try:
            is_first = self._said is not None and self._said.compare_set(FAILURE, "", word).decode() == word
        except RuntimeError:
            is_first = self.rank == 0  # with the store
        if is_first and not was_asked:
            note_lost(self.node)

    def _end_it(self) -> None:
        say(f"rank {self.rank} does not end by itself (stopped, or in a C call that holds Python's lock): it is killed")
        os.kill(self.parent, signal.SIGKILL)
