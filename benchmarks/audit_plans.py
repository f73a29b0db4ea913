"""How much of a mistake in plans, seeds, copies and missing runs the audit sees: clean studies, then graded flaws.

Each injection takes a clean study (its runs, provenances and plans) and a strength from 0 (nothing) to 1, and gives the
flawed study. `REGISTRY` says which check ought to see it. `python benchmarks/audit.py` counts how often it does.
"""
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from speedrun_nb.audit.audit import run_checks
from speedrun_nb.core.plans import SweepPlan
from speedrun_nb.core.records import run_id
from speedrun_nb.core.study import load_study
from speedrun_nb.core.variants import resolve
from speedrun_nb.evidence.case import Case, make_case

VARIANTS = ("baseline", "det_crop", "det_crop_backoff")
BLOCKS = 20
FROZEN = pd.Timestamp("2026-01-01T12:00:00Z")


@dataclass(frozen=True)
class Made:
    "A study before it is looked at."
    runs: pd.DataFrame
    provenances: dict
    plans: dict

    @property
    def case(self) -> Case: return make_case(self.runs, load_study("cifar"), None, self.provenances, self.plans)


def plan_of(rng: np.random.Generator) -> SweepPlan:
    "Three variants in blocks of one seed, in random order."
    variants = [resolve(load_study("cifar"), name, "demo") for name in VARIANTS]
    conditions = [dict(name=v.name, variant=v.name, config_hash=v.config_hash, claim=v.claim and asdict(v.claim))
                  for v in variants]
    order = [rng.permutation(len(VARIANTS)).tolist() for _ in range(BLOCKS)]
    design = dict(study="cifar", profile="demo", conditions=conditions, seeds=list(range(BLOCKS)), repeats=1,
                  seeds_per_batch=1, stop="fixed", order=order)
    return SweepPlan("benchmark", design, dict(frozen_at=FROZEN.isoformat(), package_hash="0a1b"))


def runs_of(plan: SweepPlan, rng: np.random.Generator) -> pd.DataFrame:
    "All runs of the plan, in its order, with results of two metrics, and no effect."
    places = [(seed, place) for seed, order in enumerate(plan.design["order"]) for place in order]
    conditions, n = plan.conditions, len(places)
    rows = pd.DataFrame(dict(seed=[seed for seed, _ in places], variant=[conditions[p]["variant"] for _, p in places],
                             config_hash=[conditions[p]["config_hash"] for _, p in places]))
    rows["run_id"] = [run_id("cifar", "demo", h, s, 0) for h, s in zip(rows["config_hash"], rows["seed"], strict=True)]
    started = FROZEN + pd.to_timedelta(60 * (np.arange(n) + 1), unit="s")
    configs = {name: {"data.split": "validation", "variant": name} for name in VARIANTS}
    return rows.assign(
        study="cifar", profile="demo", repeat=0, block=rows["seed"], batch=[f"b{seed}" for seed in rows["seed"]],
        order=range(n), status="completed", host_id="host", package_hash="0a1b", sweep=plan.name,
        started_at=started.astype(str), config=[configs[name] for name in rows["variant"]],
        time_seconds=rng.normal(4.4, 0.03, n), accuracy=rng.normal(0.94, 0.0012, n).round(4),
        train_loss=rng.normal(1.2, 0.01, n).round(4), fingerprint=[f"f{i}" for i in range(n)])


def provenances_of(runs: pd.DataFrame) -> dict:
    "What every batch says of itself."
    batches = runs.groupby(["variant", "batch"])
    return {f"cifar/demo/{variant}/{batch}": dict(
        status="completed", seeds=rows["seed"].tolist(), config=rows["config"].iloc[0], sweep=rows["sweep"].iloc[0],
        recorded=len(rows), git=dict(commit="a" * 40, dirty=False)) for (variant, batch), rows in batches}


def planned_study(seed: int) -> Made:
    "A study that was planned and carried out as it was."
    rng = np.random.default_rng(seed)
    plan = plan_of(rng)
    runs = runs_of(plan, rng)
    return Made(runs, provenances_of(runs), {plan.name: plan})


def unplanned(made: Made) -> Made:
    "The same without a plan."
    provenances = {path: facts | dict(sweep=None) for path, facts in made.provenances.items()}
    return Made(made.runs.assign(sweep=None, block=None), provenances, {})


def mine(runs: pd.DataFrame, variant: str = "det_crop") -> pd.Index: return runs.index[runs["variant"] == variant]


def picked(runs: pd.DataFrame, strength: float, seed: int) -> pd.Index:
    "A share of the runs of one variant."
    rows = mine(runs)
    return pd.Index(np.random.default_rng(seed).choice(rows, round(strength * len(rows)), replace=False))


# ---------------------------------------------------------------- injections: (clean study, strength, seed) -> flawed

def delete_lines(made: Made, strength: float, seed: int) -> Made:
    "The slowest runs of a variant are deleted from their batches."
    rows = mine(made.runs)
    slowest = made.runs.loc[rows, "time_seconds"].nlargest(round(strength * len(rows))).index
    return replace(made, runs=made.runs.drop(slowest))


def delete_batches(made: Made, strength: float, seed: int) -> Made:
    "Whole folders of the slowest runs are deleted, and nothing is left but gaps in the seeds."
    flawed = delete_lines(unplanned(made), strength, seed)
    left = set(flawed.runs["variant"] + "/" + flawed.runs["batch"])
    kept = {path: facts for path, facts in made.provenances.items() if path.removeprefix("cifar/demo/") in left}
    return replace(flawed, provenances={path: facts | dict(sweep=None) for path, facts in kept.items()})


def stop_early(made: Made, strength: float, seed: int) -> Made:
    "The last blocks are never made."
    runs = made.runs[made.runs["block"] < BLOCKS - round(strength * BLOCKS)]
    return replace(made, runs=runs, provenances=provenances_of(runs))


def leave_a_variant_out(made: Made, strength: float, seed: int) -> Made:
    "A variant of the plan is never run."
    runs = made.runs[made.runs["variant"] != "det_crop_backoff"] if strength else made.runs
    return replace(made, runs=runs, provenances=provenances_of(runs))


def plan_late(made: Made, strength: float, seed: int) -> Made:
    "Runs of a variant were made before, by hand."
    rows, runs = picked(made.runs, strength, seed), made.runs.copy()
    runs.loc[rows, ["sweep", "started_at"]] = [None, "2026-01-01T09:00:00+00:00"]
    return replace(made, runs=runs)


def one_side_first(made: Made, strength: float, seed: int) -> Made:
    "In a share of the blocks the baseline goes first."
    runs = made.runs.copy()
    for block in range(round(strength * BLOCKS)):
        rows = runs[runs["block"] == block].sort_values("variant").index
        runs.loc[rows, "started_at"] = sorted(runs.loc[rows, "started_at"])
    return replace(made, runs=runs)


def other_code(made: Made, strength: float, seed: int) -> Made:
    "A share of the runs of a variant was made by other code."
    runs = made.runs.copy()
    runs.loc[picked(runs, strength, seed), "package_hash"] = "ffff"
    return replace(made, runs=runs)


def copy_with_jitter(made: Made, strength: float, seed: int) -> Made:
    "The fastest runs of a variant again, with new seeds and fingerprints, their times changed by one in ten thousand."
    rng, rows = np.random.default_rng(seed), mine(made.runs)
    fastest = made.runs.loc[rows].nsmallest(round(strength * len(rows)), "time_seconds")
    n = len(fastest)
    copies = fastest.assign(
        run_id=[f"copy{i}" for i in range(n)], seed=range(BLOCKS, BLOCKS + n), fingerprint=[f"c{i}" for i in range(n)],
        time_seconds=fastest["time_seconds"] * rng.normal(1, 1e-4, n), batch="more", sweep=None)
    return replace(unplanned(made), runs=pd.concat([unplanned(made).runs, copies], ignore_index=True))


def tune_one_side(made: Made, strength: float, seed: int) -> Made:
    "Up to ten learning rates of a variant are tried, and one of the baseline."
    tries = [made.runs.loc[mine(made.runs)].assign(config_hash=f"{i}" * 12, config=[{"optimizer.lr": i}] * BLOCKS,
                                                   run_id=[f"t{i}-{seed}" for seed in range(BLOCKS)], batch=f"t{i}",
                                                   fingerprint=[f"t{i}-{seed}" for seed in range(BLOCKS)])
             for i in range(1, round(10 * strength))]
    flawed = unplanned(made)
    return replace(flawed, runs=pd.concat([flawed.runs, *(rows.assign(sweep=None) for rows in tries)],
                                          ignore_index=True))


@dataclass(frozen=True)
class Injection:
    check: str                                    # the id of the finding
    make: Callable[[Made, float, int], Made]
    strengths: tuple[float, ...]                  # graded, from weak to strong
    warns_from: float                             # every study is found from here on
    serious_from: float | None                    # and serious; None: it never is


REGISTRY = (
    Injection("missing-runs", delete_lines, (0.05, 0.2, 0.5), warns_from=0.05, serious_from=0.05),
    Injection("seed-gaps", delete_batches, (0.1, 0.3, 0.6), warns_from=0.3, serious_from=0.6),
    Injection("plan-unfinished", stop_early, (0.05, 0.2, 0.5), warns_from=0.05, serious_from=0.2),
    Injection("planned-variant-missing", leave_a_variant_out, (1.0,), warns_from=1.0, serious_from=None),
    Injection("plan-late", plan_late, (0.05, 0.3, 1.0), warns_from=0.05, serious_from=0.3),
    Injection("order-not-kept", one_side_first, (0.2, 0.5, 1.0), warns_from=0.5, serious_from=1.0),
    Injection("other-code", other_code, (0.1, 0.5, 1.0), warns_from=0.1, serious_from=0.5),
    Injection("copied-runs", copy_with_jitter, (0.05, 0.2, 0.5), warns_from=0.2, serious_from=0.5),
    Injection("tuned-more", tune_one_side, (0.2, 0.3, 1.0), warns_from=0.2, serious_from=None),
)
OURS = tuple(injection.check for injection in REGISTRY)


def severity_of(made: Made, check: str) -> str:
    "The worst severity of a check's findings; empty where it finds nothing."
    found = {finding.severity for finding in run_checks("case", made.case) if finding.id == check}
    return next((severity for severity in ("serious", "warning", "note") if severity in found), "")


def false_alarms(seed: int) -> list[str]:
    "What these checks find in clean studies, with and without a plan."
    made = planned_study(seed)
    return [f.id for each in (made, unplanned(made)) for f in run_checks("case", each.case) if f.id in OURS]
