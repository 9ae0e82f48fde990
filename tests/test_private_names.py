"""Private names of dependencies: all that are used are in one table, each covered by a contract.

Why: a minor release may change them. Whatever could use public names does; for the rest, the contract fails before a
run does, and shows the name, the file that needs it and the versions in which it was tried.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from hive_scale.distributed import session
from hive_scale.engine.deepspeed_config import load_deepspeed

pytestmark = pytest.mark.contract
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hive_scale"


class Use(NamedTuple):
    package: str
    tried: str  # versions
    user: str  # the one file that uses it
    why: str


DEEPSPEED = "0.19.8"
TORCH = "2.11 to 2.14"
USES = {
    "_hp_mapping": Use("deepspeed", DEEPSPEED, "engine/deepspeed.py", "where a parameter lies in ZeRO-1/2's masters"),
    "grad_position": Use("deepspeed", DEEPSPEED, "engine/deepspeed.py", "where a parameter lies in ZeRO-3's masters"),
    "get_param_id": Use("deepspeed", DEEPSPEED, "engine/deepspeed.py", "the key of grad_position"),
    "fp32_partitioned_groups_flat": Use("deepspeed", DEEPSPEED, "engine/deepspeed.py", "ZeRO-3's masters"),
    "sub_group_to_group_id": Use(
        "deepspeed", DEEPSPEED, "engine/deepspeed.py", "the parameter group of a ZeRO-3 master"
    ),
    "ds_tensor": Use("deepspeed", DEEPSPEED, "engine/deepspeed.py", "this rank's part of a ZeRO-3 parameter"),
    "ds_numel": Use("deepspeed", DEEPSPEED, "engine/deepspeed.py", "the whole size of a ZeRO-3 parameter"),
    "ds_shape": Use("deepspeed", DEEPSPEED, "engine/deepspeed.py", "the whole shape of a ZeRO-3 parameter"),
    "update_lp_params": Use("deepspeed", DEEPSPEED, "engine/deepspeed.py", "masters that were loaded reach the model"),
    "checkpoint_event_prologue": Use("deepspeed", DEEPSPEED, "engine/deepspeed.py", "partitions persistent parameters"),
    "checkpoint_event_epilogue": Use(
        "deepspeed", DEEPSPEED, "engine/deepspeed.py", "gathers persistent parameters again"
    ),
    "overflow": Use("deepspeed", DEEPSPEED, "engine/deepspeed.py", "whether the last step was left out"),
    "_python_dispatch": Use(
        "torch", TORCH, "engine/activation_checkpointing.py", "TorchDispatchMode, under every operator"
    ),
    "_pytree": Use("torch", TORCH, "engine/activation_checkpointing.py", "tensors of nested results"),
    "_subclasses": Use("torch", TORCH, "plan/trace.py", "FakeTensorMode, shapes without memory"),
    "_cdata": Use("torch", TORCH, "plan/trace.py", "the identity of a storage without memory"),
    "_schema": Use("torch", TORCH, "plan/trace.py", "whether an operator writes in place"),
    "_overloadpacket": Use("torch", TORCH, "plan/trace.py", "the key of torch's table of FLOP formulas"),
    "_scaled_dot_product_flash_attention": Use(
        "torch", TORCH, "engine/activation_checkpointing.py", "an operator worth keeping"
    ),
    "_scaled_dot_product_efficient_attention": Use(
        "torch", TORCH, "engine/activation_checkpointing.py", "an operator worth keeping"
    ),
    "_scaled_dot_product_cudnn_attention": Use(
        "torch", TORCH, "engine/activation_checkpointing.py", "an operator worth keeping"
    ),
    "_scaled_dot_product_flash_attention_for_cpu": Use("torch", TORCH, "plan/trace.py", "has no FLOP formula"),
    "_scaled_dot_product_flash_attention_for_cpu_backward": Use("torch", TORCH, "plan/trace.py", "has no FLOP formula"),
    "_upsample_bicubic2d_aa": Use("torch", TORCH, "data/transform.py", "resizing into memory that exists"),
    "_record_memory_history": Use("torch", TORCH, "observability/profiler.py", "a memory snapshot on a GPU"),
    "_dump_snapshot": Use("torch", TORCH, "observability/profiler.py", "a memory snapshot on a GPU"),
    "_C": Use("torch", TORCH, "observability/profiler.py", "kinds of events in a trace"),
    "_profiler": Use("torch", TORCH, "observability/profiler.py", "kinds of events in a trace"),
    "_EventType": Use("torch", TORCH, "observability/profiler.py", "kinds of events in a trace"),
    "experimental_event_tree": Use("torch", TORCH, "observability/profiler.py", "allocations of a host as a tree"),
    "_get_node": Use("omegaconf", "2.4.0", "config_merge.py", "a child of a config, unresolved"),
    "_make_submission_file_text": Use("submitit", "1.5.4", "slurm/submission.py", "a script without submitting it"),
    "_submitit_command_str": Use("submitit", "1.5.4", "slurm/submission.py", "what such a script runs"),
}
# documented by Python itself, with their underscore
STANDARD = {"_exit", "_current_frames", "_open"}


def private_names(path: Path) -> Iterator[str]:
    """Names with a leading underscore that `path` takes from modules and objects that it does not define itself."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    annotated = [node.target for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    own |= {target.id for target in annotated if isinstance(target, ast.Name)}
    for node in attributes:
        if node.attr not in own:
            yield node.attr
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (*node.module.split("."), *(alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_private_name_is_in_the_table(path: Path) -> None:
    found = {name for name in private_names(path) if is_private(name)} - STANDARD
    assert found <= USES.keys(), "say it in public names, or add it to the table with a contract"


def test_nothing_comes_from_the_inside_of_transformers() -> None:
    for path in files():
        assert "transformers.models." not in path.read_text(), f"{path}: only what transformers itself exports"


def test_the_table_is_of_what_is_used() -> None:
    for name, use in USES.items():
        assert name in (PACKAGE / use.user).read_text(), f"{name}: {use.user} does not use it any more"


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[int, Any]]:
    """DeepSpeed engines of stage 2 and 3 after one step of a small model, in this process alone."""
    made = {}
    with pytest.MonkeyPatch.context() as patch, session():
        patch.setenv("LOCAL_RANK", "0")
        patch.setenv("LOCAL_SIZE", "1")  # else it starts numactl to count
        for stage in (2, 3):
            torch.manual_seed(stage)
            model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
            settings = {
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
            }
            deepspeed = load_deepspeed()
            deepspeed.init_distributed(auto_mpi_discovery=False)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
            engine.backward(engine(torch.ones(1, 6)).sum())
            engine.step()
            made[stage] = engine
        yield made
        for engine in made.values():
            engine.destroy()


def _zero_two(engine: Any) -> None:
    optimizer = engine.optimizer
    flat = optimizer.param_groups[0]["params"][0]
    assert flat.dtype == torch.float32
    for parameter in engine.module.parameters():
        cut = parameter._hp_mapping
        assert cut.param_group_index == 0
        held, here = cut.lp_fragment_address, cut.hp_fragment_address
        assert held.start == 0
        assert here.numel == parameter.numel()
        assert torch.equal(flat[here.start : here.start + here.numel], parameter.detach().flatten())
    flat.data.zero_()
    optimizer.update_lp_params()
    assert all(not parameter.any() for parameter in engine.module.parameters())
    assert optimizer.overflow is False or not optimizer.overflow


def _zero_three(engine: Any) -> None:
    optimizer = engine.optimizer
    for parameter in engine.module.parameters():
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        assert parameter.ds_numel == parameter.ds_shape.numel() <= size
        flat = optimizer.fp32_partitioned_groups_flat[group]
        held = parameter.ds_tensor[: parameter.ds_numel]
        assert torch.equal(flat[start : start + parameter.ds_numel], held)
        assert optimizer.sub_group_to_group_id[group] == 0
    optimizer.checkpoint_event_prologue()
    optimizer.checkpoint_event_epilogue()
    assert not optimizer.overflow


def _torch() -> None:
    from torch._C._profiler import _EventType
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.profiler import ProfilerActivity, profile
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((func._overloadpacket, func._schema.is_mutable))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Mode():
        one, other = torch.ones(3, 3), torch.ones(3, 3)
        one.mm(other).add_(1)
        assert one.untyped_storage()._cdata != other.untyped_storage()._cdata
    assert (torch.ops.aten.mm, False) in seen
    assert (torch.ops.aten.add_, True) in seen
    assert tree_leaves({"a": [1, 2]}) == [1, 2]
    assert tree_map_only(int, str, [1, "b"]) == ["1", "b"]
    for name in USES:
        if name.startswith("_scaled_dot_product"):
            assert getattr(torch.ops.aten, name).default is not None if "backward" not in name else True
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    out = torch.empty(1, 3, 4, 4, dtype=torch.uint8)
    torch.ops.aten._upsample_bicubic2d_aa.out(pixels, [4, 4], False, None, None, out=out)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.ones(1000).sum()
    tree = profiled.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    assert any(event.tag == _EventType.TorchOp for event in tree)
    assert callable(torch.cuda.memory._record_memory_history)
    assert callable(torch.cuda.memory._dump_snapshot)


def _omegaconf() -> None:
    from omegaconf import OmegaConf

    assert OmegaConf.create({"a": {"b": "${missing}"}})._get_node("a") is not None


def _submitit() -> None:
    import submitit

    from hive_scale.slurm.submission import Executor

    assert issubclass(Executor, submitit.SlurmExecutor)
    text = Executor("unused").script()
    assert "submitit.core._submit" in text


def contract(package: str, check: Callable[..., None], *arguments: Any) -> None:
    """Run `check`; a failure is told with what it means for the project."""
    try:
        check(*arguments)
    except Exception as error:
        names = ", ".join(name for name, use in USES.items() if use.package == package)
        tried = next(use.tried for use in USES.values() if use.package == package)
        raise AssertionError(
            f"{package} {version(package)} has changed one of the private names {names} ({error!r}): they were tried "
            f"with {package} {tried}; see the files in this table, and narrow pyproject.toml until they are mended"
        ) from error


def test_deepspeed_zero_two(engines: dict[int, Any]) -> None:
    contract("deepspeed", _zero_two, engines[2])


def test_deepspeed_zero_three(engines: dict[int, Any]) -> None:
    contract("deepspeed", _zero_three, engines[3])


def test_torch() -> None:
    contract("torch", _torch)


def test_omegaconf() -> None:
    contract("omegaconf", _omegaconf)


def test_submitit() -> None:
    contract("submitit", _submitit)
