"""How the time of evidence grows with the number of runs: collecting records, comparing groups, auditing a study.

Records are made up, by the functions that write true ones, in a temporary folder that is removed afterwards; a million take
2.7 GB there. Each figure of `load` is from a process of its own, so that its memory is its own. Where a ratio is shown its two
sides took turns within this one call, so that a machine that drifts treats both alike.

    python benchmarks/evidence.py                     # everything, up to 100,000 runs
    python benchmarks/evidence.py load --runs 1000000
"""
import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

VARIANTS, PROFILE = ("baseline", "det_crop", "random_crop_backoff", "det_crop_backoff"), "full"
PLAIN_UP_TO = 100_000  # runs; beyond, json.loads on every line takes more memory and patience than there is
BYTES = 2800           # of a record, rounded up


# made-up runs

def template(study, variant, batch, block):
    "A record as a batch would write it, what differs from run to run marked by names in @."
    from speedrun_nb.core.records import Ready, Result, json_ready, make_record
    from speedrun_nb.core.variants import resolve

    resolved = resolve(study, variant, PROFILE)
    cell = dict(study=study.name, profile=PROFILE, variant=variant, config=resolved.flat, config_hash=resolved.config_hash, repeat=0, batch=batch, block=block, order="@order@",
                host_id="5f2a9c1e7b3d", package_hash="0d9c4f6a1b2e", clock=study.clock, started_at="@started@", ended_at="@ended@")
    result = Result("@seed@", "completed", "@time@", {name: f"@{name}@" for name in ("accuracy", "accuracy_plain", "train_loss")}, "@curve@", [], 9 << 30, "@regions@")
    record = make_record(result, Ready("NVIDIA A100-SXM4-40GB", "fp16", 8, 1.0, {}), cell, study.metrics)
    return json_ready(record | {"run_id": "@run_id@", "fingerprint": "@fingerprint@"})


def write_runs(outputs, runs):
    "Records of `runs` runs in batches, the variants taking turns."
    from speedrun_nb.core.records import write_json
    from speedrun_nb.core.study import load_study

    study, noise, size = load_study("cifar"), random.Random(0), max(25, min(500, runs // 40))
    curves = [json.dumps(dict(epoch=list(range(10)), train_loss=[2 - i / 6 + noise.random() / 50 for i in range(10)], accuracy_plain=[0.5 + i / 22 + noise.random() / 500 for i in range(10)],
                              time_seconds=[0.44 * (i + 1) + noise.random() / 100 for i in range(10)])) for _ in range(200)]
    for number, first in enumerate(range(0, runs, size)):
        variant, batch = VARIANTS[number % len(VARIANTS)], f"b{number:06d}"
        folder = Path(outputs) / study.name / PROFILE / variant / batch
        folder.mkdir(parents=True)
        write_json(folder / "provenance.json", dict(status="completed", host_id="5f2a9c1e7b3d", git=dict(commit="0" * 40, dirty=False), packages={}, gpus=[], clock=study.clock))
        text = json.dumps(template(study, variant, batch, number // len(VARIANTS)), ensure_ascii=False)
        with open(folder / "runs.jsonl", "w", encoding="utf-8") as file:
            for order in range(first, min(first + size, runs)): file.write(fill(text, order, variant, curves, noise) + "\n")


def fill(text, order, variant, curves, noise):
    "The record of one run: a little faster for each variant, a little slower as time goes by."
    start, seconds = 1767225600 + 5 * order, 4.4 - 0.02 * VARIANTS.index(variant) + noise.gauss(0, 0.03)
    stamps = [time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(s)) + f".{noise.randrange(10**6):06d}+00:00" for s in (start, start + 4)]
    values = dict(run_id=f'"{noise.getrandbits(64):016x}"', fingerprint=f'"{noise.getrandbits(48):012x}"', order=order, seed=order // len(VARIANTS), started=f'"{stamps[0]}"', ended=f'"{stamps[1]}"', time=seconds,
                  accuracy=0.94 + noise.gauss(0, 0.0012), accuracy_plain=0.932 + noise.gauss(0, 0.0012), train_loss=1.1 + noise.gauss(0, 0.01), curve=noise.choice(curves),
                  regions=f'{{"whitening": {noise.random() / 10}, "training": {seconds - 0.3}, "evaluation": {noise.random() / 5}}}')
    for name, value in values.items(): text = text.replace(f'"@{name}@"', str(value), 1)
    return text


# a process for each figure

def use():
    "CPU seconds so far, and the peak of memory in bytes."
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plain_load(outputs):
    "What anyone would write."
    import pandas as pd

    rows = [json.loads(line) for path in sorted(Path(outputs).glob("*/*/*/*/runs.jsonl")) for line in open(path, encoding="utf-8")]
    return pd.DataFrame([{**row, **row["metrics"]} for row in rows]).sort_values(["started_at", "run_id"], ignore_index=True)


def measure(side, outputs):
    "Load all runs and print what it took. What is imported is imported before."
    from speedrun_nb.core.runs import collect

    start, (cpu, _) = time.perf_counter(), use()
    frame = plain_load(outputs) if side == "plain" else collect(outputs)[0]
    seconds, (after, peak) = time.perf_counter() - start, use()
    print(json.dumps(dict(runs=len(frame), seconds=seconds, cpu=after - cpu, peak=peak)))


def measured(side, outputs):
    "The same, in a process of its own."
    if side == "first":
        for cache in Path(outputs).glob("*/.runs.parquet"): cache.unlink()
    done = subprocess.run([sys.executable, __file__, "measure", side, str(outputs)], capture_output=True, text=True, check=False)
    if done.returncode: sys.exit(f"{side} in {outputs} failed:\n{done.stderr}")
    return json.loads(done.stdout)


# the sections

def load(sizes, rounds, folder):
    "Collect all records: first and second time, against json.loads."
    print("\nload: seconds (CPU seconds) and peak memory of the process")
    print(f"{'runs':>9} {'first time':>22} {'second time':>22} {'json.loads':>22} {'times faster':>22}")
    for size in sizes:
        if (free := shutil.disk_usage(folder or tempfile.gettempdir()).free) < 1.1 * BYTES * size:
            sys.exit(f"{size:,} runs need {1.1 * BYTES * size / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free; name another place with --folder, or fewer --runs")
        with tempfile.TemporaryDirectory(prefix="speedrun_nb-", dir=folder) as outputs:
            write_runs(outputs, size)
            sides = {"first": [], "second": []} | ({"plain": []} if size <= PLAIN_UP_TO else {})
            for _ in range(rounds):
                for side, found in sides.items(): found.append(measured(side, outputs))
            assert all(found["runs"] == size for side in sides.values() for found in side)
        cells = [f"{median(f['seconds'] for f in found):6.2f} ({median(f['cpu'] for f in found):5.2f}) {max(f['peak'] for f in found) / 2**20:5.0f} MiB" for found in sides.values()]
        ratios = [median(p["seconds"] / f["seconds"] for p, f in zip(sides["plain"], sides[side], strict=True)) for side in ("first", "second")] if "plain" in sides else []
        print(f"{size:>9,} " + " ".join(f"{cell:>22}" for cell in [*cells, *["-"] * (3 - len(cells)), "; ".join(f"{r:.1f}" for r in ratios) or "-"]), flush=True)


@contextmanager
def made_up(size, folder):
    "Runs in a temporary folder: their frame, whose curves lie there, and the provenances."
    from speedrun_nb.core.provenance import read_provenances
    from speedrun_nb.core.runs import collect

    with tempfile.TemporaryDirectory(prefix="speedrun_nb-", dir=folder) as outputs:
        write_runs(outputs, size)
        yield collect(outputs)[0], read_provenances(Path(outputs), "cifar")


def quickest(rounds, work, *given):
    "Seconds, the least of several rounds, and what comes out."
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        found = work(*given)
        seconds.append(time.perf_counter() - start)
    return min(seconds), found


def compare(sizes, rounds, folder):
    "Compare two variants whose runs are from two hosts: the permutation test alone, and everything."
    from speedrun_nb.core.study import load_study
    from speedrun_nb.evidence.verdict import compare_groups
    from speedrun_nb.evidence.groups import find_group
    from speedrun_nb.evidence.strata import samples
    from speedrun_nb.stats.permutation import permutation_test

    study = load_study("cifar")
    print(f"\ncompare: seconds\n{'runs':>9} {'permutation test':>22} {'whole comparison':>22}")
    for size in sizes:
        with made_up(2 * size, folder) as (frame, _):
            frame = frame[frame["variant"].isin(VARIANTS[:2])].reset_index(drop=True)
            frame["host_id"] = [f"host{number % 2}" for number in range(len(frame))]
            sides = [find_group(frame, name) for name in VARIANTS[:2]]
            parts = list(samples(*sides, study.metrics["time_seconds"]).values())
            alone, found = quickest(rounds, permutation_test, parts)
            whole, _ = quickest(rounds, compare_groups, *sides, None, study.metrics)
        print(f"{len(frame):>9,} {alone:>22.2f} {whole:>22.2f}   {found.permutations:,} permutations in {len(parts)} strata", flush=True)


def audit(sizes, rounds, folder):
    "Audit a study of four variants."
    from speedrun_nb.audit.audit import audit as audit_study
    from speedrun_nb.core.study import load_study

    print(f"\naudit: seconds\n{'runs':>9} {'all checks':>22}")
    for size in sizes:
        with made_up(size, folder) as (frame, provenances): seconds, found = quickest(rounds, audit_study, frame, load_study("cifar"), PROFILE, provenances)
        print(f"{size:>9,} {seconds:>22.2f}   {len(found)} findings: {', '.join(sorted({f.id for f in found}))}", flush=True)


SECTIONS = {"load": (load, (1_000, 10_000, 100_000)), "compare": (compare, (1_000, 2_400, 10_000, 100_000)), "audit": (audit, (1_000, 10_000))}


def main():
    if sys.argv[1:2] == ["measure"]: return measure(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all by default")
    parser.add_argument("--runs", type=int, nargs="+", help="numbers of runs, for each section its own by default")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--folder", help="where made-up records are written for a while; the system's temporary folder by default")
    given = parser.parse_args()
    if unknown := set(given.sections) - {*SECTIONS}: parser.error(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    for name in given.sections or SECTIONS:
        section, sizes = SECTIONS[name]
        section(given.runs or sizes, given.rounds, given.folder)


if __name__ == "__main__":
    main()
