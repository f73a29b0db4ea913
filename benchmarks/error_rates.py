"""The error rates of the verdict: how often it is wrong about runs of which the truth is known.

`published`: one variant's own runs, in the order in which they were made, are cut into batches and dealt as two
variants, at random within each block. So nothing differs but what real machines do. The times of one side are then
multiplied, so that the truth is a change of known size. `simulated`: batches, drift, outliers and skewed times made by
known laws; beside the verdict, what counting every run as independent would give.

A claim of at least 1 % is at its border if the truth is exactly 1 %: *supported* or *refuted* are then both mistakes,
and each may happen in 2.5 % of studies. `coverage` is how often the 95 % interval holds the truth.

    python benchmarks/error_rates.py published FOLDER      # runs that `speedrun import` collected
    python benchmarks/error_rates.py simulated
    python benchmarks/error_rates.py power                 # what `speedrun power` promises, against the verdict
"""
import argparse
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd

CLAIMED = 0.01
DESIGNS = ((8, 25), (8, 10), (20, 5), (20, 2))  # blocks, runs a batch
COLUMNS = ("supported", "refuted", "undecided", "coverage")


# records

def record_frame(times, accuracies=None, hosts=("h",), plan=None):
    """Records of two variants in blocks, `times[name]` of shape (blocks, runs a batch), as they would be read.

    `first[block]` says which variant ran first; batches follow each other without a gap."""
    names, rows, clock = list(times), [], pd.Timestamp("2026-01-01", tz="UTC")
    blocks, size = times[names[0]].shape
    for block in range(blocks):
        for name in names:
            for run in range(size):
                seconds = float(times[name][block, run])
                quality = 0.94 if accuracies is None else float(accuracies[name][block, run])
                started, clock = clock, clock + pd.Timedelta(seconds=seconds)
                rows.append(dict(
                    run_id=f"{name}-{block}-{run}", variant=name, seed=block * size + run, block=block,
                    batch=f"{name}-{block}", host_id=hosts[block % len(hosts)], order=len(rows), time_seconds=seconds,
                    accuracy=quality, started_at=started.isoformat(), ended_at=clock.isoformat()))
    same = dict(study="cifar", profile="published", repeat=0, sweep=None, status="completed", clock="events")
    frame = pd.DataFrame(rows).assign(**same, config_hash=lambda table: table["variant"])
    frame["config"] = [{}] * len(frame)
    return frame


def groups_of(frame):
    "The case that the records make, and its two groups."
    from speedrun_nb.core.study import load_study
    from speedrun_nb.evidence.case import make_case

    case = make_case(frame, load_study("cifar"))
    groups = {group.name: group for group in case.groups}
    return case, groups["baseline"], groups["variant"]


def compared(frame, claim):
    "The comparison of `variant` with `baseline` under a claim, as `speedrun compare` makes it but for the audit."
    from speedrun_nb.evidence.verdict import compare_in

    comparison = compare_in(*groups_of(frame), claim)
    return comparison.estimate, comparison.verdict.outcome


def ruled(frame, claim, family_size=1):
    """The same without tests and words, which takes a tenth of the time.

    Others of the family are never significant, which is what Bonferroni supposes."""
    from speedrun_nb.evidence.comparison import results
    from speedrun_nb.evidence.families import question_of
    from speedrun_nb.evidence.verdict import by_figures
    from speedrun_nb.stats.family import family

    case, baseline, variant = groups_of(frame)
    found = vars(results(baseline, variant, question_of(case, baseline, variant, claim)))
    others = {f"other {n}": 1.0 for n in range(family_size - 1)}
    found["family"] = family({"variant": found["estimate"].p_claim, **others}, "variant")
    return found["estimate"], by_figures(SimpleNamespace(**found, hosts=()))


def tally(judged, truth):
    "One row of a table: outcome, and whether the interval held the true relative change."
    estimate, outcome = judged
    held = estimate.ci95_relative is not None and estimate.ci95_relative[0] <= truth <= estimate.ci95_relative[1]
    return dict(supported=outcome == "supported", refuted=outcome == "refuted", undecided=outcome == "undecided",
                coverage=held)


def rates(rows): return {name: np.mean([row[name] for row in rows]) for name in COLUMNS}


def claim_at(at_least):
    "A claim about time without a guard."
    from speedrun_nb.core.study import Claim
    return Claim("time_seconds", "decrease", at_least)


# runs that were really made

def real_series(folder):
    "Times of every variant on one host with enough runs, in the order of running, by name."
    from speedrun_nb.core.runs import read_runs

    frame = read_runs(folder)
    frame = frame[(frame["study"] == "cifar") & (frame["status"] == "completed") & frame["order"].notna()]
    found = {}
    for (variant, host), runs in frame.groupby(["variant", "host_id"], dropna=False):
        runs = runs.sort_values("order")
        if len(runs) >= 80: found[f"{variant} {host if isinstance(host, str) else ''}".strip()] = runs["time_seconds"]
    return {name: values.to_numpy(float) for name, values in found.items()}


def dealt(values, blocks, size, rng, drift, truth):
    "Consecutive batches dealt as two variants within each block, with a linear drift, one made faster by the truth."
    start = rng.integers(0, len(values) - 2 * blocks * size + 1)
    times = values[start:start + 2 * blocks * size] * (1 + drift * np.linspace(0, 1, 2 * blocks * size))
    pairs = times.reshape(blocks, 2, size)
    swapped = rng.random(blocks) < 0.5
    first, second = pairs[:, 0], pairs[:, 1]
    variant = np.where(swapped[:, None], second, first) * (1 - truth)
    return dict(baseline=np.where(swapped[:, None], first, second), variant=variant)


def published(folder, shuffles, seed):
    "A table of error rates of one variant's own runs against itself."
    rng, rows = np.random.default_rng(seed), []
    for name, values in real_series(folder).items():
        for blocks, size in DESIGNS:
            if 2 * blocks * size > len(values): continue
            for drift in (0.0, 0.05):
                for truth in (0.0, CLAIMED):
                    found = []
                    for _ in range(shuffles):
                        frame = record_frame(dealt(values, blocks, size, rng, drift, truth))
                        found.append(tally(compared(frame, claim_at(truth)), -truth))
                    rows.append(dict(runs=name, design=f"{blocks} x {size}", drift=drift, truth=truth, **rates(found)))
                    show(rows[-1])
    return rows


# runs that are made up

def walk(rng, n, step): return np.cumsum(rng.normal(0, step, n))


LAWS = {  # (rng, blocks, size) -> log times of 2 x blocks batches in the order of running, (2 * blocks, size)
    "independent runs": lambda rng, n, size: rng.normal(0, 0.01, (n, size)),
    "batches, half the sd of runs": lambda rng, n, size: rng.normal(0, 0.01, (n, size)) + rng.normal(0, 0.005, (n, 1)),
    "batches, twice the sd of runs": lambda rng, n, size: rng.normal(0, 0.01, (n, size)) + rng.normal(0, 0.02, (n, 1)),
    "linear drift of 10 %": lambda rng, n, size:
        rng.normal(0, 0.01, (n, size)) + np.linspace(0, 0.1, n * size).reshape(n, size),
    "random walk": lambda rng, n, size: rng.normal(0, 0.01, (n, size)) + walk(rng, n * size, 0.002).reshape(n, size),
    "outliers": lambda rng, n, size: rng.normal(0, 0.01, (n, size)) + 0.3 * (rng.random((n, size)) < 0.02),
    "lognormal": lambda rng, n, size: 0.05 * rng.lognormal(0, 0.8, (n, size)),
}


def made_up(law, blocks, size, rng, truth):
    "Two variants in blocks, by a law."
    times = 4.4 * np.exp(LAWS[law](rng, 2 * blocks, size))
    return dealt(times.reshape(-1), blocks, size, rng, 0.0, truth)


def naive_support(times, at_least):
    "Would counting every run as independent support the claim?"
    from speedrun_nb.stats.tests import relative_interval

    interval = relative_interval(times["variant"].ravel(), times["baseline"].ravel())
    return interval is not None and interval[1] <= -at_least


def simulated(studies, seed):
    "A table of error rates at the border of a claim, and of power at a true change of 2 % for a claim of 1 %."
    rng, rows = np.random.default_rng(seed), []
    for law in LAWS:
        for blocks, size in (*DESIGNS, (40, 5)):
            border, power, naive = [], [], []
            for _ in range(studies):
                times = made_up(law, blocks, size, rng, CLAIMED)
                border.append(tally(ruled(record_frame(times), claim_at(CLAIMED)), -CLAIMED))
                naive.append((naive_support(times, CLAIMED), None))
                times = made_up(law, blocks, size, rng, 2 * CLAIMED)
                power.append(ruled(record_frame(times), claim_at(CLAIMED))[1] == "supported")
                naive[-1] = naive[-1][0], naive_support(times, CLAIMED)
            wrong, right = np.mean(naive, axis=0)
            rows.append(dict(law=law, design=f"{blocks} x {size}", **rates(border), power=np.mean(power),
                             naive_supported=wrong, naive_power=right))
            show(rows[-1])
    return rows


# what planning promises

PLANS = (  # blocks, seeds a batch, between / within, true change, claim, margin in sd of accuracy, family
    dict(blocks=8, seeds=5, ratio=0.5, effect=0.015, claim=0.01, margin=None, family=1),
    dict(blocks=20, seeds=2, ratio=1.0, effect=0.02, claim=0.01, margin=0.8, family=1),
    dict(blocks=20, seeds=5, ratio=0.0, effect=0.014, claim=0.01, margin=0.45, family=4),
    dict(blocks=40, seeds=5, ratio=2.0, effect=0.015, claim=0.01, margin=0.3, family=1),
)


def planned_study(plan, rng, within=0.008, spread=0.0013):
    "Times and accuracies of a study with the spreads that the plan supposes."
    shape = (plan["blocks"], plan["seeds"])
    def times(truth):
        batches = rng.normal(0, plan["ratio"] * within, (plan["blocks"], 1))
        return 4.4 * (1 - truth) * np.exp(batches + rng.normal(0, within, shape))
    sides = dict(baseline=times(0.0), variant=times(plan["effect"]))
    return sides, {name: rng.normal(0.94, spread, shape) for name in sides}


def power(studies, seed):
    "What `probability_of_support` promises, against the share of studies that the verdict supports."
    from speedrun_nb.core.study import Guard
    from speedrun_nb.stats.power import guard_hurdle, probability_of_support

    rng, rows, within, spread = np.random.default_rng(seed), [], 0.008, 0.0013
    for plan in PLANS:
        margin = plan["margin"] and plan["margin"] * spread
        claim = claim_at(plan["claim"])
        if margin: claim = replace(claim, guard=Guard("accuracy", margin))
        found = []
        for _ in range(studies):
            frame = record_frame(*planned_study(plan, rng, within, spread))
            found.append(ruled(frame, claim, plan["family"])[1] == "supported")
        guard = margin and guard_hurdle(margin, spread, in_block=plan["seeds"])
        promised = probability_of_support(
            plan["blocks"], plan["seeds"], plan["effect"], plan["ratio"] * within, within, at_least=plan["claim"],
            family=plan["family"], guard=guard or None)
        rows.append(dict(**plan, promised=promised, simulated=np.mean(found)))
        show(rows[-1])
    return rows


# the command

def show(row):
    "One line of a table."
    def word(value): return f"{value:.3f}" if isinstance(value, float) else str(value)
    print("  ".join(f"{name} {word(value)}" for name, value in row.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("published", "simulated", "power"))
    parser.add_argument("folder", nargs="?", help="folder of collected runs, for `published`")
    parser.add_argument("--studies", type=int, default=200, help="studies, or shuffles, for each line")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    error = 2 * math.sqrt(0.025 * 0.975 / given.studies)
    print(f"{given.studies} studies a line: a rate of 2.5 % comes out as up to {0.025 + error:.3f}")
    if given.what == "published": published(given.folder, given.studies, given.seed)
    elif given.what == "simulated": simulated(given.studies, given.seed)
    else: power(given.studies, given.seed)


if __name__ == "__main__": main()
