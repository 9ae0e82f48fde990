"""How far a stage is, on its way to the disk and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch

from hive_scale.checkpoint.provenance import code_version
from hive_scale.checkpoint.store import Store
from hive_scale.engine import Engine
from hive_scale.watch.guard import BAD_BATCHES, Guard

PIECE = 1 << 24  # numbers looked at together: a look takes as much memory again
logger = logging.getLogger(__name__)


class Progress:
    """What a checkpoint says beside masters and moments; random numbers and schedule are functions of the step."""

    def __init__(
        self, store: Store, engine: Engine, guard: Guard, origin: Mapping[str, Sequence[str]], known: Mapping[str, Any]
    ) -> None:
        """`origin` is what a checkpoint must agree with to be gone on from, `known` what it only tells.

        Each of `origin` has the name that is written, and after it those that older versions wrote.
        """
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

    def save(self, global_batch: int, wait: bool) -> bool:
        """Write a checkpoint of this step; False, and none, if what it would hold is not finite. A collective."""
        if not self._is_finite():
            if self.store.world.is_main:
                logger.warning(
                    "step %d is not saved: its weights, their moments or its held-out loss are not finite", self.step
                )
            return False
        state: dict[str, Any] = {"step": self.step, "samples": self.step * global_batch, "tokens": self.tokens}
        state |= {"passed": self.passed, "losses": self.guard.losses, "eval_loss": self.eval_loss}
        state |= {what: names[0] for what, names in self.origin.items()}
        self.store.save(self.step, self.engine.fragments(), {**state, **self.known}, wait=wait)
        return True

    def _is_finite(self) -> bool:
        """Of all ranks' masters and moments, and of the loss if this step looked."""
        spoiled = not all(
            bool(piece.isfinite().all())
            for fragment in self.engine.fragments()
            for piece in torch.split(fragment.data, PIECE)
        )
        return not any(self.store.world.sum(spoiled)) and isfinite(self.eval_loss or 0.0)

    def resume(self) -> bool:
        """Go on from the newest checkpoint, if there is one.

        Raises ValueError if that belongs to other data or other weights.
        """
        newest = self.store.latest()
        if newest is None:
            return False
        state = self.store.load(newest, self.engine.fragments())
        for what, names in self.origin.items():
            if state[what] not in names:
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
                "the loss or the weights are not finite, or far out, and no checkpoint is there to go back to: lower "
                f"the learning rates, raise warmup, or look at the samples in {BAD_BATCHES}"
            )
        self.passed = next_batch - self.step
