"""Planned against done, from the sweep that freezes a plan to the paper that tells of it. Unplanned runs are marked."""
import html
import json
import random
import re
import shutil
from dataclasses import asdict, replace

import pandas as pd
import pytest
from simulate import simulated_runs

from speedrun_nb.audit.audit import audit, compare
from speedrun_nb.audit.plans import check_claim_changed, check_exploratory_runs, check_plan_extended
from speedrun_nb.core.batch import run_batch
from speedrun_nb.core.errors import SpeedrunError
from speedrun_nb.core.plans import SweepPlan, freeze, plan_folder, read_plans
from speedrun_nb.core.records import Ready, Result, run_id
from speedrun_nb.core.runs import read_runs
from speedrun_nb.core.study import from_root, load_study
from speedrun_nb.core.variants import resolve, variant_names
from speedrun_nb.evidence.case import make_case
from speedrun_nb.evidence.plans import EXPLORATORY, claim_changes, planned_by
from speedrun_nb.render.render import render
from speedrun_nb.report import evidence_tables as evidence
from speedrun_nb.report import planned, tables
from speedrun_nb.report.study import load_report
from speedrun_nb.sweep.drive import Drive
from speedrun_nb.sweep.file import read_sweep
from speedrun_nb.sweep.notebook import plan_from_parameters
from speedrun_nb.sweep.plan import as_frozen
from speedrun_nb.sweep.slots import Slot

CIFAR = load_study("cifar")


def audit_plans(case): return check_exploratory_runs(case) + check_claim_changed(case) + check_plan_extended(case)


def train(settings, seeds):
    "Simulated runs; those with seed 5 diverge."
    yield Ready("cpu", "fp32", 2, 0.5, {})
    for seed in seeds:
        noise = random.Random(f"{settings}{seed}")
        status = "diverged" if seed == 5 else "completed"
        seconds, metrics = noise.gauss(4, 0.1), {"accuracy": noise.gauss(0.9, 0.003)}
        yield Result(seed, status, seconds, metrics, {}, [noise.random()], None)


def run(outputs, variant, seeds, **more):
    "A batch, by hand unless a plan is named."
    parameters = dict(variant=variant, seeds=seeds, profile="demo", outputs=str(outputs)) | more
    return run_batch(plan_from_parameters("cifar", parameters), train)


class Engine:
    "Runs the batches of a sweep at once, in this process."
    def __init__(self): self.slots, self.jobs = [Slot("here", "here")], {}
    def free(self): return [slot for slot in self.slots if slot not in self.jobs]
    def start(self, slot, job): self.jobs[slot] = job
    def close(self): pass

    def wait(self, seconds):
        for job in self.jobs.values(): run_batch(plan_from_parameters(job["study"], job["parameters"]), train)
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


def cells(table):
    "The rows of a Markdown table: its headings, a rule, and what follows."
    lines = [line.split("|")[1:-1] for line in table.splitlines()]
    return [[cell.strip().replace("\\_", "_") for cell in line] for line in lines]


def test_a_sweep_and_what_was_run_beside_it(sweep, tmp_path):
    run(tmp_path / "out", "baseline", "0:2")      # before anything was planned, and asked for later
    name = sweep(tmp_path / "out", seeds="0:6")
    run(tmp_path / "out", "random_crop_backoff", "0:2")
    run(tmp_path / "out", "det_crop", "8:10", sweep=name)  # says that it was planned, which is not so
    report = load_report("cifar", tmp_path / "out")
    assert report.frame.groupby(["variant", "plan"]).size().to_dict() == {
        ("baseline", name): 4, ("baseline", EXPLORATORY): 2, ("det_crop", name): 6, ("det_crop", EXPLORATORY): 2,
        ("random_crop_backoff", EXPLORATORY): 2}
    assert ids(report.findings) == [("warning", "exploratory-runs")]
    threats = evidence.threats(report)
    assert "2 of 5 runs of baseline" in threats.replace("\\", "") and f"sweep={name}" in threats
    check_table(planned.planned_table(report), name)
    check_words(planned.planned_words(report), name)
    check_marks(report)


def check_table(table, name):
    heading, _, *rows = cells(table)
    assert heading[3:] == ["condition", "planned", "done", "done outside", "diverged", "not run"] and rows[0][0] == name
    assert rows[0][3:] == ["all 2", "12", "8", "2", "2", "0"]
    assert rows[1][3:] == ["baseline", "6", "3", "2", "1", "0"]
    assert rows[2][3:] == ["det_crop", "6", "5", "0", "1", "0"]


def check_words(words, name):
    assert f"The plan `{name}` was frozen on " in words and "when 2 runs of its conditions" in words
    assert "12 runs of 2 conditions in 3 blocks, a number that was fixed when some results were known" in words
    assert "10 completed (8 under the plan and 2 outside of any plan) and 2 diverged." in words
    assert "in the planned order. The claims are those that were frozen" in words
    assert "6 runs are exploratory" in words and words.endswith("Of these, 2 would have been asked for by a plan.")


def check_marks(report):
    "Tables of runs say which of them nobody planned."
    heading, _, *rows = cells(tables.summary_table(report))
    assert heading[:3] == ["variant", "runs", "exploratory"]
    assert [row[:3] for row in rows] == [
        ["baseline", "5", "2 of 5"], ["det_crop", "7", "2 of 7"], ["random_crop_backoff", "2", "yes"]]
    assert [row[4] for row in cells(tables.runs_table(report))[2:]].count("yes") == 6
    assert "2 of 2" not in tables.runs_table(report, most=5) and "| yes" in tables.runs_table(report, most=5)


def test_planned_runs_can_be_compared_alone(sweep, tmp_path):
    run(tmp_path, "baseline", "0:2")
    name = sweep(tmp_path)
    frame, plans = read_runs(tmp_path, "cifar")[0], read_plans(tmp_path, "cifar")
    def found(**options): return ids(compare(frame, "cifar", "baseline", "det_crop", **options).findings)
    assert found(plans=plans) == [("warning", "exploratory-runs")]
    assert found(plans=plans, conditions={"sweep": name}) == found() == []


def test_a_longer_plan_shares_the_runs_of_a_shorter(sweep, tmp_path):
    first, second = sweep(tmp_path, seeds="0:2"), sweep(tmp_path, seeds="0:4")
    third = sweep(tmp_path, variants="[baseline]", seeds="0:4")
    report = load_report("cifar", tmp_path)
    table, words = planned.planned_table(report), planned.planned_words(report)
    assert [row[0] for row in cells(table)[2:] if row[0]] == [first, second] and "done for another plan" in table
    assert "All 4 were completed under the plan." in words
    assert "8 completed (4 under the plan and 4 under another plan)." in words
    assert "when 4 runs of its conditions had been made already" in words
    assert f"Nothing was run under 1 further plan (`{third}`)." in words
    assert words.endswith("No run is exploratory.") and not ids(report.findings)


def test_what_a_claim_was_when_it_was_planned_counts(sweep, tmp_path):
    "To lower the bar when the results are known, and to freeze the sweep again, is seen."
    frozen = as_frozen(read_sweep("cifar_demo"))
    bold = json.loads(json.dumps(frozen.design))
    next(c for c in bold["conditions"] if c["name"] == "det_crop")["claim"]["at_least"] = 0.3
    bolder = freeze(SweepPlan("cifar_demo", bold, frozen.circumstances), tmp_path)
    for condition in bolder.conditions: run(tmp_path, condition["variant"], bold["seeds"], sweep=bolder.name)
    freeze(frozen, tmp_path)
    report = load_report("cifar", tmp_path)
    f, = (f for f in report.findings if f.id == "claim-changed")
    assert ids(report.findings) == [("serious", "claim-changed")] and f.groups == ("det_crop",)
    blamed = {c.variant.name: c.verdict.outcome for c in report.comparisons if f in c.findings}
    assert blamed == {"det_crop": "untrustworthy"}
    for text in (f.message, planned.planned_words(report)): assert "at_least was 0.3 and is 0.01" in text


def test_plans_that_stop_when_they_are_decided(sweep, tmp_path):
    sweep(tmp_path, stop="decided", seeds="0:4")
    assert "after which every claim is decided." in planned.planned_words(load_report("cifar", tmp_path))


def test_without_a_plan_there_is_one_note(tmp_path):
    variants = ("baseline", "det_crop", "det_crop_backoff", "random_crop_backoff")
    simulated_runs(tmp_path, effects={name: (0, 0) for name in variants}, runs=3)
    frame, _ = read_runs(tmp_path)
    note = [("note", "exploratory-runs")]
    assert ids(audit(frame, CIFAR, plans=read_plans(tmp_path))) == note and ids(audit(frame, CIFAR)) == []
    report = load_report("cifar", tmp_path)
    words = planned.planned_section(report)
    assert "No plan" in words and "all 12 runs are exploratory" in words and ids(report.findings) == note
    assert "exploratory" not in tables.summary_table(report) + tables.runs_table(report)


def test_runs_published_elsewhere_are_neither_planned_nor_exploratory(tmp_path):
    simulated_runs(tmp_path, effects={"baseline": (0, 0), "det_crop": (0, 0)})
    frame = read_runs(tmp_path)[0].assign(profile="published")
    plans = read_plans(tmp_path)
    assert planned_by(frame, plans).isna().all() and audit_plans(make_case(frame, CIFAR, plans=plans)) == []
    shutil.move(tmp_path / "cifar/demo", tmp_path / "cifar/published")
    for path in tmp_path.glob("cifar/*/*/*/runs.jsonl"):
        path.write_text(path.read_text().replace('"profile": "demo"', '"profile": "published"'))
    report = load_report("cifar", tmp_path)
    words = planned.planned_section(report)
    assert report.profile == "published" and "published elsewhere" in words and "exploratory" not in words
    assert not ids(report.findings)


def test_a_plan_that_was_changed_is_refused(sweep, tmp_path):
    name = sweep(tmp_path)
    path = plan_folder(tmp_path, name) / "plan.json"
    path.write_text(path.read_text().replace('"at_least": 0.01', '"at_least": 0.0'))
    with pytest.raises(SpeedrunError, match="changed after it was frozen"): load_report("cifar", tmp_path)


def words_of(page):
    "What a reader of the HTML sees."
    shown = re.sub(r"<(style|annotation)\b.*?</\1>", "", page, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]+>", "", shown)).replace("\u00a0", " ")
    return re.sub(r"\s+", " ", text)


def test_papers_tell_of_their_plans(sweep, tmp_path, monkeypatch):
    outputs = tmp_path / "out"
    monkeypatch.setenv("SPEEDRUN_OUTPUTS", str(outputs))
    monkeypatch.delenv("SPEEDRUN_PROFILE", raising=False)
    name = sweep(outputs)
    gpt = as_frozen(read_sweep("gpt_demo"))
    freeze(gpt, outputs)
    simulated_runs(outputs, "gpt", effects={"baseline": (0, 0), "kv_1": (-1, 0.05)}, runs=3, sweep=gpt.name)
    papers = shutil.copytree(from_root("paper"), tmp_path / "paper", ignore=shutil.ignore_patterns("_output"))
    rendered = render(papers, ["cifar10", "nanogpt"], formats=["html"], engine="built-in")
    made = {path.stem: words_of(path.read_text(encoding="utf-8")) for path in rendered.outputs}
    assert f"The plan {name} was frozen" in made["cifar10"] and "All 8 were completed" in made["cifar10"]
    assert "6 completed (6 under the plan) and 9 were not run." in made["nanogpt"]
    assert f"The plan {gpt.name} was frozen" in made["nanogpt"] and "0 of 5 blocks are complete." in made["nanogpt"]
    for text in made.values():
        assert re.search(r"Table \d sets what was planned against what was done\.", text)
        assert text.count("Planned against done, in numbers of runs.") == 1
    numbers = [int(n) for n in re.findall(r"Table (\d+):", made["nanogpt"])]
    assert numbers == [*range(1, len(numbers) + 1)] and len(numbers) > 15


def test_a_plan_without_runs_has_empty_tables(tmp_path):
    freeze(as_frozen(read_sweep("cifar_demo")), tmp_path)
    report = load_report("cifar", tmp_path)
    assert report.plans and tables.runs_table(report) == tables.summary_table(report) == "*No runs yet.*"


def large_plan(variants, seeds):
    "A plan of many conditions, and the records of all its runs."
    conditions = [dict(name=f"v{i}", variant=f"v{i}", config_hash=f"h{i}", claim=None) for i in range(variants)]
    design = dict(study="cifar", profile="demo", conditions=conditions, seeds=[*range(seeds)], repeats=1,
                  seeds_per_batch=4, stop="fixed", order=[[*range(variants)]] * (seeds // 4))
    plan = SweepPlan("large", design, dict(frozen_at="2026-01-01T00:00:00+00:00"))
    same = dict(study="cifar", profile="demo", config={}, repeat=0, batch="b", sweep=plan.name, status="completed",
                package_hash="0", time_seconds=1.0)
    rows = [same | dict(variant=c["variant"], config_hash=c["config_hash"], seed=seed, block=seed // 4,
                        run_id=run_id("cifar", "demo", c["config_hash"], seed, 0),
                        started_at=f"2026-01-02T00:{seed // 60:02d}:{seed % 60:02d}+00:00")
            for c in conditions for seed in range(seeds)]
    return plan, pd.DataFrame(rows)


def test_ten_thousand_runs_in_a_plan():
    plan, rows = large_plan(variants=50, seeds=200)
    case = make_case(rows, CIFAR, plans={plan.name: plan})
    report = replace(load_report("cifar", "nowhere"), frame=case.rows, plans=case.plans, profile="demo")
    assert "All 10000 were completed under the plan." in planned.planned_section(report) and not audit_plans(case)


def test_claims_are_compared_as_they_are_written(tmp_path):
    "Through JSON and back nothing counts as a change: all variants of both studies."
    for study in (CIFAR, load_study("gpt")):
        variants = [resolve(study, name, "demo") for name in variant_names(study)]
        conditions = [dict(name=v.name, variant=v.name, config_hash=v.config_hash, claim=v.claim and asdict(v.claim))
                      for v in variants]
        design = dict(study=study.name, profile="demo", conditions=conditions, seeds=[0], repeats=1)
        plan = freeze(SweepPlan("all", design, dict(frozen_at="2026-01-01T00:00:00+00:00")), tmp_path)
        assert claim_changes(plan, study) == {} and any(c["claim"] for c in plan.conditions)
