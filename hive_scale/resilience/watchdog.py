"""Watchdog: detects a hanging run or a lost rank, reports who, where and since when, and ends the job.

On every rank a thread checks the phase timer once a second. If a phase exceeds the deadline, or a collective failed
because another rank has gone, the rank starts a roll call through the store that all ranks share. Each live rank
answers with its phase and the stacks of its threads, the caller names the ranks that did not answer, and all exit
with the code for "try again".

Work of unknown length, such as writing weights while other ranks wait, calls `phase_timer.tick` to show progress. While
any rank makes progress, no rank counts as late.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from hive_scale import phase_timer
from hive_scale.config import Config
from hive_scale.distributed import World
from hive_scale.exit_codes import TRY_AGAIN, is_loss_of_contact, say
from hive_scale.heartbeat import FAILURE, leave

POLL = 1.0  # seconds between checks
ANSWER = 5.0  # seconds that live ranks have to answer a roll call
CALL = "hive_scale/roll_call"
PROGRESS = "hive_scale/progress"  # store key of a counter that grows while any rank makes progress
SILENCE = 60.0  # least deadline in seconds for phases outside of steps, since loading libraries gives no sign


class Watchdog(AbstractContextManager["Watchdog"]):
    """Watches this process while the context lasts; a `deadline` (seconds) of 0 turns it off.

    Time during which the process was suspended (by Slurm, or SIGSTOP) does not count.
    """

    def __init__(self, world: World, deadline: float) -> None:
        self.world, self.deadline = world, deadline
        self._store: Any = None
        self._stopped = threading.Event()
        self._calling = threading.Lock()

    def __enter__(self) -> Watchdog:
        if self.world.store is not None:
            self._store = self.world.store.clone()  # a separate connection, since a wait on a shared one would block it
        if self.deadline:
            threading.Thread(target=self._watch, name="hang watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stopped.set()
        if self.deadline and error is not None and is_loss_of_contact(error) and self._nobody_failed():
            self._call_roll(f"a collective failed ({str(error).splitlines()[0]})")

    def _watch(self) -> None:
        asleep = resumed = time.monotonic()
        mine, all_of_us = phase_timer.ticks(), 0
        while not self._stopped.wait(min(POLL, self.deadline / 4)):
            now = time.monotonic()
            if now - asleep > self.deadline / 2:  # suspended while asleep; waiting for the store is not counted here
                resumed = now
            moved, mine = (
                self.world.timer.phase == phase_timer.FETCH or phase_timer.ticks() != mine,
                phase_timer.ticks(),
            )
            try:
                called, before = self._store is not None and self._store.check([CALL]), all_of_us
                all_of_us = self._store.add(PROGRESS, int(moved)) if self._store is not None else before + int(moved)
            except RuntimeError:
                return  # the store has gone with rank 0; the companion processes handle that
            if called:
                self._answer()
                time.sleep(ANSWER + POLL)
                leave(TRY_AGAIN)
            if all_of_us != before:
                resumed = time.monotonic()
            if self._late(resumed) > self._limit():
                self._call_roll(f"{self._doing()} for {self._late(resumed):.0f} s")
            asleep = time.monotonic()

    def _late(self, resumed: float) -> float:
        return time.monotonic() - max(self.world.timer.since, resumed)

    def _limit(self) -> float:
        return max(self.deadline, SILENCE) if self.world.timer.phase in phase_timer.OUTSIDE else self.deadline

    def _doing(self) -> str:
        phase, step = self.world.timer.phase, self.world.timer.step
        return f"it has been at its {phase}" if phase in phase_timer.OUTSIDE else f"step {step} has been in its {phase}"

    def _call_roll(self, reason: str) -> None:
        """Report what is wrong, list the ranks that answer and those that do not, and end this process."""
        with self._calling:
            self._answer()
            say(f"rank {self.world.rank}: {reason}; the job ends, to be tried again")
            say(self._heard())
            time.sleep(POLL)
            leave(TRY_AGAIN)

    def _answer(self) -> None:
        at, rank = self.world.timer, self.world.rank
        late = time.monotonic() - at.since
        keys = ", ".join(at.keys[:4]) + (f" and {len(at.keys) - 4} more" if len(at.keys) > 4 else "")
        state = f"step {at.step}, {at.phase} for {late:.1f} s, samples {keys or 'none'}"
        say(f"rank {rank}: {state}\n{stacks()}")
        try:
            if self._store is not None:
                self._store.set(f"{CALL}/{rank}", state)
                self._store.set(CALL, "now")
        except RuntimeError:
            say("rank 0, which holds the job together, has gone")

    def _heard(self) -> str:
        """Collect the answers to the roll call; name the ranks that did not answer."""
        if self._store is None:
            return "there is no other rank"
        answers: dict[int, str] = {}
        deadline = time.monotonic() + ANSWER
        try:
            while len(answers) < self.world.size and time.monotonic() < deadline:
                time.sleep(POLL / 4)
                for rank in range(self.world.size):
                    if rank not in answers and self._store.check([f"{CALL}/{rank}"]):
                        answers[rank] = self._store.get(f"{CALL}/{rank}").decode()
        except RuntimeError:
            return "missing: rank 0, which holds the job together"
        lines = [f"  rank {rank}: {answer}" for rank, answer in sorted(answers.items())]
        missing = [str(rank) for rank in range(self.world.size) if rank not in answers]
        return "\n".join([*lines, f"missing, without a word: rank {', '.join(missing)}" if missing else "none missing"])

    def _nobody_failed(self) -> bool:
        """True if no rank has published a failure, of which this rank's error would be a consequence."""
        time.sleep(2 * POLL)
        try:
            return self._store is None or not self._store.check([FAILURE])
        except RuntimeError:
            return True


def watching(world: World) -> Watchdog:
    """A watchdog for commands without a config, with the default deadline. Off in a single process."""
    return Watchdog(world, Config().watchdog_seconds if world.size > 1 else 0.0)


def stacks() -> str:
    """Stack traces of all threads of this process, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames: dict[int, Any] = sys._current_frames()
    return "\n".join(
        f"  thread {names.get(ident, '?')}:\n" + "".join(traceback.format_stack(frame)).rstrip()
        for ident, frame in frames.items()
    )
