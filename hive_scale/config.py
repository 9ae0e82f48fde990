"""The configuration of a run as frozen dataclasses: every option with its default and its meaning.

A preset (see ``presets``) builds a `Config`; a YAML file and ``key=value`` words override it. Each run saves its
resolved config in its directory, and loading that file gives the same run. This module imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from math import ceil, floor, isfinite
from pathlib import Path
from typing import Any, ClassVar, Literal

from omegaconf import OmegaConf

from hive_scale import checksums, credentials
from hive_scale.atomic import write_text
from hive_scale.config_merge import STAGE_ORDER, flatten, resolve
from hive_scale.registry import ADAPTERS, FUSIONS, OPTIMIZERS

Pairing = Literal["shallow_to_shallow", "deep_to_shallow"]
Positions = Literal["grid", "line"]
Frozen = Literal["replicate", "shard"]
Precision = Literal["fp32", "bf16"]
Checkpointing = Literal["none", "full", "selective"]
ImageMode = Literal["resize", "crop", "pad"]
TextMode = Literal["caption", "conversation"]
ImagePosition = Literal["user", "start"]
Owned = Literal["refuse", "ignore"]
Wandb = Literal["online", "offline", "off"]


@dataclass(frozen=True)
class PartConfig:
    """One pretrained component of the model (encoder or LLM): weights at `path`, or `config` built from scratch.

    `path` is a local Hugging Face directory, a hub name, the directory of another run (its last finished stage is
    used) or of one of its stages, or a safetensors file or index. `config` has the keys of ``config.json``, including
    ``model_type``; weights in a bare safetensors file need it. If both are given, the weights come from `path`, and
    `config` may change how the model is built but not what it computes: `model.build` refuses such keys by name.
    Without ``model_type``, `config` has only what differs from the config at `path`.

    A new `path` brings its own config in place of that of an earlier layer, such as a preset; ``config=preset`` goes
    back to the preset's. A `config` with another ``model_type``, or an empty one, replaces that of an earlier layer;
    any other is merged into it.
    """

    path: str = ""
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: `path` is a Hugging Face directory, a hub name, or "bytes" (UTF-8 bytes, needs no file)."""

    path: str = "bytes"
    pad_token: str = ""  # padding token, for tokenizers that define none (Llama, MobileLLM)


@dataclass(frozen=True)
class ModelConfig:
    """The vision encoder, the LLM, and how they are fused."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "connector": "connector_weights",
        "depths": "encoder_layers",
        "density": "encoder_layer_ratio",
    }

    vision: PartConfig = field(default_factory=PartConfig)
    language: PartConfig = field(default_factory=PartConfig)
    connector_weights: str = ""  # run, stage or safetensors to load projectors and fusion from; "": random init
    fusion: str = "cross_attention"  # name of a registered fusion: see docs/fusions.md
    # which encoder layers feed the LLM: "uniform" (evenly spaced), "later", "last" (cascaded: one layer into all fused
    # LLM layers, paper suppl. 6), or a list such as [3,7,11], ascending; 1 is the first block's output
    encoder_layers: Any = "uniform"
    encoder_layer_ratio: float = 0.25  # share of encoder layers that feed the LLM (paper 3.2); 1: all, the last one too
    llm_layers: Any = (
        "uniform"  # the fused LLM layers, as many as encoder layers: "uniform", or a list from 0, ascending
    )
    pairing: Pairing = (
        "shallow_to_shallow"  # deep_to_shallow: the deepest encoder layer feeds the first fused LLM layer
    )
    qk_norm: bool = False  # per-head RMSNorm on queries and keys of the visual attention
    positions: Positions = "grid"  # rotary positions of visual keys (joint_attention): row and column, or index
    num_query_tokens: int = 64  # visual tokens that q_former makes of an image, whatever its number of patches
    num_query_layers: int = 6  # layers of q_former

    def __post_init__(self) -> None:
        if not 0 < self.encoder_layer_ratio <= 1:
            raise ValueError(
                f"model.encoder_layer_ratio={self.encoder_layer_ratio} is a share: set it above 0 and at most 1"
            )
        for name in ("num_query_tokens", "num_query_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: set it to 1 or more")
        for name, rules in (("encoder_layers", ENCODER_RULES), ("llm_layers", ("uniform",))):
            _check_layers(f"model.{name}", getattr(self, name), rules)


ENCODER_RULES = ("uniform", "later", "last")


def _check_layers(key: str, given: Any, rules: Sequence[str]) -> None:
    """Raises ValueError unless `given` is one of `rules`, or an ascending list of whole numbers."""
    if isinstance(given, str):
        if given not in rules:
            raise ValueError(f"{key}={given}: set {', '.join(rules)}, or a list of layers such as [3,7,11]")
        return
    is_list = isinstance(given, list | tuple) and bool(given)
    if not is_list or any(not isinstance(one, int) or isinstance(one, bool) for one in given):
        raise ValueError(f"{key}={given}: give whole numbers, such as [3,7,11], or {', '.join(rules)}")
    if list(given) != sorted(given):
        raise ValueError(
            f"{key}={list(given)} does not ascend: sort it; model.pairing=deep_to_shallow pairs the other way round"
        )


SHARDS = ("train", "heldout")  # keys of DataConfig that hold shard patterns


@dataclass(frozen=True)
class DataConfig:
    """Shards are WebDataset tars: paths, ``{0000..0099}`` ranges, globs or URLs; ``sample:train`` is the shipped set.

    One pattern needs no list, and a folder stands for its ``train-*.tar`` or ``heldout-*.tar``; if it has neither, for
    all its tars. `heldout` may also be ``none``, or a share of the training set, such as ``5%``: samples are then held
    out by a hash of their key, so the same ones whatever the order of the shards.

    ``3 x small/*.tar`` reads a set three times per epoch of the mixture, ``0.5 x large/*.tar`` half of it. Credentials
    in a URL are removed from the config and kept apart: see `credentials`.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "text": "format",
        "image": "image_transform",
        "blank": "blank_images",
        "window": "shuffle_window",
        "threads": "decode_threads",
    }

    train: list[str] = field(default_factory=lambda: ["sample:train"])
    heldout: list[str] = field(default_factory=lambda: ["sample:heldout"])  # shards, a share such as 5%, or none
    heldout_samples: int = 0  # most held-out samples that an evaluation reads, always the same ones; 0: all
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    format: TextMode = "caption"  # caption, or conversation: the LLM's chat template, with the answers as targets
    # where a conversation has its image: before the first question (user, as LLaVA), or after the start token (start)
    image_position: ImagePosition = "user"
    max_tokens: int = 77  # texts are truncated to this many tokens, start and end included (paper, appendix 7)
    image_transform: ImageMode = "resize"  # to a square: stretch (SigLIP), crop the middle (CLIP), or pad (LLaVA)
    blank_images: bool = False  # replace all images by blank ones: the control that shows what the images add
    shuffle_window: int = 16384  # samples shuffled together: larger mixes more, smaller reads fewer shards at once
    workers: int = 0  # data-loading processes per rank; 0: load in the training process
    decode_threads: int = 1  # image-decoding threads in each data worker
    cache_gb: float = 100.0  # disk space in GB for shards fetched from URLs, in $XDG_CACHE_HOME or ~/.cache
    retry_seconds: float = 300.0  # a shard's download may stall this many seconds; then the run stops, to be restarted
    max_bad_samples: int = 1000  # broken samples are skipped and logged; more than this many stop the run
    max_bad_share: float = 0.05  # a larger share of broken samples in a set stops the run, too; 1: no limit
    max_pixels: int = 50_000_000  # images with more pixels are refused before decoding

    def __post_init__(self) -> None:
        if self.max_tokens < 3:
            raise ValueError(f"data.max_tokens={self.max_tokens} leaves no room for a caption: use 3 or more")
        if self.retry_seconds < 0:
            raise ValueError(f"data.retry_seconds={self.retry_seconds:g} must be at least 0; 0 asks once")
        if self.decode_threads < 1:
            raise ValueError(f"data.decode_threads={self.decode_threads} must be at least 1")
        if self.shuffle_window < 1:
            raise ValueError(
                f"data.shuffle_window={self.shuffle_window} must be at least 1; 1 keeps the order inside shards"
            )
        if self.heldout_samples < 0:
            raise ValueError(f"data.heldout_samples={self.heldout_samples} must be at least 0; 0 evaluates all")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"data.max_bad_share={self.max_bad_share:g} is a share: set it from 0 to 1")
        for name in SHARDS:  # strip credentials here, so that no way of making a config lets one in
            given = getattr(self, name)
            patterns = [given] if isinstance(given, str) else given
            object.__setattr__(self, name, [credentials.take(pattern) for pattern in patterns])
        if [one.lower() for one in self.heldout] == ["none"]:
            object.__setattr__(self, "heldout", [])
        _check_share(self.heldout)

    @property
    def heldout_share(self) -> float:
        """Share of the training set that is held out; 0 if `heldout` names shards, or nothing."""
        match = SHARE.fullmatch(self.heldout[0]) if len(self.heldout) == 1 else None
        return float(match[1]) / 100 if match else 0.0


SHARE = re.compile(r"(\d+\.?\d*|\.\d+) ?%")


def _check_share(heldout: Sequence[str]) -> None:
    """Raises ValueError if a share is not written as one, out of range or among others."""
    for one in heldout:
        if re.fullmatch(r"\d*\.?\d+", one):
            share = f"{float(one) * 100:g}%" if 0 < float(one) < 1 else "5%"
            raise ValueError(f"data.heldout={one} is neither shards nor a share: write a share as {share}")
        if (match := SHARE.fullmatch(one)) and (len(heldout) > 1 or not 0 < float(match[1]) < 100):
            raise ValueError(f"data.heldout={one}: give one share, above 0% and below 100%; or shards; or none")


@dataclass(frozen=True)
class GroupConfig:
    """A group of trainable parameters: `parameters` are globs over their names, `lr` is the peak learning rate."""

    parameters: list[str]
    lr: float  # peak learning rate
    weight_decay: float = 0.0  # not applied to vectors (norms, biases, gates)

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, float) and not (isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} of a group must be a number of at least 0")


@dataclass(frozen=True)
class AdapterConfig:
    """Small modules that a stage trains in place of the weights of linear layers, such as LoRA (Hu et al. 2021).

    `targets` are globs over the names of linear layers in the blocks of encoder and LLM. In a part that has some, the
    adapter alone is trained, at the rate of the group that names it. It is merged into the weights at the stage's end.
    """

    kind: str = "lora"  # name of a registered adapter: lora or dora
    rank: int = 16  # columns of the two factors
    alpha: int = 32  # what the factors compute is multiplied by alpha / rank
    dropout: float = 0.0  # share of the factors' inputs that is set to zero while training
    targets: list[str] = field(default_factory=lambda: ["language.*_proj"])  # all projections of the LLM

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 1:
            raise ValueError(f"adapter.rank={self.rank}, adapter.alpha={self.alpha}: set both to 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout:g} is a share: set it from 0 to below 1")
        if not self.targets:
            raise ValueError("adapter.targets is empty: name linear layers, such as language.*_proj")


@dataclass(frozen=True)
class StageConfig:
    """One stage of training. Parameters that no group names are frozen.

    `global_batch` sets what is learned and `micro_batch` only what fits the device: gradient accumulation follows
    from the two and the number of processes.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "steps": "max_steps",
        "warmup": "warmup_ratio",
        "keep_moments": "carry_optimizer_state",
        "decoupled_decay": "decoupled_weight_decay",
    }

    groups: dict[str, GroupConfig]
    global_batch: int = 256  # samples per optimizer step, over all processes
    micro_batch: int = 32  # most samples per process and forward pass; the rest is gradient accumulation
    epochs: float = 1.0  # passes over the training data; may be a fraction
    max_steps: int = 0  # optimizer steps; overrides epochs if positive
    drop_last: bool = False  # the stage's last batch, if incomplete: true drops it, false fills it from the next epoch
    max_grad_norm: float = 1.0  # gradients are clipped to this L2 norm; .inf: no clipping
    warmup_ratio: float = 0.03  # linear warmup, as a share of the steps
    min_lr: float = 0.1  # learning rate at the end of the cosine, as a share of the peak
    # adamw; muon: Muon for the weights of linear layers, AdamW for the rest; adafactor; or a registered one of yours
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-8  # of AdamW; its square bounds adafactor's mean squares
    ema: float = 0.0  # decay per step of an average of the trained weights, such as 0.9999; 0: none is kept
    # true: parameters that the previous stage trained too keep their optimizer's moments; false: all start at zero
    carry_optimizer_state: bool = False
    decoupled_weight_decay: bool = True  # weight decay does not scale with the peak learning rate (paper, Table 3)
    seed: int = 0  # of data order and step randomness; the first stage's also of newly drawn weights
    adapter: AdapterConfig | None = None  # modules trained in place of the weights of linear layers; None: no adapter
    # keys of `DataConfig` that this stage overrides in the run's `data`
    data: dict[str, Any] | None = field(default=None, metadata={"overrides": DataConfig})

    def __post_init__(self) -> None:
        if isinstance(self.data, DataConfig):  # given in Python: it overrides every key
            object.__setattr__(self, "data", asdict(self.data))
        if self.data:
            object.__setattr__(self, "data", _without_credentials(self.data))
        if not self.groups:
            raise ValueError("a stage without groups trains nothing: name at least one {parameters, lr} group")
        for name in ("global_batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_steps < 0 or not (isfinite(self.epochs) and (self.epochs > 0 or self.max_steps)):
            raise ValueError(
                f"epochs={self.epochs:g}, max_steps={self.max_steps}: set epochs above 0, or max_steps to 1 or more"
            )
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm:g} must be above 0: .inf clips nothing")
        if not (self.eps > 0 and isfinite(self.eps) and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"betas={list(self.betas)}, eps={self.eps:g}: betas are from 0 to below 1, eps above 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema:g} is a decay per step: set it from 0 (none) to below 1, such as 0.9999")
        for name in ("warmup_ratio", "min_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name):g} is a share: set it from 0 to 1")

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps of this stage on a set of `num_samples`; batches run across the ends of epochs.

        Raises ValueError if there are none, because the data do not fill one global batch.
        """
        if self.max_steps > 0:
            return self.max_steps
        exact = self.epochs * num_samples / self.global_batch
        steps = floor(exact) if self.drop_last else ceil(exact)
        if steps == 0:
            raise ValueError(
                f"{num_samples} samples x {self.epochs:g} epochs are less than one global batch of "
                f"{self.global_batch}: lower stages.*.global_batch, or raise epochs, or set drop_last=false"
            )
        return steps

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per process and optimizer step: the fewest equal ones of at most `micro_batch` samples.

        Raises ValueError if `global_batch` cannot be divided so.
        """
        per_rank, rest = divmod(self.global_batch, world_size)
        if rest:
            raise ValueError(
                f"global_batch={self.global_batch} does not divide among {world_size} processes: use a "
                f"multiple of {world_size}, such as {self.global_batch - rest or world_size}"
            )
        if per_rank > self.micro_batch and per_rank % self.micro_batch:
            fit = max(n for n in range(1, self.micro_batch + 1) if per_rank % n == 0)
            raise ValueError(
                f"micro_batch={self.micro_batch} does not divide the {per_rank} samples of one process: "
                f"use micro_batch={fit}, or a global_batch that is a multiple of {world_size * self.micro_batch}"
            )
        return ceil(per_rank / self.micro_batch)


@dataclass(frozen=True)
class CheckpointingConfig:
    """Activation checkpointing by component: none, full (recompute all), selective (all but attention and matmuls)."""

    vision: Checkpointing = "none"
    language: Checkpointing = "none"
    fusion: Checkpointing = "none"


@dataclass(frozen=True)
class EngineConfig:
    """How a step is executed: precision, sharding and memory. None of it changes what is learned.

    `reshard_after_backward` and `sync_each_micro_batch` matter only under gradient accumulation on FSDP2. With
    `reshard_after_backward` false, parameters stay unsharded between a backward and the next forward: one all-gather
    less for each further micro-batch, if the whole model's compute copy fits. With `sync_each_micro_batch`, gradients
    are reduce-scattered after each backward and accumulate sharded: for models whose unsharded float32 gradients do
    not fit. Under HSDP the all-reduce over replicas still happens once per step.

    `shard_size` 0 and `reshard_after_backward` auto are decided per stage by the planned memory (`plan.choose`). Where
    the device's memory is not known, as on a CPU, they mean all ranks and true, which need the least.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"shard": "shard_size", "offload": "cpu_offload"}

    precision: Precision = "fp32"  # of compute; master weights and moments are always fp32
    # ranks that share one copy of the state: all is FSDP, 1 is replicated (DDP), a number between is HSDP; 0: all, but
    # on several nodes those of one node, if that is planned to fit
    shard_size: int = 0
    frozen: Frozen = "replicate"  # frozen parameters under FSDP2: whole on each rank, in `precision`; or shard, in fp32
    reshard_after_forward: bool = True  # false: blocks stay unsharded until the backward (more memory, fewer gathers)
    # false: parameters stay unsharded between micro-batches of a step; auto: false where that is planned to fit
    reshard_after_backward: bool | str = "auto"
    sync_each_micro_batch: bool = False  # true: reduce-scatter gradients after each micro-batch, not once per step
    cpu_offload: bool = False  # keep master weights and moments in host memory
    compile: bool | str = (
        "auto"  # torch.compile each block; auto: on CUDA, where what it needs is there, not under ZeRO-3
    )
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    ds_config: str = ""  # DeepSpeed JSON file; if given, ZeRO replaces FSDP2
    ds_config_owned: Owned = "refuse"  # if that JSON contradicts a stage: refuse it, or ignore it and use the stage

    def __post_init__(self) -> None:
        known = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
        for name in ("compile", "reshard_after_backward"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "auto":
                if value.lower() not in known:
                    raise ValueError(f"engine.{name}={value}: set auto, true or false")
                object.__setattr__(self, name, known[value.lower()])
        if self.shard_size < 0:
            raise ValueError(f"engine.shard_size={self.shard_size}: set a number of ranks, or 0 for the default")


@dataclass(frozen=True)
class KeepConfig:
    """Retention of a stage's step checkpoints. Corrupt ones do not count; the newest intact one is always kept."""

    last: int = 2  # number of newest checkpoints to keep
    every: int = 0  # also keep checkpoints whose step is a multiple of this; 0: none
    best: bool = False  # also keep the one with the lowest held-out loss, of those saved at an evaluation step

    def __post_init__(self) -> None:
        if self.last < 1 or self.every < 0:
            raise ValueError(
                f"keep.last={self.last}, keep.every={self.every}: set last to 1 or more, every to 0 or more"
            )


@dataclass(frozen=True)
class LogConfig:
    """Where metrics are shown, besides `metrics.jsonl`."""

    wandb: Wandb = "offline"  # Weights & Biases mode; the environment variable WANDB_MODE overrides it
    tensorboard: bool = False  # event files under <output>/tensorboard


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps the profiler traces."""

    steps: str = ""  # FIRST:END in each stage, END excluded: 10:13 traces steps 10, 11 and 12; "": none

    def __post_init__(self) -> None:
        self.window()

    def window(self) -> tuple[int, int]:
        """The first traced step and the one after the last; (0, 0) for none. Raises ValueError for a bad `steps`."""
        if not self.steps:
            return 0, 0
        first, _, end = self.steps.partition(":")
        if not (first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end)):
            raise ValueError(f"profile.steps={self.steps} is not FIRST:END, such as '10:13' for steps 10, 11 and 12")
        return int(first), int(end)


@dataclass(frozen=True)
class GuardConfig:
    """Which batches are skipped as bad. A step whose loss or gradient is not finite is always skipped."""

    spike: float = 20.0  # skip a loss this many robust standard deviations above the median; 0: skip no spikes
    window: int = 128  # number of recent losses that the median and deviation are taken over
    patience: int = 3  # this many bad steps in a row: roll back to the last checkpoint, and go on with new batches
    rollbacks: int = 2  # this many rollbacks at most; one more ends the run

    def __post_init__(self) -> None:
        least = {"spike": 0, "window": 16, "patience": 1, "rollbacks": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"guard.{name}={getattr(self, name)} must be at least {value}")


@dataclass(frozen=True)
class Config:
    """A whole run: model, data, stages and how they are executed."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "hang_seconds": "watchdog_seconds",
        "failures_per_day": "expected_failures_per_day",
        "evidence": "blank_image_control",
    }

    name: str = "run"
    output: str = "runs/{name}"  # run directory; {name} stands for the run's name
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    feature_cache: str = ""  # directory for features of frozen encoders: each image is encoded once; "": no cache
    eval_interval: int = 0  # optimizer steps between evaluations on held-out data; 0: only at the end of each stage
    save_interval: int = 0  # steps between checkpoints; 0: from the cost of a save and expected_failures_per_day
    keep: KeepConfig = field(default_factory=KeepConfig)
    max_failed_saves: int = 3  # this many failed checkpoint writes in a row stop the run
    # expected failures of the whole job per day (86400 / MTBF): sets the checkpoint interval (Daly 2006)
    expected_failures_per_day: float = 2.0
    grace_seconds: float = 30.0  # seconds from a stop request to the kill; 30 is Slurm's and many launchers' default
    # seconds without progress after which the job ends, to be restarted; outside of steps at least 60; 0: never
    watchdog_seconds: float = 480.0
    guard: GuardConfig = field(default_factory=GuardConfig)
    extensions: list[str] = field(default_factory=list)  # your own modules to import, which register fusions and such
    blank_image_control: bool = False  # afterwards train the same stages on blank images, to show what the images add

    def __post_init__(self) -> None:
        if (
            not self.name.strip()
            or not self.name.isprintable()
            or ".." in Path(self.name).parts
            or len(self.name) > 200
        ):
            raise ValueError(
                f"name={self.name!r} cannot name a run: use printable characters, at most 200, and no '..'"
            )
        for name in self.stages:
            if not STAGE_NAME.fullmatch(name) or len(name) > 100 or name in TAKEN:
                why = "the run directory has a file of its own of that name" if name in TAKEN else NAMING
                raise ValueError(f"stages.{name!r} cannot name a stage, which has a folder of that name: {why}")
            self.data_of(name)  # resolve each stage's overrides now, so that a typo is reported at once
            OPTIMIZERS.check(self.stages[name].optimizer, f"stages.{name}.optimizer", self.extensions)
            if adapter := self.stages[name].adapter:
                ADAPTERS.check(adapter.kind, f"stages.{name}.adapter.kind", self.extensions)
        FUSIONS.check(self.model.fusion, "model.fusion", self.extensions)

    @property
    def run_dir(self) -> Path:
        """The run's directory: `output` with the run's name filled in."""
        return Path(os.path.expanduser(self.output.replace("{name}", self.name)))

    def data_of(self, stage: str) -> DataConfig:
        """The data config of `stage`: the run's, with the stage's own keys over it. Raises ValueError for a typo.

        For a name that is no stage, it is the run's.
        """
        own = self.stages[stage].data if stage in self.stages else None
        if not own:
            return self.data
        try:
            return resolve(self.data, own)
        except ValueError as error:
            raise ValueError(f"stages.{stage}.data: {str(error).removeprefix('config: ')}") from None


def _without_credentials(data: dict[str, Any]) -> dict[str, Any]:
    """Strip credentials from a stage's `data`. Its values are not yet checked, so they may have a wrong type."""
    given = {name: data[name] for name in SHARDS if name in data}
    lists = {name: [one] if isinstance(one, str) else one for name, one in given.items() if isinstance(one, str | list)}
    return data | {
        name: [credentials.take(one) if isinstance(one, str) else one for one in value] for name, value in lists.items()
    }


# File names that a run directory uses itself: no stage may be called so.
TAKEN = frozenset(
    [
        *(
            "config.yaml",
            "data.json",
            checksums.SUMS,
            "bad_samples.jsonl",
            "bad_batches.jsonl",
            "outcome.txt",
            "log_id",
            "STOP",
        ),
        *("initial", "blank", "logs", "slurm", "tensorboard", "wandb", "export", "llava", "vlm"),
        *("probes", "evaluation"),
    ]
)
STAGE_NAME = re.compile(r"\w(?:[\w.+ -]*[\w.+-])?")
NAMING = "begin with a letter or digit, go on with letters, digits, '_', '-', '+', '.' or spaces, at most 100"


def save(config: Config, path: Path) -> None:
    """Write `config` to `path` by atomic rename, so that readers never see half a file. Raises OSError."""
    write_text(path, to_yaml(config))


def load(path: Path) -> Config:
    """Read a config that `save` wrote. Raises ValueError for a bad file."""
    return resolve(Config(), path)


def run_of(path: str) -> Config | None:
    """The config of the run at `path`, which is a run directory or a stage directory; None if it is neither."""
    place = Path(os.path.expanduser(path))
    if (place / "config.json").is_file():  # a Hugging Face directory is no run, even inside of one
        return None
    saved = [found for found in (place / "config.yaml", place.parent / "config.yaml") if found.is_file()]
    if not (place.is_dir() and saved):
        return None
    checksums.check_file(saved[0], EDITED)
    return load(saved[0])


EDITED = "restore it; or, if you changed it yourself, go on with the run by --config, which takes the change up"
# Keys that may change when a run is resumed: how it uses the hardware, intervals and limits.
FREE = (
    *(
        "output",
        "engine.*",
        "log.*",
        "profile.*",
        "eval_interval",
        "save_interval",
        "blank_image_control",
        "*.micro_batch",
    ),
    *("expected_failures_per_day", "grace_seconds", "watchdog_seconds", "guard.*", "keep.*", "max_failed_saves"),
    *("*data.workers", "*data.decode_threads", "*data.cache_gb", "*data.retry_seconds", "*data.max_bad_samples"),
    *("*data.max_bad_share", "*data.heldout_samples"),
    *("feature_cache", "extensions"),
)
PLACES = ("data.train", "data.heldout")


def differences(one: Config, other: Config, moved: bool = False) -> list[str]:
    """Keys that make `other` a different run than `one`. With `moved`, the folders of shards may differ."""
    special = {name for run in (one, other) for name, stage in run.stages.items() if stage.data}
    flat, wanted = (flatten(_with_data(run, special)) for run in (one, other))
    keys = [key for key in sorted(flat.keys() | wanted.keys()) if flat.get(key) != wanted.get(key)]
    if moved:  # the shards themselves are compared by fingerprint when they are opened
        keys = [
            key
            for key in keys
            if not key.endswith(PLACES) or without_folders(flat.get(key)) != without_folders(wanted.get(key))
        ]
    return [key for key in keys if not any(fnmatchcase(key, free) for free in FREE)]


def without_folders(patterns: Any) -> Any:
    """Shard patterns without their folders: ``2 x /old/set/*.tar`` becomes ``2 x *.tar``."""
    if not isinstance(patterns, list):
        return patterns
    return [re.sub(r"^((?:[\d.]+ x )?).*/", r"\1", str(pattern)) for pattern in patterns]


def _with_data(config: Config, stages: Collection[str]) -> dict[str, Any]:
    """`config` as plain data, with the full data config of each of `stages`, so that overrides compare by value."""
    plain = asdict(config)
    for name, stage in plain["stages"].items():
        stage["data"] = asdict(config.data_of(name)) if name in stages else None
    return plain


def to_yaml(config: Config) -> str:
    """The config as YAML, in the form that a run saves."""
    text: str = OmegaConf.to_yaml(OmegaConf.structured(config))
    order: str = OmegaConf.to_yaml(OmegaConf.create({STAGE_ORDER: list(config.stages)})) if config.stages else ""
    return text + order
