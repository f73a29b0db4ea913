"""How the cost of a verdict grows with the number of runs: reading records, auditing a study, comparing two variants.

Records are made up, by the functions that write true ones, in a temporary folder that is removed afterwards; a million
take 2.7 GB there. Every number of runs and every round has a process of its own, so that its memory is its own. The
peak of each step includes the steps before it. `growth` is the power of the number of runs with which CPU seconds grew
since the line before: 1 is proportional.

    python benchmarks/evidence.py                     # 1,000, 10,000 and 100,000 runs
    python benchmarks/evidence.py --runs 1000000 --rounds 1
"""
import argparse
import json
import math
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

VARIANTS, PROFILE = ("baseline", "det_crop", "random_crop_backoff", "det_crop_backoff"), "full"
STEPS = ("read", "audit", "compare")
BYTES = 2800  # of a record, rounded up
HOST, PACKAGE = "5f2a9c1e7b3d", "0d9c4f6a1b2e"


# made-up runs

def template(study, variant, batch, block):
    "A record as a batch would write it, what differs from run to run marked by names in @."
    from speedrun_nb.core.records import Ready, Result, json_ready, make_record
    from speedrun_nb.core.variants import resolve

    resolved = resolve(study, variant, PROFILE)
    cell = dict(
        study=study.name, profile=PROFILE, variant=variant, config=resolved.flat, config_hash=resolved.config_hash,
        repeat=0, batch=batch, block=block, order="@order@", host_id=HOST, package_hash=PACKAGE, clock=study.clock,
        started_at="@started@", ended_at="@ended@")
    metrics = {name: f"@{name}@" for name in ("accuracy", "accuracy_plain", "train_loss")}
    result = Result("@seed@", "completed", time_seconds="@time@", metrics=metrics, curve="@curve@", losses=[],
                    peak_memory_bytes=9 << 30, regions="@regions@")
    record = make_record(result, Ready("NVIDIA A100-SXM4-40GB", "fp16", 8, 1.0, {}), cell, study.metrics)
    return json_ready(record | {"run_id": "@run_id@", "fingerprint": "@fingerprint@"})


def curve_of(noise):
    "The curve of a run, as JSON."
    def line(start, step, jitter): return [start + i * step + noise.random() * jitter for i in range(10)]
    return json.dumps(dict(epoch=list(range(10)), train_loss=line(2, -1 / 6, 0.02),
                           accuracy_plain=line(0.5, 1 / 22, 0.002), time_seconds=line(0.44, 0.44, 0.01)))


def fill(text, order, variant, curve, noise):
    "The record of one run: a little faster for each variant, a little slower as time goes by."
    start, seconds = 1767225600 + 7 * order, 4.4 - 0.02 * VARIANTS.index(variant) + noise.gauss(0, 0.03)
    def stamp(at): return time.strftime('"%Y-%m-%dT%H:%M:%S', time.gmtime(at)) + f'.{noise.randrange(10**6):06d}+00:00"'
    regions = dict(whitening=noise.random() / 10, training=seconds - 0.3, evaluation=noise.random() / 5)
    values = dict(
        run_id=f'"{noise.getrandbits(64):016x}"', fingerprint=f'"{noise.getrandbits(48):012x}"', order=order,
        seed=order // len(VARIANTS), started=stamp(start), ended=stamp(start + 6), time=seconds, curve=curve,
        accuracy=0.94 + noise.gauss(0, 0.0012), accuracy_plain=0.932 + noise.gauss(0, 0.0012),
        train_loss=1.1 + noise.gauss(0, 0.01), regions=json.dumps(regions))
    for name, value in values.items(): text = text.replace(f'"@{name}@"', str(value), 1)
    return text


def write_runs(outputs, runs):
    "Records of `runs` runs in batches, the variants taking turns."
    from speedrun_nb.core.records import write_json
    from speedrun_nb.core.study import load_study

    study, noise, size = load_study("cifar"), random.Random(0), max(25, min(500, runs // 40))
    curves = [curve_of(noise) for _ in range(200)]
    facts = dict(status="completed", host_id=HOST, git=dict(commit="0" * 40, dirty=False), packages={}, gpus=[])
    for number, first in enumerate(range(0, runs, size)):
        variant, batch = VARIANTS[number % len(VARIANTS)], f"b{number:06d}"
        folder = Path(outputs) / study.name / PROFILE / variant / batch
        folder.mkdir(parents=True)
        write_json(folder / "provenance.json", facts | dict(clock=study.clock))
        text = json.dumps(template(study, variant, batch, number // len(VARIANTS)), ensure_ascii=False)
        with open(folder / "runs.jsonl", "w", encoding="utf-8") as file:
            for order in range(first, min(first + size, runs)):
                file.write(fill(text, order, variant, noise.choice(curves), noise) + "\n")


# one process

def use():
    "CPU seconds so far, and the peak of memory in MiB."
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(outputs):
    "From the records to a verdict; prints CPU seconds, seconds and peak of each step. Imports come before."
    from speedrun_nb.audit.audit import audit
    from speedrun_nb.core.provenance import read_provenances
    from speedrun_nb.core.runs import read_runs
    from speedrun_nb.core.study import load_study
    from speedrun_nb.evidence.comparison import Question
    from speedrun_nb.evidence.verdict import compare_groups
    from speedrun_nb.evidence.groups import find_group

    study = load_study("cifar")

    def read(): return read_runs(outputs)[0], read_provenances(outputs, study.name)
    def audit_all(): return audit(frame, study, PROFILE, provenances)
    def compare():
        baseline, variant = (find_group(frame, name) for name in VARIANTS[:2])
        return compare_groups(baseline, variant, Question(study.metrics))

    found = {"start": dict(peak=use()[1])}
    (frame, provenances), found["read"] = measured(read)
    _, found["audit"] = measured(audit_all)
    _, found["compare"] = measured(compare)
    print(json.dumps(found | {"runs": len(frame)}))


def measured(work):
    "What comes out, and what it took."
    start, (before, _) = time.perf_counter(), use()
    result = work()
    seconds, (after, peak) = time.perf_counter() - start, use()
    return result, dict(cpu=after - before, seconds=seconds, peak=peak)


# the table

def in_process(outputs):
    "What `measure` says, in a process of its own."
    command = [sys.executable, __file__, "--measure", str(outputs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode: sys.exit(f"measuring {outputs} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def check_space(runs, folder):
    free, wanted = shutil.disk_usage(folder or tempfile.gettempdir()).free, 1.1 * BYTES * runs
    if free > wanted: return
    sys.exit(f"{runs:,} runs need {wanted / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free; "
             "name another place with --folder, or fewer --runs")


def costs(runs, rounds, folder):
    "Step -> CPU seconds, seconds (medians of the rounds) and peak in MiB (the highest)."
    check_space(runs, folder)
    with tempfile.TemporaryDirectory(prefix="speedrun_nb-", dir=folder) as outputs:
        write_runs(outputs, runs)
        found = [in_process(outputs) for _ in range(rounds)]
    assert all(each["runs"] == runs for each in found)
    return {step: dict(cpu=median(each[step]["cpu"] for each in found), peak=max(each[step]["peak"] for each in found),
                       seconds=median(each[step]["seconds"] for each in found)) for step in STEPS}


def show(runs, found, before):
    "The lines of one number of runs; `before` is (runs, costs) of the number before, or None."
    for step, cost in found.items():
        growth = ""
        if before: growth = f"{math.log(cost['cpu'] / before[1][step]['cpu']) / math.log(runs / before[0]):.2f}"
        figures = f"{cost['cpu']:>12.2f} {cost['seconds']:>10.2f} {cost['peak']:>10,.0f}"
        print(f"{runs:>10,} {step:>8} {figures} {growth:>8}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="numbers of runs")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--folder", help="where made-up records are written for a while")
    parser.add_argument("--measure", metavar="OUTPUTS", type=Path, help="measure once what is below a folder")
    given = parser.parse_args()
    if given.measure: return measure(given.measure)
    print(f"{'runs':>10} {'step':>8} {'CPU seconds':>12} {'seconds':>10} {'peak MiB':>10} {'growth':>8}")
    before = None
    for runs in sorted(given.runs):
        found = costs(runs, given.rounds, given.folder)
        show(runs, found, before)
        before = runs, found


if __name__ == "__main__":
    main()
