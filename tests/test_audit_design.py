"The design checks of the audit: quiet on clean studies, loud on mistakes that careful authors made, never an error."
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from speedrun_nb.audit.audit import audit_case, run_checks
from speedrun_nb.audit.conditions import table_of
from speedrun_nb.audit.order import drifts
from speedrun_nb.core.runs import read_runs
from speedrun_nb.core.study import from_root, load_study
from speedrun_nb.evidence.case import by_baseline, make_case
from speedrun_nb.importing.import_ import import_runs

sys.path.insert(0, str(from_root("benchmarks")))
import audit as benchmark

STUDY = load_study("cifar")
DATA = os.environ.get("SPEEDRUN_DATA")
published = pytest.mark.skipif(not DATA, reason="SPEEDRUN_DATA names no folder with published runs")
TAILS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "skewed": lambda rng, n: rng.exponential(size=n) - 1,
    "long": lambda rng, n: rng.standard_t(3, n),
    "very long": lambda rng, n: rng.standard_t(2, n),
}


pytestmark = pytest.mark.usefixtures("no_warnings")


def times_at(orders):
    "When runs were made: one every five seconds."
    return [datetime.fromtimestamp(1767614400 + 5 * int(order), UTC).isoformat() for order in orders]


def in_blocks(rng, variants, seeds, size):
    "Who runs when on one host: variant, seed, block, in randomised complete blocks."
    rows = []
    for block, first in enumerate(range(0, seeds, size)):
        block_seeds = range(first, min(first + size, seeds))
        rows += [(variant, seed, block) for variant in map(str, rng.permutation(variants)) for seed in block_seeds]
    return pd.DataFrame(rows, columns=["variant", "seed", "block"]).assign(order=range(len(rows)))


def study(seed=0, variants=("baseline", "crop"), hosts=("a",), blocks=6, size=3, seeds=None,
          effect=-0.02, noise=0.004, tail="normal", drift=lambda done: 0):
    """Runs in randomised complete blocks on every host.

    `drift` maps the part of the study that is done, in [0, 1], to a relative change of the time that all share.
    """
    rng, parts = np.random.default_rng(seed), []
    for number, host in enumerate(hosts):
        parts.append(in_blocks(rng, variants, seeds or blocks * size, size).assign(host_id=host, number=number))
    frame = pd.concat(parts, ignore_index=True)
    done = (frame["order"] / frame["order"].max()).to_numpy()
    change = effect * (frame["variant"] != "baseline") + drift(done) + noise * TAILS[tail](rng, len(frame))
    frame["time_seconds"] = 4.4 * (1 + 0.3 * frame.pop("number")) * (1 + change)
    frame["accuracy"] = 0.94 + 0.0013 * rng.normal(size=len(frame))
    frame["run_id"] = frame["variant"] + "-" + frame["host_id"] + "-" + frame["seed"].astype(str)
    frame["batch"] = frame["host_id"] + "-" + frame["variant"] + "-" + frame["block"].astype(str)
    frame["config"] = [{"train.epochs": 9.9, "idea": variant} for variant in frame["variant"]]
    recorded = dict(device="cuda", precision="fp16", threads=4, package_hash="0a1b2c", clock="airbench")
    return frame.assign(study="cifar", profile="simulated", config_hash="hash-" + frame["variant"], repeat=0,
                        status="completed", started_at=times_at(frame["order"]), **recorded)


def on_one_machine(variant, batch):
    return {"packages": {"torch": "2.8.0"}, "gpus": [{"name": "A100", "driver_version": "550"}], "os": "Linux-6"}


def case_of(frame, of=on_one_machine):
    keys = set(zip(frame["variant"], frame["batch"], strict=True))
    return make_case(frame, STUDY, provenances={f"cifar/simulated/{v}/{b}": of(v, b) for v, b in keys})


def audit_design(case): return run_checks("part", case)


def found(case): return {(f.id, f.severity) for f in audit_design(case)}


def serious(case): return sorted({f.id for f in audit_design(case) if f.severity == "serious"})


def in_sequence(frame):
    "As if all runs of one variant had been made before those of the next, at the same moments."
    frame = frame.sort_values(["host_id", "variant", "order"], kind="stable", ignore_index=True)
    order = frame.groupby("host_id").cumcount()
    return frame.assign(order=order, started_at=times_at(order))


# ---------------------------------------------------------------- quiet where nothing is wrong

def clean(seed):
    "A study as it should be made: its size, noise and drift depend on the seed."
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(0, 0.002, 50))
    drifts = [
        lambda done: 0,
        lambda done: 0.02 * done,
        lambda done: -0.03 * np.exp(-10 * done),
        lambda done: 0.01 * np.sin(7 * done),
        lambda done: walk[(49 * done).astype(int)],
    ]
    drift, hosts, size = drifts[rng.integers(5)], ("a", "b")[:rng.integers(1, 3)], int(rng.integers(1, 6))
    variants, seeds = ("baseline", "crop", "wide", "lion")[:rng.integers(2, 5)], int(rng.integers(max(6, 2 * size), 31))
    effect, noise = float(rng.choice([0, -0.005, -0.02, 0.1])), float(rng.choice([0.001, 0.004, 0.01]))
    times = dict(effect=effect, noise=noise, tail=str(rng.choice(list(TAILS))), drift=drift)
    frame = study(seed, variants, hosts, size=size, seeds=seeds, **times)
    if len(hosts) == 1 and rng.random() < 0.4: frame["host_id"] = None
    if len(hosts) == 1 and rng.random() < 0.2: frame["started_at"] = None
    return frame


@pytest.mark.parametrize("seed", range(60))
def test_clean_studies_raise_no_alarm(seed):
    "Of 1,000 such studies none had a serious finding; sixty of them here."
    assert not serious(case_of(clean(seed)))


def test_clean_studies_are_called_interleaved():
    for seed in range(20):
        assert "not-interleaved" not in {f.id for f in audit_design(case_of(clean(1000 + seed)))}


def test_complete_randomisation_is_no_sequence():
    "Without blocks, in one random order."
    rng = np.random.default_rng(5)
    for _ in range(20):
        frame = study(blocks=1, size=12, drift=lambda x: 0.05 * x)
        moments = rng.permutation(len(frame))
        frame = frame.assign(order=moments, started_at=times_at(moments), batch="b")
        assert not {("not-interleaved", "warning"), ("order-drift", "serious")} & found(case_of(frame))


def test_a_variant_may_have_its_own_precision_and_data():
    frame = study()
    declared = [{"train.precision": variant, "data.order": variant} for variant in frame["variant"]]
    frame = frame.assign(precision=frame["variant"], config=declared)
    def own_data(variant, batch): return {"data": {"train.bin": variant}}
    assert not serious(case_of(frame, own_data))
    assert serious(case_of(frame.assign(config=[{}] * len(frame)), own_data)) == ["mixed-software"]


# ---------------------------------------------------------------- loud where something is

def test_order_drift_needs_drift_and_sequence():
    in_turns = study(drift=lambda done: 0.04 * done, blocks=8)
    assert ("order-drift", "serious") not in found(case_of(in_turns))
    after = found(case_of(in_sequence(in_turns)))  # runs of either side still drift: they keep their order
    assert {("order-drift", "serious"), ("not-interleaved", "warning")} <= after


def test_drift_is_found_as_often_as_promised():
    "White noise seldom seems to drift; a drift of three standard deviations is nearly always seen in 40 runs."
    rng, frame = np.random.default_rng(3), in_sequence(study(blocks=10, size=4))
    n, noise, trend = len(frame), 0, 0
    slowly = 0.06 * (np.arange(n) % 40) / 40
    for _ in range(40):
        times, accuracy = 4.4 + 0.02 * rng.standard_t(3, n), 0.94 + 0.0013 * rng.normal(size=n)
        case = case_of(frame.assign(time_seconds=times, accuracy=accuracy))
        noise += len(drifts(case, table_of(case))) > 0
        case = case_of(frame.assign(time_seconds=4.4 + 0.02 * rng.normal(size=n) + slowly))
        trend += (drifts(case, table_of(case))["metric"] == "time_seconds").sum() == 2
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
    frame.loc[late, "started_at"] = times_at(range(17280, 17280 + late.sum()))
    f, = (f for f in audit_design(case_of(frame)) if f.id == "not-interleaved")
    assert f.groups == ("baseline", "late")
    assert f.concerns(["baseline", "late"]) and not f.concerns(["baseline", "crop"])


def test_hosts():
    two = study(hosts=("a", "b"))
    assert found(case_of(two)) == {("mixed-hosts", "note")}
    on_a, is_base = two["host_id"] == "a", two["variant"] == "baseline"
    for kept in (on_a | ~is_base, on_a == is_base):
        assert ("no-baseline-on-host", "serious") in found(case_of(two[kept]))
    assert found(case_of(two[on_a | is_base])) <= {("mixed-hosts", "note")}  # the baseline on more than it needs


def test_hosts_without_names():
    two = study(hosts=("a", "b"))
    unnamed = [f for f in audit_design(case_of(two.assign(host_id=None))) if f.id == "mixed-hosts"]
    assert {(f.severity, f.metric) for f in unnamed} == {("serious", "time_seconds")}
    assert {f.groups for f in unnamed} == {("baseline",), ("crop",)}
    worse = two.assign(host_id=None, accuracy=two["accuracy"] - 0.01 * (two["host_id"] == "b"))
    assert {f.metric for f in audit_design(case_of(worse)) if f.id == "mixed-hosts"} == {None}
    def own_gpu(variant, batch): return {"gpus": [{"name": "L40" if variant == "crop" else "H100"}]}
    assert serious(case_of(study().assign(host_id=None), own_gpu)) == ["mixed-hosts"]


def test_clocks():
    frame = study(variants=("baseline", "crop", "wide"))
    mixed = frame.assign(clock=frame["clock"].where(frame["variant"] != "crop", "wall"))
    f, = (f for f in audit_design(case_of(mixed)) if f.id == "mixed-clocks")
    assert f.severity == "serious" and f.undermines("time_seconds") and not f.undermines("accuracy")
    assert f.concerns(["baseline", "crop"]) and not f.concerns(["baseline", "wide"])


@pytest.mark.parametrize("provenance, severity", [
    (lambda new: {"packages": {"torch": new}}, "serious"),
    (lambda new: {"cuda": new}, "serious"),
    (lambda new: {"gpus": [{"driver_version": new}]}, "serious"),
    (lambda new: {"data": {"train.bin": new}}, "serious"),
    (lambda new: {"git": {"commit": new}}, "warning"),
    (lambda new: {"python": new}, "note"),
    (lambda new: {"os": new}, "note"),
])
def test_software_that_separates_the_sides(provenance, severity):
    frame = study().assign(package_hash=None)
    by_variant = found(case_of(frame, lambda v, b: provenance("new" if v == "crop" else "old")))
    assert by_variant == {("mixed-software", severity)}
    half = found(case_of(frame, lambda v, b: provenance("new" if b[-1] < "3" else "old")))  # both sides have both
    assert half == {("mixed-software", "note" if severity == "note" else "warning")}
    for shared in ("same", None): assert not found(case_of(frame, lambda v, b, shared=shared: provenance(shared)))


def test_numbers_of_processes():
    "Times of eight processes and of one are not compared unnoticed, wherever the difference is; results may be."
    frame = study(variants=("baseline", "crop", "wide"))
    of_variant = frame["variant"].map({"baseline": 8, "crop": 1, "wide": 8})
    by_seed = of_variant.where(frame["variant"] != "crop", frame["seed"] % 2 * 7 + 1)
    for ranks, groups in ((of_variant, ("baseline", "crop")), (by_seed, ("crop",))):
        mixed, = (f for f in audit_design(case_of(frame.assign(ranks=ranks))) if f.severity == "serious")
        assert mixed.id == "mixed-software" and mixed.groups == groups
        assert mixed.undermines("time_seconds") and not mixed.undermines("accuracy")
        assert mixed.concerns(["baseline", "crop"]) and not mixed.concerns(["baseline", "wide"])
    alternating = audit_design(case_of(frame.assign(ranks=frame["seed"] % 2 + 1)))  # all groups have both
    assert {f.groups for f in alternating if f.severity == "serious"} == {("baseline",), ("crop",), ("wide",)}


def test_numbers_of_processes_that_are_no_mistake():
    frame, two = study(variants=("baseline", "crop", "wide")), study(hosts=("a", "b"))
    assert not found(case_of(frame.assign(ranks=8))) and not found(case_of(frame.assign(ranks=None)))
    ranks = frame["variant"].map({"baseline": 2, "crop": 4, "wide": 2})
    assert not found(case_of(frame.assign(ranks=ranks, config=[{"train.cpu_processes": n} for n in ranks])))  # declared
    by_host = two.assign(ranks=two["host_id"].map({"a": 8, "b": 4}))  # compared within each
    assert found(case_of(by_host)) == {("mixed-hosts", "note"), ("mixed-software", "note")}


def test_a_variant_that_is_compiled_in_another_way():
    frame = study()
    how = frame["variant"].map({"baseline": "model", "crop": "blocks"})
    compiled = frame.assign(compiled=[dict(how=each, graphs=2, recompiles=0, fallbacks=0) for each in how])
    assert found(case_of(compiled)) == {("mixed-software", "warning")}
    assert not found(case_of(frame.assign(compiled=[dict(how="model")] * len(frame))))
    assert not found(case_of(compiled.assign(config=[{"train.compile": v} for v in frame["variant"]])))


def test_software_of_two_hosts():
    frame = study(hosts=("a", "b"))
    def of_host(variant, batch): return {"packages": {"torch": batch[0]}}
    def of_variant_on_b(variant, batch): return {"packages": {"torch": variant if batch[0] == "b" else "a"}}
    assert {severity for _, severity in found(case_of(frame, of_host))} == {"note"}
    assert serious(case_of(frame, of_variant_on_b)) == ["mixed-software"]


@pytest.mark.parametrize("n, expected", [(1, "serious"), (2, "serious"), (3, "warning"), (4, "warning"), (5, None)])
def test_sample_sizes(n, expected):
    assert dict(found(case_of(study(blocks=n, size=1)))).get("sample-too-small") == expected


# ---------------------------------------------------------------- mistakes put into studies

NO_MORE_THAN_A_WARNING = {"other-scipy", "outliers", "batch-effect", "two-speeds", "shared-device"}


@pytest.mark.parametrize("name", [name for name, each in benchmark.FLAWS.items() if isinstance(each, benchmark.Flaw)])
def test_mistakes_are_found(name):
    "At twice the effect; `python benchmarks/audit.py` has more strengths and studies."
    mistake = benchmark.FLAWS[name]
    findings = audit_case(mistake.study(2.0, 0).case)
    severities = {f.severity for f in findings if f.id in mistake.ids}
    assert severities and ("serious" in severities or name in NO_MORE_THAN_A_WARNING)


def test_whole_studies_that_are_clean_have_nothing_serious():
    found, serious = benchmark.alarms(8, seed=100)
    assert not serious and found


def test_severity_follows_the_size():
    "Cold starts that make an eighth of the effect do not turn the verdict; those that make all of it do."
    mistake = benchmark.FLAWS["cold-start"]
    weights = [audit_case(mistake.study(strength, 1).case) for strength in (0.125, 1.0)]
    small, large = ({f.severity for f in findings if f.id == "warmup-outlier"} for findings in weights)
    assert "serious" not in small and large == {"serious"}


def test_a_flaw_on_both_sides_is_a_note():
    made = benchmark.make(benchmark.Shape())
    for record in made.records: benchmark.slow(record, 0.2, lambda done: done)
    benchmark.renumber(made)
    findings = audit_case(made.case)
    assert [f.severity for f in findings if f.id == "slow-down"] == ["note"]


# ---------------------------------------------------------------- never an error

def cycled(values, n): return (values * n)[:n]


RECORDED = ["host_id", "clock", "device", "precision", "threads", "package_hash", "order", "block"]


def variations(frame):
    n, seeds, times = len(frame), frame["seed"], frame["time_seconds"]
    ranks, compiled = cycled([None, 8, "two", 2.5], n), cycled([None, 7, {}, {"how": None}], n)
    patchy = times.where(seeds % 3 > 0, np.nan).where(seeds % 4 > 0, np.inf)
    started = [None if i % 3 else f"2026-01-01T00:00:{i % 60:02d}" for i in range(n)]
    yield "no runs completed", frame.assign(status="failed")
    yield "one run", frame.iloc[:1]
    yield "one run a side", frame.drop_duplicates("variant")
    yield "no baseline", frame[frame["variant"] != "baseline"]
    yield "only the baseline", frame[frame["variant"] == "baseline"]
    yield "all times missing", frame.assign(time_seconds=None)
    yield "all metrics missing", frame.assign(time_seconds=np.nan, accuracy=np.nan)
    yield "odd numbers of processes", frame.assign(ranks=ranks, compiled=compiled)
    yield "some NaN and infinities", frame.assign(time_seconds=patchy)
    yield "all equal", frame.assign(time_seconds=4.4, accuracy=0.94)
    yield "zero times", frame.assign(time_seconds=0.0)
    yield "negative times", frame.assign(time_seconds=-times, host_id=None)
    for name in (*RECORDED, "batch", "started_at", "run_id"): yield f"no {name}", frame.assign(**{name: None})
    yield "nothing but names", frame.drop(columns=[*RECORDED, "accuracy"])
    yield "odd times of starting", frame.assign(started_at=started)
    yield "no settings", frame.assign(config=None)


VARIATIONS = dict(variations(study(hosts=("a", "b"), blocks=8)))
NEED_A_BASELINE = {"no-baseline-on-host", "not-interleaved", "order-drift", "sample-too-small"}


@pytest.mark.parametrize("name", VARIATIONS)
@pytest.mark.parametrize("provenance", [
    {},
    {"git": None, "packages": [], "gpus": None, "data": "?", "os": 7},
    {"gpus": ["A100", {"name": None}], "packages": {"torch": None}, "python": "3.12"},
    None,
])
def test_degenerate_runs(name, provenance):
    frame = VARIATIONS[name].reset_index(drop=True)
    case = make_case(frame, STUDY) if provenance is None else case_of(frame, lambda variant, batch: provenance)
    findings = audit_design(case)
    text = json.dumps([f.as_dict() for f in findings], allow_nan=False)
    assert "nan" not in text.lower().replace("nanogpt", "") and all(f.message and f.remedy for f in findings)
    if case.baseline is None: assert not {f.id for f in findings} & NEED_A_BASELINE


def test_ten_thousand_clean_runs():
    case = case_of(study(variants=["baseline", *(f"v{i}" for i in range(49))], blocks=50, size=4))
    assert not serious(case)


# ---------------------------------------------------------------- published runs

STUDIES = ("cifar", "gpt")  # that have published runs


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    "Findings on all published runs, by study: without names for machines, and with the map's."
    def findings(map_file):
        outputs = tmp_path_factory.mktemp("outputs")
        import_runs(Path(DATA) / "published", outputs, map_file=map_file)
        frame, _ = read_runs(outputs)
        paths = outputs.glob("*/*/*/*/provenance.json")
        provenances = {str(path.parent.relative_to(outputs)): json.loads(path.read_text()) for path in paths}
        cases = {name: make_case(frame, load_study(name), provenances=provenances) for name in STUDIES}
        return {name: [f for part in by_baseline(case) for f in audit_design(part)] for name, case in cases.items()}
    return {"no map": findings(None), "map": findings(from_root("params/maps/published.yaml"))}


def only(findings, id, *names):
    "The finding with this id that concerns groups whose names contain these words."
    f, = (f for f in findings if f.id == id and all(any(name in group for group in f.groups) for name in names))
    return f


@published
def test_two_machines_in_one_sample(imported):
    "PITFALLS 8.1.6: the second instance was 31 % slower on nominally the same GPU, and the logs do not name them."
    mixed = [f for f in imported["no map"]["cifar"] if f.id == "mixed-hosts" and f.severity == "serious"]
    unnamed = [f for f in mixed if len(f.groups) == 1]
    assert sorted(len(f.runs) for f in unnamed) == [500, 2000]
    assert all(f.metric == "time_seconds" and "--host" in f.remedy for f in unnamed)
    assert all(f.figures["medians"][-1] / f.figures["medians"][0] > 1.29 for f in unnamed)
    named = only(imported["map"]["cifar"], "mixed-hosts", "baseline", "det_crop_backoff")
    assert named.severity == "note" and named.figures["hosts"] == ["instance1", "instance2"]
    assert len(named.runs) == 2400


@published
@pytest.mark.parametrize("how, variant", [("no map", "deterministic_translate_backoff"), ("map", "det_crop_backoff")])
def test_final_study_was_not_interleaved_and_drifts(imported, how, variant):
    "PITFALLS 8.1.7: 200 runs of the baseline, then 1,000 of the variant; a drift of 0.22 s with an effect of 0.20 s."
    findings = imported[how]["cifar"]
    assert only(findings, "not-interleaved", "baseline", variant).severity == "warning"
    f, = (f for f in findings if f.id == "order-drift" and variant in f.groups)
    slow = f.figures["drifts"][0]
    assert f.severity == "serious" and f.metric == "time_seconds"
    assert slow["group"] == variant and slow["n"] == 1000
    assert abs(slow["difference"] + 0.2044) < 0.0005 and 0.2 < slow["drift"] < 0.35
    first = [d for d in f.figures["drifts"] if d["n"] == 200 and abs(d["difference"] + 0.0853) < 0.0005]
    assert first and 0.05 < first[0]["drift"] < 0.11  # the baseline's, from 4.442 s to 4.499 s


@published
@pytest.mark.parametrize("how", ["no map", "map"])
def test_final_benchmark_drifts(imported, how):
    "CIFAR 2.4: the baseline drifts by 1.5 % with a speed-up of 0.87 %."
    f = only(imported[how]["cifar"], "order-drift", "hardswish")
    worst = f.figures["drifts"][0]
    assert f.severity == "serious" and f.undermines("time_seconds") and not f.undermines("accuracy")
    assert abs(worst["difference"] + 0.0351) < 0.0002 and 0.04 < worst["drift"] < 0.065
    assert only(imported[how]["cifar"], "not-interleaved", "hardswish", "lion").severity == "warning"


@published
@pytest.mark.parametrize("how", ["no map", "map"])
def test_other_commits_and_small_samples(imported, how):
    """The ablation ran at another commit than the final baseline.

    PITFALLS 8.2.4 and 8.2.9: stage A has a single run of the baseline, stage C three against three.
    """
    assert only(imported[how]["cifar"], "mixed-software", "ablation_random_translate").severity == "warning"
    small = {f.severity: f for f in imported[how]["gpt"] if f.id == "sample-too-small"}
    sizes, = small["warning"].figures["runs_each"].values()
    assert sizes == {"baseline": 3, "variant": 3, "smallest_p": 0.1} and "serious" in small
    assert any(f.id == "not-interleaved" and "palm" in " ".join(f.groups) for f in imported[how]["gpt"])


@published
def test_nothing_else_is_serious(imported):
    "In stage C, and with named machines, no machine, clock or software is blamed that is not to blame."
    blameless = {"mixed-clocks", "mixed-software", "no-baseline-on-host", "sample-too-small"}
    for findings in imported.values():
        bad = {study: [f for f in findings[study] if f.severity == "serious"] for study in findings}
        assert not {f.id for f in bad["cifar"]} & blameless
        assert not [f for f in bad["gpt"] if any("parallel" in group and "stage_a" not in group for group in f.groups)]
