"""Plan: the memory and the time that a recipe needs on so many GPUs of a kind, before any is there.

python jobs/plan.py --recipe sft-full --gpus 8 --kind H200 [--data.pack-length 8192 and all other options of a training]
"""

from dataclasses import dataclass, field, replace

import tyro
from rich.console import Console
from rich.table import Table

from mqwen import cli
from mqwen.model import MQWenConfig
from mqwen.train.build import starting_point
from mqwen.train.command_line import overridden
from mqwen.train.estimate import Load, estimate
from mqwen.train.hardware import CARDS, REACHED
from mqwen.train.recipes import QWEN_7B, recipe
from mqwen.train.settings import RunSettings, SettingsError


@dataclass(frozen=True)
class Plan:
    """`reached` is the share of the card's rate that the model's computations are taken to reach."""

    recipe: str
    gpus: int = 1
    kind: str = "H200"
    reached: float = REACHED
    load: tyro.conf.OmitArgPrefixes[Load] = field(default_factory=Load)


def sizes(recipe: str, settings: RunSettings) -> MQWenConfig:
    """The artifact's that is started from, or else those of the models that the recipe is for."""
    if settings.model.init_from or settings.tokenizer:
        return starting_point(settings)[0]
    return MQWenConfig(**(QWEN_7B if recipe.endswith("-7b") else {}) | settings.model.config)


def check(plan: Plan) -> None:
    """Raises SettingsError for what is out of range."""
    if plan.kind not in CARDS:
        raise SettingsError(f"--kind {plan.kind} is unknown; known are {', '.join(CARDS)}")
    counts = ("gpus", plan.gpus, 1), ("pictures", plan.load.pictures, 0), ("conversations", plan.load.conversations, 1)
    shares = ("reached", plan.reached, 0.001), ("labelled", plan.load.labelled, 0)
    for option, value, least, most in (*((*c, 10**6) for c in counts), *((*share, 1) for share in shares)):
        if not least <= value <= most:
            raise SettingsError(f"--{option} is {value}; {least} to {most} is allowed")


def main() -> None:
    plan, rest = tyro.cli(Plan, description=__doc__, return_unknown_args=True)
    check(plan)
    settings = overridden(recipe(plan.recipe), rest)
    settings = replace(settings, parallel=replace(settings.parallel, workers=plan.gpus))
    # Whatever the dataset is: it need not be there yet.
    replace(settings, data=replace(settings.data, dataset="any", mixture={})).check()
    card, found = CARDS[plan.kind], estimate(settings, sizes(plan.recipe, settings), plan.load)
    table = Table("in memory", "GiB", title=f"{plan.recipe} on {plan.gpus} {plan.kind}, each")
    for what, size in found.memory.items():
        table.add_row(what, f"{size / 2**30:.2f}")
    table.add_row("all", f"{found.bytes / 2**30:.2f} of {card.memory / 2**30:.1f}", style="bold")
    Console().print(table)
    seconds = found.flops / (plan.gpus * card.flops * plan.reached)
    steps = f", {settings.steps * seconds / 3600:.2f} h for {settings.steps:,} steps" if settings.steps else ""
    print(
        f"{found.parameters / 1e9:.2f}e9 weights, {found.trained / 1e9:.3f}e9 of them trained; a step of "
        f"{found.positions:,} positions takes {found.flops / 1e12:,.0f} TFLOP: {seconds:.2f} s{steps}, "
        f"{found.positions / seconds:,.0f} positions/s, where {plan.reached:.0%} of {card.flops / 1e12:.0f} TFLOP/s "
        "are reached"
    )
    if found.bytes > card.memory:
        raise SettingsError(
            "it does not fit: take more --gpus, fewer --data.packs-per-row, --parallel.offload weights, or a sharding "
            "--parallel.strategy"
        )


if __name__ == "__main__":
    cli.run(main)
