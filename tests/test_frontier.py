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

TIME, ACCURACY = Metric("time_seconds", "time", "s", "lower", digits=3, quality=False), Metric("accuracy", "accuracy", "%", "higher", scale=100)
GRID = Path(os.environ.get("SPEEDRUN_DATA", "")) / "published/grid-csv/part1_cifar10.csv"


def as_group(name, epochs, level, runs):
    config = {"train.epochs": epochs, "evaluation.tta_level": level}
    return Group("cifar", "published", name, f"{level}-{epochs}", config, runs.reset_index(drop=True), 0, 0, runs.iloc[:0], name)


@pytest.fixture(scope="module")
def grid():
    "(level, epochs) -> group of ten runs, of which the first carries the autotuning."
    if not os.environ.get("SPEEDRUN_DATA") or not GRID.exists(): pytest.skip("needs the published grid: SPEEDRUN_DATA names no folder with published/grid-csv/part1_cifar10.csv")
    frame = pd.read_csv(GRID).rename(columns={"total_time_seconds": "time_seconds", "final_tta_acc": "accuracy"})
    return {(level, epochs): as_group(name, epochs, level, runs) for (name, level, epochs), runs in frame.groupby(["experiment", "tta_level", "train_epochs"])}


def without_first(groups): return {key: replace(g, runs=g.runs.iloc[1:].reset_index(drop=True)) for key, g in groups.items()}


def test_published_budgets_are_found_whatever_their_names(grid):
    found = budget_groups(grid.values(), grid[0, 9.9], "train.epochs")
    assert [g.name for g in found] == [f"grid_tta0_ep{epochs}" for epochs in (9.0, 9.9, 11.0, 12.0, 13.0)]
    assert [g.config["evaluation.tta_level"] for g in budget_groups(grid.values(), grid[1, 9.0], "train.epochs")] == [1] * 5


@pytest.mark.parametrize("epochs", [9.0, 9.9, 11.0, 12.0, 13.0])
def test_mirroring_beats_longer_training_once_the_first_runs_are_left_out(grid, epochs):
    clean = without_first(grid)
    found = frontier(clean[1, epochs], budget_groups(clean.values(), clean[0, 9.9], "train.epochs"), TIME, ACCURACY)
    assert found.better is True and found.quality.p < 1e-5 and found.fit_p > 0.05
    assert 0.0055 < found.quality.absolute < 0.0067 and 0.0040 < found.quality.ci95[0] and found.quality.ci95[1] < 0.0080
    assert found.time is None and "no budget of the baseline reaches" in found.time_reason and found.quality.outside < 0.05


@pytest.mark.parametrize("epochs", [9.0, 9.9, 11.0, 12.0, 13.0])
def test_the_first_runs_make_the_intervals_useless(grid, epochs):
    clean, width = without_first(grid), {}
    for name, groups in (("all", grid), ("clean", clean)):
        found = frontier(groups[1, epochs], budget_groups(groups.values(), groups[0, 9.9], "train.epochs"), TIME, ACCURACY)
        width[name] = np.ptp(found.quality.ci95)
    assert width["all"] > 3 * width["clean"] and width["all"] > 0.0085  # wider than the gain from 9 to 13 epochs


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("epochs", [9.9, 11.0, 12.0])
def test_a_published_budget_lies_on_the_frontier_of_the_others(grid, level, epochs):
    clean = without_first(grid)
    found = frontier(clean[level, epochs], budget_groups(clean.values(), clean[level, 9.0], "train.epochs"), TIME, ACCURACY)
    assert len(found.budgets) == 4 and found.better is None and found.quality.p > 0.05 and abs(found.quality.absolute) < 0.001


def seconds(epochs): return 0.1 + 0.39 * epochs


def curve(exponent): return lambda took: 0.9305 + 0.0055 * (1 - (took / seconds(9)) ** -exponent) / (1 - (seconds(13) / seconds(9)) ** -exponent)


def draw(random, epochs, n, quality, faster=0.0, correlation=0.0, time_sd=0.01, outlier=False, hosts=False):
    z = random.standard_normal((2, n))
    took = seconds(epochs) * (1 + time_sd * z[0]) * (1 - faster)
    if outlier: took[0] += 7.3
    runs = pd.DataFrame({"time_seconds": took, "accuracy": quality(seconds(epochs)) + 0.0012 * (correlation * z[0] + np.sqrt(1 - correlation**2) * z[1])})
    if hosts: runs = runs.assign(host_id=np.where(np.arange(n) % 2, "a", "b"), time_seconds=took * np.where(np.arange(n) % 2, 1.3, 1))
    return runs


FIVE = (9, 9.9, 11, 12, 13)
DESIGNS = {
    "five budgets": dict(amounts=FIVE, n=10, epochs=9.9), "at the end": dict(amounts=FIVE, n=10, epochs=13), "three runs": dict(amounts=FIVE, n=3, epochs=10.5),
    "three budgets": dict(amounts=(9, 11, 13), n=5, epochs=10), "far apart": dict(amounts=(6, 9, 18), n=20, epochs=12), "two budgets": dict(amounts=(9, 13), n=40, epochs=11),
    "together": dict(amounts=FIVE, n=10, epochs=10.5, correlation=0.8, time_sd=0.05), "against": dict(amounts=FIVE, n=10, epochs=10.5, correlation=-0.8, time_sd=0.05),
    "warm-up": dict(amounts=FIVE, n=10, epochs=10.5, outlier=True), "two hosts": dict(amounts=FIVE, n=12, epochs=10.5, hosts=True)}


@pytest.mark.parametrize("name", DESIGNS)
def test_a_variant_on_the_frontier_is_rarely_called_better_or_worse(name):
    design = dict(DESIGNS[name])
    amounts, n, epochs, trials, random = design.pop("amounts"), design.pop("n"), design.pop("epochs"), 100, np.random.default_rng(7)
    group = lambda name, amount, level: as_group(name, amount, level, draw(random, amount, n, curve(1.4), **design))
    found = [frontier(group("idea", epochs, 1), [group(f"b{b}", b, 0) for b in amounts], TIME, ACCURACY) for _ in range(trials)]
    slack = 2.6 * np.sqrt(0.05 * 0.95 / trials)
    assert np.mean([f.better is not None for f in found]) <= 0.05 + slack
    quality, time = [f.quality.ci95 for f in found if f.quality], [f.time.ci95 for f in found if f.time]
    assert len(quality) > 0.8 * trials and np.mean([low <= 0 <= high for low, high in quality]) >= 0.95 - slack
    assert np.mean([(low is None or low <= 0) and (high is None or 0 <= high) for low, high in time]) >= 0.95 - slack


def test_a_variant_that_is_3_percent_faster_is_found_with_enough_runs():
    random, found = np.random.default_rng(8), []
    for _ in range(30):
        budgets = [as_group(f"b{b}", b, 0, draw(random, b, 100, curve(1.4))) for b in FIVE]
        found.append(frontier(as_group("idea", 10, 1, draw(random, 10, 200, curve(1.4), faster=0.03)), budgets, TIME, ACCURACY))
    assert np.mean([f.better is True for f in found]) > 0.85 and not any(f.better is False for f in found)
    assert abs(np.mean([f.time.relative for f in found]) + 0.03) < 0.004
