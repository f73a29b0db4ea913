"""Simulated runs: complete records, quickly made, for tests and lessons. Their provenance says so."""
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, UTC
from pathlib import Path

from speedrun_nb.core.records import Ready, Result, append_record, make_record, run_id, write_json
from speedrun_nb.core.runs import RunRecord
from speedrun_nb.core.study import Metric, Study, load_study
from speedrun_nb.core.variants import Variant, resolve

START = datetime(2026, 1, 1, tzinfo=UTC)
POINTS = 8  # of a curve over steps


@dataclass(frozen=True)
class Typical:
    "What a run of a study usually measures, in stored units."
    values: dict[str, float]                                   # by metric; others have those of their kind
    spread: dict[str, float] = field(default_factory=dict)     # standard deviation of time and the first quality
    untrained: dict[str, float] = field(default_factory=dict)  # where a curve begins; other metrics have no curve
    ranks: int | None = None                                   # processes


TYPICAL = {
    "cifar": Typical(
        values=dict(time_seconds=4, accuracy=0.9, accuracy_plain=0.88, train_loss=1.0),
        spread=dict(time_seconds=0.05, accuracy=0.003),
        untrained=dict(train_loss=2.3, accuracy_plain=0.1)),
    "gpt": Typical(
        values=dict(time_seconds=40, wall_seconds=48, step_ms=160, tokens_per_second=1e5,
                    val_loss=3.3, train_loss=3.25),
        spread=dict(time_seconds=0.2, val_loss=0.002),
        untrained=dict(val_loss=5.5, train_loss=5.5),
        ranks=2),
}


def typical_value(metric: Metric, typical: Typical) -> float:
    "A table's value, or one of the metric's kind."
    if metric.name in typical.values: return typical.values[metric.name]
    if metric.unit == "MiB": return 2**30
    if metric.quality: return 0.9 if metric.better == "higher" else 1.0
    return 10.0


def typical_of(study: Study) -> Typical:
    "The table of a study; one that has none gets a curve for each of its quality metrics."
    qualities = [metric for metric in study.metrics.values() if metric.quality]
    untrained = {metric.name: 0.1 if metric.better == "higher" else 3.0 for metric in qualities}
    return TYPICAL.get(study.name) or Typical(values={}, untrained=untrained)


def first_quality(study: Study) -> Metric:
    return next(metric for metric in study.metrics.values() if metric.quality)


def spread_of(metric: Metric, typical: Typical) -> float:
    "The standard deviation of runs of one batch."
    return typical.spread.get(metric.name, 0.01 * typical_value(metric, typical))


def measure(study: Study, typical: Typical, effect: tuple[float, float], noise: random.Random) -> dict[str, float]:
    "Every metric of one run: costs follow the time, qualities the first quality, memory neither."
    quality = first_quality(study)
    changes = dict(zip(("time_seconds", quality.name), effect, strict=True))
    measured = {}
    for name, change in changes.items():
        metric = study.metrics[name]
        measured[name] = typical_value(metric, typical) + change + noise.gauss(0, spread_of(metric, typical))
    slower = measured["time_seconds"] / typical_value(study.metrics["time_seconds"], typical)
    better = measured[quality.name] - typical_value(quality, typical)
    for name, metric in study.metrics.items():
        value = typical_value(metric, typical)
        if name in measured: continue
        elif metric.unit == "MiB": measured[name] = value
        elif metric.quality: measured[name] = value + (better if metric.better == quality.better else -better)
        else: measured[name] = value * slower if metric.better == "lower" else value / slower
    return measured


def places_of(study: Study, variant: Variant) -> tuple[dict[str, list], list[float]]:
    "Where a run is looked at: the axis of its curve, and the share of training that is done there."
    budget = variant.flat[study.budget] if study.budget else 2
    if study.budget and not study.budget.endswith("epochs"):
        shares = [n / POINTS for n in range(POINTS + 1)]
        return {"step": [round(share * budget) for share in shares]}, shares
    epochs = math.ceil(budget)
    return {"epoch": list(range(epochs))}, [(epoch + 1) / epochs for epoch in range(epochs)]


def curve_of(study: Study, typical: Typical, variant: Variant, measured: dict) -> dict[str, list]:
    "What was recorded on the way: by epoch where the budget counts epochs, otherwise by step."
    curve, shares = places_of(study, variant)
    curve["time_seconds"] = [share * measured["time_seconds"] for share in shares]
    for name, start in typical.untrained.items():
        curve[name] = [measured[name] + (start - measured[name]) * (1 - share) ** 6 for share in shares]
    return curve


def result_of(study: Study, typical: Typical, variant: Variant, seed: int, measured: dict) -> Result:
    "What a trainer would have yielded."
    identity = run_id(study.name, variant.profile, variant.config_hash, seed, 0)
    tokens = getattr(variant.settings, "tokens", None)
    return Result(
        seed=seed, status="completed", time_seconds=measured["time_seconds"],
        metrics={name: value for name, value in measured.items() if name not in ("time_seconds", "peak_memory_bytes")},
        curve=curve_of(study, typical, variant, measured), losses=[random.Random(identity).random()],
        peak_memory_bytes=int(measured["peak_memory_bytes"]) if "peak_memory_bytes" in measured else None,
        tokens=tokens and dict(trained=tokens, unique=tokens // 2, passes=2.0))


def simulated_provenance(host: str) -> dict:
    return dict(status="completed", host_id=host, cpu="simulated", packages={}, git={}, gpus=[])


@dataclass(frozen=True)
class Layout:
    "How runs are spread over batches and blocks: a block holds a batch of every variant, an hour after the last one."
    variants: int
    seeds_per_batch: int
    between: float  # standard deviation of what blocks, and batches in them, add to times, in that of runs
    hosts: tuple[str, ...]

    def block(self, seed: int) -> int: return seed // self.seeds_per_batch

    def batch(self, seed: int) -> str: return f"simulated-{self.block(seed):02d}"

    def host(self, seed: int) -> int: return self.block(seed) % len(self.hosts)

    def state(self, seed: int, place: int) -> float:
        "What the machine's state adds to the times of a batch, in standard deviations of runs."
        block = self.block(seed)
        together, alone = (random.Random(f"{block} {what}").gauss(0, 1) for what in ("block", place))
        return self.between * (together + alone)

    def turn(self, seed: int, place: int) -> dict:
        "When a run was made, and where in the order of all."
        before = place * self.seeds_per_batch + seed % self.seeds_per_batch
        started = START + timedelta(hours=self.block(seed), minutes=before)
        times = dict(started_at=started.isoformat(), ended_at=(started + timedelta(seconds=50)).isoformat())
        order = self.block(seed) * self.variants * self.seeds_per_batch + before
        where = dict(host_id=self.hosts[self.host(seed)], block=self.block(seed), batch=self.batch(seed))
        return where | times | dict(order=order)


def cell_of(variant: Variant, sweep: str | None) -> dict:
    "What is the same for all runs of a variant."
    named = dict(study=variant.study.name, profile=variant.profile, variant=variant.name)
    asked = dict(config=variant.flat, config_hash=variant.config_hash, repeat=0, sweep=sweep)
    return named | asked | dict(clock=variant.study.clock)


def add_run(folder: Path, record: dict) -> None:
    "Append a record to its batch, which is made if need be."
    batch = folder / record["batch"]
    if not batch.exists():
        batch.mkdir(parents=True)
        write_json(batch / "provenance.json", simulated_provenance(record["host_id"]))
    append_record(batch / "runs.jsonl", record)


def simulated_runs(
    outputs: str | Path,          # records are written below it
    study: str = "cifar",         # any study
    profile: str = "demo",
    effects: dict | None = None,  # variant -> (seconds, quality) to add to what is typical, in stored units
    runs: int = 8,                # of each variant
    sweep: str | None = None,     # name of the plan that they are made under
    seeds_per_batch: int = 1,     # a batch of every variant is a block
    between: float = 0.0,         # how much blocks and batches differ in time, in standard deviations of runs
    hosts: tuple[str, ...] = ("simulated",),  # which take turns, block by block; each is a tenth slower than the last
) -> None:
    "Write simulated records as a sweep leaves them: the variants took turns, in blocks of one batch each."
    effects = effects or {"baseline": (0, 0)}
    known, noise = load_study(study), random.Random(0)
    typical, layout = typical_of(known), Layout(len(effects), seeds_per_batch, between, hosts)
    ready = Ready("cpu", "fp32", 1, 0.0, {}, ranks=typical.ranks)
    time = known.metrics["time_seconds"]
    usual, spread = typical_value(time, typical), spread_of(time, typical)
    for place, (name, (seconds, quality)) in enumerate(effects.items()):
        variant = resolve(known, name, profile)
        for seed in range(runs):
            slower = 0.1 * layout.host(seed) * (usual + seconds)
            effect = seconds + slower + spread * layout.state(seed, place), quality
            result = result_of(known, typical, variant, seed, measure(known, typical, effect, noise))
            cell = cell_of(variant, sweep) | layout.turn(seed, place)
            add_run(Path(outputs) / study / profile / name, make_record(result, ready, cell, known.metrics))


def planned_runs(
    cells,                 # `speedrun_nb.sweep.state.Cells` of a sweep
    plan: str | None,      # name of the plan that they are made under
    draw: Callable,        # of a batch: for each of its seeds seconds and metrics
    blocks: int | None = None,  # the first so many; None: all
) -> None:
    "The runs of a sweep as if they had been made, in memory only: a batch takes a minute."
    for number, batch in enumerate(cells.batches):
        if blocks is not None and batch.block >= blocks: continue
        variant, started = batch.condition.variant, START + timedelta(minutes=number)
        same = dict(
            study=variant.study.name, profile=variant.profile, variant=variant.name, config=variant.flat,
            config_hash=variant.config_hash, repeat=batch.repeat, batch=f"b{number}", sweep=plan, block=batch.block,
            host_id="simulated", status="completed", started_at=started.isoformat(),
            ended_at=(started + timedelta(seconds=50)).isoformat())
        for (cell, seed), (seconds, metrics) in zip(batch.cells.items(), draw(batch), strict=True):
            cells.done[cell] = RunRecord(cell, seed=seed, time_seconds=seconds, metrics=metrics, **same)
