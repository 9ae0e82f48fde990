"""How well do a frozen encoder's features classify? Attentive and linear probes, a grid of rates in one pass."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_scale.cli import Parser
from hive_scale.exit_codes import ended

if TYPE_CHECKING:
    from hive_scale.evaluate.classification_datasets import ClassificationDataset
    from hive_scale.evaluate.probe_runner import ProbeConfig

EXAMPLES = """\
examples:
  python launchers/probe.py runs/debug --set emoji --data data/emoji            a run's encoder
  python launchers/probe.py runs/debug --set fashion_mnist --augment none --heads knn,linear
  torchrun --nproc_per_node 8 launchers/probe.py models/siglip-large-patch16-384 --set cifar10,cifar100 --workers 8
  python launchers/probe.py models/clip-vit-large-patch14-336 --set folder --data my/images

Sets: cifar10, cifar100, imagenet, tiny_imagenet, food101, stanford_cars, pets, caltech256, fashion_mnist, emoji,
and folder (a folder per class under train/ and test/). --data holds the hub's parquet files, class folders, or what
torchvision downloads. Rates are chosen on a validation split, never on the test images; where a tenth of the training
images has to serve as one, a probe at the rate chosen is trained on all of them again. The same command again passes
over sets that it has results of. Exit codes: 0 done, 2 something to change.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    return ended(lambda: _probe(arguments))


def check(argv: Sequence[str]) -> None:
    """Raise ValueError now for mistakes in the command `argv`, though its encoder does not exist yet."""
    arguments = _parse(argv)
    _plan(arguments)
    _sets(arguments)


def _probe(arguments: argparse.Namespace) -> int:
    from hive_scale.locate import check_there

    check_there(arguments.encoder)  # before torch is imported, which takes long
    from hive_scale.device import choose_precision
    from hive_scale.distributed import session
    from hive_scale.evaluate.encoder import Encoder
    from hive_scale.evaluate.probe_runner import ProbeRunner, results_for_all, save, warnings
    from hive_scale.observability.console import console
    from hive_scale.precision import DTYPES
    from hive_scale.resilience.watchdog import watching
    from hive_scale.run import find_encoder

    path = find_encoder(arguments.encoder)
    plan, output = _plan(arguments), arguments.output or arguments.encoder / "probes"
    sets = _sets(arguments)
    with session() as world, watching(world):
        say = console.print if world.is_main else _say_nothing
        precision, told = choose_precision(world.device, arguments.precision)
        say(told)
        encoder = Encoder(path, world.device, DTYPES[precision], arguments.depth)
        for data in sets:
            file = output / f"{data.name}.json"
            # copies of a set on several nodes differ in file times, so all ranks use rank 0's identity
            data = replace(data, identity=world.of_main(data.identity))
            results = results_for_all(file, plan, encoder, data, world)
            if results is None:
                sizes = f"{data.train.size} images to train, {data.test.size} to test"
                say(f"{data.name}: {data.num_classes} classes, {sizes}")
                for note in data.notes:
                    say(f"{data.name}, {note}")
                results = ProbeRunner(encoder, data, plan, world, output / "features").run(say)
                if world.is_main:
                    save(file, plan, encoder, data, results)
                if data.num_broken:
                    say(f"{data.name}: {data.num_broken} images could not be decoded; others stood in for them")
            if world.is_main:
                _show(results)
                for warning in warnings(results):
                    say(f"warning: {warning}")
                print(f"results  {file}")
    return 0


def _sets(arguments: argparse.Namespace) -> list[ClassificationDataset]:
    from hive_scale.evaluate.classification_datasets import open_dataset

    root, names = arguments.data or Path("data"), arguments.set.split(",")
    if arguments.data and len(names) == 1 and not (root / names[0]).is_dir():
        return [open_dataset(names[0], root)]
    return [open_dataset(name, root / name) for name in names]


def _plan(arguments: argparse.Namespace) -> ProbeConfig:
    from hive_scale.evaluate.probe_runner import ProbeConfig
    from hive_scale.evaluate.probes import PROBES, RATES, Recipe

    heads = arguments.heads.split(",")
    if unknown := [head for head in heads if head not in (*PROBES, "knn")]:
        raise ValueError(f"--heads: there is no '{unknown[0]}': choose among {', '.join(PROBES)}, knn")
    for name, least in (("epochs", 1), ("batch", 1), ("seeds", 1), ("limit", 0)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise ValueError(f"--{name} {value} must be at least {least}")
    try:
        rates = tuple(float(rate) for rate in arguments.rates.split(",")) if arguments.rates else RATES
    except ValueError:
        raise ValueError(f"--rates {arguments.rates} are no numbers: give such as 1e-3,2e-3") from None
    if not all(0 < rate < inf for rate in rates):
        raise ValueError(f"--rates {arguments.rates}: each must be above 0: give such as 1e-3,2e-3")
    recipe = Recipe(rates=rates, batch=arguments.batch)
    if arguments.epochs is not None:
        recipe = replace(recipe, epochs=arguments.epochs, min_steps=0)
    return ProbeConfig(
        kinds=tuple(kind for kind in PROBES if kind in heads),
        recipe=recipe,
        seeds=tuple(range(arguments.seeds)),
        augment=arguments.augment == "paper",
        neighbours="knn" in heads,
        limit=arguments.limit,
        workers=arguments.workers,
    )


def _say_nothing(text: str) -> None:
    """Stands in for printing on all ranks but the first."""


def _show(results: dict[str, Any]) -> None:
    from rich.table import Table

    from hive_scale.observability.console import console

    table = Table("probe", "test accuracy, %", "deviation", "rates chosen")
    for kind, one in results.items():
        rates = ", ".join(f"{seed['rate']:g}" for seed in one.get("seeds", ()))
        table.add_row(kind, f"{one['mean']:.2f}", f"{one['deviation']:.2f}", rates)
    console.print(table)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("encoder", type=Path, help="a run, one of its stages, or a Hugging Face directory")
    parser.add_argument("--set", required=True, metavar="A,B", help="see below")
    parser.add_argument("--data", type=Path, metavar="DIR", help="holds DIR/<set> (data), or is the one set itself")
    parser.add_argument("--heads", default="attentive,linear", help="attentive, linear, knn (%(default)s)")
    parser.add_argument("--rates", default="", metavar="A,B", help="peak learning rates (seven, 5e-5 to 2e-3)")
    parser.add_argument("--epochs", type=int, metavar="N", help="a step a batch (50, and of few batches 2000 steps)")
    parser.add_argument("--batch", type=int, default=512, help="images a step, over all processes (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs, for a deviation (%(default)s)")
    parser.add_argument("--augment", choices=("paper", "none"), default="paper", help="none keeps features on disk")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="train on N images only, always the same")
    parser.add_argument("--depth", type=int, default=-2, help="the block that is read (%(default)s, as the authors)")
    parser.add_argument("--workers", type=int, default=0, help="data processes (%(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of the encoder (bf16 on GPUs that have it)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for results and features (<encoder>/probes)")
    return parser.parse_args(argv)
