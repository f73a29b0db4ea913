"What the audit finds in single runs and batches: planted mistakes, clean studies, degenerate input, and published runs."
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from speedrun_nb.audit.agreement import agreements, beyond_chance
from speedrun_nb.audit.copies import check_copied_runs, check_same_computation
from speedrun_nb.audit.counted import counted
from speedrun_nb.audit.seeds import check_inert_seed, check_repeated_seed
from speedrun_nb.audit.findings import CHECKS
from speedrun_nb.audit.outliers import check_warmup_outlier
from speedrun_nb.audit.runs import RUN_CHECKS, audit_runs, check_missing_runs
from speedrun_nb.audit.settings import check_settings_differ
from speedrun_nb.audit.steps import check_step_time_jump
from speedrun_nb.importing.steps import step_times
from speedrun_nb.core.provenance import read_provenance
from speedrun_nb.core.runs import read_runs
from speedrun_nb.core.study import load_study
from speedrun_nb.evidence.case import make_case

DATA = os.environ.get("SPEEDRUN_DATA")
STUDY = load_study("cifar")


pytestmark = pytest.mark.usefixtures("no_warnings")


def runs_of(variant, n, rng, batch="b0", time=4.4, cv=0.01, step=1e-4, **columns):
    "Clean runs, one a seed, with different fingerprints."
    rows = pd.DataFrame(dict(
        run_id=[f"{variant}-{batch}-{i}" for i in range(n)], study="cifar", profile="full", variant=variant, config_hash=f"hash-{variant}", seed=range(n), repeat=0, batch=batch, order=range(n),
        status="completed", host_id="host", started_at=[f"2026-01-01T{i // 60 % 24:02d}:{i % 60:02d}:00+00:00" for i in range(n)], time_seconds=rng.normal(time, cv * time, n),
        accuracy=(rng.normal(0.94, 0.0012, n) / step).round() * step, fingerprint=[f"{variant}-{batch}-{i}" for i in range(n)]))
    return rows.assign(config=[{"data.split": "validation"}] * n).assign(**columns)


def case_of(*frames, provenances=None):
    return make_case(pd.concat(frames, ignore_index=True), STUDY, provenances=provenances)


def found(case):
    "Findings as (id, severity, groups); each is known, has words and figures, and can be written as JSON."
    findings = audit_runs(case)
    for f in findings:
        assert f.id in CHECKS and f.message.endswith(".") and f.remedy.endswith(".") and f.figures
        assert json.loads(json.dumps(f.as_dict(), allow_nan=False)) and set(f.runs) <= set(case.rows["run_id"].astype(str)) and set(f.groups) <= {g.name for g in case.groups}
    return {(f.id, f.severity, f.groups) for f in findings}


# ---------------------------------------------------------------- planted mistakes

def test_every_planted_mistake_is_found_and_nothing_else():
    rng = np.random.default_rng(0)
    base, other = runs_of("baseline", 60, rng), runs_of("det_crop", 60, rng, time=4.3)
    assert found(case_of(base, other)) == set()

    copy = base.head(30).assign(batch="b1", repeat=1, run_id=[f"again-{i}" for i in range(30)], time_seconds=rng.normal(4.4, 0.04, 30))
    assert found(case_of(base, copy, other)) == {("copied-runs", "serious", ("baseline",)), ("repeated-seed", "note", ("baseline",))}

    twin = other.assign(variant="control", config_hash="hash-control", run_id=other["run_id"] + "-c", time_seconds=rng.normal(4.3, 0.04, 60))
    assert found(case_of(base, other, twin)) == {("same-computation", "serious", ("control", "det_crop"))}
    unmarked = twin.assign(fingerprint=[f"c{i}" for i in range(60)])  # different fingerprints, equal accuracies
    assert found(case_of(base, other, unmarked)) == {("same-computation", "serious", ("control", "det_crop"))}

    assert found(case_of(base, other.assign(fingerprint="same", accuracy=0.1))) == {("inert-seed", "serious", ("det_crop",))}
    assert found(case_of(base, other.assign(config_hash="hash-baseline"))) == {("same-settings", "serious", ("baseline", "det_crop"))}

    cold = other.assign(time_seconds=other["time_seconds"].where(other["order"] > 0, 12.0))
    assert found(case_of(base, cold)) == {("warmup-outlier", "serious", ("det_crop",))}
    slow = other.assign(time_seconds=other["time_seconds"].where(other["order"] != 33, 6.0))
    assert found(case_of(base, slow)) == {("outliers", "note", ("det_crop",))}

    jump = [dict(epoch=list(range(10)), time_seconds=np.cumsum([0.4] * 5 + [0.6] * 5).tolist())] * 60
    assert found(case_of(base, other.assign(curve=jump))) == {("step-time-jump", "serious", ("det_crop",))}
    assert found(case_of(base, other.assign(curve=jump, config=[{"data.split": "validation", "augment.crop_until_epoch": 5}] * 60))) == {("step-time-jump", "warning", ("det_crop",))}

    lost = other.assign(status=["failed"] * 20 + ["completed"] * 40)
    assert found(case_of(base, lost)) == {("missing-runs", "serious", ("det_crop",))}
    assert found(case_of(base, other.assign(tokens=[dict(trained=30, unique=10)] * 60))) == {("repeated-data", "warning", ("det_crop",))}
    gave_up = [dict(how="model", graphs=9, recompiles=7, fallbacks=1)] * 60
    assert found(case_of(base, other.assign(compiled=gave_up))) == {("compile-fallback", "serious", ("det_crop",))}
    assert found(case_of(base, other.assign(compiled=[c | dict(fallbacks=0) for c in gave_up]))) == {("compile-fallback", "warning", ("det_crop",))}
    fine = [dict(how="model", graphs=9, recompiles=0, fallbacks=0)] * 60
    assert found(case_of(base.assign(compiled=fine, ranks=8, resumed_at=None), other.assign(compiled=fine, ranks=8, resumed_at=None))) == set()
    assert found(case_of(base, other.assign(resumed_at=[None, 600] * 30))) == {("resumed-runs", "warning", ("det_crop",))}
    dirty = {"cifar/full/det_crop/b0": dict(git=dict(commit="ab" * 20, dirty=True))}
    assert found(case_of(base, other, provenances=dirty)) == {("uncommitted-code", "warning", ("det_crop",))}
    tested = [runs_of(name, 20, rng, config=[{"data.split": "official"}] * 20) for name in ("baseline", "a", "b", "c")]
    assert {(i, s) for i, s, _ in found(case_of(*tested))} == {("tuned-on-test", "warning")}


def test_one_copied_batch_among_many_is_found():
    "As published: twenty batches of a hundred, some of which are copies of each other, one with five runs."
    rng = np.random.default_rng(1)
    accuracy = [rng.normal(0.94, 0.0012, 100).round(4) for _ in range(20)]
    accuracy[7], accuracy[12] = accuracy[3], accuracy[3]
    frames = [runs_of(f"v{i:02d}", 100, rng, accuracy=a, fingerprint=None) for i, a in enumerate(accuracy)]
    frames.append(runs_of("v03", 5, rng, batch="b1", accuracy=accuracy[3][:5], fingerprint=None))
    assert found(case_of(*frames)) == {("same-computation", "serious", ("v03", "v07", "v12")), ("copied-runs", "warning", ("v03",)), ("repeated-seed", "warning", ("v03",))}


def gpt_runs(variant, losses, prints, **config):
    "Runs of the other study, which has settings that say how rather than what."
    rows = runs_of(variant, len(losses), np.random.default_rng(0), fingerprint=prints).drop(columns="accuracy")
    return rows.assign(study="gpt", profile="elsewhere", val_loss=losses, config=[{"optimizer.sharded": False, "train.loss_chunk": None, "model.layers": 12} | config] * len(losses))


def test_equal_results_of_another_implementation_are_what_was_hoped_for():
    rng = np.random.default_rng(8)
    losses, prints = rng.normal(3.28, 0.002, 20), [f"p{i}" for i in range(20)]
    make = lambda *frames: make_case(pd.concat(frames, ignore_index=True), load_study("gpt"))
    base = gpt_runs("baseline", losses, prints)
    for change in ({"optimizer.sharded": True}, {"train.loss_chunk": 4096}, {"optimizer.sharded": True, "train.loss_chunk": 4096}):
        assert found(make(base, gpt_runs("other", losses, prints, **change))) == set()
        assert found(make(base, gpt_runs("other", losses, [f"q{i}" for i in range(20)], **change))) == set()  # equal to the last digit shown
        assert found(make(base, gpt_runs("other", losses + rng.normal(0, 1e-3, 20), [f"q{i}" for i in range(20)], **change))) == set()  # more than rounding
        assert found(make(base, gpt_runs("other", losses, prints, **change | {"model.layers": 24}))) == {("same-computation", "serious", ("baseline", "other"))}
    twice = make(base, gpt_runs("baseline", losses, prints).assign(batch="b1", repeat=1, run_id=[f"again-{i}" for i in range(20)]))
    assert ("copied-runs", "serious", ("baseline",)) in found(twice)  # within a group it is a copy all the same


def test_copies_are_told_from_files_copied():
    rng = np.random.default_rng(2)
    rows = runs_of("baseline", 100, rng, fingerprint=None)
    file = rows.assign(batch="b1", run_id=rows["run_id"] + "-copy", seed=range(500, 600))
    [f] = check_copied_runs(case_of(rows, file))
    assert f.metric is None and f.figures["same_times"] == 100 and "records were copied" in f.message
    [f] = check_copied_runs(case_of(rows, file.assign(time_seconds=rng.normal(4.4, 0.04, 100))))
    assert f.metric == "accuracy" and f.figures["pairs"][0]["equal"] == 100 and not f.undermines("time_seconds") and f.undermines("accuracy")
    [f] = check_copied_runs(case_of(rows, file.sample(frac=1, random_state=0).assign(order=range(100))))  # in another order, under other seeds
    assert f.figures["copies"] == 100


@pytest.mark.parametrize("step, correlation", [(1e-4, 0), (1e-4, 0.5), (1e-3, 0), (1e-3, 0.5)])
def test_results_that_coincide_by_chance_are_no_copies(step, correlation):
    "The same seeds on two machines, and two variants that share them."
    rng, alarms = np.random.default_rng(3), 0
    for n in [5, 10, 20, 50, 200] * 2:
        shared = rng.normal(0, 0.0012, n)
        draw = lambda n=n, shared=shared: ((0.94 + np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * rng.normal(0, 0.0012, n)) / step).round() * step
        frames = [runs_of(v, n, rng, batch=h, host_id=h, accuracy=draw(), fingerprint=None) for v in ("baseline", "a", "b") for h in ("north", "south")]
        case = case_of(*frames)
        alarms += len(check_copied_runs(case) + check_same_computation(case) + check_inert_seed(case))
    assert alarms == 0


def test_published_coincidences_are_chance():
    assert not beyond_chance(10, 200, 0.0241) and not beyond_chance(26, 1000, 0.0227)
    assert beyond_chance(100, 100, 0.03, looks=325) and beyond_chance(5, 5, 0.026, looks=100)


# ---------------------------------------------------------------- clean studies

def clean_study(rng):
    "An interleaved study without mistakes: normal, skewed or heavy-tailed times, results counted in images, with or without curves and fingerprints."
    n, hosts, blocks = rng.choice([5, 12, 40, 150]), rng.choice([1, 2]), bool(rng.integers(2))
    noise = dict(normal=lambda n: rng.normal(size=n), skewed=lambda n: rng.lognormal(0, 0.5, n) - 1.13, heavy=lambda n: rng.standard_t(4, n) / 1.4)[rng.choice(["normal", "skewed", "heavy"])]
    cv, step, known, shared = rng.choice([0.002, 0.01, 0.05]), rng.choice([1e-4, 1e-3]), rng.integers(2), rng.normal(0, 0.0006, n)
    frames = []
    for v in range(4):
        for h in range(hosts):
            time = (4.4 + h) * (1 - 0.01 * v) * np.maximum(0.3, 1 + cv * noise(n))
            curve = [dict(epoch=list(range(10)), train_loss=rng.normal(1.5, 0.1, 10).tolist(), time_seconds=np.cumsum(t / 10 * np.maximum(0.5, 1 + cv * noise(10))).tolist()) for t in time]
            frames.append(runs_of(f"v{v}" if v else "baseline", n, rng, batch=f"h{h}", host_id=f"h{h}", time_seconds=time, accuracy=((0.94 + shared + rng.normal(0, 0.001, n)) / step).round() * step,
                                  curve=curve, order=np.arange(n) * 4 + v, **({} if known else dict(fingerprint=None))))
            if blocks: frames[-1]["batch"] += (frames[-1]["seed"] // 4).astype(str)
    return case_of(*frames)


def test_clean_studies_have_nothing_serious():
    rng, severities = np.random.default_rng(4), []
    for _ in range(24): severities += [f.severity for f in audit_runs(clean_study(rng)) if f.id not in ("repeated-seed", "outliers")]
    assert "serious" not in severities and len(severities) <= 4


def test_clean_normal_times_have_no_outliers():
    rng = np.random.default_rng(5)
    alarms = [f.id for n in [8, 20, 100, 1000] * 6 for f in audit_runs(case_of(runs_of("baseline", n, rng), runs_of("det_crop", n, rng, step=1e-3)))]
    assert len(alarms) <= 1  # of 48 groups in two metrics


# ---------------------------------------------------------------- degenerate input

def bare(**columns):
    "Records with next to nothing in them."
    return pd.DataFrame(dict(run_id=["a", "b"], study="cifar", profile="full", variant="baseline", config=[None, None], config_hash="h", seed=None, repeat=0, batch="b", status="completed",
                             started_at=None) | columns)


@pytest.mark.parametrize("columns", [
    {}, dict(time_seconds=None), dict(time_seconds=[np.nan, 4.4], accuracy=[np.nan, None]), dict(time_seconds=0.0, accuracy=0.0), dict(status="failed"), dict(status=["diverged", "completed"], time_seconds=[None, 4.0]),
    dict(curve=None), dict(curve=[{}, {"step": []}]), dict(curve=[dict(step=[0, 1], val_loss=[None, None], step_ms=[None, None])] * 2), dict(curve=[dict(epoch=[None] * 9, time_seconds=[1.0] * 9)] * 2),
    dict(fingerprint=[None, np.nan]), dict(seed=[0, 0], fingerprint=["f", "f"]), dict(run_id=[None, None]), dict(run_id=["a", "a"]), dict(batch=None), dict(tokens=[None, {}]), dict(tokens=[dict(trained=None, unique=3), 7]),
    dict(compiled=[None, {}]), dict(compiled=[7, dict(fallbacks=None, recompiles="x", graphs=1.5)]), dict(compiled=[dict(fallbacks=1), dict(recompiles=2)]), dict(resumed_at=[None, 600]), dict(resumed_at=["x", np.nan]),
    dict(config=[{}, {}], order=[None, 1], host_id=None), dict(order=[0, 0], time_seconds=[9.9, 1.0])])
@pytest.mark.parametrize("runs", [1, 2])
def test_degenerate_records_are_audited(columns, runs):
    found(make_case(bare(**columns).head(runs), STUDY))
    found(make_case(bare(**columns).head(runs), replace(STUDY, target=None, metrics={}), provenances={"cifar/full/baseline/b": {}, "odd": {"seeds": [1]}}))


def test_provenance_may_lack_anything():
    for p in ({}, dict(status="imported"), dict(status="interrupted", seeds=None), dict(contradictions=[None, {}]), dict(git=None, notes=None), dict(git={"dirty": True}), dict(expected_runs=None, seeds=[], config=None)):
        found(make_case(bare(), STUDY, provenances={"cifar/full/baseline/b": p}))


def test_no_groups_at_all():
    case = replace(make_case(bare(), STUDY), groups=(), baseline=None)
    assert all(check(case) == [] for check in RUN_CHECKS) and counted(case).empty and agreements(case) == []


def test_equal_times_are_no_outliers_and_no_copies():
    rng = np.random.default_rng(6)
    assert found(case_of(runs_of("baseline", 20, rng, time_seconds=4.4), runs_of("det_crop", 20, rng, time_seconds=4.3))) == set()


def test_curves_of_any_shape():
    assert step_times([dict(step=list(range(10)), step_ms=[None] * 10), dict(step=[0, 1], step_ms=[[1], [2]]), dict(step="abcdefgh", step_ms="abcdefgh"), 7, "x", dict(epoch=[1] * 9, time_seconds=[0.0] * 9)]) == []


def test_findings_for_records_read_back(tmp_path):
    "Runs of batches that were interrupted and taken up again are not missing."
    rng = np.random.default_rng(7)
    rows = runs_of("baseline", 10, rng)
    provenances = {"cifar/full/baseline/b0": dict(status="interrupted", seeds=list(range(10))), "cifar/full/baseline/b1": dict(status="completed", seeds=[6, 7, 8, 9])}
    rows.loc[rows["seed"] > 5, "batch"] = "b1"
    assert check_missing_runs(case_of(rows, provenances=provenances)) == []
    [f] = check_missing_runs(case_of(rows[rows["seed"] < 9], provenances=provenances))
    assert f.figures["not_recorded"] == 1 and f.severity == "warning"


# ---------------------------------------------------------------- published runs

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "The published runs, imported: a case for each study."
    if not DATA: pytest.skip("SPEEDRUN_DATA is not set: published runs are not available")
    from speedrun_nb.importing.import_ import import_runs
    outputs = tmp_path_factory.mktemp("published")
    import_runs(Path(DATA) / "published", outputs, map_file="params/maps/published.yaml")
    frame, problems = read_runs(outputs)
    assert not problems
    provenances = {str(path.parent.relative_to(outputs)): read_provenance(path.parent) for path in outputs.glob("*/*/*/*/provenance.json")}
    return {study: make_case(frame, load_study(study), provenances=provenances) for study in ("cifar", "gpt")}


def of(case, check, *names):
    "The findings of a check that concern these groups (all of them)."
    return [f for f in check(case) if set(names) <= set(f.groups)]


def test_control_that_never_ran(published):
    case, names = published["cifar"], ("ablation_random_translate", "deterministic_translate")
    [f] = of(case, check_same_computation, *names)
    assert f.severity == "serious" and f.figures["pairs"][0]["equal"] == f.figures["pairs"][0]["of"] == 100 and set(f.groups) == set(names)
    claims = of(case, check_settings_differ, names[0])
    assert {len(f.groups) for f in claims} == {1, 2} and {f.severity for f in claims} == {"serious"}  # the contradiction, and the same module under two names


def test_same_seeds_on_two_machines_are_related_but_no_copies(published):
    case = published["cifar"]
    assert check_copied_runs(case) == [] and len(check_same_computation(case)) == 1
    notes = {f.groups[0]: f for f in check_repeated_seed(case)}
    assert {f.severity for f in notes.values()} == {"note"} and set(notes) == {"baseline", "det_crop_backoff"}
    assert notes["baseline"].figures["correlation"]["accuracy"] == pytest.approx(0.12, abs=0.005)
    assert notes["det_crop_backoff"].figures["correlation"]["accuracy"] == pytest.approx(0.19, abs=0.005)


def test_first_runs_without_warm_up(published):
    findings = {f.groups[0]: f for f in check_warmup_outlier(published["cifar"])}
    grid = {g.name for g in published["cifar"].groups if g.name.startswith("grid_")}
    assert set(findings) == grid and len(grid) == 10 and {f.severity for f in findings.values()} == {"serious"}
    f = findings["grid_tta0_ep9.0"]
    assert round(f.figures["mean"], 3) == 4.317 and round(f.figures["mean_without"], 3) == 3.600  # as published, and without the first run


def test_compiler_that_gave_up(published):
    [f] = check_step_time_jump(published["gpt"])
    assert f.groups == ("depth_warming_stage_a",) and f.severity == "serious" and f.figures["runs"] == 2 and "recompile_limit" in f.message
    assert f.figures["before"] == pytest.approx(1631, abs=2) and f.figures["after"] == pytest.approx(2463, abs=2) and 650 <= f.figures["at"] <= 700 and f.figures["share"] > 0.1


def test_seeds_that_control_nothing(published):
    [f] = check_inert_seed(published["gpt"])
    assert f.groups == ("palm_parallel_stage_c",) and f.severity == "warning" and sorted(f.figures["losses"]) == [15.9677, 15.9939]
    assert [g.groups for g in check_repeated_seed(published["gpt"])] == [("palm_parallel_stage_c",)]


def test_the_rest_of_the_published_runs(published):
    gpt = {(f.id, f.severity, name) for f in audit_runs(published["gpt"]) for name in f.groups}
    assert {("repeated-data", "warning", "baseline_stage_c"), ("repeated-data", "warning", "palm_parallel_stage_c"), ("missing-runs", "warning", "palm_parallel_stage_c")} <= gpt
    clean = {name for study in published for g in published[study].groups for name in [g.name]} - {name for study in published for f in audit_runs(published[study]) if f.severity == "serious" for name in f.groups}
    assert {"baseline", "det_crop_backoff", "cifar10_baseline", "benchmark_baseline", "hardswish", "lion", "baseline_stage_a", "palm_parallel_stage_a", "baseline_stage_c", "record_5", "record_5_replication"} <= clean
    for case in published.values(): found(case)
