"""Planned against done, from the sweep that freezes a plan to the paper that tells of it; and what was run outside of any plan is marked."""
import html
import json
import random
import re
import shutil
import time
from dataclasses import asdict

import pandas as pd
import pytest
from simulate import simulated_runs

from speedrun_nb.audit.audit import audit, compare
from speedrun_nb.audit.plans import audit_plans
from speedrun_nb.core.batch import run_batch
from speedrun_nb.core.errors import SpeedrunError
from speedrun_nb.core.plans import SweepPlan, freeze, plan_folder, read_plans
from speedrun_nb.core.records import Ready, Result, run_id
from speedrun_nb.core.runs import read_runs
from speedrun_nb.core.study import from_root, load_study
from speedrun_nb.core.variants import resolve
from speedrun_nb.evidence.case import make_case
from speedrun_nb.evidence.plans import EXPLORATORY, planned_by
from speedrun_nb.render.render import render
from speedrun_nb.report import evidence_tables as evidence
from speedrun_nb.report import planned, tables
from speedrun_nb.report.study import load_report
from speedrun_nb.sweep.drive import Drive
from speedrun_nb.sweep.file import read_sweep
from speedrun_nb.sweep.local import Slot
from speedrun_nb.sweep.notebook import prepare
from speedrun_nb.sweep.plan import as_frozen

CIFAR = load_study("cifar")


def train(settings, seeds):
    "Made-up runs, of which those with seed 5 diverge."
    yield Ready("cpu", "fp32", 2, 0.5, {})
    for seed in seeds:
        noise = random.Random(f"{settings}{seed}")
        yield Result(seed, "diverged" if seed == 5 else "completed", noise.gauss(4, 0.1), {"accuracy": noise.gauss(0.9, 0.003)}, {}, [noise.random()], None)


def run(outputs, variant, seeds, **more):
    "A batch, by hand unless a plan is named."
    return run_batch(prepare("cifar", dict(variant=variant, seeds=seeds, profile="demo", outputs=str(outputs)) | more), train)


class Engine:
    "Runs the batches of a sweep at once, in this process."
    def __init__(self): self.slots, self.jobs = [Slot("here", "here")], {}
    def free(self): return [slot for slot in self.slots if slot not in self.jobs]
    def start(self, slot, job): self.jobs[slot] = job
    def close(self): pass

    def wait(self, seconds):
        for job in self.jobs.values(): run_batch(prepare(job["study"], job["parameters"]), train)
        done, self.jobs = list(self.jobs), {}
        return [(slot, None, False) for slot in done]


@pytest.fixture
def sweep(tmp_path):
    "Runs a sweep of these variants and seeds into a folder; answers with the name of its plan."
    def start(outputs, variants="[baseline, det_crop]", seeds="0:4", **more):
        lines = dict(study="cifar", profile="demo", variants=variants, seeds=f'"{seeds}"', seeds_per_batch=2) | more
        (tmp_path / "mine.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
        drive = Drive(read_sweep(tmp_path / "mine.yaml"), outputs, Engine())
        drive.run()
        return drive.plan.name
    return start


def ids(findings): return [(f.severity, f.id) for f in findings if f.id in ("exploratory-runs", "claim-changed")]


def cells(table): return [[cell.strip().replace("\\_", "_") for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_a_sweep_and_what_was_run_beside_it(sweep, tmp_path):
    run(tmp_path / "out", "baseline", "0:2")      # before anything was planned, and asked for later
    name = sweep(tmp_path / "out", seeds="0:6")
    run(tmp_path / "out", "random_crop_backoff", "0:2")
    run(tmp_path / "out", "det_crop", "8:10", sweep=name)  # says that it was planned, which is not so
    report = load_report("cifar", tmp_path / "out")
    assert report.frame.groupby(["variant", "plan"]).size().to_dict() == {("baseline", name): 4, ("baseline", EXPLORATORY): 2, ("det_crop", name): 6, ("det_crop", EXPLORATORY): 2, ("random_crop_backoff", EXPLORATORY): 2}
    rows = cells(planned.planned_table(report))
    assert rows[0][3:] == ["condition", "planned", "done", "done outside", "diverged", "not run"]
    assert [row[3:] for row in rows[2:]] == [["all 2", "12", "8", "2", "2", "0"], ["baseline", "6", "3", "2", "1", "0"], ["det_crop", "6", "5", "0", "1", "0"]] and rows[2][0] == name
    words = planned.planned_words(report)
    assert f"The plan `{name}` was frozen on " in words and "when 2 runs of its conditions had been made already" in words and "12 runs of 2 conditions in 3 blocks, a number that was fixed when some results were known already" in words
    assert "Of these, 10 completed (8 under the plan and 2 outside of any plan) and 2 diverged. The conditions took turns in the planned order. The claims are those that were frozen with it." in words
    assert "6 runs are exploratory, made outside of any plan: " in words and words.endswith("Of these, 2 would have been asked for by a plan.")
    assert ids(report.findings) == [("warning", "exploratory-runs")] and "2 of 5 runs of baseline" in evidence.threats(report).replace("\\", "") and f"sweep={name}" in evidence.threats(report)
    summary = cells(tables.summary_table(report))
    assert [row[:3] for row in (summary[0], *summary[2:])] == [["variant", "runs", "exploratory"], ["baseline", "5", "2 of 5"], ["det_crop", "7", "2 of 7"], ["random_crop_backoff", "2", "yes"]]
    assert [row[4] for row in cells(tables.runs_table(report))[2:]].count("yes") == 6 and "2 of 2" not in tables.runs_table(report, most=5) and "| yes" in tables.runs_table(report, most=5)


def test_planned_runs_can_be_compared_alone(sweep, tmp_path):
    run(tmp_path, "baseline", "0:2")
    name = sweep(tmp_path)
    frame, plans = read_runs(tmp_path, "cifar")[0], read_plans(tmp_path, "cifar")
    def compared(**options): return compare(frame, "cifar", "baseline", "det_crop", **options)
    assert ids(compared(plans=plans).findings) == [("warning", "exploratory-runs")] and ids(compared(plans=plans, conditions={"sweep": name}).findings) == [] == ids(compared().findings)


def test_a_longer_plan_shares_the_runs_of_a_shorter(sweep, tmp_path):
    first, second, third = sweep(tmp_path, seeds="0:2"), sweep(tmp_path, seeds="0:4"), sweep(tmp_path, variants="[baseline]", seeds="0:4")
    report = load_report("cifar", tmp_path)
    assert [row[0] for row in cells(planned.planned_table(report))[2:] if row[0]] == [first, second] and "done for another plan" in planned.planned_table(report)
    words = planned.planned_words(report)
    assert "All 4 were completed under the plan." in words and "Of these, 8 completed (4 under the plan and 4 under another plan)." in words and "when 4 runs of its conditions had been made already" in words
    assert f"Nothing was run under 1 further plan (`{third}`)." in words and words.endswith("No run is exploratory.") and not ids(report.findings)


def test_what_a_claim_was_when_it_was_planned_counts(sweep, tmp_path):
    "To lower the bar when the results are known, and to freeze the sweep again, is seen."
    frozen = as_frozen(read_sweep("cifar_demo"))
    bold = json.loads(json.dumps(frozen.design))
    next(c for c in bold["conditions"] if c["name"] == "det_crop")["claim"]["at_least"] = 0.3
    bolder = freeze(SweepPlan("cifar_demo", bold, frozen.circumstances), tmp_path)
    for condition in bolder.conditions: run(tmp_path, condition["variant"], "0:5", sweep=bolder.name)
    freeze(frozen, tmp_path)
    report = load_report("cifar", tmp_path)
    f, = (f for f in report.findings if f.id == "claim-changed")
    assert f.severity == "serious" and f.groups == ("det_crop",) and "at_least was 0.3 and is 0.01" in f.message and ids(report.findings) == [("serious", "claim-changed")]
    assert {c.variant.name for c in report.comparisons if c.verdict.outcome == "untrustworthy"} == {"det_crop"}
    assert "**Claims were changed after it was frozen:** `det_crop` (at_least was 0.3 and is 0.01)." in planned.planned_words(report)


def test_plans_that_stop_when_they_are_decided(sweep, tmp_path):
    sweep(tmp_path, stop="decided", seeds="0:4")
    assert "or fewer: it was to end after the first block after which every claim is decided." in planned.planned_words(load_report("cifar", tmp_path))


def test_without_a_plan_there_is_one_note(tmp_path):
    simulated_runs(tmp_path, effects={name: (0, 0) for name in ("baseline", "det_crop", "det_crop_backoff", "random_crop_backoff")}, runs=3)
    frame, _ = read_runs(tmp_path)
    assert ids(audit(frame, CIFAR, plans=read_plans(tmp_path))) == [("note", "exploratory-runs")] and ids(audit(frame, CIFAR)) == []
    report = load_report("cifar", tmp_path)
    assert planned.section(report) == "No plan was frozen for the profile demo: all 12 runs are exploratory." and ids(report.findings) == [("note", "exploratory-runs")]
    assert "exploratory" not in tables.summary_table(report) + tables.runs_table(report)


def test_runs_published_elsewhere_are_neither_planned_nor_exploratory(tmp_path):
    simulated_runs(tmp_path, effects={"baseline": (0, 0), "det_crop": (0, 0)})
    frame = read_runs(tmp_path)[0].assign(profile="published")
    plans = read_plans(tmp_path)
    assert planned_by(frame, plans).isna().all() and audit_plans(make_case(frame, CIFAR, plans=plans)) == []
    shutil.move(tmp_path / "cifar/demo", tmp_path / "cifar/published")
    for path in tmp_path.glob("cifar/*/*/*/runs.jsonl"): path.write_text(path.read_text().replace('"profile": "demo"', '"profile": "published"'))
    report = load_report("cifar", tmp_path)
    assert report.profile == "published" and planned.section(report) == "These runs were published elsewhere; whether they were planned before they were made is not known." and not ids(report.findings)


def test_a_plan_that_was_changed_is_refused(sweep, tmp_path):
    name = sweep(tmp_path)
    path = plan_folder(tmp_path, name) / "plan.json"
    path.write_text(path.read_text().replace('"at_least": 0.01', '"at_least": 0.0'))
    with pytest.raises(SpeedrunError, match="changed after it was frozen"): load_report("cifar", tmp_path)


def words_of(page):
    "What a reader of the HTML sees."
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<(style|annotation)\b.*?</\1>", "", page, flags=re.DOTALL))).replace("\u00a0", " "))


def test_papers_tell_of_their_plans(sweep, tmp_path, monkeypatch):
    outputs = tmp_path / "out"
    monkeypatch.setenv("SPEEDRUN_OUTPUTS", str(outputs))
    monkeypatch.delenv("SPEEDRUN_PROFILE", raising=False)
    name = sweep(outputs)
    gpt = as_frozen(read_sweep("gpt_demo"))
    freeze(gpt, outputs)
    simulated_runs(outputs, "gpt", effects={"baseline": (0, 0), "kv_1": (-1, 0.05)}, runs=3, sweep=gpt.name)
    papers = shutil.copytree(from_root("paper"), tmp_path / "paper", ignore=shutil.ignore_patterns("_output"))
    made = {path.stem: words_of(path.read_text(encoding="utf-8")) for path in render(papers, ["cifar10", "nanogpt"], formats=["html"], engine="built-in").outputs}
    for text, plan, done in ((made["cifar10"], name, "All 8 were completed under the plan."), (made["nanogpt"], gpt.name, "Of these, 6 completed (6 under the plan) and 6 were not run. 0 of 2 blocks are complete.")):
        assert f"The plan {plan} was frozen on" in text and done in text and re.search(r"Table \d sets what was planned against what was done\.", text) and text.count("Planned against done, in numbers of runs.") == 1
    numbers = [int(n) for n in re.findall(r"Table (\d+):", made["nanogpt"])]
    assert numbers == [*range(1, 17)]


def test_ten_thousand_runs_are_quick():
    conditions = [dict(name=f"v{i}", variant=f"v{i}", config_hash=f"h{i}", claim=None) for i in range(50)]
    plan = SweepPlan("large", dict(study="cifar", profile="demo", conditions=conditions, seeds=list(range(200)), repeats=1, seeds_per_batch=4, stop="fixed", order=[[*range(50)]] * 50), dict(frozen_at="2026-01-01T00:00:00+00:00"))
    rows = pd.DataFrame([dict(study="cifar", profile="demo", variant=c["variant"], config={}, config_hash=c["config_hash"], seed=s, repeat=0, batch="b", block=s // 4, sweep=plan.name, status="completed", package_hash="0",
                              run_id=run_id("cifar", "demo", c["config_hash"], s, 0), started_at=f"2026-01-02T00:{s // 60:02d}:{s % 60:02d}+00:00", time_seconds=1.0) for c in conditions for s in range(200)])
    begin = time.process_time()
    case = make_case(rows, CIFAR, plans={plan.name: plan})
    report = load_report("cifar", "nowhere")
    words = planned.section(type(report)(**vars(report) | dict(frame=case.rows, plans=case.plans, profile="demo")))
    assert "All 10000 were completed under the plan." in words and not audit_plans(case) and time.process_time() - begin < 4


def test_claims_are_compared_as_they_are_written(sweep, tmp_path):
    "Through JSON and back nothing counts as a change: all variants of both studies."
    from speedrun_nb.core.variants import variant_names
    from speedrun_nb.evidence.plans import claim_changes
    for study in (CIFAR, load_study("gpt")):
        variants = [resolve(study, name, "demo") for name in variant_names(study)]
        conditions = [dict(name=v.name, variant=v.name, config_hash=v.config_hash, claim=v.claim and asdict(v.claim)) for v in variants]
        plan = freeze(SweepPlan("all", dict(study=study.name, profile="demo", conditions=conditions, seeds=[0], repeats=1), dict(frozen_at="2026-01-01T00:00:00+00:00")), tmp_path)
        assert claim_changes(plan, study) == {} and any(c["claim"] for c in plan.conditions)
