"""Made-up runs for tests and lessons of the audit: studies in which nothing is wrong, for mistakes to be planted in."""
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from speedrun_nb.audit.findings import Finding
from speedrun_nb.core.study import load_study
from speedrun_nb.evidence.case import Case, make_case


_START = pd.Timestamp("2026-01-01", tz="UTC")

def _times(after:Iterable)->list[str]:
    "Moments, some seconds after the start of the year."
    return [str(_START + pd.Timedelta(seconds=int(seconds))) for seconds in after]


def runs_of(
    variant:str="baseline",
    n:int=20,          # how many, one a seed
    batch:str="b0",
    time:float=4.4,    # mean, in seconds
    rng=None,          # numpy's generator; by default the noise depends on nothing but variant and batch
    cv:float=0.007,    # standard deviation of the times, relative
    step:float=1e-4,   # in which accuracies are written: shares of 10,000 test images
    **columns,         # more of them, or in the place of those below
)->pd.DataFrame:
    "Records of one batch, made in its order, with results and fingerprints that differ."
    rng = rng or np.random.default_rng(list(f"{variant} {batch}".encode()))
    rows = pd.DataFrame(dict(
        run_id=[f"{variant}-{batch}-{i}" for i in range(n)],
        study="cifar",
        profile="demo",
        variant=variant,
        config_hash=f"hash-{variant}",
        seed=range(n),
        repeat=0,
        batch=batch,
        order=range(n),
        status="completed",
        started_at=_times(60 * np.arange(n)),
        accuracy=((rng.normal(0.94, 0.0012, n) / step).round() * step).round(9),
        time_seconds=rng.normal(time, cv * time, n),
        fingerprint=[f"{variant}-{batch}-{i}" for i in range(n)],
    ))
    return rows.assign(config=[{"data.split": "validation"}] * n).assign(**columns)


def _in_turns(
    rng,                     # numpy's generator
    variants:Iterable[str],
    blocks:int,
    size:int,                # runs of a variant in a block
)->pd.DataFrame:
    "Who runs when: block, variant and seed, in the order of running."
    rows = []
    for block in range(blocks):
        seeds = range(block * size, block * size + size)
        for variant in rng.permutation(variants): rows += [(block, str(variant), seed) for seed in seeds]
    turns = pd.DataFrame(rows, columns=["block", "variant", "seed"])
    return turns.assign(order=range(len(rows)))


def runs_in_blocks(
    seed:int=0,              # of the noise
    variants:Iterable[str]=("baseline", "det_crop"),
    hosts:Iterable[str]=("a",),
    blocks:int=8,
    size:int=3,              # runs of a variant in a block
    effect:float=-0.02,      # of any variant but the baseline, relative
    noise:float=0.004,       # standard deviation, relative
    drift:float=0.005,       # from the first block to the last, relative
    **columns,               # more of them, or in the place of those below
)->pd.DataFrame:
    "Records of a whole study."
    rng, parts = np.random.default_rng(seed), []
    for number, host in enumerate(hosts):
        turns = _in_turns(rng, variants, blocks, size)
        parts.append(turns.assign(host_id=host, repeat=number))
    frame = pd.concat(parts, ignore_index=True)
    n, is_variant = len(frame), frame["variant"] != "baseline"
    slower = 1 + 0.3 * frame["repeat"]
    change = effect * is_variant + drift * frame["block"] / blocks
    frame["time_seconds"] = 4.4 * slower * (1 + change + noise * rng.normal(size=n))
    frame["accuracy"] = 0.94 + 0.0013 * rng.normal(size=n)
    frame["run_id"] = frame["variant"] + "-" + frame["host_id"] + "-" + frame["seed"].astype(str)
    frame["batch"] = frame["host_id"] + frame["block"].astype(str)
    frame["config"] = [{"train.epochs": 9.9}] * len(frame)
    frame["config_hash"] = "hash-" + frame["variant"]
    frame["started_at"] = _times(5 * frame["order"])
    recorded = dict(device="cuda", precision="fp16", threads=4, package_hash="0a1b2c", clock="airbench")
    return frame.assign(study="cifar", profile="simulated", status="completed", **recorded).assign(**columns)


def case_of(
    *frames:pd.DataFrame,
    study:str="cifar",
    of:Callable|None=None,  # (variant, batch) -> provenance of a batch
    **by_variant,           # provenance of all batches of a variant
)->Case:
    "The case of some records of one profile."
    frame = pd.concat(frames, ignore_index=True)
    of = of or (lambda variant, batch: by_variant.get(variant))
    profile = frame["profile"].iloc[0]
    batches = set(zip(frame["variant"], frame["batch"], strict=True))
    found = {f"{study}/{profile}/{variant}/{batch}": of(variant, batch) for variant, batch in batches}
    return make_case(frame, load_study(study), provenances={batch: p for batch, p in found.items() if p})


def show_findings(findings:Iterable[Finding])->None:
    "What was found, to read."
    for f in findings: print(f"{f.severity} {f.id}: {f.message}\n  {f.remedy}")

def kinds(findings:Iterable[Finding])->set[tuple[str, str]]:
    "What was found, to compare: ids and severities."
    return {(f.id, f.severity) for f in findings}
