"The published tables follow from the published runs, to the printed digits, by the commands that a reader would use."
import json
import os
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

PUBLISHED = Path(os.environ.get("SPEEDRUN_DATA", "")) / "published"
pytestmark = pytest.mark.skipif(
    not (os.environ.get("SPEEDRUN_DATA") and PUBLISHED.is_dir()),
    reason="published runs are not here: SPEEDRUN_DATA names no folder with published/")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    "All published runs, imported with the map that is shipped."
    from speedrun_nb.core.study import from_root
    from speedrun_nb.importing.import_ import import_runs
    folder = tmp_path_factory.mktemp("published")
    report = import_runs(PUBLISHED, folder, map_file=from_root("params/maps/published.yaml"))
    assert not report.refused
    return folder


@pytest.fixture(scope="module")
def known():
    "Comparisons that were made, by their arguments."
    return {}


@pytest.fixture
def compared(speedrun, outputs, known):
    "`speedrun compare --json`."
    def run(*arguments):
        if arguments not in known:
            done = speedrun("compare", *arguments, "--outputs", outputs, "--json")
            assert done.code == 0, done.err
            known[arguments] = json.loads(done.out)
        return known[arguments]
    return run


def printed(value, text):
    "Is a figure the printed one, at the digits that are printed?"
    number, power = text.lower().partition("e")[::2]
    digits = len(number.partition(".")[2])
    shown = f"{value:.{digits}e}" if power else f"{value:.{digits}f}"
    return float(shown) == float(text)


def figure(comparison, path):
    "A figure by its dotted name: tests.welch.p."
    return reduce(lambda part, key: part[key], path.split("."), comparison)


def check(comparison, figures, times=1):
    "Do the figures with these dotted names, times a factor, print as published?"
    for path, text in figures.items():
        value = times * figure(comparison, path)
        assert printed(value, text), f"{path} is {value}, not {text}"


def check_sides(comparison, baseline, variant):
    "Mean, standard deviation and runs of both sides."
    for side, (mean, sd, n) in (("baseline", baseline), ("variant", variant)):
        check(comparison, {f"{side}.mean": mean, f"{side}.sd": sd})
        assert comparison[side]["n"] == n


def intervals(comparison, name, digits):
    "The intervals of both means, as printed."
    ends = (*comparison["baseline"][name], *comparison["variant"][name])
    return [f"{end:.{digits}f}" for end in ends]


# the headline study: a deterministic crop with backoff, 2,400 runs on two machines

INSTANCE_1 = "host_id=instance1"
INSTANCE_2 = "host_id=instance2"


@pytest.mark.parametrize("host, metric, baseline, variant, relative, test, p, d", [
    (INSTANCE_1, "accuracy", ("0.940247", "0.001200", 200), ("0.939642", "0.001279", 1000),
     "-0.0643", "student", "9.318e-10", "-0.4779"),
    (INSTANCE_1, "time_seconds", ("4.4851", "0.0335", 200), ("4.3998", "0.0074", 1000),
     "-1.9011", "mann_whitney", "3.919e-96", "5.5994"),
    (INSTANCE_2, "accuracy", ("0.940319", "0.001211", 200), ("0.939718", "0.001256", 1000),
     "-0.0639", "student", "6.943e-10", "-0.4816"),
    (INSTANCE_2, "time_seconds", ("5.8553", "0.0769", 200), ("5.6509", "0.2015", 1000),
     "-3.4902", "mann_whitney", "2.946e-59", "1.0949")])
def test_headline_on_each_machine(compared, host, metric, baseline, variant, relative, test, p, d):
    c = compared("cifar", "baseline", "det_crop_backoff", "--metric", metric, "--where", host)
    check_sides(c, baseline, variant)
    check(c, {"difference.relative": relative}, times=100)
    check(c, {f"tests.{test}.p": p, "effect.cohens_d": d})
    assert c["hosts"] == [] and c["basis"]["unit"] == ("run" if metric == "accuracy" else "batch")


def test_headline_accuracy_pooled(compared):
    c = compared("cifar", "baseline", "det_crop_backoff", "--metric", "accuracy")
    b, v = c["baseline"], c["variant"]
    check_sides(c, ("0.940283", "0.001204", 400), ("0.939680", "0.001268", 2000))
    check(c, {"difference.relative": "-0.0641"}, times=100)
    check(c, {"tests.welch.p": "1.859e-18", "baseline.percentiles.95": "0.9423", "variant.percentiles.95": "0.9418",
              "tests.levene.p": "0.1690", "tests.shapiro.baseline": "0.2895", "tests.shapiro.variant": "0.0125"})
    assert intervals(c, "ci95", 6) == ["0.940165", "0.940402", "0.939624", "0.939736"]
    assert intervals(c, "ci99", 6) == ["0.940127", "0.940439", "0.939607", "0.939753"]
    spread = np.sqrt((b["sd"]**2 + v["sd"]**2) / 2)  # the mean of the variances, as published
    assert printed((v["mean"] - b["mean"]) / spread, "-0.4879")


def test_headline_time_pooled(compared):
    c = compared("cifar", "baseline", "det_crop_backoff")
    check_sides(c, ("5.1702", "0.6885", 400), ("5.0254", "0.6417", 2000))
    check(c, {"difference.relative": "-2.8009"}, times=100)
    check(c, {"tests.welch.p": "1.1588e-4", "baseline.percentiles.95": "5.9112", "variant.percentiles.95": "5.8181"})
    assert intervals(c, "ci95", 4) == ["5.1025", "5.2379", "4.9972", "5.0535"]


def test_headline_within_machines(compared):
    "Each machine made one batch of either: two ratios, which differ by nearly half, are all there is."
    c = compared("cifar", "baseline", "det_crop_backoff")
    assert [host["name"] for host in c["hosts"]] == ["host instance1", "host instance2"]
    assert [(host["units"], host["difference"]["ci95"]) for host in c["hosts"]] == [(1, None)] * 2
    each = np.array([host["difference"]["relative"] for host in c["hosts"]])
    assert printed(100 * each[0], "-1.9011") and printed(100 * each[1], "-3.4902")
    assert printed(np.mean([host["difference"]["absolute"] for host in c["hosts"]]), "-0.1448")
    e, logs = c["estimate"], np.log1p(each)
    half = stats.t.ppf(0.975, 1) * logs.std(ddof=1) / np.sqrt(2)
    assert e["method"] == "hosts" and c["basis"]["units"] == 2 and e["statistic"].endswith("df = 1")
    np.testing.assert_allclose(e["ci95_relative"], np.expm1([logs.mean() - half, logs.mean() + half]), rtol=1e-9)
    assert np.isclose(e["p"], stats.ttest_1samp(logs, 0).pvalue) and np.isclose(e["relative"], np.expm1(logs.mean()))
    assert printed(100 * e["relative"], "-2.70") and printed(e["absolute"], "-0.1448")  # mean of ratios, of differences
    found = {f["id"]: f["severity"] for f in c["findings"]}  # not in turns, and a drift as large as the difference
    assert found["order-drift"] == "serious" and found["not-interleaved"] == "warning"
    assert c["verdict"]["outcome"] == "untrustworthy"


# three conditions of 200 runs, one after the other; tests are printed as baseline minus variant

POPULATION = np.sqrt(199 / 200)  # the standard deviations printed are those of the population


@pytest.mark.parametrize("variant, mean, sd, interval, t, p", [
    ("hardswish", "0.9376275", "0.0013902", ["0.937433", "0.937822"], "18.072", "1.048e-53"),
    ("lion", "0.9265545", "0.0017856", ["0.926305", "0.926804"], "85.878", "4.2e-245")])
def test_final_benchmark_accuracy(compared, variant, mean, sd, interval, t, p):
    c = compared("cifar", "benchmark_baseline", variant, "--metric", "accuracy")
    check(c, {"baseline.mean": "0.9400870", "variant.mean": mean, "tests.welch.p": p})
    check(c, {"baseline.sd": "0.0013240", "variant.sd": sd}, times=POPULATION)
    check(c, {"tests.welch.t": t}, times=-1)
    assert intervals(c, "ci95", 6)[2:] == interval and c["baseline"]["n"] == c["variant"]["n"] == 200


@pytest.mark.parametrize("variant, mean, sd, t, p, speedup", [
    ("hardswish", "4.016455", "0.015784", "17.219", "2.363e-48", "0.866"),
    ("lion", "4.124030", "0.013196", "-37.305", "1.8e-116", "-1.789")])
def test_final_benchmark_time(compared, variant, mean, sd, t, p, speedup):
    c = compared("cifar", "benchmark_baseline", variant)
    check(c, {"baseline.mean": "4.051544", "variant.mean": mean, "tests.welch.p": p})
    check(c, {"variant.sd": sd}, times=POPULATION)
    check(c, {"tests.welch.t": t}, times=-1)
    check(c, {"difference.relative": speedup}, times=-100)


# NanoGPT, three runs against three

@pytest.mark.parametrize("metric, relative, t, p, d", [
    ("val_loss", "1.04", "37.739", "1.86e-5", "-30.81"),
    ("wall_seconds", "-2.66", "-3.114", "0.0462", "2.54"),
    ("time_seconds", "-2.89", "-11.54", "4.4e-4", None)])
def test_stage_c(compared, metric, relative, t, p, d):
    c = compared("gpt", "baseline_stage_c", "palm_parallel_stage_c", "--metric", metric)
    assert (c["baseline"]["n"], c["variant"]["n"], c["variant"]["failed"]) == (3, 3, 1)
    check(c, {"difference.relative": relative}, times=100)
    check(c, {"tests.welch.t": t, "tests.welch.p": p} | ({"effect.cohens_d": d} if d else {}))
    p, ways = (0.1, 20) if metric == "val_loss" else (1.0, 2)  # runs can be dealt in 20 ways, one batch a side in two
    assert c["tests"]["permutation"] == dict(p=p, exact=True, smallest_p=p, permutations=ways)


def test_stage_c_loss(compared):
    c = compared("gpt", "baseline_stage_c", "palm_parallel_stage_c", "--metric", "val_loss")
    check(c, {"baseline.mean": "3.3005", "variant.mean": "3.3348", "tests.shapiro.baseline": "0.2351",
              "tests.shapiro.variant": "0.5026", "tests.levene.p": "0.6215"})


def test_stage_c_memory(compared):
    "All three runs of a side used the same memory."
    c = compared("gpt", "baseline_stage_c", "palm_parallel_stage_c", "--metric", "peak_memory_bytes")
    check(c, {"difference.relative": "-7.54"}, times=100)
    assert round(-c["difference"]["absolute"] / 2**20) == 2307
    assert c["tests"]["welch"] is None and c["difference"]["ci95"] is None


# what becomes of published claims: what was published counts every run, most of them of one batch a side

BENCHMARK, STAGE_C = ("cifar", "benchmark_baseline"), ("gpt", "baseline_stage_c", "palm_parallel_stage_c")
HEADLINE = "cifar", "baseline", "det_crop_backoff"
CLAIMS = [  # what was compared, the published p, what counts (unit, method, how many), p by what counts
    ((*HEADLINE, "--where", INSTANCE_1), "mann_whitney", "3.919e-96", ("batch", "batches", 1), None),
    ((*HEADLINE, "--where", INSTANCE_2), "mann_whitney", "2.946e-59", ("batch", "batches", 1), None),
    (HEADLINE, "welch", "1.1588e-4", ("batch", "hosts", 2), "0.185"),
    ((*HEADLINE, "--metric", "accuracy"), "welch", "1.859e-18", ("run", "stratified", 400), "1.962e-18"),
    ((*BENCHMARK, "hardswish"), "welch", "2.363e-48", ("batch", "batches", 1), None),
    ((*BENCHMARK, "hardswish", "--metric", "accuracy"), "welch", "1.048e-53", ("run", "welch", 200), "1.048e-53"),
    ((*BENCHMARK, "lion"), "welch", "1.8e-116", ("batch", "batches", 1), None),
    ((*BENCHMARK, "lion", "--metric", "accuracy"), "welch", "4.2e-245", ("run", "welch", 200), "4.2e-245"),
    ((*STAGE_C, "--metric", "time_seconds"), "welch", "4.4e-4", ("batch", "batches", 1), None),
    ((*STAGE_C, "--metric", "wall_seconds"), "welch", "0.0462", ("batch", "batches", 1), None),
    ((*STAGE_C, "--metric", "val_loss"), "welch", "1.86e-5", ("run", "welch", 3), "1.86e-5")]


@pytest.mark.parametrize("arguments, test, published, counts, p", CLAIMS, ids=lambda value: "")
def test_what_the_right_unit_leaves_of_published_claims(compared, arguments, test, published, counts, p):
    "Differences in quality survive; no difference in time does, and none is supported."
    c = compared(*arguments)
    assert printed(c["tests"][test]["p"], published)
    assert tuple(c["basis"][name] for name in ("unit", "method", "units")) == counts
    by_design = c["raw"]["p"]
    if p is None: assert by_design is c["raw"]["ci95"] is c["raw"]["better"] is None and c["raw"]["method"] == "none"
    else: assert printed(by_design, p)
    survives = by_design is not None and by_design < 0.05
    assert survives == (c["basis"]["unit"] == "run") and c["verdict"]["outcome"] != "supported"


# what a careful author overlooked: study, id, groups

SERIOUS = [
    ("cifar", "same-computation", "ablation_random_translate", "deterministic_translate"),
    ("cifar", "settings-differ", "ablation_random_translate"),
    ("cifar", "order-drift", "benchmark_baseline", "hardswish"),
    ("gpt", "step-time-jump", "depth_warming_stage_a")]
FOUND = [  # of the headline nothing is decided anyway, so its drift is a warning
    ("cifar", "order-drift", "baseline", "det_crop_backoff"),
    ("cifar", "not-interleaved", "baseline", "det_crop_backoff"),
    ("cifar", "mixed-hosts", "baseline"),
    ("cifar", "repeated-seed", "baseline"),
    ("cifar", "warmup-outlier", "grid_tta0_ep9.0"),
    ("cifar", "target-missed", "det_crop_backoff"),
    ("cifar", "guard-missed", "det_crop_backoff"),
    ("cifar", "uncommitted-code", "det_crop_backoff"),
    ("cifar", "tuned-on-test"),
    ("gpt", "inert-seed", "palm_parallel_stage_c"),
    ("gpt", "repeated-seed", "palm_parallel_stage_c"),
    ("gpt", "repeated-data", "baseline_stage_c"),
    ("gpt", "sample-too-small", "palm_parallel_stage_c"),
    ("gpt", "missing-runs", "palm_parallel_stage_c"),
    ("gpt", "target-missed", "palm_parallel_stage_c")]
SMALL = [("gpt", "step-time-jump", "baseline_stage_c")]  # 271 to 285 ms in one of three runs: a warning and no more
NOT_FOUND = [
    ("gpt", "step-time-jump", "palm_parallel_stage_c"),
    ("cifar", "copied-runs"),  # the genuine replications are not called copies
    ("cifar", "inert-seed")]


def findings_of(speedrun, study, outputs):
    return json.loads(speedrun("audit", study, "--outputs", outputs, "--json").out)


def test_audit_finds_what_went_wrong(speedrun, outputs):
    found = {study: findings_of(speedrun, study, outputs) for study in ("cifar", "gpt")}

    def severities(study, name, *groups):
        return {f["severity"] for f in found[study] if f["id"] == name and set(groups) <= set(f["groups"])}
    assert [wanted for wanted in SERIOUS if "serious" not in severities(*wanted)] == []
    assert [wanted for wanted in FOUND if not severities(*wanted)] == []
    assert [severities(*small) for small in SMALL] == [{"warning"}]
    assert [unwanted for unwanted in NOT_FOUND if severities(*unwanted)] == []


def test_audit_without_being_told_the_machines(speedrun, tmp_path):
    assert speedrun("import", PUBLISHED / "runner-logs" / "cifar", "--outputs", tmp_path).code == 0
    mixed = [f for f in findings_of(speedrun, "cifar", tmp_path) if f["id"] == "mixed-hosts"]
    assert any(f["severity"] == "serious" and "deterministic_translate_backoff" in f["groups"] for f in mixed)


def test_paper_of_published_runs(outputs):
    from speedrun_nb.report import evidence_tables as evidence
    from speedrun_nb.report import words
    from speedrun_nb.report.study import load_report
    report = load_report("cifar", outputs)
    assert report.profile == "published" and report.groups[0].variant == "baseline"
    assert report.comparison("det_crop_backoff").verdict.outcome == "untrustworthy"
    assert "order-drift" in evidence.threats(report) and "det_crop_backoff" in words.verdicts(report)
    assert "−" not in words.abstract(report)
