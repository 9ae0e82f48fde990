"""Effect of each optimisation of a step, tried alone: with it and without it, in turns."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.table import describe_machine, peak_bytes, show, spread, this_device

if TYPE_CHECKING:
    from hive_scale.batch import Batch
    from hive_scale.config import ModelConfig

HELP = "each means to a fast step, with it and without it"
TEXT, SHORT = 77, 20  # tokens: the longest caption, and a typical one of CC3M
SIDE = 128  # pixels per side of an image
Step = Callable[[], None]


@dataclass(frozen=True)
class Gain:
    """Two ways to do the same work."""

    title: str
    without: Step
    having: Step


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=GAINS, default=list(GAINS), help="default: all")


def run(arguments: argparse.Namespace) -> None:
    import torch

    torch.manual_seed(0)
    rows = []
    usual = Size(1024, 12, 128) if this_device().type == "cuda" else Size(256, 8, 8)
    size = Size(32, 2, 2) if arguments.quick else usual
    for name in arguments.only:
        for gain in GAINS[name](size):
            rows.append(_time(gain, arguments.rounds))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)  # printed now, in case a later one fails
            gc.collect()
    columns = ("what", "without, s", "with, s", "times as fast", "quartiles", "without, MB", "with, MB")
    what = f"{size.layers} layers of width {size.width}, micro-batch {size.micro_batch}, {size.precision}"
    show(columns, rows, f"{describe_machine()}; {what}; {arguments.rounds} rounds", arguments.markdown)


def _time(gain: Gain, rounds: int) -> list[str]:
    import torch

    device = this_device()
    peaks = []
    for step in (gain.without, gain.having):
        step()  # warm-up: the first run allocates memory that stays
        peaks.append(peak_bytes(step, device))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for step, found in zip((gain.without, gain.having), seconds, strict=True):
            began = perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found.append(perf_counter() - began)
    faster = [a / b for a, b in zip(*seconds, strict=True)]
    medians = [f"{median(found):.3f}" for found in seconds]
    return [gain.title, *medians, f"{median(faster):.2f}", spread(faster), *(f"{peak / 1e6:.0f}" for peak in peaks)]


# -- the work ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    micro_batch: int

    @property
    def precision(self) -> str:
        """bf16 on GPUs, as users run it; fp32 on CPUs, whose bf16 matrix products are slow."""
        return "bf16" if this_device().type == "cuda" else "fp32"

    def config(self) -> ModelConfig:
        from hive_scale.config import ModelConfig, PartConfig

        sizes = {
            "hidden_size": self.width,
            "intermediate_size": 3 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(4, self.width // 64),
        }
        vision = {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": 8, "vision_use_head": False}
        language = {"model_type": "llama", "vocab_size": 8192, "tie_word_embeddings": True}
        parts = PartConfig(config={**vision, **sizes}), PartConfig(config={**language, **sizes})
        return ModelConfig(*parts, encoder_layer_ratio=0.5 if self.layers < 4 else 0.25)

    def model(self, stage: str) -> Any:
        """A model on the device, frozen as in `stage`."""
        from hive_scale.config import StageConfig
        from hive_scale.model.build import init_model
        from hive_scale.param_groups import apply_trainable_groups
        from hive_scale.precision import DTYPES
        from hive_scale.presets import three_stages

        dtype = DTYPES[self.precision]
        model = init_model(self.config(), seed=0).to(this_device(), dtype)
        apply_trainable_groups(
            model, StageConfig(three_stages("cross_attention", (1e-3,) * 3)[stage]), model.unused_parameters()
        )
        return model

    def batch(self, lengths: list[int] | None = None) -> Batch:
        """One micro-batch of captions with these `lengths`, by default TEXT tokens each."""
        import torch

        from hive_scale.batch import Sample, collate

        random = torch.Generator().manual_seed(0)

        def sample(length: int) -> Sample:
            pixels = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=random)
            ids = torch.randint(3, 8192, (length,), generator=random).tolist()
            return Sample("", pixels, ids, [False] + [True] * (length - 1))

        return collate([sample(length) for length in lengths or [TEXT] * self.micro_batch], pad_id=0, image_size=SIDE)

    def step(self, model: Any, lengths: list[int] | None = None, pixels: Any = None) -> Step:
        """Forward and backward of one micro-batch."""
        import torch

        batch = self.batch(lengths).to(this_device())
        if pixels is not None:
            batch = replace(batch, pixels=pixels)

        def step() -> None:
            torch.autograd.backward(model(**batch.inputs()))
            model.zero_grad(set_to_none=True)

        return step


def frozen_parts(size: Size) -> Iterator[Gain]:
    """Train only the connector, both ways; the first also computes gradients of frozen parts and discards them."""
    graph = size.model("projector")
    for name, parameter in graph.vision.named_parameters():
        parameter.requires_grad_(f"vision.{name}" not in graph.unused_parameters())
    yield Gain("no graph through the frozen encoder", size.step(graph), size.step(size.model("projector")))
    stored = size.model("projector")
    stored.language.requires_grad_(True)
    title = "nothing stored below the first fused layer, no gradients of the frozen LLM"
    yield Gain(title, size.step(stored), size.step(size.model("projector")))


def encoder_depth(size: Size) -> Iterator[Gain]:
    import torch

    model = size.model("projector")
    pixels = torch.randn(size.micro_batch, 3, SIDE, SIDE).to(model.vision.device, model.vision.dtype)

    def whole() -> None:
        model.vision(pixels)

    def tapped() -> None:
        from hive_scale.model.encoders import hidden_states

        hidden_states(model.vision, pixels, max(model.encoder_depths))

    yield Gain("encoder stops at the block before the last", whole, tapped)


def kept(size: Size) -> Iterator[Gain]:
    """Connector on images, or on stored features in memory; the time to read them from disk is not included."""
    import torch

    model = size.model("projector")
    pixels = torch.randint(0, 256, (size.micro_batch, 3, SIDE, SIDE), dtype=torch.uint8)
    pixels = pixels.to(model.pixel_mean.device)
    with torch.no_grad():
        features = torch.stack(model.features(model.encode(pixels)), dim=1)
    title = "features of the frozen encoder kept (feature_cache)"
    yield Gain(title, size.step(model, pixels=pixels), size.step(model, pixels=features))


def decoding(size: Size) -> Iterator[Gain]:
    """Generate token by token: recompute everything for each token, or use a KV cache."""
    import torch

    from hive_scale.model.generate import generate

    model = size.model("projector")
    pixels = torch.zeros(size.micro_batch, 3, SIDE, SIDE, dtype=torch.uint8, device=model.pixel_mean.device)
    starts, never = [[1]] * size.micro_batch, -1

    @torch.no_grad()
    def again() -> None:
        tokens = torch.ones(size.micro_batch, 1, dtype=torch.long, device=pixels.device)
        for _ in range(SHORT):
            hidden = model.language_forward(model.encode_images(pixels), tokens)
            tokens = torch.cat([tokens, model.logits(hidden[:, -1:]).argmax(-1)], dim=1)

    title = f"{SHORT} tokens written with keys and values of image and text kept"
    yield Gain(title, again, lambda: cast_none(generate(model, pixels, range(len(pixels)), starts, never, SHORT)))


def lengths(size: Size) -> Iterator[Gain]:
    """Four micro-batches of one global batch, as drawn or sorted by length; then with only short captions."""
    import torch

    model = size.model("projector")
    ragged = (
        SHORT / 2 + torch.rand(4 * size.micro_batch, generator=torch.Generator().manual_seed(1)).pow(3) * 60
    ).int()
    drawn = [size.step(model, part.tolist()) for part in ragged.chunk(4)]
    ordered = [size.step(model, part.tolist()) for part in ragged.sort().values.chunk(4)]
    yield Gain(
        "micro-batches sorted by length",
        lambda: [step() for step in drawn] and None,
        lambda: [step() for step in ordered] and None,
    )
    short = size.step(model, [SHORT] * size.micro_batch)
    yield Gain(f"captions of {SHORT} tokens padded to {SHORT}, not to {TEXT}", size.step(model), short)


def rows_with_targets(size: Size) -> Iterator[Gain]:
    import torch

    width, vocabulary, device = size.width, 32000, this_device()
    head = torch.nn.Linear(width, vocabulary, bias=False, device=device)
    hidden = torch.randn(1024, width, requires_grad=True, device=device)
    rows, ids = torch.arange(0, 1024, 4, device=device), torch.randint(vocabulary, (256,), device=device)
    everywhere = torch.full((1024,), -100, device=device).index_put((rows,), ids)

    def loss(states: Any, wanted: Any) -> None:
        torch.autograd.backward(torch.nn.functional.cross_entropy(head(states).float(), wanted, reduction="sum"))
        hidden.grad = head.weight.grad = None

    title = "head over the rows that carry a target (1 in 4)"
    yield Gain(title, lambda: loss(hidden, everywhere), lambda: loss(hidden[rows], ids))


def optimizer(size: Size) -> Iterator[Gain]:
    import torch

    def adamw(fused: bool) -> Step:
        model = size.model("joint").float()  # like the master weights
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.full_like(parameter, 1e-3)
        stepper = torch.optim.AdamW(trained, lr=1e-5, fused=fused, foreach=False)
        return lambda: cast_none(stepper.step())

    yield Gain("fused AdamW, against torch's loop", adamw(False), adamw(True))


def cast_none(_: Any) -> None:
    return None


def attention(size: Size) -> Iterator[Gain]:
    eager, fused = size.model("joint"), size.model("joint")
    for part in (eager.vision, eager.language):
        part.set_attn_implementation("eager")
    yield Gain("SDPA, against attention that keeps its scores", size.step(eager), size.step(fused))


def compiled(size: Size) -> Iterator[Gain]:
    from hive_scale.engine.activation_checkpointing import blocks_of

    plain, compiled = size.model("joint"), size.model("joint")
    for block in blocks_of(compiled):
        block.compile()
    yield Gain("blocks compiled", size.step(plain), size.step(compiled))


def copies(size: Size) -> Iterator[Gain]:
    """Copy four micro-batches of a step to the device; only if there is a device."""
    import torch

    if this_device().type == "cpu":
        return
    model = size.model("projector")
    pageable = [size.batch() for _ in range(4)]
    pinned = [batch.pin() for batch in pageable]

    def through(batches: Sequence[Batch]) -> Step:
        def step() -> None:
            for batch in batches:
                torch.autograd.backward(model(**batch.to(this_device()).inputs()))
            model.zero_grad(set_to_none=True)

        return step

    def copied(batches: Sequence[Batch]) -> Step:
        return lambda: cast_none([batch.to(this_device()) for batch in batches])

    yield Gain("copies of micro-batches from pinned memory, alone", copied(pageable), copied(pinned))
    yield Gain("copies from pinned memory, which nothing waits for, in a step", through(pageable), through(pinned))


GAINS: Mapping[str, Callable[[Size], Iterator[Gain]]] = {
    "frozen": frozen_parts,
    "encoder": encoder_depth,
    "features": kept,
    "decoding": decoding,
    "lengths": lengths,
    "loss": rows_with_targets,
    "optimizer": optimizer,
    "sdpa": attention,
    "compile": compiled,
    "copies": copies,
}
