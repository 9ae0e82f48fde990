"""Check that a model uses the image: captions it writes, and whether each caption fits its own image best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hive_scale.batch import Batch
from hive_scale.data.tokenizer import Tokenizer
from hive_scale.model.generate import generate
from hive_scale.model.hive import Hive


@torch.no_grad()
def caption_losses(model: Hive, batch: Batch, shift: int = 0) -> Tensor:
    """Negative log-likelihood (B,), in nats, of each caption given the image `shift` places later in the batch."""
    visual = [feature.roll(-shift, 0) for feature in model.encode_images(batch.pixels)]
    hidden = model.language_forward(visual, batch.tokens)
    losses = model.token_loss(hidden.flatten(0, 1)[batch.target_rows], batch.target_ids)
    samples = torch.div(batch.target_rows, batch.tokens.shape[1], rounding_mode="floor")
    return torch.zeros(len(batch)).index_add_(0, samples.cpu(), losses.cpu())


def matched_share(model: Hive, batches: Iterable[Batch], shifts: Sequence[int] = (1, 2, 3, 5)) -> float:
    """Share of pairs whose caption is more likely with its own image than with another image; chance is 0.5.

    Each caption is compared on the images `shifts` places later in its batch.
    """
    won = tried = 0
    for batch in batches:
        own = caption_losses(model, batch)
        for shift in shifts:
            if shift % len(batch):
                won += int((own < caption_losses(model, batch, shift)).sum())
                tried += len(batch)
    return won / max(1, tried)


def write(model: Hive, tokenizer: Tokenizer, images: Sequence[Tensor]) -> list[str]:
    """Return a caption that the model generates for each image, uint8 (3, H, W)."""
    pixels = torch.stack(list(images)).to(model.pixel_mean.device)
    starts = [[tokenizer.start_id]] * len(pixels)
    written = generate(model, pixels, range(len(pixels)), starts, tokenizer.end_ids, max_tokens=40)
    return [tokenizer.decode(ids) for ids in written]
