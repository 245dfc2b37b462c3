"""The two sizes of the study."""

from dataclasses import dataclass
from typing import Literal

from based_megatron.recall.mqar import FIGURE, TINY, Task
from based_megatron.recall.train import Recipe, Stage

PresetName = Literal["figure", "tiny"]


@dataclass(frozen=True)
class Preset:
    """A task, and how models learn it."""

    task: Task
    recipe: Recipe


PRESETS: dict[str, Preset] = {
    "figure": Preset(
        FIGURE,
        Recipe(
            rates=(1e-3, 10**-2.5, 1e-2, 10**-1.5),
            epochs=12,
            stages=(Stage(2, 2), Stage(4, 1)),
            test_every_epochs=2,
        ),
    ),
    "tiny": Preset(TINY, Recipe(rates=(1e-2,), epochs=4, batch_examples=128)),
}
"""Figure: the paper's task and rates, in 12 epochs in place of 32, judged after 1,414 and 2,828 steps. Tiny: 600 steps, one rate."""
FAITHFUL_EPOCHS = 32
