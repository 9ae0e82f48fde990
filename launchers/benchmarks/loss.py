"""Implementations of head and cross-entropy, from hidden states to the loss: time, peak memory, error of the loss."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.table import describe_machine, peak_bytes, show, spread, this_device

if TYPE_CHECKING:
    from torch import Tensor, nn

HELP = "head and cross-entropy: time and peak memory"
ROWS_PER_TARGET = 2  # rows per target row for a head over all rows: padding and prompts have no target


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", nargs="+", type=int, default=[1024, 4096], help="target rows (1024 4096)")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32000, 128256], help="(32000 128256)")
    parser.add_argument("--width", type=int, default=576, help="of the LLM (576)")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])


def run(arguments: argparse.Namespace) -> None:
    from hive_scale.precision import DTYPES

    if arguments.quick:
        arguments.rows, arguments.vocabularies, arguments.width = [64], [1000], 32
    device = this_device()
    rows = []
    for name in arguments.dtypes:
        dtype = DTYPES[name]
        for vocabulary in arguments.vocabularies:
            for number in arguments.rows:
                found = time_losses(number, vocabulary, arguments.width, dtype, device, arguments.rounds)
                base = found["target rows"][0]
                for way, (seconds, peak, error) in found.items():
                    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
                    figures = f"{median(seconds):.3f}", f"{median(ratios):.2f}", spread(ratios), f"{peak / 1e6:.0f}"
                    rows.append([name, str(vocabulary), str(number), way, *figures, f"{error:.0e}"])
    figures = ("seconds", "/ target rows", "quartiles", "peak, MB", "error")
    columns = ("dtype", "vocabulary", "target rows", "way", *figures)
    caption = f"{describe_machine()}; width {arguments.width}; {arguments.rounds} rounds, forward and backward"
    show(columns, rows, caption, arguments.markdown)


def time_losses(
    number: int, vocabulary: int, width: int, dtype: Any, device: Any, rounds: int
) -> dict[str, tuple[list[float], int, float]]:
    """Return by implementation: seconds of each round, peak memory added by forward and backward, relative error."""
    import torch

    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(ROWS_PER_TARGET * number, width, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randperm(len(hidden), device=device)[:number].sort().values
    ids = torch.randint(vocabulary, (number,), device=device)
    ways = loss_ways(head, hidden, targets, ids)

    def run(way: str) -> float:
        hidden.grad = head.weight.grad = None
        loss = ways[way]()
        torch.autograd.backward(loss)
        return loss.item()

    peaks, losses = {}, {}
    for way in ways:
        run(way)  # warm-up: the first run allocates memory that stays
        peaks[way] = peak_bytes(lambda way=way: losses.update({way: run(way)}), device)  # type: ignore[misc]
    errors = {way: abs(loss / losses["target rows"] - 1) for way, loss in losses.items()}
    assert dtype != torch.float32 or max(errors.values()) < 1e-4, losses
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            began = perf_counter()
            run(way)  # ends by copying the loss to the host, after backward
            seconds[way].append(perf_counter() - began)
    return {way: (seconds[way], peaks[way], errors[way]) for way in ways}


def loss_ways(head: nn.Linear, hidden: Tensor, targets: Tensor, ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    everywhere = torch.full((len(hidden),), -100, device=ids.device).index_put((targets,), ids)

    def plain(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), wanted, reduction="sum")

    def chunked(count: int) -> Tensor:
        pairs = zip(hidden[targets].tensor_split(count), ids.tensor_split(count), strict=True)
        return torch.stack([checkpoint(plain, *pair, use_reentrant=False) for pair in pairs]).sum()

    def fused(policy: Any) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
        return F.linear_cross_entropy(hidden[targets], head.weight, ids, reduction="sum", options=options)

    return {
        "all rows": lambda: plain(hidden, everywhere),
        "target rows": lambda: plain(hidden[targets], ids),
        "linear_cross_entropy, auto": lambda: fused("auto"),
        "linear_cross_entropy, accurate": lambda: fused("accurate"),
        "checkpointed in 8": lambda: chunked(8),
    }
