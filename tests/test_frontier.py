"""The frontier on published runs, and its error rates in more designs than the notebook has room for."""
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from speedrun_nb.core.study import Metric
from speedrun_nb.evidence.frontier import budget_groups, frontier
from speedrun_nb.evidence.groups import Group

TIME = Metric("time_seconds", "time", "s", "lower", digits=3, quality=False)
ACCURACY = Metric("accuracy", "accuracy", "%", "higher", scale=100)
GRID = Path(os.environ.get("SPEEDRUN_DATA", "")) / "published/grid-csv/part1_cifar10.csv"


def as_group(name, epochs, level, runs):
    config = {"train.epochs": epochs, "evaluation.tta_level": level}
    runs = runs.reset_index(drop=True)
    return Group("cifar", "published", name, f"{level}-{epochs}", config, runs, 0, 0, runs.iloc[:0], name)


@pytest.fixture(scope="module")
def grid():
    "(level, epochs) -> group of ten runs, of which the first carries the autotuning."
    if not os.environ.get("SPEEDRUN_DATA") or not GRID.exists():
        pytest.skip(f"needs the published grid: SPEEDRUN_DATA names no folder with {'/'.join(GRID.parts[-3:])}")
    frame = pd.read_csv(GRID).rename(columns={"total_time_seconds": "time_seconds", "final_tta_acc": "accuracy"})
    parts = frame.groupby(["experiment", "tta_level", "train_epochs"])
    return {(level, epochs): as_group(name, epochs, level, runs) for (name, level, epochs), runs in parts}


def without_first(groups):
    return {key: replace(g, runs=g.runs.iloc[1:].reset_index(drop=True)) for key, g in groups.items()}


def against(groups, variant, baseline):
    "A group of the grid against the frontier of another."
    budgets = budget_groups(groups.values(), groups[baseline], "train.epochs")
    return frontier(groups[variant], budgets, TIME, ACCURACY)


def test_published_budgets_are_found_whatever_their_names(grid):
    found = budget_groups(grid.values(), grid[0, 9.9], "train.epochs")
    assert [g.name for g in found] == [f"grid_tta0_ep{epochs}" for epochs in (9.0, 9.9, 11.0, 12.0, 13.0)]
    found = budget_groups(grid.values(), grid[1, 9.0], "train.epochs")
    assert [g.config["evaluation.tta_level"] for g in found] == [1] * 5


@pytest.mark.parametrize("epochs", [9.0, 9.9, 11.0, 12.0, 13.0])
def test_mirroring_beats_longer_training_once_the_first_runs_are_left_out(grid, epochs):
    found = against(without_first(grid), (1, epochs), (0, 9.9))
    low, high = found.quality.ci95
    assert found.better is True and found.quality.p < 1e-5 and found.fit_p > 0.05
    assert 0.0055 < found.quality.absolute < 0.0067 and 0.0040 < low and high < 0.0080
    assert found.time is None and "no budget of the baseline reaches" in found.time_reason
    assert found.quality.outside < 0.05


@pytest.mark.parametrize("epochs", [9.0, 9.9, 11.0, 12.0, 13.0])
def test_the_first_runs_make_the_intervals_useless(grid, epochs):
    def width(groups): return np.ptp(against(groups, (1, epochs), (0, 9.9)).quality.ci95)
    all_runs, clean = width(grid), width(without_first(grid))
    assert all_runs > 3 * clean and all_runs > 0.0085  # wider than the gain from 9 to 13 epochs


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("epochs", [9.9, 11.0, 12.0])
def test_a_published_budget_lies_on_the_frontier_of_the_others(grid, level, epochs):
    found = against(without_first(grid), (level, epochs), (level, 9.0))
    assert len(found.budgets) == 4 and found.better is None
    assert found.quality.p > 0.05 and abs(found.quality.absolute) < 0.001


def seconds(epochs): return 0.1 + 0.39 * epochs


def quality_after(took, exponent=1.4):
    "A power law from 93.05 % after 9 epochs to 93.6 % after 13."
    def gain(time): return 1 - (time / seconds(9)) ** -exponent
    return 0.9305 + 0.0055 * gain(took) / gain(seconds(13))


def draw(random, epochs, n, faster=0.0, correlation=0.0, time_sd=0.01, outlier=False, hosts=False):
    "Runs whose quality is that of the budget; times and qualities may be correlated."
    z = random.standard_normal((2, n))
    took = seconds(epochs) * (1 + time_sd * z[0]) * (1 - faster)
    noise = correlation * z[0] + np.sqrt(1 - correlation**2) * z[1]
    if outlier: took[0] += 7.3
    runs = pd.DataFrame({"time_seconds": took, "accuracy": quality_after(seconds(epochs)) + 0.0012 * noise})
    if not hosts: return runs
    odd = np.arange(n) % 2 == 1
    return runs.assign(host_id=np.where(odd, "a", "b"), time_seconds=took * np.where(odd, 1.3, 1))


FIVE = (9, 9.9, 11, 12, 13)
DESIGNS = {  # budgets, runs a group, epochs of the variant, how runs are drawn
    "five budgets": (FIVE, 10, 9.9, {}),
    "at the end": (FIVE, 10, 13, {}),
    "three runs": (FIVE, 3, 10.5, {}),
    "three budgets": ((9, 11, 13), 5, 10, {}),
    "far apart": ((6, 9, 18), 20, 12, {}),
    "two budgets": ((9, 13), 40, 11, {}),
    "together": (FIVE, 10, 10.5, dict(correlation=0.8, time_sd=0.05)),
    "against": (FIVE, 10, 10.5, dict(correlation=-0.8, time_sd=0.05)),
    "warm-up": (FIVE, 10, 10.5, dict(outlier=True)),
    "two hosts": (FIVE, 12, 10.5, dict(hosts=True))}


def holds(interval, truth):
    low, high = interval
    return (low is None or low <= truth) and (high is None or truth <= high)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_variant_on_the_frontier_is_rarely_called_better_or_worse(name):
    amounts, n, epochs, how = DESIGNS[name]
    trials, random, found = 100, np.random.default_rng(7), []
    for _ in range(trials):
        variant = as_group("idea", epochs, 1, draw(random, epochs, n, **how))
        budgets = [as_group(f"b{b}", b, 0, draw(random, b, n, **how)) for b in amounts]
        found.append(frontier(variant, budgets, TIME, ACCURACY))
    slack = 2.6 * np.sqrt(0.05 * 0.95 / trials)
    assert np.mean([f.better is not None for f in found]) <= 0.05 + slack
    quality, time = [f.quality.ci95 for f in found if f.quality], [f.time.ci95 for f in found if f.time]
    assert len(quality) > 0.8 * trials and np.mean([holds(interval, 0) for interval in quality]) >= 0.95 - slack
    assert np.mean([holds(interval, 0) for interval in time]) >= 0.95 - slack


def test_a_variant_that_is_3_percent_faster_is_found_with_enough_runs():
    random, found = np.random.default_rng(8), []
    for _ in range(30):
        budgets = [as_group(f"b{b}", b, 0, draw(random, b, 100)) for b in FIVE]
        variant = as_group("idea", 10, 1, draw(random, 10, 200, faster=0.03))
        found.append(frontier(variant, budgets, TIME, ACCURACY))
    assert np.mean([f.better is True for f in found]) > 0.85 and not any(f.better is False for f in found)
    assert abs(np.mean([f.time.relative for f in found]) + 0.03) < 0.004
