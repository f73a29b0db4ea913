"""What the audit finds of mistakes that are put into clean studies, and how often it cries wolf about clean ones.

Clean studies differ in the number of variants, machines, blocks and runs of a batch, in effect, noise and drift, with
and without an effect of the batch, with qualities that seeds share or not; they are of CIFAR-10 or of GPT. A mistake is
put into a study of one shape, at graded strength: of the effect, of the runs' standard deviation, or as a share of the
runs, as its line says. Where a mistake makes a part of the effect that is seen, the true one is smaller by as much, so
that a strength from a half on turns a claim of 1 % that seems to be kept by 2 %. A clean study must have no serious
finding.

    python benchmarks/audit.py                                  # 1,000 clean studies, 20 of each mistake and strength
    python benchmarks/audit.py --studies 0 --flaw cold-start other-cudnn --each 50

Mistakes in plans, seeds and copies are made by audit_plans.py, beside this file.
"""
import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache, partial

import audit_plans
import numpy as np
from rich.console import Console

from speedrun_nb.audit.audit import audit_case
from speedrun_nb.core.records import RECORD_SCHEMA, json_ready, run_id
from speedrun_nb.core.runs import make_frame, parse_run
from speedrun_nb.core.study import load_study
from speedrun_nb.core.tables import make_table
from speedrun_nb.core.variants import resolve
from speedrun_nb.evidence.case import Case, make_case

START = datetime(2026, 1, 1, tzinfo=UTC)
PROFILE = "full"
EFFECT = 0.02  # relative, of variants in studies that mistakes are put into; their claims are of 1 %
STRENGTHS = (0.25, 0.5, 1.0, 2.0)
TAILS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "skewed": lambda rng, n: rng.exponential(size=n) - 1,
    "long": lambda rng, n: rng.standard_t(4, n) / 1.4}


# a study

@dataclass(frozen=True)
class Shape:
    "How a study is laid out, and what is true of it."
    study: str = "cifar"
    variants: tuple[str, ...] = ("baseline", "det_crop")
    hosts: tuple[str, ...] = ("a",)
    blocks: int = 10
    size: int = 6                 # runs of a batch
    effect: float = -EFFECT       # of every variant on time, relative
    noise: float = 0.004          # standard deviation of a run's time, relative
    batch: float = 0.0            # standard deviation of a batch's, in those of a run
    shared: float = 0.0           # correlation of quality between runs of one seed
    tail: str = "normal"
    drift: Callable = lambda done: 0 * done  # part of the study that is done -> relative change of time

    @property
    def seconds(self) -> float: return 4.4 if self.study == "cifar" else 200.0


@dataclass
class Made:
    "Records of a study, in the order of running, and where its batches come from."
    shape: Shape
    records: list[dict]
    provenances: dict[str, dict] = field(default_factory=dict)

    @property
    def effect(self) -> float:
        "That is seen where nothing is wrong, in seconds."
        return EFFECT * self.shape.seconds

    def of(self, variant: str) -> list[dict]: return [r for r in self.records if r["variant"] == variant]

    def batches(self, variant: str | None = None) -> list[list[dict]]:
        "Runs batch by batch, in the order of running."
        found = {}
        for record in self.records:
            if variant in (None, record["variant"]): found.setdefault(record["batch"], []).append(record)
        return list(found.values())

    def provenance(self, record: dict) -> dict:
        return self.provenances[f"{record['study']}/{PROFILE}/{record['variant']}/{record['batch']}"]

    @property
    def case(self) -> Case:
        "As if the records had been read from files."
        rows = make_frame([parse_run(json.dumps(json_ready(record)).encode()) for record in self.records])
        return make_case(rows, load_study(self.shape.study), PROFILE, json_ready(self.provenances))


@cache
def settings(study: str, variant: str):
    "The settings of a variant at full size, and their hash."
    found = resolve(load_study(study), variant, PROFILE)
    return json_ready(found.flat), found.config_hash


def moment(seconds: float) -> str: return (START + timedelta(seconds=float(seconds))).isoformat(timespec="microseconds")


def cifar_measures(seconds, quality, rng):
    "Metrics and curve of a run."
    epochs = seconds / 10 * np.maximum(0.5, rng.normal(1, 0.01, 10))
    curve = dict(epoch=list(range(10)), time_seconds=np.cumsum(epochs), train_loss=rng.normal(1.5, 0.1, 10))
    accuracy = round(0.94 + 0.0013 * quality, 4)
    measured = dict(accuracy=accuracy, accuracy_plain=round(accuracy - 0.008 + rng.normal(0, 0.0005), 4),
                    train_loss=rng.normal(1.1, 0.01))
    return measured, {name: list(values) for name, values in curve.items()}


def gpt_measures(seconds, quality, rng):
    "Metrics and curve of a run."
    ends, step = list(range(0, 5101, 150)), 1000 * seconds / 5100
    times = [None, *(step * np.maximum(0.5, rng.normal(1, 0.01, len(ends) - 1)))]
    loss = 3.28 + 0.002 * quality
    curve = dict(step=ends, step_ms=times, val_loss=list(rng.normal(3.5, 0.1, len(ends))))
    measured = dict(val_loss=loss, train_loss=loss + rng.normal(0, 0.03), step_ms=step, wall_seconds=seconds + 20,
                    tokens_per_second=2.7e9 / seconds)
    return measured, curve


MEASURES = {"cifar": cifar_measures, "gpt": gpt_measures}
OVERHEAD = {"cifar": 0.8, "gpt": 30.0}  # seconds of a run that its clock leaves out


def layout(shape: Shape, rng) -> list[tuple[str, int, str, int, int]]:
    "Who runs when: host, block, variant, seed, repeat; blocks in random order of variants."
    found = []
    for number, host in enumerate(shape.hosts):
        for block in range(shape.blocks):
            for variant in map(str, rng.permutation(shape.variants)):
                seeds = range(block * shape.size, (block + 1) * shape.size)
                found += [(host, block, variant, seed, number) for seed in seeds]
    return found


def make(shape: Shape, seed: int = 0) -> Made:
    "A study without mistakes."
    rng = np.random.default_rng(seed)
    runs, clock, records = layout(shape, rng), dict.fromkeys(shape.hosts, 0.0), []
    noise = shape.noise * TAILS[shape.tail](rng, len(runs))
    of_batch, of_seed = {}, {}
    for (host, block, variant, number, repeat), own in zip(runs, noise, strict=True):
        batch = f"{host}-{variant}-{block:02d}"
        moved = of_batch.setdefault(batch, shape.noise * shape.batch * rng.normal())
        common = of_seed.setdefault((host, number), rng.normal())
        done = np.float64(block / max(1, shape.blocks - 1))
        slower = (1 + 0.3 * shape.hosts.index(host)) * (1 + shape.effect * (variant != "baseline"))
        seconds = float(shape.seconds * slower * (1 + shape.drift(done) + moved + own))
        quality = np.sqrt(shape.shared) * common + np.sqrt(1 - shape.shared) * rng.normal()
        measured, curve = MEASURES[shape.study](seconds, float(quality), rng)
        config, digest = settings(shape.study, variant)
        start, end = clock[host], clock[host] + seconds + OVERHEAD[shape.study]
        clock[host] = end + 0.1
        records.append(dict(
            schema=RECORD_SCHEMA, run_id=run_id(shape.study, PROFILE, digest, number, repeat), study=shape.study,
            profile=PROFILE, variant=variant, config=config, config_hash=digest, seed=number, repeat=repeat,
            batch=batch, sweep="s", block=block, order=len(records), host_id=host, device="cuda", precision="bf16",
            threads=8, ranks=8 if shape.study == "gpt" else None, package_hash="0a1b2c3d", status="completed",
            started_at=moment(start), ended_at=moment(end), time_seconds=seconds, clock=load_study(shape.study).clock,
            peak_memory_bytes=9 << 30, fingerprint=f"{rng.integers(2**48):012x}", curve=curve, metrics=measured,
            compiled=dict(how="none", graphs=0, recompiles=0, fallbacks=0)))
    made = Made(shape, records)
    for batch in made.batches(): made.provenances[path_of(batch[0])] = origin(batch)
    return made


def path_of(record: dict) -> str: return f"{record['study']}/{PROFILE}/{record['variant']}/{record['batch']}"


def origin(batch: list[dict]) -> dict:
    "provenance.json of a batch."
    gpu = {"name": "NVIDIA A100-SXM4-40GB", "driver_version": "550.54", "clocks.max.sm": "1410 MHz",
           "clocks.max.memory": "1215 MHz", "power.limit": "400.00 W"}
    packages = dict(torch="2.8.0", triton="3.4.0", numpy="2.3.0", scipy="1.16.0")
    first = batch[0]
    return dict(
        status="completed", host_id=first["host_id"], boot_id=f"boot-{first['host_id']}", cpu="EPYC 7742",
        cpu_count=64, memory_bytes=512 << 30, os="Linux-6.8", python="3.12.3", cuda="12.8", cudnn="91002",
        gpus=[gpu] * (first["ranks"] or 1), packages=packages, git=dict(commit="0" * 40, dirty=False),
        data={"train.bin": "ab12"}, config=first["config"], expected_runs=len(batch),
        seeds=[record["seed"] for record in batch], started_at=first["started_at"], ended_at=batch[-1]["ended_at"])


def clean_shape(seed: int) -> Shape:
    "A study as it should be made; what is not wrong depends on the seed."
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(0, 0.002, 50))
    drifts = [lambda done: 0 * done, lambda done: 0.02 * done, lambda done: -0.03 * np.exp(-10 * done),
              lambda done: walk[int(49 * done)]]
    study = str(rng.choice(["cifar", "gpt"]))
    others = dict(cifar=("det_crop", "random_crop_backoff", "det_crop_then_random"), gpt=("kv_1", "mdha", "kv_3"))
    return Shape(
        study, ("baseline", *others[study][:rng.integers(1, 4)]), ("a", "b")[:rng.integers(1, 3)],
        blocks=int(rng.integers(5, 13)), size=int(rng.integers(1, 7)),
        effect=float(rng.choice([0, -0.005, -0.02, -0.1])), noise=float(rng.choice([0.001, 0.004, 0.01])),
        batch=float(rng.choice([0, 0.5, 1, 2])), shared=float(rng.choice([0, 0.3])),
        tail=str(rng.choice(list(TAILS))), drift=drifts[rng.integers(len(drifts))])


# mistakes

@dataclass(frozen=True)
class Flaw:
    "A mistake that is put into a study."
    name: str
    ids: tuple[str, ...]  # of findings that count as having found it
    of: str               # what a strength of 1 is
    put: Callable         # study, strength, generator -> None; changes the study
    instead: bool         # does it make so much of the effect that is seen, beside the true one?
    shape: Shape
    strengths: tuple[float, ...] = STRENGTHS

    def study(self, strength: float, seed: int) -> Made:
        "A study with the mistake. Where it makes a part of the effect, the true one is smaller by as much."
        shape = self.shape
        if self.instead: shape = replace(shape, effect=shape.effect * (1 - strength))
        made = make(shape, seed)
        self.put(made, strength, np.random.default_rng(seed))
        return made


@dataclass(frozen=True)
class PlanFlaw:
    "A mistake of `audit_plans`, that is put into a study with a frozen plan."
    injection: audit_plans.Injection

    @property
    def name(self) -> str: return self.injection.make.__name__.replace("_", "-")

    @property
    def ids(self) -> tuple[str, ...]: return (self.injection.check,)

    @property
    def of(self) -> str: return f"all of it: {self.injection.make.__doc__}"

    @property
    def strengths(self) -> tuple[float, ...]: return self.injection.strengths

    def study(self, strength: float, seed: int) -> audit_plans.Made:
        return self.injection.make(audit_plans.planned_study(seed), strength, seed)


FLAWS: dict[str, Flaw | PlanFlaw] = {each.name: each for each in map(PlanFlaw, audit_plans.REGISTRY)}


def flaw(name: str, *ids: str, of: str, instead: bool = False, **shape) -> Callable:
    "Register a mistake, and the findings that tell of it; `shape`: what of the study is not as usual."
    def register(function):
        FLAWS[name] = Flaw(name, ids, of, function, instead, Shape(**shape))
        return function
    return register


def slow(record: dict, seconds: float, steps: Callable | None = None) -> None:
    "Make a run longer, and its curve too, at once or by `steps`: part of the run that is done -> weight."
    before, curve = record["time_seconds"], record["curve"]
    record["time_seconds"] = before + seconds
    end = datetime.fromisoformat(record["ended_at"]) + timedelta(seconds=seconds)
    record["ended_at"] = end.isoformat(timespec="microseconds")
    times = np.diff(curve["time_seconds"], prepend=0) if "time_seconds" in curve else np.array(curve["step_ms"][1:])
    weights = np.array([(steps or (lambda done: 1.0))((i + 0.5) / len(times)) for i in range(len(times))])
    times = times + seconds / before * times.sum() * weights / weights.sum()
    if "time_seconds" in curve: curve["time_seconds"] = list(np.cumsum(times))
    else: curve["step_ms"] = [None, *times]


def renumber(made: Made) -> None:
    "Give runs moments and orders as they now follow each other, host by host."
    clock = {}
    for number, record in enumerate(made.records):
        start = clock.get(record["host_id"], 0.0)
        end = start + record["time_seconds"] + OVERHEAD[made.shape.study]
        record |= dict(order=number, started_at=moment(start), ended_at=moment(end))
        clock[record["host_id"]] = end + 0.1


@flaw("always-first", "order-effect", of="effect, from the baseline's turn to the variant's")
def always_first(made, strength, rng):
    made.records.sort(key=lambda r: (r["block"], r["variant"], r["seed"]))
    size = made.shape.size
    for number, record in enumerate(made.records):
        slow(record, strength * made.effect * (number % (2 * size)) / size)
    renumber(made)


@flaw("in-sequence", "not-interleaved", "order-drift", of="effect, as drift from first to last")
def in_sequence(made, strength, rng):
    made.records.sort(key=lambda r: (r["variant"], r["block"], r["seed"]))
    for number, record in enumerate(made.records): slow(record, strength * made.effect * number / len(made.records))
    renumber(made)


@flaw("later-without-blocks", "order-effect", "not-interleaved", of="effect, as drift from first to last")
def later_without_blocks(made, strength, rng):
    place = {id(r): rng.random() + 0.6 * (r["variant"] != "baseline") for r in made.records}
    made.records.sort(key=lambda r: place[id(r)])
    for number, record in enumerate(made.records):
        record |= dict(block=None, sweep=None)
        slow(record, strength * made.effect * number / len(made.records))
    renumber(made)


@flaw("hot-steps", "slow-down", of="effect, lost by the baseline in the course of a run",
      instead=True)
def hot_steps(made, strength, rng):
    for record in made.of("baseline"): slow(record, strength * made.effect, lambda done: done)
    renumber(made)


@flaw("hot-steps-gpt", "slow-down", of="effect, lost by the baseline in the course of a run",
      instead=True, study="gpt", variants=("baseline", "kv_1"), size=3)
def hot_steps_gpt(made, strength, rng): hot_steps(made, strength, rng)


@flaw("hot-batches", "slow-down", of="effect, in the baseline's mean", instead=True)
def hot_batches(made, strength, rng):
    for batch in made.batches("baseline"):
        for place, record in enumerate(batch): slow(record, 2 * strength * made.effect * place / (len(batch) - 1))
    renumber(made)


@flaw("cold-start", "warmup-outlier", of="effect, in the baseline's mean", instead=True)
def cold_start(made, strength, rng):
    for batch in made.batches("baseline"): slow(batch[0], strength * made.effect * len(batch))
    renumber(made)


@flaw("step-jump", "step-time-jump", "slow-down", of="effect, in the baseline's mean; half of its runs jump",
      instead=True)
def step_jump(made, strength, rng):
    for record in made.of("baseline")[::2]: slow(record, 2 * strength * made.effect, lambda done: float(done > 0.6))
    renumber(made)


@flaw("not-waited-for", "impossible-time", of="half of the variant's runs")
def not_waited_for(made, strength, rng):
    for record in made.of("det_crop"):
        if rng.random() < strength / 2: record["time_seconds"] /= 30


@flaw("longer-than-run", "impossible-time", of="effect", instead=True)
def longer_than_run(made, strength, rng):
    for record in made.of("baseline"):
        record["time_seconds"] += strength * made.effect
        start = datetime.fromisoformat(record["started_at"])
        record["ended_at"] = (start + timedelta(seconds=made.shape.seconds)).isoformat()


@flaw("batch-effect", "batch-effect", of="standard deviation of a run, between batches")
def batch_effect(made, strength, rng):
    for batch in made.batches():
        moved = strength * made.shape.noise * made.shape.seconds * rng.normal()
        for record in batch: slow(record, moved)


def in_batches(made, strength, rng, variant="det_crop"):
    "A share of the batches of a variant: all from a strength of 1 on, where the effect also moves."
    for batch in made.batches(variant):
        if rng.random() >= strength: continue
        for record in batch: slow(record, 0.5 * made.effect)
        yield made.provenance(batch[0])


def other(name: str, *where: str, value: str):
    "Register: a share of the variant's batches ran with something else."
    @flaw(f"other-{name}", "mixed-software", of="all of the variant's batches")
    def put(made, strength, rng):
        for provenance in in_batches(made, strength, rng):
            inner = provenance
            for key in where[:-1]: inner = inner[key]
            for each in inner if isinstance(inner, list) else [inner]: each[where[-1]] = value


other("cudnn", "cudnn", value="90100")
other("torch", "packages", "torch", value="2.7.1")
other("triton", "packages", "triton", value="3.3.0")
other("scipy", "packages", "scipy", value="1.15.0")
other("cuda", "cuda", value="12.6")
other("driver", "gpus", "driver_version", value="535.1")
other("clocks", "gpus", "clocks.max.sm", value="1200 MHz")
other("power-limit", "gpus", "power.limit", value="250.00 W")
other("data", "data", "train.bin", value="cd34")


@flaw("other-card", "one-name-two-machines", of="all of the variant's batches")
def other_card(made, strength, rng):
    for provenance in in_batches(made, strength, rng): provenance["gpus"][0]["name"] = "NVIDIA A100-SXM4-80GB"


@flaw("cloned-machine", "one-name-two-machines", of="all of the variant's batches")
def cloned_machine(made, strength, rng):
    for provenance in in_batches(made, strength, rng): provenance["boot_id"] = "boot-clone"


@flaw("other-memory", "one-name-two-machines", of="all of the variant's batches")
def other_memory(made, strength, rng):
    for provenance in in_batches(made, strength, rng): provenance["memory_bytes"] = 256 << 30


@flaw("two-speeds", "one-name-two-machines", "batch-effect", of="10 % in half of the baseline's batches")
def two_speeds(made, strength, rng):
    for batch in made.batches("baseline")[::2]:
        for record in batch: slow(record, 0.1 * strength * made.shape.seconds)
    renumber(made)


@flaw("shared-device", "shared-device", of="half of the baseline's batches, each run 10 % slower")
def shared_device(made, strength, rng):
    for batch in made.batches("baseline"):
        if rng.random() >= strength / 2: continue
        guests = deepcopy(batch)
        for number, (record, guest) in enumerate(zip(batch, guests, strict=True)):
            slow(record, 0.1 * made.shape.seconds)
            guest |= dict(variant="det_crop_then_random", config=settings("cifar", "det_crop_then_random")[0],
                          config_hash=settings("cifar", "det_crop_then_random")[1])
            guest |= dict(run_id=f"{record['run_id'][:-4]}{number:04d}", fingerprint=f"{rng.integers(2**48):012x}",
                          batch=f"guest-{record['batch']}")
            guest["metrics"] = cifar_measures(4.4, rng.normal(), rng)[0]
        made.records += guests
        made.provenances[path_of(guests[0])] = origin(guests)


def set_everywhere(made, records, **changes):
    "Override settings, as somebody would by hand."
    for record in records:
        record["config"] = record["config"] | changes
        record["config_hash"] = f"{record['config_hash'][:8]}override"
        made.provenance(record)["config"] = record["config"]


@flaw("fewer-epochs", "different-work", of="5 % of the variant's epochs")
def fewer_epochs(made, strength, rng):
    set_everywhere(made, made.of("det_crop"), **{"train.epochs": 9.9 * (1 - 0.05 * strength)})


@flaw("other-batch-size", "different-work", of="128 images")
def other_batch_size(made, strength, rng):
    set_everywhere(made, made.of("det_crop"), **{"train.batch_size": 1024 - int(128 * strength)})


@flaw("other-validation", "different-work", of="a tenth of the validation tokens", study="gpt",
      variants=("baseline", "kv_1"), size=3)
def other_validation(made, strength, rng):
    set_everywhere(made, made.of("kv_1"), **{"evaluation.tokens": int(10_485_760 * (1 - 0.1 * strength))})


@flaw("fewer-ranks", "mixed-software", of="all of the variant's batches", study="gpt", variants=("baseline", "kv_1"),
      size=3)
def fewer_ranks(made, strength, rng):
    for batch in made.batches("kv_1"):
        if rng.random() < strength:
            for record in batch: record["ranks"] = 7


@flaw("fallback", "compile-fallback", of="effect, in the baseline's mean; half of its runs fall back",
      instead=True, study="gpt", variants=("baseline", "kv_1"), size=4)
def fallback(made, strength, rng):
    for record in made.records: record["compiled"] = dict(how="model", graphs=2, recompiles=0, fallbacks=0)
    for record in made.of("baseline")[::2]:
        record["compiled"]["fallbacks"] = 1
        slow(record, 2 * strength * made.effect)
    renumber(made)


@flaw("outliers", "outliers", of="effect, in the baseline's mean, by one run in ten", instead=True)
def outliers(made, strength, rng):
    for record in made.of("baseline")[3::10]: slow(record, 10 * strength * made.effect)
    renumber(made)


@flaw("other-machine", "no-baseline-on-host", of="all of the variant's batches")
def other_machine(made, strength, rng):
    for batch in made.batches("det_crop"):
        if rng.random() >= strength: continue
        made.provenance(batch[0])["host_id"] = "b"
        for record in batch: record["host_id"] = "b"


@flaw("unnamed-machines", "mixed-hosts", of="10 % between the machines", hosts=("a", "b"))
def unnamed_machines(made, strength, rng):
    for record in made.records:
        slower = 1.3 if record["host_id"] == "b" else 1.0
        slow(record, record["time_seconds"] * ((1 + 0.1 * strength * (slower > 1)) / slower - 1))
        made.provenance(record)["host_id"] = record["host_id"] = None


@flaw("other-clock", "mixed-clocks", of="all of the variant's batches")
def other_clock(made, strength, rng):
    for batch in made.batches("det_crop"):
        if rng.random() < strength:
            for record in batch: record["clock"] = "the clock on the wall"


# counting

def alarms_of(seed: int) -> tuple[set, bool]:
    "What is found in a clean study, as (id, severity), and whether any of it is serious."
    findings = audit_case(make(clean_shape(seed), seed).case)
    serious = any(f.severity == "serious" and not is_weighed(f.id) for f in findings)
    return {(f.id, f.severity) for f in findings}, serious


def alarms(studies: int, seed: int = 0, each=map) -> tuple[Counter, list[int]]:
    "How many clean studies have a finding, by (id, severity), and seeds of those with a serious one."
    found, serious, seeds = Counter(), [], range(seed, seed + studies)
    for number, (findings, is_serious) in zip(seeds, each(alarms_of, seeds), strict=True):
        found.update(findings)
        if is_serious: serious.append(number)
    return found, serious


def is_weighed(id: str) -> bool:
    "Is it a result, such as a guard that is broken, rather than a mistake?"
    from speedrun_nb.audit.findings import CHECKS
    return CHECKS[id].weighed


def detected(name: str, strength: float, each: int, seed: int = 0) -> dict:
    "How often a mistake of a strength is found, at which severity, and what else is serious."
    mistake, counts, elsewhere = FLAWS[name], Counter(), Counter()
    for number in range(each):
        findings = audit_case(mistake.study(strength, seed + number).case)
        severities = [f.severity for f in findings if f.id in mistake.ids]
        if severities: counts[next(s for s in ("serious", "warning", "note") if s in severities)] += 1
        elsewhere.update({f.id for f in findings if f.severity == "serious" and f.id not in mistake.ids
                          and not is_weighed(f.id)})
    shares = {severity: round(counts[severity] / each, 2) for severity in ("serious", "warning", "note")}
    also = ", ".join(f"{name} {n / each:.2g}" for name, n in elsewhere.most_common())
    found = round(counts.total() / each, 2)
    return dict(flaw=mistake.name, strength=strength, found=found) | shares | {"also serious": also}


def strengths_of(mistake: Flaw | PlanFlaw, wanted: list[float] | None) -> tuple[float, ...]:
    "Those wanted; a mistake in plans has strengths of its own, up to the whole of it."
    return tuple(wanted) if wanted and isinstance(mistake, Flaw) else mistake.strengths


def main(arguments=None) -> int:
    "Print both tables; fail where a clean study has a serious finding."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, help="clean studies")
    parser.add_argument("--flaw", nargs="*", choices=[*FLAWS, []], help="only these mistakes; none: clean studies only")
    parser.add_argument("--each", type=int, default=20, help="studies of each mistake and strength")
    parser.add_argument("--strength", type=float, nargs="+", help="of mistakes that are not in plans; four by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that work at once")
    given = parser.parse_args(arguments)
    console, serious = Console(width=110), []
    chosen = list(FLAWS) if given.flaw is None else given.flaw
    planned = [(name, strength) for name in chosen for strength in strengths_of(FLAWS[name], given.strength)]
    with ProcessPoolExecutor(given.jobs) as pool:
        names, strengths = zip(*planned, strict=True) if planned else ((), ())
        rows = list(pool.map(partial(detected, each=given.each, seed=given.seed), names, strengths))
        if given.studies: found, serious = alarms(given.studies, given.seed, partial(pool.map, chunksize=8))
    if rows: console.print(make_table(rows, f"Mistakes put into {given.each} studies, the share found"))
    for name in chosen: console.print(f"{name}: 1 is {FLAWS[name].of}; found by {', '.join(FLAWS[name].ids)}")
    if given.studies:
        table = [dict(id=id, severity=severity, studies=n, share=round(n / given.studies, 3))
                 for (id, severity), n in found.most_common()]
        console.print(make_table(table, f"Findings on {given.studies:,} clean studies"))
        seeds = f": seeds {', '.join(map(str, serious[:20]))}" if serious else ""
        console.print(f"{len(serious)} with a serious finding that is no result{seeds}")
    return int(bool(serious))


if __name__ == "__main__": sys.exit(main())
