"The trainer of the toy study: numpy alone."
import time
from collections.abc import Iterable, Iterator

import numpy as np

from speedrun_nb.core.records import Progress, Ready, Result

from .settings import Settings


def train_one(settings: Settings, seed: int) -> Result:
    "Fit slope and intercept. The time is made up, and waited for: steps at their price, a per mille of noise."
    rng, train = np.random.default_rng(seed), settings.train
    x = rng.uniform(-1, 1, 100)
    y = 2 * x + 1 + rng.normal(0, 0.1, 100)
    weights, losses = np.zeros(2), []
    for _ in range(train.steps):
        error = weights[0] * x + weights[1] - y
        losses.append(float((error**2).mean()))
        weights -= train.lr * np.array([(error * x).mean(), error.mean()])
    noise = np.random.default_rng([seed, round(train.step_ms)]).normal(0, 0.001)
    seconds = train.steps * train.step_ms / 1000 * (1 + noise)
    time.sleep(seconds)
    curve = {"epoch": list(range(len(losses))), "loss": losses}
    return Result(seed, "completed", float(seconds), {"loss": losses[-1]}, curve, losses, None)


def train(settings: Settings, seeds: Iterable[int]) -> Iterator[Ready | Progress | Result]:
    yield Ready("cpu", "fp64", 1, 0.0, {})
    for seed in seeds:
        yield Progress(seed, settings.train.steps, settings.train.steps)
        yield train_one(settings, seed)
