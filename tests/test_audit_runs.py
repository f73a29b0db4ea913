"What the audit finds in runs and batches: planted mistakes, clean studies, degenerate input, and published runs."
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import stub_train

from speedrun_nb.audit.agreement import agreements, beyond_chance
from speedrun_nb.audit.audit import audit, compare, run_checks
from speedrun_nb.audit.claimed_settings import check_same_settings, check_settings_differ
from speedrun_nb.audit.copies import check_copied_runs, check_same_computation
from speedrun_nb.audit.counted import counted
from speedrun_nb.audit.examples import runs_of
from speedrun_nb.audit.findings import CHECKS
from speedrun_nb.audit.outliers import check_warmup_outlier
from speedrun_nb.audit.runs import check_missing_runs
from speedrun_nb.audit.seeds import check_inert_seed, check_repeated_seed
from speedrun_nb.audit.steps import check_step_time_jump, interval_times
from speedrun_nb.core.batch import run_batch
from speedrun_nb.core.parameters import plan_batch
from speedrun_nb.core.provenance import read_provenance, read_provenances
from speedrun_nb.core.runs import read_runs
from speedrun_nb.core.study import load_study
from speedrun_nb.core.withdraw import withdraw
from speedrun_nb.evidence.case import make_case
from speedrun_nb.importing.import_ import import_runs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import audit_plans
from audit_plans import planned_study

DATA = os.environ.get("SPEEDRUN_DATA")
STUDY = load_study("cifar")


pytestmark = pytest.mark.usefixtures("no_warnings")


def case_of(*frames, provenances=None):
    return make_case(pd.concat(frames, ignore_index=True), STUDY, provenances=provenances)


def found(case):
    "Findings as (id, severity, groups); each is known, has words and figures, and can be written as JSON."
    findings = run_checks("case", case)
    for f in findings:
        assert f.id in CHECKS and f.message.endswith(".") and f.remedy.endswith(".") and f.figures
        assert json.loads(json.dumps(f.as_dict(), allow_nan=False))
        assert set(f.runs) <= set(case.rows["run_id"].astype(str)) and set(f.groups) <= {g.name for g in case.groups}
    return {(f.id, f.severity, f.groups) for f in findings}


# ---------------------------------------------------------------- planted mistakes

def test_every_planted_mistake_is_found_and_nothing_else():
    rng = np.random.default_rng(0)
    base, other = runs_of("baseline", 60, rng=rng), runs_of("det_crop", 60, rng=rng, time=4.3)
    assert found(case_of(base, other)) == set()

    new_times = rng.normal(4.4, 0.04, 60)
    copy = base.assign(batch="b1", repeat=1, run_id=base["run_id"] + "-again", time_seconds=new_times).head(30)
    repeated = {("copied-runs", "serious", ("baseline",)), ("repeated-seed", "note", ("baseline",))}
    assert found(case_of(base, copy, other)) == repeated

    renamed = other.assign(variant="control", config_hash="hash-control", run_id=other["run_id"] + "-c")
    twin = renamed.assign(time_seconds=rng.normal(4.3, 0.04, 60))
    assert found(case_of(base, other, twin)) == {("same-computation", "serious", ("control", "det_crop"))}
    unmarked = twin.assign(fingerprint=[f"c{i}" for i in range(60)])  # different fingerprints, equal accuracies
    assert found(case_of(base, other, unmarked)) == {("same-computation", "serious", ("control", "det_crop"))}

    collapsed, same = other.assign(fingerprint="same", accuracy=0.1), other.assign(config_hash="hash-baseline")
    assert found(case_of(base, collapsed)) == {("inert-seed", "serious", ("det_crop",))}
    assert found(case_of(base, same)) == {("same-settings", "serious", ("baseline", "det_crop"))}

    cold = other.assign(time_seconds=other["time_seconds"].where(other["order"] > 0, 12.0))
    assert found(case_of(base, cold)) == {("warmup-outlier", "serious", ("det_crop",))}
    slow = other.assign(time_seconds=other["time_seconds"].where(other["order"] != 33, 6.0))
    assert found(case_of(base, slow)) == {("outliers", "warning", ("det_crop",))}  # without it 1 % is shown

    jump = [dict(epoch=list(range(10)), time_seconds=np.cumsum([0.4] * 5 + [0.6] * 5).tolist())] * 60
    assert found(case_of(base, other.assign(curve=jump))) == {("step-time-jump", "serious", ("det_crop",))}
    scheduled = other.assign(curve=jump, config=[{"data.split": "validation", "augment.crop_until_epoch": 5}] * 60)
    assert found(case_of(base, scheduled)) == {("step-time-jump", "warning", ("det_crop",))}

    lost = other.assign(status=["failed"] * 20 + ["completed"] * 40)
    assert found(case_of(base, lost)) == {("missing-runs", "serious", ("det_crop",))}
    again = other.assign(tokens=[dict(trained=30, unique=10)] * 60)
    assert found(case_of(base, again)) == {("repeated-data", "warning", ("det_crop",))}
    counts = dict(how="model", graphs=9, recompiles=7, fallbacks=0)
    for fallbacks, severity in ((1, "serious"), (0, "warning")):
        compiled = other.assign(compiled=[counts | dict(fallbacks=fallbacks)] * 60)
        assert found(case_of(base, compiled)) == {("compile-fallback", severity, ("det_crop",))}
    fine = dict(compiled=[counts | dict(recompiles=0)] * 60, ranks=8, resumed_at=None)
    assert found(case_of(base.assign(**fine), other.assign(**fine))) == set()
    resumed = other.assign(resumed_at=[None, 600] * 30)
    assert found(case_of(base, resumed)) == {("resumed-runs", "warning", ("det_crop",))}
    dirty = {"cifar/demo/det_crop/b0": dict(git=dict(commit="ab" * 20, dirty=True))}
    assert found(case_of(base, other, provenances=dirty)) == {("uncommitted-code", "warning", ("det_crop",))}
    official = [{"data.split": "official"}] * 20
    tested = [runs_of(name, 20, rng=rng, config=official) for name in ("baseline", "a", "b", "c")]
    assert {(i, s) for i, s, _ in found(case_of(*tested))} == {("tuned-on-test", "warning")}


def test_one_copied_batch_among_many_is_found():
    "As published: twenty batches of a hundred, some of which are copies of each other, one with five runs."
    rng = np.random.default_rng(1)
    accuracy = [rng.normal(0.94, 0.0012, 100).round(4) for _ in range(20)]
    accuracy[7], accuracy[12] = accuracy[3], accuracy[3]
    frames = [runs_of(f"v{i:02d}", 100, rng=rng, accuracy=a, fingerprint=None) for i, a in enumerate(accuracy)]
    frames.append(runs_of("v03", 5, rng=rng, batch="b1", accuracy=accuracy[3][:5], fingerprint=None))
    same = ("same-computation", "serious", ("v03", "v07", "v12"))
    copied = {("copied-runs", "warning", ("v03",)), ("repeated-seed", "warning", ("v03",))}
    assert found(case_of(*frames)) == {same} | copied


def gpt_runs(variant, losses, prints, **config):
    "Runs of the other study, which has settings that say how rather than what."
    rows = runs_of(variant, len(losses), rng=np.random.default_rng(0), fingerprint=prints).drop(columns="accuracy")
    settings = {"optimizer.sharded": False, "train.loss_chunk": None, "model.layers": 12} | config
    return rows.assign(study="gpt", profile="elsewhere", val_loss=losses, config=[settings] * len(losses))


@pytest.mark.parametrize("change", [
    {"optimizer.sharded": True},
    {"train.loss_chunk": 4096},
    {"optimizer.sharded": True, "train.loss_chunk": 4096},
])
def test_equal_results_of_another_implementation_are_what_was_hoped_for(change):
    rng = np.random.default_rng(8)
    losses, prints, others = rng.normal(3.28, 0.002, 20), [f"p{i}" for i in range(20)], [f"q{i}" for i in range(20)]
    base = gpt_runs("baseline", losses, prints)

    def beside_base(losses, prints, **config):
        frame = pd.concat([base, gpt_runs("other", losses, prints, **config)], ignore_index=True)
        return found(make_case(frame, load_study("gpt")))

    assert beside_base(losses, prints, **change) == set()
    assert beside_base(losses, others, **change) == set()  # equal to the last digit shown
    assert beside_base(losses + rng.normal(0, 1e-3, 20), others, **change) == set()  # more than rounding
    deeper = beside_base(losses, prints, **change | {"model.layers": 24})
    assert deeper == {("same-computation", "serious", ("baseline", "other"))}


def test_equal_results_within_a_group_are_copies_whatever_the_implementation():
    base = gpt_runs("baseline", np.random.default_rng(8).normal(3.28, 0.002, 20), [f"p{i}" for i in range(20)])
    again = base.assign(batch="b1", repeat=1, run_id=base["run_id"] + "-again")
    twice = make_case(pd.concat([base, again], ignore_index=True), load_study("gpt"))
    assert ("copied-runs", "serious", ("baseline",)) in found(twice)


def test_copies_are_told_from_files_copied():
    rng = np.random.default_rng(2)
    rows = runs_of("baseline", 100, rng=rng, fingerprint=None)
    file = rows.assign(batch="b1", run_id=rows["run_id"] + "-copy", seed=range(500, 600))
    [f] = check_copied_runs(case_of(rows, file))
    assert f.metric is None and f.figures["times"] == "equal" and "records were copied" in f.message
    [f] = check_copied_runs(case_of(rows, file.assign(time_seconds=rng.normal(4.4, 0.04, 100))))
    assert f.metric == "accuracy" and f.figures["pairs"][0]["equal"] == 100
    assert not f.undermines("time_seconds") and f.undermines("accuracy")
    shuffled = file.sample(frac=1, random_state=0).assign(order=range(100))  # and under other seeds
    [f] = check_copied_runs(case_of(rows, shuffled))
    assert f.figures["copies"] == 100


@pytest.mark.parametrize("step, correlation", [(1e-4, 0), (1e-4, 0.5), (1e-3, 0), (1e-3, 0.5)])
def test_results_that_coincide_by_chance_are_no_copies(step, correlation):
    "The same seeds on two machines, and two variants that share them."
    rng = np.random.default_rng(3)

    def related_to(shared):
        own = rng.normal(0, 0.0012, len(shared))
        return ((0.94 + np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own) / step).round() * step

    for n in [5, 10, 20, 50, 200] * 2:
        shared = rng.normal(0, 0.0012, n)
        places = [(variant, host) for variant in ("baseline", "a", "b") for host in ("north", "south")]
        frames = [runs_of(variant, n, rng=rng, batch=host, host_id=host, fingerprint=None) for variant, host in places]
        case = case_of(*(frame.assign(accuracy=related_to(shared)) for frame in frames))
        assert check_copied_runs(case) == check_same_computation(case) == check_inert_seed(case) == []


def test_published_coincidences_are_chance():
    assert not beyond_chance(10, 200, 0.0241) and not beyond_chance(26, 1000, 0.0227)
    assert beyond_chance(100, 100, 0.03, looks=325) and beyond_chance(5, 5, 0.026, looks=100)


# ---------------------------------------------------------------- mistakes of graded strength

@pytest.mark.parametrize("injection", audit_plans.REGISTRY, ids=audit_plans.OURS)
def test_a_mistake_is_found_and_as_serious_as_it_is_large(injection):
    for strength in injection.strengths:
        severity = audit_plans.severity_of(injection.make(planned_study(3), strength, 3), injection.check)
        assert severity or strength < injection.warns_from
        if strength >= (injection.serious_from or 2): assert severity == "serious"
        if strength < injection.warns_from or injection.serious_from is None: assert severity != "serious"


@pytest.mark.parametrize("seed", range(3))
def test_studies_that_were_carried_out_as_planned_have_none_of_them(seed):
    assert audit_plans.false_alarms(seed) == []


def batch(outputs, name, seeds="0:4", variant="baseline", trainer=stub_train):
    return run_batch(plan_batch("cifar", variant, seeds, "demo", outputs=str(outputs), batch=name), trainer)


def missing(outputs):
    "The findings on missing runs as a user gets them."
    frame, _ = read_runs(outputs)
    return [f for f in audit(frame, STUDY, provenances=read_provenances(outputs)) if f.id == "missing-runs"]


def test_lines_that_were_deleted_from_our_own_batches_are_noticed(tmp_path):
    for variant in ("baseline", "det_crop"): done = batch(tmp_path, "b1", variant=variant)
    batch(tmp_path, "b2", "4:6", "det_crop")
    path = done.folder / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert missing(tmp_path) == []
    for left, deleted in ((lines[1:], 1), ([], 4)):
        path.write_text("".join(left))
        [f] = missing(tmp_path)
        assert (f.severity, f.groups, f.figures["deleted"]) == ("serious", ("det_crop",), deleted)
        assert f.undermines("time_seconds")
    path.unlink()
    assert missing(tmp_path)[0].figures["deleted"] == 4
    (tmp_path / "cifar/demo/det_crop/b2/runs.jsonl").unlink()  # and now nothing is left of the variant
    [f] = missing(tmp_path)
    assert f.severity == "warning" and f.figures["deleted"] == 6 and "det_crop" in f.message
    (tmp_path / "cifar/demo/baseline/b1/runs.jsonl").unlink()
    assert {f.figures["variant"] for f in missing(tmp_path)} == {"baseline", "det_crop"}


def test_runs_that_were_interrupted_are_made_or_withdrawn(tmp_path):
    def interrupted(settings, seeds):
        yield from list(stub_train(settings, seeds))[:3]
        raise KeyboardInterrupt

    for variant in ("baseline", "det_crop"): batch(tmp_path, "first", variant=variant)
    with pytest.raises(KeyboardInterrupt): batch(tmp_path, "stopped", "4:9", trainer=interrupted)
    [f] = missing(tmp_path)
    assert (f.severity, f.figures["stopped"]) == ("warning", 3) and "speedrun withdraw" in f.remedy
    batch(tmp_path, "resumed", "6:8")
    assert missing(tmp_path)[0].figures["stopped"] == 1
    withdraw(tmp_path, "stopped", "the machine was needed")
    [f] = missing(tmp_path)
    assert (f.severity, f.figures["withdrawn"]) == ("note", 1) and "the machine was needed." in f.message
    path = tmp_path / "cifar/demo/baseline/stopped/runs.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])  # a reason excuses no deleted line
    assert missing(tmp_path)[0].severity == "serious"
    batch(tmp_path, "again", "4:9")
    assert missing(tmp_path)[0].figures["deleted"] == 1 and missing(tmp_path)[0].figures["withdrawn"] == 0


def test_conditions_hide_nothing_that_is_missing():
    made = audit_plans.stop_early(planned_study(1), 0.5, 1)
    given = dict(provenances=made.provenances, plans=made.plans)
    found = compare(made.runs, STUDY, "baseline", "det_crop", **given)
    by_block = compare(made.runs, STUDY, "baseline", "det_crop", conditions=dict(block="3"), **given)
    whole = planned_study(1)
    part = compare(whole.runs, STUDY, "baseline", "det_crop", conditions=dict(block="3"), plans=whole.plans,
                   provenances=whole.provenances)
    assert "plan-unfinished" in {f.id for f in found.findings} & {f.id for f in by_block.findings}
    assert not {f.id for f in part.findings} & {"plan-unfinished", "missing-runs", "planned-variant-missing"}
    assert found.verdict.outcome in ("untrustworthy", "undecided")


def test_a_copy_among_forty_is_a_copy_and_not_a_seed_without_effect():
    rng = np.random.default_rng(9)
    base = runs_of("baseline", 40, rng=rng)
    near = (base["time_seconds"] - base["time_seconds"].mean()).abs().argsort().iloc[:1]
    copy = base.iloc[near].assign(run_id="copy", seed=40, order=40)
    copy["time_seconds"] *= 1.001
    assert found(case_of(base, copy)) == {("copied-runs", "warning", ("baseline",))}
    many = base.head(12).assign(run_id=[f"c{i}" for i in range(12)], seed=range(40, 52), order=range(40, 52))
    assert found(case_of(base, many)) == {("copied-runs", "serious", ("baseline",))}
    twenty = base.assign(fingerprint=["same"] * 20 + [f"p{i}" for i in range(20)])
    assert found(case_of(twenty)) == {("inert-seed", "serious", ("baseline",))}


def test_copies_without_fingerprints_and_curves_are_seen_by_their_jittered_times():
    rng = np.random.default_rng(10)
    base = runs_of("baseline", 60, rng=rng, fingerprint=None)
    noise = rng.normal(1, 1e-4, 15)
    copies = base.tail(15).assign(run_id=[f"c{i}" for i in range(15)], seed=range(60, 75), order=range(60, 75))
    [f] = check_copied_runs(case_of(base, copies.assign(time_seconds=copies["time_seconds"] * noise)))
    assert f.severity == "serious" and f.metric is None and 13 <= f.figures["copies"] <= 17
    assert "copied and changed" in f.message
    assert check_copied_runs(case_of(base, copies.assign(time_seconds=rng.normal(4.4, 0.04, 15)))) == []


# ---------------------------------------------------------------- clean studies

NOISE = {
    "normal": lambda rng, n: rng.normal(size=n),
    "skewed": lambda rng, n: rng.lognormal(0, 0.5, n) - 1.13,
    "heavy": lambda rng, n: rng.standard_t(4, n) / 1.4,
}


def curve_of(rng, seconds, noise, cv):
    "Ten epochs that take so long together."
    epochs = seconds / 10 * np.maximum(0.5, 1 + cv * noise(rng, 10))
    losses = rng.normal(1.5, 0.1, 10)
    return dict(epoch=list(range(10)), train_loss=losses.tolist(), time_seconds=np.cumsum(epochs).tolist())


def clean_study(rng):
    "An interleaved study without mistakes: times of any kind, results counted in images, with or without fingerprints."
    n, hosts, blocks = rng.choice([5, 12, 40, 150]), rng.choice([1, 2]), bool(rng.integers(2))
    noise, cv, step = NOISE[rng.choice(list(NOISE))], rng.choice([0.002, 0.01, 0.05]), rng.choice([1e-4, 1e-3])
    prints = {} if rng.integers(2) else dict(fingerprint=None)
    shared, frames = rng.normal(0, 0.0006, n), []
    for v, h in ((v, h) for v in range(4) for h in range(hosts)):
        times = (4.4 + h) * (1 - 0.01 * v) * np.maximum(0.3, 1 + cv * noise(rng, n))
        columns = dict(
            host_id=f"h{h}",
            order=np.arange(n) * 4 + v,
            time_seconds=times,
            accuracy=((0.94 + shared + rng.normal(0, 0.001, n)) / step).round() * step,
            curve=[curve_of(rng, seconds, noise, cv) for seconds in times],
        )
        rows = runs_of(f"v{v}" if v else "baseline", n, rng=rng, batch=f"h{h}", **columns | prints)
        frames.append(rows.assign(batch=rows["batch"] + (rows["seed"] // 4).astype(str)) if blocks else rows)
    return case_of(*frames)


def test_clean_studies_have_nothing_serious():
    rng = np.random.default_rng(4)
    findings = [f for _ in range(24) for f in run_checks("case", clean_study(rng))]
    severities = [f.severity for f in findings if f.id not in ("repeated-seed", "outliers")]
    assert "serious" not in severities and len(severities) <= 4


def test_clean_normal_times_have_no_outliers():
    rng = np.random.default_rng(5)
    alarms = 0
    for n in [8, 20, 100, 1000] * 6:
        case = case_of(runs_of("baseline", n, rng=rng), runs_of("det_crop", n, rng=rng, step=1e-3))
        alarms += len(run_checks("case", case))
    assert alarms <= 1  # of 48 groups in two metrics


# ---------------------------------------------------------------- degenerate input

def bare(**columns):
    "Records with next to nothing in them."
    names = dict(run_id=["a", "b"], study="cifar", profile="demo", variant="baseline", config_hash="h", batch="b")
    nothing = dict(config=[None, None], seed=None, repeat=0, status="completed", started_at=None)
    return pd.DataFrame(names | nothing | columns)


@pytest.mark.parametrize("columns", [
    {},
    dict(time_seconds=None),
    dict(time_seconds=[np.nan, 4.4], accuracy=[np.nan, None]),
    dict(time_seconds=0.0, accuracy=0.0),
    dict(status="failed"),
    dict(status=["diverged", "completed"], time_seconds=[None, 4.0]),
    dict(curve=None),
    dict(curve=[{}, {"step": []}]),
    dict(curve=[dict(step=[0, 1], val_loss=[None, None], step_ms=[None, None])] * 2),
    dict(curve=[dict(epoch=[None] * 9, time_seconds=[1.0] * 9)] * 2),
    dict(fingerprint=[None, np.nan]),
    dict(seed=[0, 0], fingerprint=["f", "f"]),
    dict(run_id=[None, None]),
    dict(run_id=["a", "a"]),
    dict(batch=None),
    dict(tokens=[None, {}]),
    dict(tokens=[dict(trained=None, unique=3), 7]),
    dict(compiled=[None, {}]),
    dict(compiled=[7, dict(fallbacks=None, recompiles="x", graphs=1.5)]),
    dict(compiled=[dict(fallbacks=1), dict(recompiles=2)]),
    dict(resumed_at=[None, 600]),
    dict(resumed_at=["x", np.nan]),
    dict(config=[{}, {}], order=[None, 1], host_id=None),
    dict(order=[0, 0], time_seconds=[9.9, 1.0]),
])
@pytest.mark.parametrize("runs", [1, 2])
def test_degenerate_records_are_audited(columns, runs):
    found(make_case(bare(**columns).head(runs), STUDY))
    odd, without_metrics = {"cifar/demo/baseline/b": {}, "odd": {"seeds": [1]}}, replace(STUDY, target=None, metrics={})
    found(make_case(bare(**columns).head(runs), without_metrics, provenances=odd))


@pytest.mark.parametrize("provenance", [
    {},
    dict(status="imported"),
    dict(status="interrupted", seeds=None),
    dict(contradictions=[None, {}]),
    dict(git=None, notes=None),
    dict(git={"dirty": True}),
    dict(expected_runs=None, seeds=[], config=None),
])
def test_provenance_may_lack_anything(provenance):
    found(make_case(bare(), STUDY, provenances={"cifar/demo/baseline/b": provenance}))


def test_no_groups_at_all():
    case = replace(make_case(bare(), STUDY), groups=(), baseline=None)
    assert run_checks("case", case) == [] and counted(case).empty and agreements(case) == []


def test_equal_times_are_no_outliers_and_no_copies():
    rng = np.random.default_rng(6)
    base, other = (runs_of(name, 20, rng=rng, time_seconds=t) for name, t in (("baseline", 4.4), ("det_crop", 4.3)))
    assert found(case_of(base, other)) == set()


def test_curves_of_any_shape():
    unknown, nested = dict(step=list(range(10)), step_ms=[None] * 10), dict(step=[0, 1], step_ms=[[1], [2]])
    words, standing = dict(step="abcdefgh", step_ms="abcdefgh"), dict(epoch=[1] * 9, time_seconds=[0.0] * 9)
    assert interval_times([unknown, nested, words, 7, "x", standing]) == []


def test_findings_for_records_read_back(tmp_path):
    "Runs of batches that were interrupted and taken up again are not missing."
    rng = np.random.default_rng(7)
    rows = runs_of("baseline", 10, rng=rng)
    interrupted = dict(status="interrupted", seeds=list(range(10)))
    taken_up = dict(status="completed", seeds=[6, 7, 8, 9])
    provenances = {"cifar/demo/baseline/b0": interrupted, "cifar/demo/baseline/b1": taken_up}
    rows.loc[rows["seed"] > 5, "batch"] = "b1"
    assert check_missing_runs(case_of(rows, provenances=provenances)) == []
    [f] = check_missing_runs(case_of(rows[rows["seed"] < 9], provenances=provenances))
    assert f.figures["deleted"] == 1 and f.severity == "serious"  # the batch that took it up ended well


# ---------------------------------------------------------------- published runs

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "The published runs, imported: a case for each study."
    if not DATA: pytest.skip("SPEEDRUN_DATA is not set: published runs are not available")
    outputs = tmp_path_factory.mktemp("published")
    import_runs(Path(DATA) / "published", outputs, map_file="params/maps/published.yaml")
    frame, problems = read_runs(outputs)
    assert not problems
    batches = [path.parent for path in outputs.glob("*/*/*/*/provenance.json")]
    provenances = {str(batch.relative_to(outputs)): read_provenance(batch) for batch in batches}
    return {study: make_case(frame, load_study(study), provenances=provenances) for study in ("cifar", "gpt")}


def of(case, check, *names):
    "The findings of a check that concern these groups (all of them)."
    return [f for f in check(case) if set(names) <= set(f.groups)]


def test_control_that_never_ran(published):
    case, names = published["cifar"], ("ablation_random_translate", "deterministic_translate")
    [f] = of(case, check_same_computation, *names)
    assert f.severity == "serious" and set(f.groups) == set(names)
    assert f.figures["pairs"][0]["equal"] == f.figures["pairs"][0]["of"] == 100
    [contradiction] = of(case, check_settings_differ, names[0])
    [same_module] = of(case, check_same_settings, names[0])
    assert len(contradiction.groups) == 1 and len(same_module.groups) == 2
    assert contradiction.severity == same_module.severity == "serious"


def test_same_seeds_on_two_machines_are_related_but_no_copies(published):
    case = published["cifar"]
    assert check_copied_runs(case) == [] and len(check_same_computation(case)) == 1
    [note] = check_repeated_seed(case)
    assert note.severity == "note" and note.groups == ("baseline", "det_crop_backoff")
    correlations = [each["figures"]["correlation"]["accuracy"] for each in note.figures["cases"]]
    assert correlations == pytest.approx([0.12, 0.19], abs=0.005)


def test_first_runs_without_warm_up(published):
    [f] = check_warmup_outlier(published["cifar"])
    grid = {g.name for g in published["cifar"].groups if g.name.startswith("grid_")}
    assert set(f.groups) == grid and len(grid) == 10 and f.severity == "serious"
    assert all(f.concerns([name, "another"]) for name in grid) and not f.concerns(["baseline", "another"])
    figures = f.figures["each"]["grid_tta0_ep9.0"]
    assert round(figures["mean"], 3) == 4.317  # as published
    assert round(figures["mean_without"], 3) == 3.600


def test_compiler_that_gave_up(published):
    f, other = check_step_time_jump(published["gpt"])
    assert other.groups == ("baseline_stage_c",) and other.severity == "warning"  # a small one in one run
    assert other.figures["share"] < 0.005
    assert f.groups == ("depth_warming_stage_a",) and f.severity == "serious" and "recompile_limit" in f.message
    assert f.figures["before"] == pytest.approx(1631, abs=2) and f.figures["after"] == pytest.approx(2463, abs=2)
    assert f.figures["runs"] == 2 and 650 <= f.figures["at"] <= 700 and f.figures["share"] > 0.1


def test_seeds_that_control_nothing(published):
    [f] = check_inert_seed(published["gpt"])
    assert f.groups == ("palm_parallel_stage_c",) and f.severity == "warning"
    assert sorted(f.figures["losses"]) == [15.9677, 15.9939]
    assert [g.groups for g in check_repeated_seed(published["gpt"])] == [("palm_parallel_stage_c",)]


CLEAN = {
    "baseline", "det_crop_backoff", "cifar10_baseline", "benchmark_baseline", "hardswish", "lion",
    "baseline_stage_a", "palm_parallel_stage_a", "baseline_stage_c", "record_5", "record_5_replication",
}


def test_the_rest_of_the_published_runs(published):
    gpt = {(f.id, f.severity, name) for f in run_checks("case", published["gpt"]) for name in f.groups}
    repeated = {("repeated-data", "warning", name) for name in ("baseline_stage_c", "palm_parallel_stage_c")}
    assert repeated | {("missing-runs", "warning", "palm_parallel_stage_c")} <= gpt
    known, accused = set(), set()
    for case in published.values():
        known |= {g.name for g in case.groups}
        accused |= {name for _, severity, names in found(case) if severity == "serious" for name in names}
    assert known >= CLEAN and not accused & CLEAN
