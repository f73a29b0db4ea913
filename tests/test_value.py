"""What a comparison shows beside the estimate: the cost of failures, robust lines, variance components.

Against scipy, statsmodels and closed forms, and by simulation with fixed seeds where a rate is promised.
"""

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats
from statsmodels.duration.survfunc import SurvfuncRight

from speedrun_nb.core.study import Metric, Target
from speedrun_nb.evidence.basis import choose
from speedrun_nb.evidence.groups import find_group
from speedrun_nb.evidence.robust import robust, variance_components
from speedrun_nb.evidence.target import lost_records, race_notes, race_rows, run_race
from speedrun_nb.stats.describe import plain
from speedrun_nb.stats.variance import nested_components
from speedrun_nb.stats.robust import centre_difference, centre_interval, robust_lines, superiority, trimmed_centre
from speedrun_nb.stats.survival import (
    RunTimes,
    cost_ratio,
    median_time,
    restricted_mean,
    restricted_ratio,
    share_interval,
    unit_sums,
)

SECONDS = Metric("time_seconds", "time", "s", "lower", digits=2, quality=False)
ACCURACY = Metric("accuracy", "accuracy", "%", "higher", scale=100)
METRICS = {metric.name: metric for metric in (SECONDS, ACCURACY)}
GOAL = Target("accuracy", 0.94)


def record(variant, seed, block, seconds, status="completed", accuracy=0.945, **columns):
    "A run as `read_runs` gives it."
    start = pd.Timestamp("2026-01-01T10:00Z") + pd.Timedelta(minutes=20 * block + 5 * (variant != "baseline"))
    return dict(
        run_id=f"{variant}-{seed}-{block}", study="cifar", profile="full", variant=variant, config={},
        config_hash=f"of {variant}", seed=seed, repeat=0, sweep="s", block=block, batch=f"{variant}-{block}",
        host_id="h", status=status, started_at=(start + pd.Timedelta(seconds=10 * seed)).isoformat(),
        ended_at=(start + pd.Timedelta(seconds=10 * seed + 7)).isoformat(),
        time_seconds=seconds if status != "failed" else None,
        accuracy=accuracy if status == "completed" else None) | columns


def experiment(rng, mean, failing=0.0, blocks=6, runs=4, drift=0.1, between=0.02):
    "Records of a baseline that takes 4.4 s and of a variant, in blocks; runs of the variant diverge after 1 s."
    shared, rows = rng.normal(0, drift, blocks), []
    for block in range(blocks):
        for variant, level, part in (("baseline", 4.4, 0.0), ("new", mean, failing)):
            pace = level * math.exp(shared[block] + rng.normal(0, between))
            for seed in range(runs):
                diverged = rng.random() < part
                seconds = 1.0 if diverged else pace * math.exp(rng.normal(0, 0.01))
                rows.append(record(variant, seed, block, seconds, "diverged" if diverged else "completed"))
    return pd.DataFrame(rows)


def raced(frame):
    return run_race(find_group(frame, "baseline"), find_group(frame, "new"), GOAL, METRICS, frame)


def alone(times, spent=None):
    "Every run its own unit."
    return RunTimes(times, times if spent is None else spent, np.arange(len(times)))


# --- the cost of failures ---


def test_arrivals_are_those_of_kaplan_and_meier_where_failures_are_watched_to_the_end():
    rng = np.random.default_rng(0)
    times = rng.exponential(4, 61).round(2)
    missed = rng.random(61) < 0.3
    side = alone(np.where(missed, np.inf, times))
    curve = SurvfuncRight(np.where(missed, 99.0, times), (~missed).astype(int))
    median, (low, high) = median_time(side)
    assert median == curve.quantile(0.5)
    scipy_curve = stats.ecdf(stats.CensoredData.right_censored(np.where(missed, 99.0, times), missed)).sf
    band = scipy_curve.confidence_interval(method="log-log")
    assert band.low.evaluate(high) < 0.5 < band.high.evaluate(low) + 0.06
    ends = np.concatenate([[0], np.unique(times[~missed & (times < 9)]), [9.0]])
    area = (np.diff(ends) * np.concatenate([[1], scipy_curve.evaluate(ends[1:-1])])).sum()
    assert np.isclose(area, restricted_mean(side, 9.0))


def test_median_intervals_hold_the_median_although_runs_of_a_batch_are_alike():
    rng, hits = np.random.default_rng(1), []
    for _ in range(400):
        batches = rng.normal(0, 1, 12)
        times = 10 + np.repeat(batches, 5) + rng.normal(0, 0.3, 60)
        hits.append([inside(median_time(RunTimes(times, times, units))[1], 10.0)
                     for units in (np.repeat(np.arange(12), 5), np.arange(60))])
    by_batch, by_run = np.mean(hits, axis=0)
    assert by_batch > 0.92 and by_run < 0.75


def inside(interval, value):
    low, high = interval
    return (low is None or low <= value) and (high is None or value <= high)


def test_shares_have_the_interval_of_clopper_and_pearson():
    for hits in (0, 3, 10, 20):
        exact = stats.binomtest(hits, 20).proportion_ci(method="exact")
        assert np.allclose(share_interval(np.arange(20) < hits, np.arange(20)), exact, atol=0.03)


def test_ratios_of_sums_are_welch_like_without_blocks_and_paired_within():
    rng = np.random.default_rng(2)
    v, b = 4.0 + rng.normal(0, 0.05, 9), 4.4 + rng.normal(0, 0.08, 14)
    found = restricted_ratio(alone(v), alone(b), 99.0, shared=False)
    errors = np.array([x.std(ddof=1) / x.mean() / math.sqrt(len(x)) for x in (v, b)])  # delta method
    df = (errors**2).sum() ** 2 / (errors**4 / [8, 13]).sum()
    half = stats.t.isf(0.025, df) * math.hypot(*errors)
    assert np.allclose(np.log(found.ci95), math.log(v.mean() / b.mean()) + half * np.array([-1, 1]))
    drift = rng.normal(0, 1, 9)
    inside_blocks = restricted_ratio(alone(v + drift), alone(b[:9] + drift), 99.0, shared=True)
    assert inside_blocks.p < 1e-3 < restricted_ratio(alone(v + drift), alone(b[:9] + drift), 99.0, shared=False).p


@pytest.mark.parametrize("shared", [True, False])
def test_a_cost_ratio_of_nothing_is_significant_in_one_of_twenty(shared):
    rng, p = np.random.default_rng(3), []
    for _ in range(500):
        sides = []
        drift = rng.normal(0, 0.1, 8)
        for _side in range(2):
            units = np.repeat(np.arange(8), 4)
            times = 4 + drift[units] * shared + rng.normal(0, 0.1, 8)[units] + rng.normal(0, 0.05, 32)
            missed = rng.random(32) < 0.1
            sides.append(RunTimes(np.where(missed, np.inf, times), np.where(missed, 1.0, times), units))
        p.append(cost_ratio(*sides, shared).p or 1.0)
    assert 0.025 < np.mean(np.array(p) < 0.05) < 0.075


def test_a_race_counts_what_diverged_and_what_failed():
    rng = np.random.default_rng(4)
    frame = experiment(rng, 4.0, failing=0.25)
    result = raced(frame)
    new = frame[frame.variant == "new"]
    lost = int((new.status == "diverged").sum())
    completed = new[new.status == "completed"]
    assert result.unit == "block" and result.variant.lost == lost > 2 and result.variant.arrived == len(completed)
    assert np.isclose(result.variant.cost, (completed.time_seconds.sum() + lost) / len(completed))
    slowest = frame[frame.variant == "baseline"].time_seconds
    assert np.isclose(result.horizon, np.quantile(slowest, 0.9, method="lower"))
    timed = completed.time_seconds.clip(upper=result.horizon).sum()
    assert np.isclose(result.variant.restricted, (timed + lost * result.horizon) / len(new))
    odd = frame.assign(time_seconds=frame.time_seconds.where(frame.index != frame.index[0], 40.0))
    assert raced(odd).horizon <= slowest.max()
    crashed = frame.assign(status=frame.status.replace("diverged", "failed"),
                           time_seconds=frame.time_seconds.where(frame.status == "completed"))
    assert np.isclose(raced(crashed).variant.cost, (completed.time_seconds.sum() + 7 * lost) / len(completed))
    untimed = raced(crashed.assign(ended_at=None))
    assert untimed.variant.untimed == lost and any("not known" in note for note in race_notes(untimed, METRICS))
    assert len(lost_records(frame, find_group(frame, "new"))) == lost
    assert len(race_rows(result, METRICS)) == 3 and json.loads(json.dumps(plain(result))) == plain(result)


def test_diverging_variants_do_not_win_the_race():
    "A variant that is a tenth faster and loses every third run: faster where it arrives, no cheaper."
    frame = experiment(np.random.default_rng(5), 3.95, failing=0.35, blocks=12)
    completed = raced(frame[frame.status == "completed"])
    everything = raced(frame)
    assert completed.cost.ci95[1] < 1 and everything.cost.ratio > completed.cost.ratio * 1.05
    assert everything.variant.median is not None and everything.variant.share < 0.8


# --- robust lines ---


def test_superiority_without_clusters_is_brunner_and_munzels():
    rng = np.random.default_rng(6)
    for n, m, digits in ((8, 11, 9), (30, 12, 1), (7, 7, 1)):
        v, b = rng.normal(0.4, 1, n).round(digits), rng.normal(0, 2, m).round(digits)
        found = superiority(v, b, "higher", np.arange(n), np.arange(m))
        reference = stats.brunnermunzel(v, b)
        assert np.isclose(found.p, reference.pvalue)
        u = stats.mannwhitneyu(v, b).statistic
        assert np.isclose(found.probability, u / (n * m))


def test_clustered_superiority_has_the_spread_of_redrawn_batches():
    rng = np.random.default_rng(7)
    batches, units = 40, np.repeat(np.arange(40), 3)
    v, b = (np.repeat(rng.normal(mean, 1, batches), 3) + rng.normal(0, 0.4, 120) for mean in (0.5, 0))
    found = superiority(v, b, "higher", units, units)
    drawn = []
    for _ in range(600):
        one, other = (side.reshape(batches, 3)[rng.integers(batches, size=batches)].ravel() for side in (v, b))
        drawn.append(superiority(one, other, "higher", units, units).probability)
    logit = np.diff(np.log(np.array(found.ci95) / (1 - np.array(found.ci95))))[0] / 2
    se = logit / stats.t.isf(0.025, found.df) * found.probability * (1 - found.probability)
    assert np.isclose(se, np.std(drawn), rtol=0.1)
    as_runs = superiority(v, b, "higher", np.arange(120), np.arange(120))
    assert np.diff(as_runs.ci95) < 0.75 * np.diff(found.ci95)


@pytest.mark.parametrize("shift, batches", [(0.0, 6), (1.0, 6), (2.5, 6), (1.0, 20)])
def test_superiority_holds_the_truth_between_batches(shift, batches):
    rng, hits = np.random.default_rng(8), []
    truth = stats.norm.cdf(shift / math.sqrt(2 * 1.25))
    units = np.repeat(np.arange(batches), 3)
    for _ in range(400):
        v, b = (mean + rng.normal(0, 1, batches)[units] + rng.normal(0, 0.5, 3 * batches) for mean in (shift, 0))
        hits.append(inside(superiority(v, b, "higher", units, units).ci95, truth))
    assert np.mean(hits) > 0.92


def test_trimmed_means_are_yuens_and_hold_the_truth_under_heavy_tails():
    rng, hits = np.random.default_rng(9), []
    for n, m in ((5, 9), (12, 20)):
        v, b = rng.standard_t(2, n), rng.standard_t(2, m)
        found, reference = centre_difference(trimmed_centre(v), trimmed_centre(b)), stats.ttest_ind(
            v, b, equal_var=False, trim=0.2)
        assert np.isclose(found.value / math.sqrt(found.variance), reference.statistic)
        assert np.isclose(2 * stats.t.sf(abs(reference.statistic), found.df), reference.pvalue)
    for _ in range(500):
        hits.append(inside(centre_interval(trimmed_centre(rng.standard_t(2, 12))), 0.0))
    assert 0.925 < np.mean(hits) < 0.985


@pytest.mark.parametrize("shared", [True, False])
def test_robust_lines_at_the_border_of_a_claim_are_wrong_in_one_of_forty_on_either_side(shared):
    rng, said = np.random.default_rng(10), []
    for _ in range(600):
        v, b = 0.99 * np.exp(rng.normal(0, 0.02, 10)), np.exp(rng.normal(0, 0.02, 10))
        said.append([line.outcome for line in robust_lines(v, b, 0.01, "lower", "open", shared)])
    for outcome in ("established", "excluded"):
        assert (np.mean(np.array(said) == outcome, axis=0) < 0.045).all()


def test_one_disturbed_batch_changes_the_answer_of_the_mean_alone():
    frame = experiment(np.random.default_rng(11), 4.2, blocks=10, runs=2, between=0.003)
    groups = [find_group(frame, name) for name in ("baseline", "new")]
    found = robust(*groups, SECONDS, 0.01, choose(*groups, SECONDS))
    assert found.unit == "block" and found.main == "established" and found.changes is False
    disturbed = frame.assign(time_seconds=frame.time_seconds.where(frame.batch != "new-4", 3 * frame.time_seconds))
    groups = [find_group(disturbed, name) for name in ("baseline", "new")]
    found = robust(*groups, SECONDS, 0.01, choose(*groups, SECONDS))
    assert found.main == "open" and found.changes and [line.outcome for line in found.lines] == ["established"] * 2


# --- variance components ---


def nested(rng, hosts, blocks, runs, sds, seeds=8, lost=0.0):
    "Batches of two conditions in blocks on hosts; seeds cross them. Some runs may be lost."
    rows = []
    of_seed = rng.normal(0, sds["seed"], seeds)
    for host in range(hosts):
        of_host = rng.normal(0, sds["host"])
        for block in range(blocks):
            of_block = rng.normal(0, sds["block"])
            for condition in range(2):
                of_batch = rng.normal(0, sds["batch"])
                for _ in range(runs):
                    seed = int(rng.integers(seeds))
                    y = 4.4 + 0.3 * condition + of_host + of_block + of_batch + of_seed[seed]
                    y += rng.normal(0, sds["run"])
                    rows.append((host, f"{host} {block}", f"{host} {block} {condition}", seed, condition, y))
    frame = pd.DataFrame(rows, columns=["host", "block", "batch", "seed", "condition", "y"])
    return frame[rng.random(len(frame)) >= lost].reset_index(drop=True)


SDS = dict(host=0.3, block=0.1, batch=0.15, seed=0.1, run=0.08)


@pytest.mark.parametrize("lost, absent", [(0.0, None), (0.3, None), (0.2, "block")])
def test_components_are_those_of_statsmodels(lost, absent):
    sds = SDS | ({absent: 0.0} if absent else {})
    frame = nested(np.random.default_rng(11), 4, 4, 3, sds, lost=lost)
    names = ["host", "block", "batch", "seed"]
    found = {part.name: part.sd for part in nested_components(frame.y, {n: frame[n] for n in names}, frame.condition)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = smf.mixedlm("y ~ C(condition)", frame, groups=np.ones(len(frame)),
                          vc_formula={name: f"0 + C({name})" for name in names}).fit(reml=True)
    theirs = dict(zip([*fit.model.exog_vc.names, "run"], np.sqrt([*fit.vcomp, fit.scale]), strict=True))
    for name, sd in found.items(): assert np.isclose(sd, theirs[name], rtol=0.02, atol=0.006), (name, found, theirs)


def test_nested_components_have_their_closed_form_in_a_balanced_design():
    rng = np.random.default_rng(12)
    y = 4 + rng.normal(0, 0.3, (6, 1, 1)) + rng.normal(0, 0.2, (6, 5, 1)) + rng.normal(0, 0.1, (6, 5, 4))
    host, batch = np.repeat(np.arange(6), 20), np.repeat(np.arange(30), 4)
    run = y.var(2, ddof=1).mean()
    of_batch = 4 * y.mean(2).var(1, ddof=1).mean()
    of_host = 20 * y.mean((1, 2)).var(ddof=1)
    expected = {"host": (of_host - of_batch) / 20, "batch": (of_batch - run) / 4, "run": run}
    found = nested_components(y.ravel(), {"host": host, "batch": batch}, np.zeros(120))
    for part in found: assert np.isclose(part.sd**2, expected[part.name], rtol=1e-3)
    assert np.isclose(sum(part.share for part in found), 1)


def test_known_components_come_back():
    rng, found, held = np.random.default_rng(13), [], []
    for _ in range(12):
        frame = nested(rng, 5, 3, 3, SDS)
        parts = nested_components(frame.y, {n: frame[n] for n in ("host", "block", "batch", "seed")}, frame.condition)
        found.append([part.sd**2 for part in parts])
        held.append([inside(part.ci95, SDS[part.name]) for part in parts])
    errors = np.std(found, axis=0, ddof=1) / math.sqrt(12)
    distances = (np.mean(found, axis=0) - np.array(list(SDS.values())) ** 2) / errors
    assert np.abs(distances).max() < stats.t.isf(0.0005, 11) and np.mean(held) > 0.85


def test_components_of_a_group_name_what_cannot_be_seen():
    frame = experiment(np.random.default_rng(14), 4.0)
    groups = [find_group(frame, name) for name in ("baseline", "new")]
    notes = {part.name: part.note for part in variance_components(groups, SECONDS)}
    assert notes == dict(host="one value", day="one value", block="", batch="", seed="", run="")
    parts = {part.name: part for part in variance_components(groups, SECONDS)}
    assert parts["block"].sd > 3 * parts["batch"].sd > 3 * parts["seed"].sd and parts["block"].levels == 6
    lone = {part.name: part.note for part in variance_components(groups[:1], SECONDS)}
    assert lone["batch"] == "cannot be told from block"


def test_sums_of_units_are_in_the_order_of_their_names():
    assert unit_sums(np.array([1.0, 2.0, 4.0]), np.array(["b", "a", "b"])).tolist() == [2.0, 5.0]
