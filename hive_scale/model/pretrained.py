"""Load pretrained weights into components, and report tensors that are missing, unexpected or of another shape."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from hive_scale import checksums
from hive_scale.strangers import some

log = logging.getLogger(__name__)


def quiet() -> None:
    """Silence transformers' progress bars and loading report; this module reports differences in one line."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    set_verbosity_error()  # type: ignore[no-untyped-call]  # hides transformers' table of differences


def load_pretrained(
    kind: Any,
    path: str,
    config: PretrainedConfig,
    given: Mapping[str, Tensor] | None,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module | None:
    """A float32 model of class `kind` with the weights at a Hugging Face `path`, or `given` ones; None without a path.

    `arguments` are those of the class beside the config.
    Raises ValueError that names tensors missing or of another shape, and CorruptFile if files of a directory of ours
    are corrupt.
    """
    if not path:
        return None
    if given is None:
        checksums.check(Path(path).expanduser())
    quiet()
    try:
        model, report = kind.from_pretrained(
            path if given is None else None,
            state_dict=None if given is None else dict(given),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, together with the other differences
            **arguments,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = next((line for line in str(error).splitlines() if line), repr(error))
        raise ValueError(f"the weights of {path} cannot be loaded: {reason}") from None
    shapes = [f"{name} {tuple(there)} instead of {tuple(here)}" for name, there, here in report["mismatched_keys"]]
    _tell_differences(path, report["missing_keys"], report["unexpected_keys"], shapes)
    return cast(nn.Module, model)


def check_finite(model: nn.Module, path: str | Path) -> None:
    """Raises ValueError if a weight is not finite, since all outputs and scores would be meaningless."""
    if spoiled := [name for name, one in model.named_parameters() if not one.isfinite().all()]:
        raise ValueError(f"the weights of {path} are not finite: {some(spoiled)}: give sound ones")


def load_connector(model: nn.Module, given: Mapping[str, Tensor], path: str) -> None:
    """Load projectors and fusion layers. Raises ValueError that names tensors missing or of another shape."""
    wanted = {name: p for name, p in model.named_parameters() if name.startswith(("projector.", "fusion."))}
    both = wanted.keys() & given.keys()
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in both
        if given[name].shape != wanted[name].shape
    ]
    _tell_differences(path, wanted.keys() - both, given.keys() - both, shapes)
    model.load_state_dict(dict(given), strict=False)


def _tell_differences(path: str, missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str]) -> None:
    """Raises ValueError if weights do not fill a component; tensors that it has no place for only cause a warning."""
    kinds = {"missing": sorted(missing), "of another shape": sorted(shapes), "unexpected": sorted(unexpected)}
    found = "; ".join(f"{kind}: {some(names)}" for kind, names in kinds.items() if names)
    if kinds["missing"] or kinds["of another shape"]:
        raise ValueError(f"{path} does not fit this model: {found}: give the weights that belong to this config")
    if found:
        log.warning("%s holds more than this model has a place for, which is left out: %s", path, found)
