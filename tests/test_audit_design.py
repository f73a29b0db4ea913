"The design checks of the audit: quiet on clean studies, loud on the mistakes that careful authors made, and never an error."
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from speedrun_nb.audit.conditions import table_of
from speedrun_nb.audit.design import audit_design
from speedrun_nb.audit.order import drifts
from speedrun_nb.core.runs import read_runs
from speedrun_nb.core.study import from_root, load_study, study_names
from speedrun_nb.evidence.case import by_baseline, make_case
from speedrun_nb.importing.import_ import import_runs

STUDY = load_study("cifar")
DATA = os.environ.get("SPEEDRUN_DATA")
published = pytest.mark.skipif(not DATA, reason="SPEEDRUN_DATA names no folder with published runs")
TAILS = {"normal": lambda rng, n: rng.normal(size=n), "skewed": lambda rng, n: rng.exponential(size=n) - 1, "long": lambda rng, n: rng.standard_t(3, n), "very long": lambda rng, n: rng.standard_t(2, n)}


pytestmark = pytest.mark.usefixtures("no_warnings")


def study(seed=0, variants=("baseline", "crop"), hosts=("a",), blocks=6, size=3, effect=-0.02, noise=0.004, tail="normal", drift=None, seeds=None):
    "Runs in randomised complete blocks on every host; `drift` maps the part of the study that is done, in [0, 1], to a relative change of the time that all share."
    rng, rows, seeds = np.random.default_rng(seed), [], seeds or blocks * size
    for h, host in enumerate(hosts):
        order = 0
        for block, first in enumerate(range(0, seeds, size)):
            for variant in map(str, rng.permutation(variants)):
                rows += [dict(variant=variant, seed=s, host=host, h=h, block=block, order=order + i) for i, s in enumerate(range(first, min(first + size, seeds)))]
                order += min(first + size, seeds) - first
    frame = pd.DataFrame(rows)
    done = frame["order"] / frame["order"].max()
    frame["time_seconds"] = 4.4 * (1 + 0.3 * frame.pop("h")) * (1 + effect * (frame["variant"] != "baseline") + (drift(done.to_numpy()) if drift else 0) + noise * TAILS[tail](rng, len(frame)))
    frame["accuracy"] = 0.94 + 0.0013 * rng.normal(size=len(frame))
    frame["run_id"] = [f"{v}-{h}-{s}" for v, h, s in zip(frame["variant"], frame["host"], frame["seed"], strict=True)]
    frame["batch"] = [f"{h}-{v}-{b}" for h, v, b in zip(frame["host"], frame["variant"], frame["block"], strict=True)]
    frame["started_at"] = [datetime.fromtimestamp(1767614400 + 5 * o, UTC).isoformat() for o in frame["order"]]
    return frame.assign(study="cifar", profile="simulated", config=[{"train.epochs": 9.9, "idea": v} for v in frame["variant"]], config_hash="hash-" + frame["variant"], repeat=0,
                        host_id=frame.pop("host"), device="cuda", precision="fp16", threads=4, package_hash="0a1b2c", status="completed", clock="airbench")


def case_of(frame, of=lambda variant, batch: {"packages": {"torch": "2.8.0"}, "gpus": [{"name": "A100", "driver_version": "550"}], "os": "Linux-6"}):
    keys = set(zip(frame["variant"], frame["batch"], strict=True))
    return make_case(frame, STUDY, provenances={f"cifar/simulated/{v}/{b}": of(v, b) for v, b in keys})


def found(case): return {(f.id, f.severity) for f in audit_design(case)}


def serious(case): return sorted({f.id for f in audit_design(case) if f.severity == "serious"})


def in_sequence(frame):
    "As if all runs of one variant had been made before those of the next, at the same moments."
    frame = frame.sort_values(["host_id", "variant", "order"], kind="stable", ignore_index=True)
    order = frame.groupby("host_id").cumcount()
    return frame.assign(order=order, started_at=[datetime.fromtimestamp(1767614400 + 5 * o, UTC).isoformat() for o in order])


# ---------------------------------------------------------------- quiet where nothing is wrong

def clean(seed):
    "A study as it should be made: its size, noise and drift depend on the seed."
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(0, 0.002, 50))
    drift = [None, lambda x: 0.02 * x, lambda x: -0.03 * np.exp(-10 * x), lambda x: 0.01 * np.sin(7 * x), lambda x: walk[(49 * x).astype(int)]][rng.integers(5)]
    hosts = ("a", "b")[:rng.integers(1, 3)]
    size = int(rng.integers(1, 6))
    frame = study(seed, ("baseline", "crop", "wide", "lion")[:rng.integers(2, 5)], hosts, size=size, seeds=int(rng.integers(max(6, 2 * size), 31)), effect=float(rng.choice([0, -0.005, -0.02, 0.1])),
                  noise=float(rng.choice([0.001, 0.004, 0.01])), tail=str(rng.choice(list(TAILS))), drift=drift)
    if len(hosts) == 1 and rng.random() < 0.4: frame["host_id"] = None
    if rng.random() < 0.2: frame = frame.assign(started_at=None) if len(hosts) == 1 else frame
    return frame


def alarms(seeds): return [(seed, *serious(case)) for seed in seeds if serious(case := case_of(clean(seed)))]


def test_clean_studies_raise_no_alarm():
    "Of 1,000 such studies none had a serious finding; sixty of them here."
    assert not alarms(range(60))


def test_clean_studies_are_called_interleaved():
    for seed in range(20):
        assert "not-interleaved" not in {f.id for f in audit_design(case_of(clean(1000 + seed)))}


def test_complete_randomisation_is_no_sequence():
    "Without blocks, in one random order."
    rng = np.random.default_rng(5)
    for _ in range(20):
        frame = study(blocks=1, size=12, drift=lambda x: 0.05 * x)
        moments = rng.permutation(len(frame))
        frame = frame.assign(order=moments, started_at=[datetime.fromtimestamp(1767614400 + 5 * int(m), UTC).isoformat() for m in moments], batch="b")
        assert not {("not-interleaved", "warning"), ("order-drift", "serious")} & found(case_of(frame))


def test_a_variant_may_have_its_own_precision_and_data():
    frame = study().assign(precision=lambda f: f["variant"], config=lambda f: [{"train.precision": v, "data.dataset": v} for v in f["variant"]])
    assert not serious(case_of(frame, lambda v, b: {"data": {"train.bin": v}}))
    assert serious(case_of(frame.assign(config=[{}] * len(frame)), lambda v, b: {"data": {"train.bin": v}})) == ["mixed-software"]


# ---------------------------------------------------------------- loud where something is

def test_order_drift_needs_drift_and_sequence():
    up = lambda x: 0.04 * x
    assert ("order-drift", "serious") not in found(case_of(study(drift=up, blocks=8)))
    assert {("order-drift", "serious"), ("not-interleaved", "warning")} <= found(case_of(in_sequence(study(drift=up, blocks=8))))  # runs of either side still drift: they keep their order


def test_drift_is_found_as_often_as_promised():
    "White noise seems to drift in less than 2 % of studies; a drift of three standard deviations is nearly always seen in 40 runs."
    rng, frame = np.random.default_rng(3), in_sequence(study(blocks=10, size=4))
    noise = trend = 0
    for _ in range(40):
        case = case_of(frame.assign(time_seconds=4.4 + 0.02 * rng.standard_t(3, len(frame)), accuracy=0.94 + 0.0013 * rng.normal(size=len(frame))))
        noise += len(drifts(case, table_of(case))) > 0
        case = case_of(frame.assign(time_seconds=4.4 + 0.02 * rng.normal(size=len(frame)) + 0.06 * (np.arange(len(frame)) % 40) / 40))
        trend += len(drifts(case, table_of(case)).query("metric == 'time_seconds'")) == 2
    assert noise <= 2 and trend >= 36


def test_a_batch_that_jumps_is_drift():
    frame = study(blocks=2, size=10, effect=-0.01)
    frame.loc[(frame["variant"] == "baseline") & (frame["block"] == 1), "time_seconds"] *= 1.02
    assert ("order-drift", "serious") not in found(case_of(frame))  # in turns
    assert ("order-drift", "serious") in found(case_of(in_sequence(frame)))


def test_added_later_is_not_interleaved():
    "A variant that joins a sweep when the baseline's cells are done, with the same block numbers a day later."
    frame = study(variants=("baseline", "crop", "late"))
    late = frame["variant"] == "late"
    frame.loc[late, "started_at"] = [datetime.fromtimestamp(1767700800 + 5 * i, UTC).isoformat() for i in range(late.sum())]
    f, = (f for f in audit_design(case_of(frame)) if f.id == "not-interleaved")
    assert f.groups == ("baseline", "late") and f.concerns(["baseline", "late"]) and not f.concerns(["baseline", "crop"])


def test_hosts():
    two = study(hosts=("a", "b"))
    assert found(case_of(two)) == {("mixed-hosts", "note")}
    assert ("no-baseline-on-host", "serious") in found(case_of(two[(two["host_id"] == "a") | (two["variant"] != "baseline")]))
    assert ("no-baseline-on-host", "serious") in found(case_of(two[(two["host_id"] == "a") == (two["variant"] == "baseline")]))
    assert found(case_of(two[(two["host_id"] == "a") | (two["variant"] == "baseline")])) <= {("mixed-hosts", "note")}  # the baseline on more than it needs
    unnamed = [f for f in audit_design(case_of(two.assign(host_id=None))) if f.id == "mixed-hosts"]
    assert {(f.severity, f.groups, f.metric) for f in unnamed} == {("serious", ("baseline",), "time_seconds"), ("serious", ("crop",), "time_seconds")}
    worse = two.assign(host_id=None, accuracy=two["accuracy"] - 0.01 * (two["host_id"] == "b"))
    assert {f.metric for f in audit_design(case_of(worse)) if f.id == "mixed-hosts"} == {None}
    assert serious(case_of(study().assign(host_id=None), lambda v, b: {"gpus": [{"name": "L40" if v == "crop" else "H100"}]})) == ["mixed-hosts"]


def test_clocks():
    frame = study(variants=("baseline", "crop", "wide"))
    mixed = frame.assign(clock=frame["clock"].where(frame["variant"] != "crop", "wall"))
    f, = (f for f in audit_design(case_of(mixed)) if f.id == "mixed-clocks")
    assert f.severity == "serious" and f.undermines("time_seconds") and not f.undermines("accuracy") and f.concerns(["baseline", "crop"]) and not f.concerns(["baseline", "wide"])


@pytest.mark.parametrize("provenance, severity", [
    (lambda new: {"packages": {"torch": new}}, "serious"), (lambda new: {"cuda": new}, "serious"), (lambda new: {"gpus": [{"driver_version": new}]}, "serious"),
    (lambda new: {"data": {"train.bin": new}}, "serious"), (lambda new: {"git": {"commit": new}}, "warning"), (lambda new: {"python": new}, "note"), (lambda new: {"os": new}, "note")])
def test_software_that_separates_the_sides(provenance, severity):
    frame = study().assign(package_hash=None)
    assert found(case_of(frame, lambda v, b: provenance("new" if v == "crop" else "old"))) == {("mixed-software", severity)}
    half = found(case_of(frame, lambda v, b: provenance("new" if b[-1] < "3" else "old")))  # both sides have both
    assert half == {("mixed-software", "note" if severity == "note" else "warning")}
    assert not found(case_of(frame, lambda v, b: provenance("same"))) and not found(case_of(frame, lambda v, b: provenance(None)))


def test_numbers_of_processes():
    "Times of eight processes and of one are not compared unnoticed, wherever the difference is; results may be."
    frame = study(variants=("baseline", "crop", "wide"))
    for ranks, groups in ((frame["variant"].map({"baseline": 8, "crop": 1, "wide": 8}), [("baseline", "crop")]), (frame["variant"].map({"baseline": 8, "wide": 8}).fillna(frame["seed"] % 2 * 7 + 1), [("crop",)])):
        mixed = [f for f in audit_design(case_of(frame.assign(ranks=ranks))) if f.severity == "serious"]
        assert [f.groups for f in mixed] == groups and {f.id for f in mixed} == {"mixed-software"}
        assert all(f.undermines("time_seconds") and not f.undermines("accuracy") and f.concerns(["baseline", "crop"]) and not f.concerns(["baseline", "wide"]) for f in mixed)
    alternating = frame.assign(ranks=frame["seed"] % 2 + 1)  # all groups have both
    assert {f.groups for f in audit_design(case_of(alternating)) if f.severity == "serious"} == {("baseline",), ("crop",), ("wide",)}
    assert not found(case_of(frame.assign(ranks=8))) and not found(case_of(frame.assign(ranks=None)))
    declared = frame.assign(ranks=frame["variant"].map({"baseline": 2, "crop": 4, "wide": 2}), config=[{"train.cpu_processes": 4 if v == "crop" else 2} for v in frame["variant"]])
    assert not found(case_of(declared))
    two = study(hosts=("a", "b"))
    assert found(case_of(two.assign(ranks=two["host_id"].map({"a": 8, "b": 4})))) == {("mixed-hosts", "note"), ("mixed-software", "note")}  # compared within each


def test_a_variant_that_is_compiled_in_another_way():
    frame = study()
    compiled = frame.assign(compiled=[dict(how="blocks" if v == "crop" else "model", graphs=2, recompiles=0, fallbacks=0) for v in frame["variant"]])
    assert found(case_of(compiled)) == {("mixed-software", "warning")} and not found(case_of(frame.assign(compiled=[dict(how="model")] * len(frame))))
    assert not found(case_of(compiled.assign(config=[{"train.compile": v} for v in frame["variant"]])))


def test_software_of_two_hosts():
    frame = study(hosts=("a", "b"))
    assert {s for _, s in found(case_of(frame, lambda v, b: {"packages": {"torch": b[0]}}))} == {"note"}
    assert serious(case_of(frame, lambda v, b: {"packages": {"torch": b[:2] + (v if b[0] == "b" else "")}})) == ["mixed-software"]


@pytest.mark.parametrize("n, expected", [(1, "serious"), (2, "serious"), (3, "warning"), (4, "warning"), (5, None)])
def test_sample_sizes(n, expected):
    assert dict(found(case_of(study(blocks=n, size=1)))).get("sample-too-small") == expected


# ---------------------------------------------------------------- never an error

def variations(frame):
    yield "no runs completed", frame.assign(status="failed")
    yield "one run", frame.iloc[:1]
    yield "one run a side", frame.drop_duplicates("variant")
    yield "no baseline", frame[frame["variant"] != "baseline"]
    yield "only the baseline", frame[frame["variant"] == "baseline"]
    yield "all times missing", frame.assign(time_seconds=None)
    yield "all metrics missing", frame.assign(time_seconds=np.nan, accuracy=np.nan)
    yield "odd numbers of processes", frame.assign(ranks=[None, 8, "two", 2.5] * (len(frame) // 4) + [None] * (len(frame) % 4), compiled=[None, 7, {}, {"how": None}] * (len(frame) // 4) + [None] * (len(frame) % 4))
    yield "some NaN and infinities", frame.assign(time_seconds=frame["time_seconds"].where(frame["seed"] % 3 > 0, np.nan).where(frame["seed"] % 4 > 0, np.inf))
    yield "all equal", frame.assign(time_seconds=4.4, accuracy=0.94)
    yield "zero times", frame.assign(time_seconds=0.0)
    yield "negative times", frame.assign(time_seconds=-frame["time_seconds"], host_id=None)
    for name in ("host_id", "clock", "device", "precision", "threads", "package_hash", "order", "block", "batch", "started_at", "run_id"): yield f"no {name}", frame.assign(**{name: None})
    yield "nothing but names", frame.drop(columns=["host_id", "clock", "device", "precision", "threads", "package_hash", "order", "block", "accuracy"])
    yield "odd times of starting", frame.assign(started_at=[None if i % 3 else f"2026-01-01T00:00:{i % 60:02d}" for i in range(len(frame))])
    yield "no settings", frame.assign(config=None)


@pytest.mark.parametrize("name, frame", list(variations(study(hosts=("a", "b"), blocks=8))), ids=lambda x: x if isinstance(x, str) else "")
def test_degenerate_runs(name, frame):
    odd = {"git": None, "packages": [], "gpus": None, "data": "?", "os": 7}
    for provenance in ({}, odd, {"gpus": ["A100", {"name": None}], "packages": {"torch": None}, "python": "3.12"}):
        for case in (case_of(frame.reset_index(drop=True), lambda v, b, p=provenance: p), make_case(frame, STUDY)):
            findings = audit_design(case)
            text = json.dumps([f.as_dict() for f in findings], allow_nan=False)
            assert "nan" not in text.lower().replace("nanogpt", "") and all(f.message and f.remedy for f in findings)
            if case.baseline is None: assert not {f.id for f in findings} & {"no-baseline-on-host", "not-interleaved", "order-drift", "sample-too-small"}


def test_ten_thousand_runs_are_quick():
    "Under two seconds on a machine that does nothing else; processor time, with room for one that does."
    case = case_of(study(variants=["baseline", *(f"v{i}" for i in range(49))], blocks=50, size=4))
    begin = time.process_time()
    assert not [f for f in audit_design(case) if f.severity == "serious"]
    assert time.process_time() - begin < 5


# ---------------------------------------------------------------- published runs

@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    "Findings on all published runs, by study: without names for machines, and with the map's."
    def findings(map_file):
        outputs = tmp_path_factory.mktemp("outputs")
        import_runs(Path(DATA) / "published", outputs, map_file=map_file)
        frame, _ = read_runs(outputs)
        provenances = {str(p.parent.relative_to(outputs)): json.loads(p.read_text()) for p in outputs.glob("*/*/*/*/provenance.json")}
        known = [s for s in study_names() if (frame["study"] == s).any()]
        return {s: [f for part in by_baseline(make_case(frame, load_study(s), provenances=provenances)) for f in audit_design(part)] for s in known}
    return {"no map": findings(None), "map": findings(from_root("params/maps/published.yaml"))}


def only(findings, id, *names):
    "The finding with this id that concerns groups whose names contain these words."
    f, = (f for f in findings if f.id == id and all(any(name in group for group in f.groups) for name in names))
    return f


@published
def test_two_machines_in_one_sample(imported):
    "PITFALLS 8.1.6: the second instance was 31 % slower on nominally the same GPU, and the logs do not name them."
    unnamed = [f for f in imported["no map"]["cifar"] if f.id == "mixed-hosts" and f.severity == "serious" and len(f.groups) == 1]
    assert sorted(len(f.runs) for f in unnamed) == [500, 2000] and all(f.metric == "time_seconds" and "--host" in f.remedy for f in unnamed)
    assert all(f.figures["medians"][-1] / f.figures["medians"][0] > 1.29 for f in unnamed)
    named = only(imported["map"]["cifar"], "mixed-hosts", "baseline", "det_crop_backoff")
    assert named.severity == "note" and named.figures["hosts"] == ["instance1", "instance2"] and len(named.runs) == 2400


@published
@pytest.mark.parametrize("how, variant", [("no map", "deterministic_translate_backoff"), ("map", "det_crop_backoff")])
def test_final_study_was_not_interleaved_and_drifts(imported, how, variant):
    "PITFALLS 8.1.7: 200 runs of the baseline, then 1,000 of the variant; a drift of 0.22 s with an effect of 0.20 s."
    findings = imported[how]["cifar"]
    assert only(findings, "not-interleaved", "baseline", variant).severity == "warning"
    f, = (f for f in findings if f.id == "order-drift" and variant in f.groups)
    slow = f.figures["drifts"][0]
    assert f.severity == "serious" and f.metric == "time_seconds" and slow["group"] == variant and slow["n"] == 1000
    assert abs(slow["difference"] + 0.2044) < 0.0005 and 0.2 < slow["drift"] < 0.35
    first = [d for d in f.figures["drifts"] if d["n"] == 200 and abs(d["difference"] + 0.0853) < 0.0005]
    assert first and 0.05 < first[0]["drift"] < 0.11  # the first machine: 4.442 s in the first 50 runs of the baseline, 4.499 s in the last


@published
@pytest.mark.parametrize("how", ["no map", "map"])
def test_final_benchmark_drifts(imported, how):
    "CIFAR 2.4: the baseline drifts by 1.5 % with a speed-up of 0.87 %."
    f = only(imported[how]["cifar"], "order-drift", "hardswish")
    assert f.severity == "serious" and f.undermines("time_seconds") and not f.undermines("accuracy") and abs(f.figures["drifts"][0]["difference"] + 0.0351) < 0.0002
    assert 0.04 < f.figures["drifts"][0]["drift"] < 0.065 and "hardswish" in only(imported[how]["cifar"], "not-interleaved", "hardswish", "lion").groups


@published
@pytest.mark.parametrize("how", ["no map", "map"])
def test_other_commits_and_small_samples(imported, how):
    "The ablation ran at another commit than the final baseline. PITFALLS 8.2.4 and 8.2.9: stage A has a single run of the baseline, stage C three against three."
    assert only(imported[how]["cifar"], "mixed-software", "ablation_random_translate").severity == "warning"
    small = {f.severity: f for f in imported[how]["gpt"] if f.id == "sample-too-small"}
    sizes, = small["warning"].figures["runs_each"].values()
    assert sizes == {"baseline": 3, "variant": 3, "smallest_p": 0.1} and "serious" in small
    assert any(f.id == "not-interleaved" and "palm" in " ".join(f.groups) for f in imported[how]["gpt"])


@published
def test_nothing_else_is_serious(imported):
    "In stage C, and with named machines, no machine, clock or software is blamed that is not to blame."
    for how in ("no map", "map"):
        assert not {f.id for f in imported[how]["cifar"] if f.severity == "serious"} & {"mixed-clocks", "mixed-software", "no-baseline-on-host", "sample-too-small"}
        assert not [f for f in imported[how]["gpt"] if f.severity == "serious" and any("parallel" in g and "stage_a" not in g for g in f.groups)]
