"The settings of a toy study: a straight line through points, by gradient descent."
from dataclasses import dataclass

from speedrun_nb.core.settings import setting
from speedrun_nb.core.study import Metric, Study, Target


@dataclass(frozen=True)
class Train:
    steps: int = setting("steps of gradient descent", low=1, high=1000)
    lr: float = setting("learning rate", above=0, high=1)
    step_ms: float = setting("time that a step is said to take, milliseconds", above=0, implementation=True)


@dataclass(frozen=True)
class Settings:
    train: Train


METRICS = {metric.name: metric for metric in (
    Metric("time_seconds", "time", "s", "lower", digits=3, quality=False),
    Metric("loss", "squared error", "", "lower", digits=4),
    Metric("peak_memory_bytes", "peak memory", "MiB", "lower", scale=2**-20, digits=0, quality=False))}

STUDY = Study(
    name="toy", title="A line through points",
    schema=Settings, budget="train.steps", work=("train.steps",), parameters={},
    trainer="speedrun_nb.toy.train:train", checker=None, checkpoints=False, datasets={},
    metrics=METRICS, clock="steps, at the time that a step is said to take", target=Target("loss", 0.02),
    stages=("demo", "published"), log_names={}, log_settings={},
    notice=lambda flat: "Made-up points and made-up times.", protocol="Nothing is really timed.",
    data_words=lambda flat: "a hundred points near a line", weights=None, token_flops=None)
