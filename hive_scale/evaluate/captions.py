"""Does the model look at the picture? Captions it writes, and whether each fits its own picture best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hive_scale.batch import Batch
from hive_scale.model.hive import Hive


@torch.no_grad()
def caption_losses(model: Hive, batch: Batch, shift: int = 0) -> Tensor:
    """Negative log-likelihood (B,), in nats, of each caption given the picture `shift` places further on."""
    visual = [feature.roll(-shift, 0) for feature in model.see(batch.pixels)]
    hidden = model.read(visual, batch.tokens)
    losses = model.token_loss(hidden.flatten(0, 1)[batch.target_rows], batch.target_ids)
    samples = torch.div(batch.target_rows, batch.tokens.shape[1], rounding_mode="floor")
    return torch.zeros(len(batch)).index_add_(0, samples.cpu(), losses.cpu())


def matched_share(model: Hive, batches: Iterable[Batch], shifts: Sequence[int] = (1, 2, 3, 5)) -> float:
    """Share of pairs whose caption is likelier with its own picture than with another's; chance is 0.5.

    Each picture is held against those `shifts` places further on in its batch.
    """
    won = tried = 0
    for batch in batches:
        own = caption_losses(model, batch)
        for shift in shifts:
            if shift % len(batch):
                won += int((own < caption_losses(model, batch, shift)).sum())
                tried += len(batch)
    return won / max(1, tried)


@torch.no_grad()
def generate(model: Hive, pixels: Tensor, start_id: int, eos_id: int, max_tokens: int = 40) -> list[list[int]]:
    """Greedy captions for pictures uint8 (B, 3, H, W): token ids, start and end left out."""
    visual = model.see(pixels)
    tokens = torch.full((len(pixels), 1), start_id, device=pixels.device)
    ended = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    for _ in range(max_tokens):
        following = model.logits(model.read(visual, tokens)[:, -1]).argmax(-1)
        ended |= following == eos_id
        if ended.all():
            break
        tokens = torch.cat([tokens, following[:, None]], dim=1)
    return [_until(row[1:], eos_id) for row in tokens.tolist()]


def _until(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
