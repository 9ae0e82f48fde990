"""How far a stage is, on its way to the disk and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hive_scale.checkpoint.provenance import code_version
from hive_scale.checkpoint.store import Store
from hive_scale.engine import Engine
from hive_scale.watch.guard import BAD_BATCHES, Guard

logger = logging.getLogger(__name__)


class Progress:
    """What a checkpoint says beside masters and moments; random numbers and schedule are functions of the step."""

    def __init__(
        self, store: Store, engine: Engine, guard: Guard, origin: Mapping[str, str], known: Mapping[str, Any]
    ) -> None:
        """`origin` is what a checkpoint must agree with to be gone on from, `known` what it only tells."""
        self.store, self.engine, self.guard, self.origin, self.known = store, engine, guard, origin, known
        self.step = 0  # optimizer steps taken
        self.passed = 0  # global batches left out on the way
        self.tokens = 0  # targets of the steps taken
        self.eval_loss: float | None = None  # after the last step, if one looked

    @property
    def batch(self) -> int:
        """The number of the next global batch."""
        return self.step + self.passed

    def take(self, num_tokens: int) -> None:
        """Count a step over so many targets."""
        self.step, self.tokens = self.step + 1, self.tokens + num_tokens

    def save(self, global_batch: int, wait: bool) -> None:
        state: dict[str, Any] = {"step": self.step, "samples": self.step * global_batch, "tokens": self.tokens}
        state |= {"passed": self.passed, "losses": self.guard.losses, "eval_loss": self.eval_loss}
        self.store.save(self.step, self.engine.fragments(), {**state, **self.origin, **self.known}, wait=wait)

    def resume(self) -> bool:
        """Go on from the newest checkpoint, if there is one.

        Raises ValueError if that belongs to other data or other weights.
        """
        newest = self.store.latest()
        if newest is None:
            return False
        state = self.store.load(newest, self.engine.fragments())
        for what, identity in self.origin.items():
            if state[what] != identity:
                raise ValueError(f"{newest} belongs to other {what}: restore what it began with, or use --overwrite")
        if state["code"] != code_version() and self.store.world.is_main:
            logger.warning("%s was saved by %s, and goes on with %s", newest, state["code"], code_version())
        self.step, self.passed, self.tokens = state["step"], state["passed"], state["tokens"]
        self.guard.go_on(state["losses"])
        self.engine.refresh(self.step)
        return True

    def go_back(self) -> None:
        """Begin again from the last checkpoint, but with the batches that come next.

        Raises ValueError if there is none, or the run has gone back too often.
        """
        self.guard.go_back()
        next_batch = self.batch
        if not self.resume():
            raise ValueError(
                f"{self.guard.config.patience} bad steps in a row before the first checkpoint: lower the learning "
                f"rates, or look at the samples in {BAD_BATCHES}"
            )
        self.passed = next_batch - self.step
