"""The published tables follow from the published runs, to the printed digits: imported, compared and audited by the same commands that a reader would use."""
import json
import os
from pathlib import Path

import numpy as np
import pytest

PUBLISHED = Path(os.environ.get("SPEEDRUN_DATA", "")) / "published"
pytestmark = pytest.mark.skipif(not (os.environ.get("SPEEDRUN_DATA") and PUBLISHED.is_dir()), reason="published runs are not here: SPEEDRUN_DATA names no folder with published/")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    "All published runs, imported with the map that is shipped."
    from speedrun_nb.core.study import from_root
    from speedrun_nb.importing.import_ import import_runs
    folder = tmp_path_factory.mktemp("published")
    report = import_runs(PUBLISHED, folder, map_file=from_root("params/maps/published.yaml"))
    assert not report.refused
    return folder


@pytest.fixture
def compared(speedrun, outputs):
    "`speedrun compare --json`."
    def run(*arguments):
        done = speedrun("compare", *arguments, "--outputs", outputs, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)
    return run


def printed(value, text):
    "Is a figure the printed one, at the digits that are printed?"
    number, power = text.lower().partition("e")[::2]
    digits = len(number.partition(".")[2])
    shown = f"{value:.{digits}e}" if power else f"{value:.{digits}f}"
    return float(shown) == float(text)


# the headline study: a deterministic crop with backoff, 2,400 runs on two machines

@pytest.mark.parametrize("host, metric, baseline, variant, relative, test, p, d", [
    ("instance1", "accuracy", ("0.940247", "0.001200", 200), ("0.939642", "0.001279", 1000), "-0.0643", "student", "9.318e-10", "-0.4779"),
    ("instance1", "time_seconds", ("4.4851", "0.0335", 200), ("4.3998", "0.0074", 1000), "-1.9011", "mann_whitney", "3.919e-96", "5.5994"),
    ("instance2", "accuracy", ("0.940319", "0.001211", 200), ("0.939718", "0.001256", 1000), "-0.0639", "student", "6.943e-10", "-0.4816"),
    ("instance2", "time_seconds", ("5.8553", "0.0769", 200), ("5.6509", "0.2015", 1000), "-3.4902", "mann_whitney", "2.946e-59", "1.0949")])
def test_headline_on_each_machine(compared, host, metric, baseline, variant, relative, test, p, d):
    c = compared("cifar", "baseline", "det_crop_backoff", "--metric", metric, "--where", f"host_id={host}")
    for side, (mean, sd, n) in ((c["baseline"], baseline), (c["variant"], variant)):
        assert printed(side["mean"], mean) and printed(side["sd"], sd) and side["n"] == n
    assert printed(100 * c["difference"]["relative"], relative) and printed(c["tests"][test]["p"], p) and printed(c["effect"]["cohens_d"], d)
    assert c["strata"] == [] and c["stratified"] is None


def test_headline_pooled(compared):
    c = compared("cifar", "baseline", "det_crop_backoff", "--metric", "accuracy")
    b, v = c["baseline"], c["variant"]
    assert all(printed(x, text) for x, text in zip((b["mean"], b["sd"], v["mean"], v["sd"]), ("0.940283", "0.001204", "0.939680", "0.001268"), strict=True)) and (b["n"], v["n"]) == (400, 2000)
    assert printed(100 * c["difference"]["relative"], "-0.0641") and printed(c["tests"]["welch"]["p"], "1.859e-18")
    assert printed((v["mean"] - b["mean"]) / np.sqrt((b["sd"]**2 + v["sd"]**2) / 2), "-0.4879")  # d by the mean of the variances, as published
    assert [f"{x:.6f}" for x in (*b["ci95"], *v["ci95"])] == ["0.940165", "0.940402", "0.939624", "0.939736"]
    assert [f"{x:.6f}" for x in (*b["ci99"], *v["ci99"])] == ["0.940127", "0.940439", "0.939607", "0.939753"]
    assert printed(b["percentiles"]["95"], "0.9423") and printed(v["percentiles"]["95"], "0.9418")
    assert printed(c["tests"]["levene"]["p"], "0.1690") and printed(c["tests"]["shapiro"]["baseline"], "0.2895") and printed(c["tests"]["shapiro"]["variant"], "0.0125")
    c = compared("cifar", "baseline", "det_crop_backoff")
    b, v = c["baseline"], c["variant"]
    assert all(printed(x, text) for x, text in zip((b["mean"], b["sd"], v["mean"], v["sd"]), ("5.1702", "0.6885", "5.0254", "0.6417"), strict=True))
    assert printed(100 * c["difference"]["relative"], "-2.8009") and printed(c["tests"]["welch"]["p"], "1.1588e-4")
    assert [f"{x:.4f}" for x in (*b["ci95"], *v["ci95"])] == ["5.1025", "5.2379", "4.9972", "5.0535"]
    assert printed(b["percentiles"]["95"], "5.9112") and printed(v["percentiles"]["95"], "5.8181")


def test_headline_within_machines(compared):
    c = compared("cifar", "baseline", "det_crop_backoff")
    assert printed(c["stratified"]["absolute"], "-0.1448") and printed(c["stratified"]["se"], "0.0044") and printed(c["stratified"]["z"], "-33.3")
    assert c["estimate"]["method"] == "stratified" and c["stratified"]["heterogeneity_p"] < 1e-6 and c["stratified"]["random"]["se"] > 5 * c["stratified"]["se"]
    assert [s["name"] for s in c["strata"]] == ["host instance1", "host instance2"]
    assert c["verdict"]["outcome"] == "untrustworthy" and "order-drift" in {f["id"] for f in c["findings"] if f["severity"] == "serious"}


# three conditions of 200 runs, one after the other

@pytest.mark.parametrize("variant, accuracy, spread, interval, t, p, time, time_spread, time_t, time_p, speedup", [
    ("hardswish", "0.9376275", "0.0013902", ("0.937433", "0.937822"), "18.072", "1.048e-53", "4.016455", "0.015784", "17.219", "2.363e-48", "0.866"),
    ("lion", "0.9265545", "0.0017856", ("0.926305", "0.926804"), "85.878", "4.2e-245", "4.124030", "0.013196", "-37.305", "1.8e-116", "-1.789")])
def test_final_benchmark(compared, variant, accuracy, spread, interval, t, p, time, time_spread, time_t, time_p, speedup):
    c = compared("cifar", "benchmark_baseline", variant, "--metric", "accuracy")
    population = np.sqrt(199 / 200)  # the standard deviations printed are those of the population
    assert printed(c["baseline"]["mean"], "0.9400870") and printed(c["baseline"]["sd"] * population, "0.0013240") and c["baseline"]["n"] == c["variant"]["n"] == 200
    assert printed(c["variant"]["mean"], accuracy) and printed(c["variant"]["sd"] * population, spread) and [f"{x:.6f}" for x in c["variant"]["ci95"]] == list(interval)
    assert printed(-c["tests"]["welch"]["t"], t) and printed(c["tests"]["welch"]["p"], p)  # printed as baseline minus variant
    c = compared("cifar", "benchmark_baseline", variant)
    assert printed(c["baseline"]["mean"], "4.051544") and printed(c["variant"]["mean"], time) and printed(c["variant"]["sd"] * population, time_spread)
    assert printed(-c["tests"]["welch"]["t"], time_t) and printed(c["tests"]["welch"]["p"], time_p) and printed(-100 * c["difference"]["relative"], speedup)


# NanoGPT, three runs against three

@pytest.mark.parametrize("metric, relative, t, p, d", [
    ("val_loss", "1.04", "37.739", "1.86e-5", "-30.81"), ("wall_seconds", "-2.66", "-3.114", "0.0462", "2.54"), ("time_seconds", "-2.89", "-11.54", "4.4e-4", None)])
def test_stage_c(compared, metric, relative, t, p, d):
    c = compared("gpt", "baseline_stage_c", "palm_parallel_stage_c", "--metric", metric)
    assert (c["baseline"]["n"], c["variant"]["n"], c["variant"]["failed"]) == (3, 3, 1) and printed(100 * c["difference"]["relative"], relative)
    assert printed(c["tests"]["welch"]["t"], t) and printed(c["tests"]["welch"]["p"], p) and (d is None or printed(c["effect"]["cohens_d"], d))
    assert c["tests"]["permutation"] == dict(p=0.1, exact=True, smallest_p=0.1, permutations=20)


def test_stage_c_runs(compared):
    c = compared("gpt", "baseline_stage_c", "palm_parallel_stage_c", "--metric", "val_loss")
    assert printed(c["baseline"]["mean"], "3.3005") and printed(c["variant"]["mean"], "3.3348")
    tests = c["tests"]
    assert printed(tests["shapiro"]["baseline"], "0.2351") and printed(tests["shapiro"]["variant"], "0.5026") and printed(tests["levene"]["p"], "0.6215")
    c = compared("gpt", "baseline_stage_c", "palm_parallel_stage_c", "--metric", "peak_memory_bytes")
    assert printed(100 * c["difference"]["relative"], "-7.54") and round(-c["difference"]["absolute"] / 2**20) == 2307
    assert c["tests"]["welch"] is None and c["difference"]["ci95"] is None  # all three runs of a side used the same memory


# what a careful author overlooked

def test_audit_finds_what_went_wrong(speedrun, outputs):
    found = {study: json.loads(speedrun("audit", study, "--outputs", outputs, "--json").out) for study in ("cifar", "gpt")}
    def has(study, name, *groups, severity=None):
        return any(f["id"] == name and set(groups) <= set(f["groups"]) and severity in (None, f["severity"]) for f in found[study])
    assert has("cifar", "same-computation", "ablation_random_translate", "deterministic_translate", severity="serious")
    assert has("cifar", "settings-differ", "ablation_random_translate", severity="serious")
    assert has("cifar", "order-drift", "baseline", "det_crop_backoff", severity="serious") and has("cifar", "order-drift", "benchmark_baseline", "hardswish", severity="serious")
    assert has("cifar", "not-interleaved", "baseline", "det_crop_backoff") and has("cifar", "mixed-hosts", "baseline") and has("cifar", "repeated-seed", "baseline")
    assert has("cifar", "warmup-outlier", "grid_tta0_ep9.0") and has("cifar", "target-missed", "det_crop_backoff") and has("cifar", "guard-missed", "det_crop_backoff")
    assert has("cifar", "uncommitted-code", "det_crop_backoff") and has("cifar", "tuned-on-test")
    assert has("gpt", "step-time-jump", "depth_warming_stage_a", severity="serious") and not has("gpt", "step-time-jump", "baseline_stage_c") and not has("gpt", "step-time-jump", "palm_parallel_stage_c")
    assert has("gpt", "inert-seed", "palm_parallel_stage_c") and has("gpt", "repeated-seed", "palm_parallel_stage_c") and has("gpt", "repeated-data", "baseline_stage_c")
    assert has("gpt", "sample-too-small", "palm_parallel_stage_c") and has("gpt", "missing-runs", "palm_parallel_stage_c") and has("gpt", "target-missed", "palm_parallel_stage_c")
    assert not has("cifar", "copied-runs") and not has("cifar", "inert-seed")  # the genuine replications are not called copies


def test_audit_without_being_told_the_machines(speedrun, tmp_path):
    assert speedrun("import", PUBLISHED / "runner-logs" / "cifar", "--outputs", tmp_path).code == 0
    found = json.loads(speedrun("audit", "cifar", "--outputs", tmp_path, "--json").out)
    assert any(f["id"] == "mixed-hosts" and f["severity"] == "serious" and "deterministic_translate_backoff" in f["groups"] for f in found)


def test_paper_of_published_runs(speedrun, outputs, tmp_path):
    from speedrun_nb.report import evidence_tables as evidence
    from speedrun_nb.report import words
    from speedrun_nb.report.study import load_report
    report = load_report("cifar", outputs)
    assert report.profile == "published" and [g.variant for g in report.groups][0] == "baseline" and report.comparison("det_crop_backoff").verdict.outcome == "untrustworthy"
    assert "order-drift" in evidence.threats(report) and "−" not in words.abstract(report) and "det_crop_backoff" in words.verdicts(report)
