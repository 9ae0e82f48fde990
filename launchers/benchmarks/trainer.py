"""HF Trainer as a contender. Its loop owns the thread it runs in, so it runs in one of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from benchmarks.peers import is_fsdp
from benchmarks.task import ACCUMULATION, CLIP, Step, Task

if TYPE_CHECKING:
    from torch import Tensor

    from hive_scale.batch import Batch


def trainer(task: Task) -> Step:
    """HF Trainer's own loop, in a thread that waits for the data of each step; Trainer counts ``labels`` itself."""
    from queue import Queue
    from threading import Thread

    import torch
    from torch.distributed.fsdp import FSDPModule
    from transformers import Trainer, TrainingArguments

    from hive_scale.engine.optimizer import make_optimizer

    model, groups = task.build()
    turns: Queue[Sequence[Batch]] = Queue()
    done: Queue[BaseException | None] = Queue()
    sums: list[Tensor] = []

    class Feed:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            while True:
                done.put(None)  # the request for a step's data means that the previous step is over
                for batch in turns.get():
                    yield batch.inputs() | {"labels": batch.target_ids}

    class Loop(Trainer):
        def get_train_dataloader(self) -> Any:
            return Feed()

        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = make_optimizer(dict(cast(Any, self.model).named_parameters()), groups, task.stage)
            return self.optimizer

    def mean(loss: Tensor, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        sums.append(loss.detach())
        return loss / num_items_in_batch

    def train() -> None:
        try:
            if task.world.device.type == "cuda":
                torch.cuda.set_device(task.world.device)  # the current device is per thread
            loop.train()
        except BaseException as error:
            done.put(error)

    arguments = TrainingArguments(
        max_steps=10**9,
        per_device_train_batch_size=task.stage.micro_batch,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=task.world.device.type == "cpu",
        ddp_find_unused_parameters=False,
        accelerator_config={"use_configured_state": True},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    arguments.deepspeed_plugin = None  # already in the shared state

    def wait() -> None:
        if error := done.get():
            raise error

    loop = Loop(model, arguments, train_dataset=[None], compute_loss_func=mean)
    Thread(target=train, daemon=True).start()
    wait()
    assert isinstance(loop.model_wrapped, FSDPModule) == is_fsdp(task)

    def step(batches: Sequence[Batch]) -> float:
        sums.clear()
        turns.put(batches)
        wait()
        total, num_tokens = task.world.sum(sum(sums).item(), sum(batch.num_tokens for batch in batches))  # type: ignore[union-attr]
        return total / num_tokens

    return step
