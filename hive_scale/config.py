"""What a run is, as frozen data: read it top to bottom and you know every switch.

A preset (see ``presets``) builds a `Config`; a YAML file and ``key=value`` words override it. The resolved
config is written beside the run and reloads to the same run. This module imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from math import ceil, floor, isfinite
from pathlib import Path
from typing import Any, ClassVar, Literal

from omegaconf import OmegaConf

from hive_scale import checksums, credentials
from hive_scale.atomic import write_text
from hive_scale.config_merge import flatten, resolve
from hive_scale.registry import FUSIONS, OPTIMIZERS

Depths = Literal["uniform", "later"]
Positions = Literal["grid", "line"]
Precision = Literal["fp32", "bf16"]
Checkpointing = Literal["none", "full", "selective"]
ImageMode = Literal["resize", "crop", "pad"]
TextMode = Literal["caption", "conversation"]
ImagePosition = Literal["user", "start"]
Owned = Literal["refuse", "ignore"]
Wandb = Literal["online", "offline", "off"]


@dataclass(frozen=True)
class PartConfig:
    """One half of the model: pretrained weights at `path`, or `config` built from scratch.

    `path` is a local Hugging Face directory, a hub name, another run's directory (its last stage that is done) or
    one stage of it, or a safetensors file or index; `config` is what ``config.json`` would say (``model_type``
    included), which weights alone do not. Given both, the weights come from `path`, and `config` may shape what is
    built of them but not compute otherwise than they were trained for: `model.build` refuses it by name. A config of
    another `model_type`, or an empty one, takes the place of one that stood there before.
    """

    path: str = ""
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerConfig:
    """`path` is a Hugging Face directory, a hub name, or "bytes": UTF-8 bytes, no file needed."""

    path: str = "bytes"
    pad_token: str = ""  # for tokenizers that come without one (Llama, MobileLLM)


@dataclass(frozen=True)
class ModelConfig:
    """Which parts are joined, and how."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "connector": "connector_weights",
        "depths": "encoder_layers",
        "density": "encoder_layer_ratio",
    }

    vision: PartConfig = field(default_factory=PartConfig)
    language: PartConfig = field(default_factory=PartConfig)
    connector_weights: str = ""  # projectors and fusion layers from this run, stage or safetensors; else drawn anew
    fusion: str = "cross_attention"  # one of those that there are: see docs/extending.md
    encoder_layers: Depths = "uniform"  # which encoder depths feed the LLM
    encoder_layer_ratio: float = 0.25  # share of the encoder's depths that do (paper 3.2); 1: all below the last block
    qk_norm: bool = False  # per-head RMSNorm on queries and keys of the visual attention
    positions: Positions = "grid"  # rotary positions of visual keys in joint_attention

    def __post_init__(self) -> None:
        if not 0 < self.encoder_layer_ratio <= 1:
            raise ValueError(
                f"model.encoder_layer_ratio={self.encoder_layer_ratio} is a share: set it above 0 and at most 1"
            )


SHARDS = ("train", "heldout")  # keys of the patterns of shards


@dataclass(frozen=True)
class DataConfig:
    """Shards are WebDataset tars: paths, ``{0000..0099}`` ranges, globs or URLs; ``sample:train`` is the shipped set.

    ``3 x small/*.tar`` reads a set three times in each epoch of the whole, ``0.5 x large/*.tar`` half of it. What is
    secret of a URL is taken out of it and kept apart: see `credentials`.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "text": "format",
        "image": "image_transform",
        "blank": "blank_images",
        "window": "shuffle_window",
        "threads": "decode_threads",
    }

    train: list[str] = field(default_factory=lambda: ["sample:train"])
    heldout: list[str] = field(default_factory=lambda: ["sample:heldout"])
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    format: TextMode = "caption"  # or the record's conversation in the LLM's chat template, its answers as targets
    # of a conversation: at the head of the first question, as LLaVA and its users ask, or behind the start token
    image_position: ImagePosition = "user"
    max_tokens: int = 77  # texts are cut here, start and end included (paper, appendix 7)
    image_transform: ImageMode = "resize"
    blank_images: bool = False  # feed blank images: the control that shows what the images add
    shuffle_window: int = 16384  # samples shuffled together: larger mixes more, smaller reads fewer shards at once
    workers: int = 0  # processes that load data; 0: the training process does
    decode_threads: int = 1  # that decode, in each of them
    cache_gb: float = 100.0  # disk for shards fetched from URLs, under $XDG_CACHE_HOME or ~/.cache
    retry_seconds: float = 300.0  # in which nothing of such a shard has come: then the run ends, to be tried again
    max_bad_samples: int = 1000  # broken samples are skipped and named; more than this many stop the run
    max_pixels: int = 50_000_000  # larger images are refused before they are decoded

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
        for name in SHARDS:  # however a config is made, no credential is in it
            object.__setattr__(self, name, [credentials.take(pattern) for pattern in getattr(self, name)])


@dataclass(frozen=True)
class GroupConfig:
    """Parameters that train together. `parameters` are globs over names; `lr` is the peak."""

    parameters: list[str]
    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, float) and not (isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} of a group must be a number of at least 0")


@dataclass(frozen=True)
class StageConfig:
    """One stage of training. Whatever no group names is frozen.

    `global_batch` is science and `micro_batch` is hardware: accumulation is arithmetic.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "steps": "max_steps",
        "warmup": "warmup_ratio",
        "keep_moments": "carry_optimizer_state",
        "decoupled_decay": "decoupled_weight_decay",
    }

    groups: dict[str, GroupConfig]
    global_batch: int = 256
    micro_batch: int = 32  # per process, at most
    epochs: float = 1.0
    max_steps: int = 0  # overrides epochs when positive
    drop_last: bool = False  # a fraction of a batch at the very end: leave out, or fill from the next epoch
    max_grad_norm: float = 1.0
    warmup_ratio: float = 0.03  # share of the steps
    min_lr: float = 0.1  # where the cosine ends, as a share of the peak
    optimizer: str = "adamw"  # one of those that there are: see docs/extending.md
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    carry_optimizer_state: bool = (
        False  # of AdamW, for parameters that the stage before trained too; else all start fresh
    )
    decoupled_weight_decay: bool = True  # decay independent of the peak learning rate (paper, Table 3)
    seed: int = 0
    # keys of `DataConfig` in which the stage differs from the run's `data`
    data: dict[str, Any] | None = field(default=None, metadata={"overrides": DataConfig})

    def __post_init__(self) -> None:
        if isinstance(self.data, DataConfig):  # given in Python: all of its keys
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
        for name in ("warmup_ratio", "min_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name):g} is a share: set it from 0 to 1")

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps of this stage on a set of `num_samples`; the data stream runs on over epochs."""
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
        """Micro-batches per process and step: the fewest of at most `micro_batch` that cut a batch evenly."""
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
    """Activation checkpointing by component: recompute nothing, all, or all but attention and matmuls."""

    vision: Checkpointing = "none"
    language: Checkpointing = "none"
    fusion: Checkpointing = "none"


@dataclass(frozen=True)
class EngineConfig:
    """How a step is carried out; none of it changes what is learned.

    Two switches are for steps of several micro-batches on FSDP2, and do nothing elsewhere. With
    `reshard_after_backward` false what a backward has gathered stays for the next forward: a gather less for every
    further micro-batch, where the whole model's compute copy fits. With `sync_each_micro_batch` gradients are
    reduced after each backward and wait cut: for models whose whole float32 gradients do not fit. Under HSDP copies are
    still reduced over once a step.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"shard": "shard_size", "offload": "cpu_offload"}

    precision: Precision = "fp32"  # of compute; master weights and moments are fp32 always
    shard_size: int = 0  # ranks that share one copy: 0 all (FSDP), 1 none (DDP), between: HSDP
    reshard_after_forward: bool = True
    reshard_after_backward: bool = True
    sync_each_micro_batch: bool = False
    cpu_offload: bool = False  # masters and moments in host memory
    compile: bool = False
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    ds_config: str = ""  # a DeepSpeed JSON: ZeRO instead of FSDP2
    ds_config_owned: Owned = "refuse"  # what that JSON fixes otherwise than a stage does: refuse it, or go by the stage


@dataclass(frozen=True)
class KeepConfig:
    """Which step checkpoints of a stage stay. Damaged ones do not count, and the newest sound one always stays."""

    last: int = 2
    every: int = 0  # and those whose step is a multiple of this
    best: bool = False  # and, of those saved at a step that looked at held-out data, the one with the lowest loss

    def __post_init__(self) -> None:
        if self.last < 1 or self.every < 0:
            raise ValueError(
                f"keep.last={self.last}, keep.every={self.every}: set last to 1 or more, every to 0 or more"
            )


@dataclass(frozen=True)
class LogConfig:
    """What is drawn besides `metrics.jsonl`, and from it."""

    wandb: Wandb = "offline"  # the variable WANDB_MODE, where set, is the last word
    tensorboard: bool = False  # event files under <output>/tensorboard


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps are traced."""

    steps: str = ""  # of each stage, such as 10:13 for steps 10, 11 and 12

    def __post_init__(self) -> None:
        self.window()

    def window(self) -> tuple[int, int]:
        """First step and the one after the last; (0, 0) for none."""
        if not self.steps:
            return 0, 0
        first, _, end = self.steps.partition(":")
        if not (first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end)):
            raise ValueError(f"profile.steps={self.steps} is not FIRST:END, such as '10:13' for steps 10, 11 and 12")
        return int(first), int(end)


@dataclass(frozen=True)
class GuardConfig:
    """Batches that are left out. A step whose loss or gradient is not finite never is taken."""

    spike: float = 20.0  # a loss so many robust standard deviations above the median is left out; 0: none is
    window: int = 128  # the losses of so many last steps say what is usual
    patience: int = 3  # so many bad steps in a row, and the run goes back to its last checkpoint, on other batches
    rollbacks: int = 2  # more of them end the run

    def __post_init__(self) -> None:
        least = {"spike": 0, "window": 16, "patience": 1, "rollbacks": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"guard.{name}={getattr(self, name)} must be at least {value}")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "hang_seconds": "watchdog_seconds",
        "failures_per_day": "expected_failures_per_day",
        "evidence": "blank_image_control",
    }

    name: str = "run"
    output: str = "runs/{name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    feature_cache: str = ""  # a directory that keeps what a frozen encoder makes of each image: it is run once only
    eval_interval: int = 0  # steps between held-out losses; 0: at the end of each stage only
    save_interval: int = 0  # steps between checkpoints; 0: by the measured cost of a save and the next line
    keep: KeepConfig = field(default_factory=KeepConfig)
    max_failed_saves: int = 3  # that many checkpoints in a row that cannot be written stop the run
    # of the whole job (86400 / mean seconds between failures): sets the interval between checkpoints (Daly 2006)
    expected_failures_per_day: float = 2.0
    grace_seconds: float = 30.0  # between a request to stop and the kill: many launchers' and Slurm's KillWait
    watchdog_seconds: float = 480.0  # without progress, in a step or (at least 60) outside: try the job again; 0: never
    guard: GuardConfig = field(default_factory=GuardConfig)
    extensions: list[str] = field(default_factory=list)  # modules of your own, which register fusions and the like
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
            self.data_of(name)  # a typo in what a stage overrides is answered at once
            OPTIMIZERS.check(self.stages[name].optimizer, f"stages.{name}.optimizer", self.extensions)
        FUSIONS.check(self.model.fusion, "model.fusion", self.extensions)

    @property
    def run_dir(self) -> Path:
        """Where it lives: `output` with its name filled in."""
        return Path(os.path.expanduser(self.output.replace("{name}", self.name)))

    def data_of(self, stage: str) -> DataConfig:
        """The data that `stage` reads: the run's, with the stage's own keys over it. Raises ValueError for a typo.

        What is no stage, such as the weights a run begins with, has the run's.
        """
        own = self.stages[stage].data if stage in self.stages else None
        if not own:
            return self.data
        try:
            return resolve(self.data, own)
        except ValueError as error:
            raise ValueError(f"stages.{stage}.data: {str(error).removeprefix('config: ')}") from None


def _without_credentials(data: dict[str, Any]) -> dict[str, Any]:
    """A stage's `data`, whose values may be of a wrong type still."""
    lists = {name: data[name] for name in SHARDS if isinstance(data.get(name), list)}
    return data | {
        name: [credentials.take(one) if isinstance(one, str) else one for one in value] for name, value in lists.items()
    }


# What a run directory holds besides its stages: no stage can have these names.
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
    """Complete or absent: who reads `path` meanwhile finds what was there before. Raises OSError."""
    write_text(path, to_yaml(config))


def load(path: Path) -> Config:
    """The very config that `save` wrote."""
    return resolve(Config(), path)


def run_of(path: str) -> Config | None:
    """The config of the run whose directory, or stage's directory, `path` is; None if it is neither."""
    place = Path(path).expanduser()
    if (place / "config.json").is_file():  # a Hugging Face directory, wherever it is
        return None
    saved = [found for found in (place / "config.yaml", place.parent / "config.yaml") if found.is_file()]
    if not (place.is_dir() and saved):
        return None
    checksums.check_file(saved[0], EDITED)
    return load(saved[0])


def holds_weights_alone(path: str) -> bool:
    """Whether `path` names a safetensors file, or the index of several."""
    return path.endswith((".safetensors", ".safetensors.index.json"))


EDITED = "restore it; or, if you changed it yourself, go on with the run by --config, which takes the change up"
# What may change between two parts of one run: the hardware's side, and how often one looks.
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
    *("feature_cache", "extensions"),
)
PLACES = ("data.train", "data.heldout")


def differences(one: Config, other: Config, moved: bool = False) -> list[str]:
    """Keys whose change makes it another run. `moved`: the folders of its shards may be others."""
    special = {name for run in (one, other) for name, stage in run.stages.items() if stage.data}
    flat, wanted = (flatten(_with_data(run, special)) for run in (one, other))
    keys = [key for key in sorted(flat.keys() | wanted.keys()) if flat.get(key) != wanted.get(key)]
    if moved:  # what lies there is compared when it is opened
        keys = [
            key
            for key in keys
            if not key.endswith(PLACES) or without_folders(flat.get(key)) != without_folders(wanted.get(key))
        ]
    return [key for key in keys if not any(fnmatchcase(key, free) for free in FREE)]


def without_folders(patterns: Any) -> Any:
    """Patterns of shards without their folders: ``2 x /old/set/*.tar`` is ``2 x *.tar``."""
    if not isinstance(patterns, list):
        return patterns
    return [re.sub(r"^((?:[\d.]+ x )?).*/", r"\1", str(pattern)) for pattern in patterns]


def _with_data(config: Config, stages: Collection[str]) -> dict[str, Any]:
    """`config` as plain data, each of `stages` with all that it reads: one value may be given in two ways."""
    plain = asdict(config)
    for name, stage in plain["stages"].items():
        stage["data"] = asdict(config.data_of(name)) if name in stages else None
    return plain


def to_yaml(config: Config) -> str:
    """The config as a run saves it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
