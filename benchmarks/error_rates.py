"""The error rates of the verdict: how often it is wrong about runs of which the truth is known.

`published`: one variant's own runs, in the order in which they were made, are cut into batches and dealt as two
variants, at random within each block. So nothing differs but what real machines do. The times of one side are then
multiplied, so that the truth is a change of known size. `simulated`: batches, drift, outliers and skewed times made by
known laws; beside the verdict, what counting every run as independent would give. `rule`: the other parts of the rule,
each at its border: guard, family, hosts, frontier.

A claim of at least 1 % is at its border if the truth is exactly 1 %: *supported* or *refuted* are then both mistakes,
and each may happen in 2.5 % of studies. `coverage` is how often the 95 % interval holds the truth. Runs go through
`compare_in`, which is `evidence.compare` without the audit: that could only take support away. Where most of its time
goes into tests and words, the figures that decide are computed alone; some studies go through both, to see that they
agree.

    python benchmarks/error_rates.py published FOLDER      # runs that `speedrun import` collected
    python benchmarks/error_rates.py simulated
    python benchmarks/error_rates.py rule
    python benchmarks/error_rates.py power                 # what `speedrun power` promises, against the verdict
"""
import argparse
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd

CLAIMED = 0.01
DESIGNS = ((8, 25), (8, 10), (20, 5), (20, 2))  # blocks, runs a batch
COLUMNS = ("supported", "refuted", "undecided", "coverage")


# records

def record_frame(times, accuracies=None, hosts=("h",), config=None, first=None):
    """Records of variants in blocks, `times[name]` of shape (blocks, runs a batch), as they would be read.

    Batches follow each other without a gap: in a block first the one named in `first[block]`, then the others."""
    names, rows, clock = list(times), [], pd.Timestamp("2026-01-01", tz="UTC")
    blocks, size = times[names[0]].shape
    for block in range(blocks):
        for name in sorted(names, key=lambda name: first is not None and name != first[block]):
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
    frame["config"] = [(config or {}).get(name, {}) for name in frame["variant"]]
    return frame


def all_groups(frame):
    "The case that the records make, and its groups by name."
    from speedrun_nb.core.study import load_study
    from speedrun_nb.evidence.case import make_case

    case = make_case(frame, load_study("cifar"))
    return case, {group.name: group for group in case.groups}


def groups_of(frame):
    "The case, and the two groups that are compared."
    case, groups = all_groups(frame)
    return case, groups["baseline"], groups["variant"]


def comparison_of(frame, claim):
    "The comparison of `variant` with `baseline` under a claim, as `speedrun compare` makes it but for the audit."
    from speedrun_nb.evidence.verdict import compare_in
    return compare_in(*groups_of(frame), claim)


def compared(frame, claim):
    "Its estimate and outcome."
    comparison = comparison_of(frame, claim)
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


def ruled_as_compared(frame, claim, also):
    "The figures that decide; `also`: see that the whole comparison says the same."
    estimate, outcome = ruled(frame, claim)
    if also: assert (estimate, outcome) == compared(frame, claim), (estimate, outcome, compared(frame, claim))
    return estimate, outcome


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

    frame, _ = read_runs(folder)
    frame = frame[(frame["study"] == "cifar") & (frame["status"] == "completed") & frame["order"].notna()]
    found = {}
    for (variant, host), runs in frame.groupby(["variant", "host_id"], dropna=False):
        runs = runs.sort_values("order")
        if len(runs) >= 80: found[f"{variant} {host if isinstance(host, str) else ''}".strip()] = runs["time_seconds"]
    return {name: values.to_numpy(float) for name, values in found.items()}


def dealt(values, blocks, size, rng, drift, truth):
    """Consecutive batches dealt as two variants within each block, with a linear drift, one made faster by the truth.

    The times of both, and which was first in each block."""
    start = rng.integers(0, len(values) - 2 * blocks * size + 1)
    times = values[start:start + 2 * blocks * size] * (1 + drift * np.linspace(0, 1, 2 * blocks * size))
    pairs = times.reshape(blocks, 2, size)
    swapped = rng.random(blocks) < 0.5
    baseline, variant = (np.where(turned[:, None], pairs[:, 1], pairs[:, 0]) for turned in (swapped, ~swapped))
    return dict(baseline=baseline, variant=variant * (1 - truth)), np.where(swapped, "variant", "baseline")


def one_published(name, values, blocks, size, drift, truth, shuffles, seed):
    "A line: error rates of one variant's own runs against itself."
    rng, found = np.random.default_rng(seed), []
    for shuffle in range(shuffles):
        times, first = dealt(values, blocks, size, rng, drift, truth)
        judged = ruled_as_compared(record_frame(times, first=first), claim_at(truth), also=shuffle % 10 == 0)
        found.append(tally(judged, -truth))
    return dict(runs=name, design=f"{blocks} x {size}", drift=drift, truth=truth, **rates(found))


def published(folder, word, shuffles, seed):
    "Each variant with enough runs on one host, in each design, with and without drift, at either border."
    return [(one_published, name, values, blocks, size, drift, truth, shuffles, seed)
            for name, values in real_series(folder).items() if word in name for blocks, size in DESIGNS
            if 2 * blocks * size <= len(values) for drift in (0.0, 0.05) for truth in (0.0, CLAIMED)]


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


def one_law(law, blocks, size, studies, seed):
    "A line: error rates at the border of a claim, and power at a true change of 2 % for a claim of 1 %."
    rng, border, power, naive = np.random.default_rng(seed), [], [], []
    for _ in range(studies):
        (at_border, first), (better, second) = (made_up(law, blocks, size, rng, n * CLAIMED) for n in (1, 2))
        border.append(tally(ruled(record_frame(at_border, first=first), claim_at(CLAIMED)), -CLAIMED))
        power.append(ruled(record_frame(better, first=second), claim_at(CLAIMED))[1] == "supported")
        naive.append([naive_support(times, CLAIMED) for times in (at_border, better)])
    wrong, right = np.mean(naive, axis=0)
    return dict(law=law, design=f"{blocks} x {size}", **rates(border), power=np.mean(power),
                naive_supported=wrong, naive_power=right)


def simulated(studies, seed):
    "Each law in each design."
    return [(one_law, law, *design, studies, seed) for law in LAWS for design in (*DESIGNS, (40, 5))]


# the other parts of the rule, at their borders

ACCURACY_SD = 0.0013


def in_blocks(rng, levels, blocks=20, size=5, between=0.005, within=0.008):
    "Times of several variants: `levels[name]` seconds, what a block has in common, batches, runs."
    state = rng.normal(0, 0.01, (blocks, 1))
    return {name: level * np.exp(state + rng.normal(0, between, (blocks, 1)) + rng.normal(0, within, (blocks, size)))
            for name, level in levels.items()}


def guard_at_margin(rng):
    "3 % faster than the baseline, and worse by exactly the margin."
    from speedrun_nb.core.study import Guard

    times = in_blocks(rng, dict(baseline=4.4, variant=4.4 * 0.97))
    accuracies = {name: rng.normal(0.94 - lost, ACCURACY_SD, times[name].shape)
                  for name, lost in (("baseline", 0.0), ("variant", 0.0005))}
    claim = replace(claim_at(CLAIMED), guard=Guard("accuracy", 0.0005))
    return [tally(compared(record_frame(times, accuracies), claim), -0.03)]


def family_at_border(rng, members=10):
    "Ten variants, each exactly as fast as it claims; the study is wrong if any is supported."
    names = [f"variant{n}" for n in range(members)]
    frame = record_frame(in_blocks(rng, dict(baseline=4.4) | dict.fromkeys(names, 4.4 * (1 - CLAIMED))))
    return [ruled_together(frame, names)]


def ruled_together(frame, names):
    "The outcomes of a family, as one: supported if any is; refuted, and coverage, as parts of it."
    from speedrun_nb.evidence.families import question_of, related
    from speedrun_nb.evidence.comparison import results
    from speedrun_nb.evidence.verdict import by_figures

    (case, groups), claim = all_groups(frame), claim_at(CLAIMED)
    asked = {name: (groups["baseline"], groups[name]) for name in names}
    found = {name: vars(results(*pair, question_of(case, *pair, claim))) for name, pair in asked.items()}
    answers = {name: SimpleNamespace(p_claim=each["estimate"].p_claim, better=each["estimate"].better)
               for name, each in found.items()}
    judged = [(found[name]["estimate"], by_figures(SimpleNamespace(
        **found[name] | dict(family=related(answers, (), name)), hosts=()))) for name in names]
    rows = [tally(each, -CLAIMED) for each in judged]
    return dict(supported=any(row["supported"] for row in rows), undecided=all(row["undecided"] for row in rows),
                **{name: np.mean([row[name] for row in rows]) for name in ("refuted", "coverage")})


def on_hosts(rng, effects):
    "Blocks on machines of different speed; `effects` are those of the variant on each, in logarithms."
    times, machines = in_blocks(rng, dict(baseline=4.4, variant=4.4)), np.arange(20) % len(effects)
    speed = rng.normal(0, 0.2, len(effects))[machines][:, None]
    factors = dict(baseline=np.exp(speed), variant=np.exp(speed + effects[machines][:, None]))
    frame = record_frame({name: times[name] * factors[name] for name in times},
                         hosts=[f"h{n}" for n in range(len(effects))])
    return comparison_of(frame, claim_at(CLAIMED))


def hosts_alike(rng, hosts=4, spread=0.0):
    "Several machines; the mean effect on these is exactly what is claimed."
    effects = spread * rng.standard_normal(hosts)
    found = on_hosts(rng, np.log1p(-CLAIMED) + effects - effects.mean())
    return [tally((found.estimate, found.verdict.outcome), -CLAIMED)]


def hosts_that_differ(rng): return hosts_alike(rng, spread=0.01)
def two_hosts_that_differ(rng): return hosts_alike(rng, hosts=2, spread=0.01)


def hosts_in_general(rng, hosts=4):
    """The mean effect on all machines of a kind is exactly what is claimed; these are some of them.

    A verdict about these machines, which says so, is none about all; coverage is that of the interval for all."""
    from speedrun_nb.evidence.verdict import on_these_machines

    found = on_hosts(rng, np.log1p(-CLAIMED) + 0.01 * rng.standard_normal(hosts))
    outcome = "undecided" if on_these_machines(found) else found.verdict.outcome
    low, high = found.across_hosts.ci95
    return [dict(supported=outcome == "supported", refuted=outcome == "refuted", undecided=outcome == "undecided",
                 coverage=low <= -CLAIMED <= high)]


def quality_after(seconds): return 0.955 - 0.048 * (seconds / 2) ** -1.3


def frontier_at_border(rng, truth=CLAIMED):
    "A variant that takes as much less time than the baseline for the same quality as it claims, trained a little less."
    epochs = {f"baseline{n}": n for n in (8.0, 9.0, 9.9, 11.0, 12.0)} | dict(variant=9.5)
    needs = {name: 0.1 + 0.4 * n for name, n in epochs.items()}
    times = in_blocks(rng, {name: t * (1 - truth) if name == "variant" else t for name, t in needs.items()})
    accuracies = {name: rng.normal(quality_after(t), ACCURACY_SD, times[name].shape) for name, t in needs.items()}
    config = {name: {"train.epochs": n} for name, n in epochs.items()}
    config["variant"] |= {"augment.crop_order": "deterministic"}
    for part in (times, accuracies, config): part["baseline"] = part.pop("baseline9.9")
    estimate, outcome = compared(record_frame(times, accuracies, config=config), claim_at(CLAIMED))
    assert estimate.method == "frontier", estimate
    return [tally((estimate, outcome), -truth)]


def frontier_of_less_training(rng): return frontier_at_border(rng, truth=0.0)


RULE = (guard_at_margin, family_at_border, hosts_alike, hosts_that_differ, two_hosts_that_differ, hosts_in_general,
        frontier_at_border, frontier_of_less_training)


def one_part(study, studies, seed):
    "A line: a part of the rule at its border."
    rng = np.random.default_rng(seed)
    return dict(part=study.__name__, **rates([row for _ in range(studies) for row in study(rng)]))


def rule(studies, seed): return [(one_part, study, studies, seed) for study in RULE]


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


def one_plan(plan, studies, seed, within=0.008, spread=0.0013):
    "A line: what `probability_of_support` promises, against the share of studies that the verdict supports."
    from speedrun_nb.core.study import Guard
    from speedrun_nb.stats.power import guard_hurdle, probability_of_support

    rng, found, margin = np.random.default_rng(seed), [], plan["margin"] and plan["margin"] * spread
    claim = replace(claim_at(plan["claim"]), guard=Guard("accuracy", margin) if margin else None)
    for _ in range(studies):
        frame = record_frame(*planned_study(plan, rng, within, spread))
        found.append(ruled(frame, claim, plan["family"])[1] == "supported")
    guard = guard_hurdle(margin, spread, in_block=plan["seeds"]) if margin else None
    promised = probability_of_support(
        plan["blocks"], plan["seeds"], plan["effect"], plan["ratio"] * within, within, at_least=plan["claim"],
        family=plan["family"], guard=guard)
    return dict(**plan, promised=promised, simulated=np.mean(found))


def power(studies, seed): return [(one_plan, plan, studies, seed) for plan in PLANS]


# the command

def word(value): return f"{value:.3f}" if isinstance(value, float) else str(value)


def line_of(task):
    "Make one line of a table, in a process of its own."
    function, *arguments = task
    return function(*arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("published", "simulated", "rule", "power"))
    parser.add_argument("folder", nargs="?", help="folder of collected runs, for `published`")
    parser.add_argument("--runs", default="", help="for `published`: only runs whose variant or host holds this word")
    parser.add_argument("--studies", type=int, default=200, help="studies, or shuffles, for each line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="lines made at once")
    given = parser.parse_args()
    if given.what == "published" and not given.folder: parser.error("published needs a folder of collected runs")
    error = 2 * math.sqrt(0.025 * 0.975 / given.studies)
    print(f"{given.studies} studies a line: a rate of 2.5 % comes out as up to {0.025 + error:.3f}", flush=True)
    makers = dict(simulated=simulated, rule=rule, power=power)
    if given.what == "published": tasks = published(given.folder, given.runs, given.studies, given.seed)
    else: tasks = makers[given.what](given.studies, given.seed)
    with ProcessPoolExecutor(given.jobs) as pool:
        for row in pool.map(line_of, tasks):
            print("  ".join(f"{name} {word(value)}" for name, value in row.items()), flush=True)


if __name__ == "__main__": main()
