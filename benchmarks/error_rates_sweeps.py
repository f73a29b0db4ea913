"""How often a sweep that stops when it is decided, and a promotion, are wrong: simulated studies through the functions
that judge real ones.

Times are log-normal: what the batches of a block have in common, what a batch has for itself, what a run has. Nothing
is trained or written; a study is a sweep's cells, filled block by block.

    python benchmarks/error_rates_sweeps.py                      # half an hour on one CPU core
    python benchmarks/error_rates_sweeps.py stop --studies 300
    python benchmarks/error_rates_sweeps.py promotion --studies 500
"""
import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CLAIMED = 0.01  # what variants of CIFAR-10 claim


# simulated studies

@dataclass(frozen=True)
class Noise:
    "Standard deviations of log times, and of accuracy between runs."
    block: float = 0.02
    batch: float = 0.006
    run: float = 0.003
    accuracy: float = 0.0005


def write_sweep(folder, variants, blocks, seeds, stop):
    "A sweep of CIFAR-10 at demo size."
    from speedrun_nb.sweep.file import read_sweep

    path = Path(folder) / "simulated.yaml"
    path.write_text(f"study: cifar\nprofile: demo\nvariants: [{', '.join(['baseline', *variants])}]\n"
                    f"seeds: 0:{blocks * seeds}\nseeds_per_batch: {seeds}\nstop: {stop}\n")
    return read_sweep(path)


def claiming(sweep, at_least):
    "The same sweep, but all its variants claim so much."
    def changed(condition):
        claim = condition.variant.claim
        if not claim: return condition
        return replace(condition, variant=replace(condition.variant, claim=replace(claim, at_least=at_least)))
    return replace(sweep, conditions=tuple(map(changed, sweep.conditions)))


def drawing(random, noise, effect):
    "What `planned_runs` asks of: seconds and metrics of a batch whose variant takes `effect` less time."
    together = {}

    def draw(batch):
        block = together.setdefault(batch.block, random.normal(0, noise.block))
        gained = math.log1p(-effect) if batch.condition.variant.name != "baseline" else 0.0
        level = math.log(4.0) + gained + block + random.normal(0, noise.batch)
        times = np.exp(level + random.normal(0, noise.run, len(batch.seeds)))
        return [(float(time), {"accuracy": 0.9 + random.normal(0, noise.accuracy)}) for time in times]

    return draw


# stop: decided

def batch_means(sweep, cells):
    "(blocks,) mean times of each condition, and its accuracies, one row a block."
    times, accuracies = ({c.name: [] for c in sweep.conditions} for _ in range(2))
    for batch in cells.batches:  # by block
        runs = [cells.done[cell] for cell in batch.cells]
        times[batch.condition.name].append(np.mean([run.time_seconds for run in runs]))
        accuracies[batch.condition.name].append([run.metrics["accuracy"] for run in runs])
    return tuple({name: np.array(values) for name, values in side.items()} for side in (times, accuracies))


def may_be_decided(claim, times, accuracies, name, blocks):
    """Could a look after so many blocks decide a claim? Not if its interval, which is that of the rule, is open and the
    accuracy is not even suspicious. So looks are saved that are sure to leave it undecided."""
    from speedrun_nb.evidence.rule import effect_outcome
    from speedrun_nb.stats.estimate import ratio_of_blocks

    found = ratio_of_blocks(times[name][:blocks], times["baseline"][:blocks], blocks)
    if effect_outcome(replace(found, watched=True).relative_interval(), claim) != "open": return True
    ours, theirs = (accuracies[side][:blocks].ravel() for side in (name, "baseline"))
    error = math.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / len(ours))
    return (theirs.mean() - ours.mean() - claim.guard.margin) / error > 1


def one_stop(sweep, plan, random, noise, effect, every_look=False):
    "Outcomes at the stop, blocks until then, and whether each printed interval holds the truth."
    from simulate import planned_runs
    from speedrun_nb.sweep.state import Cells
    from speedrun_nb.sweep.watch import case_so_far, compared_with, decided, estimate

    cells = Cells(sweep, Path("nowhere"))
    planned_runs(cells, plan.name, drawing(random, noise, effect))
    made, means = cells.done, batch_means(sweep, cells)
    total = 1 + max(batch.block for batch in cells.batches)
    judged = [c for c in sweep.conditions if compared_with(sweep, c)]
    for blocks in range(5, total + 1):
        worth = all(may_be_decided(c.variant.claim, *means, c.name, blocks) for c in judged)
        if not (worth or every_look or blocks == total): continue
        cells.done = {cell: made[cell] for batch in cells.batches if batch.block < blocks for cell in batch.cells}
        outcomes = decided(sweep, cells, {plan.name: plan})
        if "undecided" in outcomes.values(): continue
        assert worth, (blocks, outcomes)
        break
    case = case_so_far(sweep, cells, {plan.name: plan})
    intervals = [estimate(sweep, case, c).ci95_relative for c in judged]
    return outcomes, blocks, [low <= -effect <= high for low, high in intervals]


def stop_rates(studies, at_least, effect, variants=("det_crop",), blocks=40, seeds=1, noise=Noise(), seed=0, **how):
    "Shares of studies in which any variant was supported, any refuted; mean blocks; coverage at the stop."
    from speedrun_nb.sweep.plan import as_frozen

    with tempfile.TemporaryDirectory() as folder:
        sweep = claiming(write_sweep(folder, variants, blocks, seeds, "decided"), at_least)
    plan, random = as_frozen(sweep), np.random.default_rng(seed)
    found = [one_stop(sweep, plan, random, noise, effect, **how) for _ in range(studies)]
    said = [set(outcomes.values()) for outcomes, *_ in found]
    return dict(studies=studies, at_least=at_least, effect=effect, variants=len(variants),
                supported=float(np.mean(["supported" in each for each in said])),
                refuted=float(np.mean(["refuted" in each for each in said])),
                mean_blocks=float(np.mean([blocks for _, blocks, _ in found])),
                coverage=float(np.mean([each for *_, covered in found for each in covered])))


# promotion

def one_screening(sweep, rule, random, noise, effect):
    "Which variants go on, with what was promised of each."
    from simulate import planned_runs
    from speedrun_nb.core.settings import config_hash
    from speedrun_nb.sweep.screening import Screened, candidates, judge
    from speedrun_nb.sweep.state import Cells
    from speedrun_nb.sweep.watch import case_so_far

    cells = Cells(sweep, Path("nowhere"))
    planned_runs(cells, None, drawing(random, noise, effect))
    case = case_so_far(sweep, cells)
    known = {group.config_hash: group for group in case.groups}
    groups = {name: known[variant.config_hash] for name, variant in candidates(sweep).items()}
    baseline = known[config_hash(sweep.conditions[0].variant.baseline)]
    stage = Screened(sweep=sweep, case=case, baseline=baseline, groups=groups, findings=[], problems=[])
    return [judge(stage, name, rule) for name in groups]


def promotion_rates(studies, effect, blocks=3, seeds=1, at_least=CLAIMED, margin=0.0005, noise=Noise(), seed=0):
    "The share of variants that go on, beside what their reasons promise, and what follows from the true spread."
    from speedrun_nb.core.study import Guard
    from speedrun_nb.sweep.chances import pass_chance
    from speedrun_nb.sweep.file import Promotion

    with tempfile.TemporaryDirectory() as folder: sweep = write_sweep(folder, ["det_crop"], blocks, seeds, "fixed")
    rule, random = Promotion("time_seconds", at_least, Guard("accuracy", margin), runs=2), np.random.default_rng(seed)
    judged = [each for _ in range(studies) for each in one_screening(sweep, rule, random, noise, effect)]
    spread = math.hypot(noise.batch, noise.run / seeds ** 0.5) * (2 / blocks) ** 0.5
    name = "chance_reaching" if effect else "chance_null"
    return dict(studies=studies, effect=effect, blocks=blocks, went_on=float(np.mean([j.goes_on for j in judged])),
                promised=float(np.mean([j.figures[name] for j in judged])),
                expected_of_times=pass_chance((effect - at_least) / spread, blocks - 1))


# the tables

def stops(studies):
    "A/A studies, studies at the border of the claim, several variants, and batches of several runs."
    yield dict(what="A/A, any improvement is claimed", **stop_rates(studies, 0.0, 0.0))
    yield dict(what="exactly what is claimed", **stop_rates(studies, CLAIMED, CLAIMED))
    two = "det_crop", "random_crop_backoff"
    yield dict(what="the same of two variants", **stop_rates(studies, CLAIMED, CLAIMED, two))
    yield dict(what="A/A, batches of five runs", **stop_rates(studies, 0.0, 0.0, seeds=5))
    yield dict(what="3 % less", **stop_rates(studies, CLAIMED, 0.03))


def promotions(studies):
    "Variants that change nothing, and variants that are as good as the rule asks."
    for blocks in (3, 5, 8):
        for effect in (0.0, CLAIMED): yield promotion_rates(studies, effect, blocks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "stop", "promotion"), default="all")
    parser.add_argument("--studies", type=int, default=300, help="simulated studies for each line")
    given = parser.parse_args()
    lines = []
    if given.what in ("all", "stop"): lines.append(stops(given.studies))
    if given.what in ("all", "promotion"): lines.append(promotions(given.studies))
    for table in lines:
        for row in table: print(json.dumps({name: round(value, 4) if isinstance(value, float) else value
                                            for name, value in row.items()}), flush=True)


if __name__ == "__main__": main()
