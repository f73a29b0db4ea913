"The evidence against reference implementations, closed forms, published figures, simulations and degenerate input."
import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import stats
from statsmodels.stats.meta_analysis import effectsize_smd
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from speedrun_nb.core.errors import SpeedrunError
from speedrun_nb.core.study import Claim, Guard, Metric
from speedrun_nb.evidence.basis import choose
from speedrun_nb.evidence.comparison import Question
from speedrun_nb.evidence.groups import Group, find_group, make_group, select, split
from speedrun_nb.evidence.guard import non_inferiority
from speedrun_nb.evidence.verdict import compare_groups, facts_of, paragraph
from speedrun_nb.stats.describe import describe, finite
from speedrun_nb.stats.effect import cohens_d
from speedrun_nb.stats.estimate import MINIMUM, difference
from speedrun_nb.stats.tests import relative_interval, welch

TIME = Metric("time_seconds", "training time", "s", "lower", quality=False)
ACCURACY = Metric("accuracy", "accuracy", "%", "higher", scale=100)
METRICS = {m.name: m for m in (TIME, ACCURACY)}
CLAIM = Claim("time_seconds", "decrease", 0.01, Guard("accuracy", 0.001))


pytestmark = pytest.mark.usefixtures("no_warnings")


def compare(baseline, variant, claim=None, metrics=METRICS, metric=None):
    return compare_groups(baseline, variant, Question(metrics, claim, metric))


def in_turns(n):
    "Moments of `n` batches, spread over a day."
    return [(pd.Timestamp("2026-01-01", tz="UTC") + pd.Timedelta(days=(i + 0.5) / n)).isoformat() for i in range(n)]


def group(name, time, accuracy, failed=0, diverged=0, duplicates=0):
    "A group with these values: batches of one run, which take turns with those of others, but not in blocks."
    first, n = 0 if name.startswith("b") else 1000, len(time)  # no shared seeds, so no pairs
    runs = pd.DataFrame(dict(
        seed=range(first, first + n), repeat=0, batch=[f"{name}{i}" for i in range(n)], started_at=in_turns(n),
        time_seconds=time, accuracy=accuracy))
    return Group("cifar", "full", name, f"hash-{name}", {}, runs, failed, diverged, runs.iloc[:duplicates], name)


def exact_sample(mean, sd, n):
    "`n` numbers with exactly this mean and standard deviation."
    shape = np.linspace(-1, 1, n)
    return mean + sd * shape / shape.std(ddof=1)


def samples(count=40):
    "Pairs of samples of unequal sizes and spreads."
    rng = np.random.default_rng(11)
    for _ in range(count):
        n, m = rng.integers(2, 30, 2)
        yield rng.normal(4.3, rng.uniform(0.01, 0.5), n), rng.normal(4.4, rng.uniform(0.01, 0.5), m)


# ---------------------------------------------------------------- reference implementations

def test_describe_agrees_with_statsmodels():
    for sample, _ in samples():
        d, reference = describe(sample), DescrStatsW(sample)
        assert d.n == len(sample) and d.missing == 0
        np.testing.assert_allclose([d.mean, d.sd], [reference.mean, np.sqrt(reference.var_ddof(1))], rtol=1e-12)
        np.testing.assert_allclose(d.ci95, reference.tconfint_mean(0.05), rtol=1e-12)
        np.testing.assert_allclose(d.ci99, reference.tconfint_mean(0.01), rtol=1e-12)


def test_welch_and_its_interval_agree_with_statsmodels():
    for v, b in samples():
        reference = CompareMeans(DescrStatsW(v), DescrStatsW(b))
        result, d = welch(v, b), difference(v, b, TIME)
        found = [result.statistic, result.pvalue, result.df]
        np.testing.assert_allclose(found, reference.ttest_ind(usevar="unequal"), rtol=1e-9)
        np.testing.assert_allclose(d.ci95, reference.tconfint_diff(usevar="unequal"), rtol=1e-9)
        assert (d.better is not None) == (result.pvalue < 0.05) == (not d.ci95[0] <= 0 <= d.ci95[1])


def test_guard_agrees_with_statsmodels_in_both_directions():
    for v, b in samples():
        reference = CompareMeans(DescrStatsW(v), DescrStatsW(b))
        lower, higher = (non_inferiority(v, b, replace(TIME, better=better), 0.05) for better in ("lower", "higher"))
        assert np.isclose(lower.p, reference.ttest_ind("smaller", "unequal", 0.05)[1], rtol=1e-9)
        assert np.isclose(higher.p, reference.ttest_ind("larger", "unequal", -0.05)[1], rtol=1e-9)
        low, high = reference.tconfint_diff(0.10, "two-sided", "unequal")  # its ends are one-sided 95 % bounds
        np.testing.assert_allclose([lower.lower_bound, lower.bound], [low, high], rtol=1e-9)
        np.testing.assert_allclose([-higher.bound, -higher.lower_bound], [low, high], rtol=1e-9)
        if min(len(v), len(b)) >= MINIMUM:
            assert lower.outcome == ("kept" if high < 0.05 else "broken" if low > 0.05 else "undecided")
            assert higher.outcome == ("kept" if low > -0.05 else "broken" if high < -0.05 else "undecided")


def test_cohens_d_agrees_with_statsmodels():
    for v, b in samples():
        correction = 1 - 3 / (4 * (len(v) + len(b)) - 9)  # statsmodels gives Hedges' g
        g, _ = effectsize_smd(v.mean(), v.std(ddof=1), len(v), b.mean(), b.std(ddof=1), len(b))
        assert np.isclose(cohens_d(v, b, "higher"), g / correction, rtol=1e-9)
        assert cohens_d(v, b, "lower") == -cohens_d(v, b, "higher")


def test_relative_interval_is_welch_inverted():
    for v, b in samples():
        interval = relative_interval(v, b)
        if interval is None: continue
        for edge in interval:
            scaled = CompareMeans(DescrStatsW(v), DescrStatsW((1 + edge) * b))
            assert np.isclose(scaled.ttest_ind(usevar="unequal")[1], 0.05, rtol=1e-6)
        assert interval[0] < v.mean() / b.mean() - 1 < interval[1]
        assert (interval[0] <= 0 <= interval[1]) == (welch(v, b).pvalue >= 0.05)  # never at odds with the p-value


def test_relative_interval_has_fiellers_closed_form_for_a_baseline_that_does_not_vary():
    v = np.array([0.8, 0.9, 1.0, 1.1])
    np.testing.assert_allclose(relative_interval(v, [2.0] * 6), np.array(describe(v).ci95) / 2 - 1, rtol=1e-9)


def test_relative_interval_is_free_of_units():
    v, b = next(samples(1))
    np.testing.assert_allclose(relative_interval(1e9 * v, 1e9 * b), relative_interval(v, b), atol=1e-9)
    np.testing.assert_allclose(relative_interval(1e-9 * v, 1e-9 * b), relative_interval(v, b), atol=1e-9)


# ---------------------------------------------------------------- published figures

def test_published_cifar_figures_follow_from_their_summaries():
    "A published study of 2,400 runs, from its printed means and deviations (A100, pooled over two machines)."
    b, v = exact_sample(5.1702, 0.6885, 400), exact_sample(5.0254, 0.6417, 2000)
    np.testing.assert_allclose(describe(b).ci95, [5.1025, 5.2379], atol=6e-5)
    np.testing.assert_allclose(describe(v).ci95, [4.9972, 5.0535], atol=6e-5)
    d = difference(v, b, TIME)
    assert np.isclose(welch(v, b).pvalue, 1.1588e-4, rtol=0.02) and np.isclose(d.relative, -0.028009, atol=2e-5)
    b, v = exact_sample(0.940283, 0.001204, 400), exact_sample(0.939680, 0.001268, 2000)
    np.testing.assert_allclose(describe(b).ci99, [0.940127, 0.940439], atol=1e-6)
    np.testing.assert_allclose(describe(v).ci99, [0.939607, 0.939753], atol=1e-6)
    assert np.isclose(np.log10(welch(v, b).pvalue), np.log10(1.859e-18), atol=0.05)
    assert difference(v, b, ACCURACY).better is False
    b, v = exact_sample(4.4851, 0.0335, 200), exact_sample(4.3998, 0.0074, 1000)
    assert np.isclose(cohens_d(v, b, "lower"), 5.5994, atol=0.02)
    assert np.isclose(difference(v, b, TIME).relative, -0.019011, atol=2e-5)


def test_published_hardswish_benchmark():
    "Hardswish against GELU, 200 runs each: had each been a batch, it would be faster; and the accuracy guard breaks."
    baseline = group("gelu", exact_sample(4.052, 0.024, 200), exact_sample(0.94009, 0.00133, 200))
    variant = group("hardswish", exact_sample(4.016, 0.016, 200), exact_sample(0.93763, 0.00139, 200))
    c = compare(baseline, variant, Claim("time_seconds", "decrease", 0.005, Guard("accuracy", 0.001)))
    reference = stats.ttest_ind_from_stats(4.016, 0.016, 200, 4.052, 0.024, 200, equal_var=False)
    np.testing.assert_allclose([c.tests.welch.t, c.tests.welch.p], reference, rtol=1e-6)
    assert c.difference.better is True and facts_of(c).effect == "established"
    assert c.guard.outcome == "broken" and c.verdict.outcome == "refuted" and "the guard is broken" in paragraph(c)


# ---------------------------------------------------------------- error rates

# runs and standard deviations of variant and baseline, as fractions of the baseline's mean
SCENARIOS = [(5, 5, 0.01, 0.01), (20, 20, 0.01, 0.03), (30, 6, 0.05, 0.01), (8, 8, 0.2, 0.2)]
REPLICATES = 40_000


def simulate(n, m, sd_v, sd_b, mean_v=1.0, replicates=REPLICATES):
    "Many experiments: (replicates, n) values of a variant, (replicates, m) of a baseline with mean 1."
    rng = np.random.default_rng(20)
    return rng.normal(mean_v, sd_v, (replicates, n)), rng.normal(1.0, sd_b, (replicates, m))


def p_values(v, b, alternative="two-sided"):
    "Welch's test along the rows; `test_rows_are_welch` ties it to what the package computes."
    return stats.ttest_ind(v, b, axis=1, equal_var=False, alternative=alternative).pvalue


def near(rate, nominal, tolerance=0.004):
    "Is an error rate nominal, up to Monte Carlo error and what Welch's approximation is known to leave?"
    return abs(rate - nominal) < tolerance + 4 * np.sqrt(nominal * (1 - nominal) / REPLICATES)


def test_rows_are_welch():
    v, b = simulate(*SCENARIOS[2], replicates=50)
    np.testing.assert_allclose(p_values(v, b), [welch(x, y).pvalue for x, y in zip(v, b, strict=True)], rtol=1e-9)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_type_one_error_and_coverage(scenario):
    assert near((p_values(*simulate(*scenario)) < 0.05).mean(), 0.05)
    v, b = simulate(*scenario, mean_v=0.9)
    assert near((p_values(v + 0.1, b) < 0.05).mean(), 0.05)    # ci95 misses the true difference
    assert near((p_values(v, 0.9 * b) < 0.05).mean(), 0.05)    # ci95_relative misses the true relative difference
    covered, tenable = [], []
    for x, y in zip(v[:150], b[:150], strict=True):             # that these are what the intervals do
        d = difference(x, y, TIME)
        covered += [d.ci95[0] <= -0.1 <= d.ci95[1], d.ci95_relative[0] <= -0.1 <= d.ci95_relative[1]]
        tenable += [welch(x + 0.1, y).pvalue >= 0.05, welch(x, 0.9 * y).pvalue >= 0.05]
    assert covered == tenable and np.mean(covered) > 0.88


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_false_kept_and_false_broken_at_exactly_the_margin(scenario):
    margin = 0.02
    v, b = simulate(*scenario, mean_v=1 + margin)
    assert (p_values(v, b + margin, "less") < 0.05).mean() < 0.05 + 4 * np.sqrt(0.05 * 0.95 / REPLICATES)
    assert near((p_values(v, b + margin, "greater") < 0.05).mean(), 0.05)
    outcomes = [non_inferiority(x, y, TIME, margin).outcome for x, y in zip(v[:200], b[:200], strict=True)]
    kept, broken = (p_values(v[:200], b[:200] + margin, side) < 0.05 for side in ("less", "greater"))
    assert outcomes == np.select([kept, broken], ["kept", "broken"], "undecided").tolist()


@pytest.mark.parametrize("at_least", [0.0, 0.05])
def test_false_verdicts_when_the_effect_is_exactly_as_claimed(at_least):
    "On the boundary either false verdict has half of 5 %: ratios of times are compared in logarithms."
    v, b = np.exp(simulate(8, 8, 0.03, 0.05, mean_v=1 + np.log1p(-at_least)))
    sides = np.log(v), np.log1p(-at_least) + np.log(b)
    supported, refuted = (p_values(*sides, alternative) < 0.025 for alternative in ("less", "greater"))
    assert near(supported.mean(), 0.025, 0.001) and near(refuted.mean(), 0.025, 0.001)
    expected = np.select([supported, refuted], ["supported", "refuted"], "undecided")
    rows = np.concatenate([np.flatnonzero(supported)[:12], np.flatnonzero(refuted)[:12], np.arange(40)])
    claim, accuracy = Claim("time_seconds", "decrease", at_least), np.full(8, 0.94)
    found = [compare(group("b", b[i], accuracy), group("v", v[i], accuracy), claim) for i in rows]
    assert [c.verdict.outcome for c in found] == expected[rows].tolist()


def test_no_effect_and_a_ruined_metric_are_rarely_supported():
    "Time unchanged, accuracy worse by twice the margin: `supported` would need two errors at once."
    rng = np.random.default_rng(5)
    outcomes = []
    for _ in range(40):
        b = group("b", rng.normal(4.4, 0.05, 10), rng.normal(0.940, 0.001, 10))
        v = group("v", rng.normal(4.4, 0.05, 10), rng.normal(0.938, 0.001, 10))
        outcomes.append(compare(b, v, CLAIM).verdict.outcome)
    assert "supported" not in outcomes and outcomes.count("refuted") > 20


# runs of one batch have a state of the machine in common
STATE = 0.006  # standard deviation of what blocks, and batches in them, add to the logarithm of times; of runs: 0.005


def sides_of_a_sweep(rng, effect=0.0, blocks=8, runs=5, hosts=1, in_blocks=True, between=STATE):
    "A baseline and a variant in batches of some runs; time changes by `effect`, quality does not."
    block = np.repeat(np.arange(blocks), runs)
    together = rng.normal(0, between, blocks) + 0.3 * (np.arange(blocks) % hosts)
    start = pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta(60 * block, unit="min")
    for place, (name, change) in enumerate((("baseline", 0.0), ("variant", effect))):
        state = together + rng.normal(0, between, blocks)
        time = 4.4 * (1 + change) * np.exp(state[block] + rng.normal(0, 0.005, len(block)))
        runs_made = pd.DataFrame(dict(
            seed=np.arange(len(block)), repeat=0, host_id=[f"h{b % hosts}" for b in block], sweep="s",
            block=block if in_blocks else None, batch=[f"{name}{b}" for b in block], time_seconds=time,
            accuracy=rng.normal(0.94, 0.001, len(block)),
            started_at=[(moment + pd.Timedelta(minutes=10 * place)).isoformat() for moment in start]))
        yield Group("cifar", "full", name, name, {}, runs_made, 0, 0, runs_made.iloc[:0], name)


SWEEPS = {  # how runs are laid out, and what is counted
    "blocks": (dict(), "blocks"),
    "few blocks of many runs": (dict(blocks=5, runs=12), "blocks"),
    "blocks on two hosts": (dict(blocks=10, hosts=2), "blocks"),
    "batches in no blocks": (dict(in_blocks=False), "batches"),
    "batches that do not matter": (dict(between=0.0), "blocks")}
SWEPT = 50


def slack(rate, n): return 3 * np.sqrt(rate * (1 - rate) / n)


def judged_sweeps(name, at_least):
    "Sweeps in which the effect is exactly what is claimed, or nothing."
    layout, method = SWEEPS[name]
    rng, claim = np.random.default_rng(21), Claim("time_seconds", "decrease", at_least)
    found = [compare(*sides_of_a_sweep(rng, -at_least, **layout), claim) for _ in range(SWEPT)]
    assert {c.raw.method for c in found} == {method} and {c.basis.unit for c in found} == {"batch"}
    return found


def rarely(errors, rate):
    "Are there so few errors that the rate may be theirs?"
    return np.sum(errors) <= stats.binom.ppf(0.998, len(errors), rate)


@pytest.mark.parametrize("name, at_least", [*product(SWEEPS, [0.0]), ("blocks", 0.01)])
def test_verdicts_keep_their_error_rates_where_batches_differ(name, at_least):
    "Either false verdict has 2.5 %, and intervals hold the truth; a test as if runs were independent does not."
    found = judged_sweeps(name, at_least)
    for wrong in ("supported", "refuted"): assert rarely([c.verdict.outcome == wrong for c in found], 0.025), wrong
    intervals = [c.raw.ci95_relative for c in found]
    assert rarely([not low <= -at_least <= high for low, high in intervals], 0.05)
    if at_least: return
    assert rarely([c.tests.permutation.p < 0.05 for c in found], 0.05)
    naive = [c.tests.welch.p < 0.05 for c in found]
    if name == "batches that do not matter": assert rarely(naive, 0.05)
    elif name != "blocks on two hosts": assert not rarely(naive, 0.05) and np.mean(naive) > 0.2


def test_a_true_claim_is_supported_and_one_that_is_too_bold_is_refuted():
    rng = np.random.default_rng(22)
    for at_least, outcome in ((0.01, "supported"), (0.05, "refuted")):
        claim = Claim("time_seconds", "decrease", at_least)
        outcomes = [compare(*sides_of_a_sweep(rng, -0.03, blocks=12), claim).verdict.outcome for _ in range(15)]
        assert outcomes.count(outcome) > 10 and not set(outcomes) - {outcome, "undecided"}


def test_one_batch_a_side_shows_nothing_of_times_however_many_its_runs():
    claim = Claim("time_seconds", "decrease", 0.01)
    c = compare(*sides_of_a_sweep(np.random.default_rng(23), -0.05, blocks=1, runs=300), claim)
    assert c.tests.welch.p < 1e-50 and c.raw.ci95 is c.raw.p is None and c.verdict.outcome == "undecided"
    assert "there is 1" in paragraph(c) and "p <" not in paragraph(c)


def test_times_that_were_not_measured_in_turns_decide_nothing():
    rng, claim = np.random.default_rng(24), Claim("time_seconds", "decrease", 0.01)
    baseline, variant = sides_of_a_sweep(rng, -0.05, blocks=12, in_blocks=False)
    later = replace(variant, runs=variant.runs.assign(started_at="2026-03-01T00:00:00+00:00"))
    assert compare(baseline, variant, claim).verdict.outcome == "supported"
    c = compare(baseline, later, claim)
    assert c.verdict.outcome == "undecided" and "not run in turns" in paragraph(c)


QUALITIES = {  # of a quality: hosts, batches a host, how much hosts and batches differ, correlation of equal seeds
    "plain": (1, 6, 0.0, None), "hosts": (2, 6, 0.0, None), "pairs": (1, 6, 0.0, 0.7),
    "seeds that do not matter": (1, 6, 0.0, 0.0), "batches matter": (1, 10, 0.003, None)}


def two_qualities(rng, hosts, batches, between, correlation, runs=4):
    "A baseline and a variant alike in quality; the variant has twice the spread."
    place = np.arange(hosts * batches * runs)
    shared = rng.normal(size=len(place)) * np.sqrt(correlation or 0)
    own, batch = np.sqrt(1 - (correlation or 0)), place // runs
    for name, spread in (("b", 0.001), ("v", 0.002)):
        first = 1000 if correlation is None and name == "v" else 0
        values = 0.94 + spread * (shared + own * rng.normal(size=len(place)))
        values += rng.normal(0, between, hosts * batches)[batch]
        runs_made = pd.DataFrame(dict(seed=place + first, repeat=0, host_id=[f"h{b % hosts}" for b in batch],
                                      block=batch, batch=batch, accuracy=values + 0.01 * (batch % hosts)))
        yield Group("cifar", "full", name, name, {}, runs_made, 0, 0, runs_made.iloc[:0], name)


@pytest.mark.parametrize("design", QUALITIES)
def test_the_estimate_that_the_design_asks_for_keeps_its_error_rate(design):
    "Without any effect, 5 % of the answers are significant, whichever rule chooses the estimate."
    rng, n = np.random.default_rng(8), 150
    found = [choose(*two_qualities(rng, *QUALITIES[design]), ACCURACY) for _ in range(n)]
    methods, estimates = {f.basis.method for f in found}, [f.estimate for f in found]
    allowed = {"hosts": {"stratified", "blocks"}, "batches matter": {"blocks", "welch"}}
    assert methods <= allowed.get(design, {"paired", "welch", "blocks"})
    assert design != "pairs" or "paired" in methods
    assert design != "batches matter" or np.mean([f.basis.method == "blocks" for f in found]) > 0.95
    assert np.mean([e.p() < 0.05 for e in estimates]) < 0.05 + slack(0.05, n)
    assert np.mean([e.interval()[0] <= 0 <= e.interval()[1] for e in estimates]) > 0.95 - slack(0.05, n)


# ---------------------------------------------------------------- verdicts

def test_claims_to_increase():
    claim = Claim("accuracy", "increase", 0.001, Guard("time_seconds", 0.1))
    baseline = group("baseline", exact_sample(4.4, 0.05, 20), exact_sample(0.940, 0.001, 20))
    outcomes = {}
    for accuracy, time in product((0.942, 0.940, 0.938), (4.4, 5.0)):
        v = group("v", exact_sample(time, 0.05, 20), exact_sample(accuracy, 0.001, 20))
        outcomes[accuracy, time] = compare(baseline, v, claim).verdict.outcome
    assert outcomes.pop((0.942, 4.4)) == "supported" and set(outcomes.values()) == {"refuted"}


def test_too_few_runs_are_undecided_however_large_the_effect():
    def halved(n, m):
        b = group("b", exact_sample(4.4, 0.01, n), exact_sample(0.94, 1e-5, n))
        return compare(b, group("v", exact_sample(2.2, 0.01, m), exact_sample(0.94, 1e-5, m)), CLAIM)
    for n, m in ((4, 50), (50, 4), (2, 2)):
        c = halved(n, m)
        assert c.verdict.outcome == c.guard.outcome == "undecided" and "too early" in paragraph(c)
        assert c.difference.better is True  # the figures are there; only the verdict waits
    assert halved(5, 5).verdict.outcome == "supported"


def test_too_few_values_of_the_guards_metric_do_not_support():
    v = group("v", exact_sample(4.2, 0.01, 10), [0.94, 0.941, 0.942, 0.943] + [None] * 6)
    c = compare(group("b", exact_sample(4.4, 0.01, 10), exact_sample(0.93, 0.001, 10)), v, CLAIM)
    assert c.guard.outcome == c.verdict.outcome == "undecided" and "guard is not judged yet" in paragraph(c)


@pytest.mark.parametrize("time, words", [
    (4.2, "0.200 s less, which is better"), (4.6, "0.200 s more, which is worse"),
    (4.39, "0.010 s less, which would be better, but it is not significant")])
def test_words_never_leave_the_direction_of_a_time_open(time, words):
    b = group("b", exact_sample(4.4, 0.05, 20), exact_sample(0.94, 0.001, 20))
    v = group("v", exact_sample(time, 0.05, 20), exact_sample(0.94, 0.001, 20))
    assert words in paragraph(compare(b, v, CLAIM))


def test_words_never_leave_the_direction_of_an_accuracy_open():
    b = group("b", exact_sample(4.4, 0.05, 20), exact_sample(0.94, 0.001, 20))
    c = compare(b, group("v", exact_sample(4.4, 0.05, 20), exact_sample(0.95, 0.001, 20)), None, metric="accuracy")
    assert "1.000 percentage points more, which is better" in paragraph(c)


def test_claim_on_another_metric_decides_nothing():
    b, v = (group(n, exact_sample(t, 0.01, 10), exact_sample(0.94, 0.001, 10)) for n, t in (("b", 4.4), ("v", 4.2)))
    c = compare(b, v, CLAIM, metric="accuracy")
    assert c.claim is None and c.guard is None and c.verdict.outcome == "undecided"
    assert "No claim about accuracy" in paragraph(c)


# ---------------------------------------------------------------- degenerate input

VARIED = [4.3, 4.4, 4.5, 4.35, 4.45, 4.42]
HARD = {
    "varied": VARIED,
    "equal": [4.4] * 6,
    "equal but for rounding": [0.1 + 0.2, 0.3] * 3,
    "zero": [0.0] * 6,
    "around zero": [-1.0, 1.0, -1.0, 1.0, 0.5, -0.5],
    "negative": [-x for x in VARIED],
    "one": [4.4],
    "two": [4.4, 4.5],
    "none": [],
    "missing": [None] * 6,
    "some missing": [4.4, None, float("nan"), 4.5, 4.6, 4.41, 4.39],
    "infinite": [float("inf"), 4.4, 4.5, 4.6, 4.45, 4.55],
    "tiny": [1e-12, 2e-12, 1.5e-12, 1e-12, 1.2e-12],
    "huge": [1e15, 1e15 + 1, 1e15 + 2, 1e15, 1e15 + 1]}
DECREASE = Claim("time_seconds", "decrease", 0.01)


@pytest.mark.parametrize("b,v", list(product(HARD, HARD)))
def test_hard_samples_end_in_a_clear_statement(b, v):
    for claim in (CLAIM, None):
        sides = group("base", HARD[b], HARD[b], failed=1), group("var", HARD[v], HARD[v], diverged=2)
        c = compare(*sides, claim, metric="time_seconds")
        text = json.dumps(c.as_dict(), allow_nan=False)  # refuses NaN and infinities
        assert json.loads(text) == c.as_dict()
        words = paragraph(c)
        assert not any(bad in words for bad in ("nan", "inf", "None", "not known.", "-0.0")), words
        assert words.endswith(".") and "2 diverged" in words and "1 failed" in words
        if claim is None or min(c.baseline.n, c.variant.n) < MINIMUM: assert c.verdict.outcome == "undecided"
        if c.tests.welch is None:
            assert c.difference.better is c.difference.ci95 is c.difference.ci95_relative is c.effect.cohens_d is None


def test_rounding_errors_are_not_significant():
    assert welch([0.1 + 0.2] * 6, [0.3] * 6) is None
    c = compare(group("b", [0.3] * 6, [0.9] * 6), group("v", [0.1] * 6, [0.9] * 6), CLAIM)
    assert c.tests.welch is None and c.verdict.outcome == "undecided" and "all gave the same value" in paragraph(c)


def test_a_baseline_mean_of_zero_has_no_relative_change():
    v = group("v", VARIED, VARIED)
    c = compare(group("b", HARD["around zero"], VARIED), v, DECREASE)
    assert c.difference.relative is None and c.difference.ci95 and c.verdict.outcome == "undecided"
    assert "not above zero" in paragraph(c)
    c = compare(group("b", [0.1, -0.1, 0.2, -0.1, 0.1], VARIED[:5]), v, DECREASE)
    assert c.difference.relative and c.difference.ci95_relative is None and "cannot be told from zero" in paragraph(c)


def test_a_metric_that_no_run_has():
    metrics = METRICS | {"loss": Metric("loss", "validation loss", "", "lower")}
    c = compare(group("b", VARIED, VARIED), group("v", VARIED, VARIED), None, metrics, "loss")
    assert c.variant.n == 0 and c.variant.missing == 6
    assert "no completed run of v or of b with validation loss" in paragraph(c)


def test_words_among_the_values_are_refused():
    with pytest.raises(ValueError): finite([4.4, "fast"])


def test_what_cannot_be_compared():
    b, v = group("b", VARIED, VARIED), group("v", VARIED, VARIED)
    pairs = {"same group": (b, b), "profile": (b, replace(v, profile="demo")), "study": (replace(b, study="gpt"), v)}
    for words, pair in pairs.items():
        with pytest.raises(SpeedrunError, match=words): compare(*pair, CLAIM)
    with pytest.raises(SpeedrunError, match='Did you mean "time_seconds"'): compare(b, v, CLAIM, metric="time_second")
    assert compare(b, v, None).metric is TIME  # without a claim, time


# ---------------------------------------------------------------- the documented object

DESCRIBED = ["n", "missing", "mean", "sd", "median", "min", "max", "ci95", "ci99", "percentiles", "cv"]


ANSWER = [
    "method", "absolute", "relative", "ci95", "ci95_relative", "p", "p_claim", "better", "watched", "statistic",
    "within"]
BASIS = ["unit", "method", "units", "apart", "interleaved", "unused", "batch_effect"]


def test_json_shape():
    c = compare(group("b", VARIED, VARIED), group("v", VARIED, VARIED), CLAIM).as_dict()
    assert c["schema"] == 3
    assert list(c) == [
        "schema", "study", "profile", "metric", "better", "claim", "baseline", "variant", "difference", "tests",
        "effect", "basis", "hosts", "across_hosts", "paired", "guard", "frontier", "target", "race", "robust", "family",
        "raw", "estimate", "fixed", "findings", "verdict"]
    side = [*DESCRIBED, "name", "variant", "config_hash", "failed", "diverged", "duplicates"]
    assert list(c["baseline"]) == list(c["variant"]) == side
    assert set(c["difference"]) == {"absolute", "relative", "ci95", "ci95_relative", "bca95", "better"}
    assert list(c["effect"]) == ["cohens_d", "hedges_g", "ci95", "probability_better"]
    assert list(c["raw"]) == list(c["estimate"]) == ANSWER and list(c["basis"]) == BASIS
    assert list(c["verdict"]) == ["outcome", "reasons"]
    assert c["hosts"] == [] and all(c[name] is None for name in (
        "across_hosts", "paired", "frontier", "target", "race", "family", "fixed"))
    assert list(c["robust"]) == ["metric", "at_least", "unit", "main", "chance", "lines", "changes"]


def test_json_shape_of_tests():
    c = compare(group("b", VARIED, VARIED), group("v", VARIED, VARIED), CLAIM).as_dict()
    assert {name: set(test) for name, test in c["tests"].items()} == {
        "welch": {"t", "df", "p"}, "student": {"t", "p"}, "mann_whitney": {"u", "p"},
        "permutation": {"p", "exact", "smallest_p", "permutations"},
        "levene": {"p"}, "shapiro": {"baseline", "variant"}}
    assert list(c["guard"]) == [
        "metric", "margin", "baseline", "variant", "difference", "bound", "lower_bound", "p", "outcome", "equivalence",
        "basis"]
    assert list(c["guard"]["baseline"]) == DESCRIBED and list(c["guard"]["basis"]) == BASIS
    assert list(c["guard"]["equivalence"]) == ["equivalent", "p", "ci90"]


def test_json_shape_of_hosts_and_pairs():
    sides = [*sides_of_a_sweep(np.random.default_rng(3), -0.03, blocks=8, hosts=2)]
    c = compare(*sides).as_dict()
    assert [h["name"] for h in c["hosts"]] == ["host h0", "host h1"] and c["estimate"]["method"] == "blocks"
    assert list(c["hosts"][0]) == ["name", "n_baseline", "n_variant", "units", "difference"]
    assert set(c["hosts"][0]["difference"]) == set(c["difference"])
    assert list(c["across_hosts"]) == [
        "hosts", "q", "p", "i2", "heterogeneous", "tau2", "mean", "ci95", "prediction95"]
    assert set(c["basis"]["batch_effect"]) == {
        "f", "df_between", "df_within", "p", "sd_between", "sd_within", "shown"}
    pairs = compare(*sides, metric="accuracy").as_dict()["paired"]
    assert pairs.keys() >= {"n", "mean", "t", "p", "ci95", "correlation"} and pairs["n"] == 40
    watched = compare_groups(*sides, Question(METRICS, watched=True)).as_dict()
    assert list(watched["fixed"]) == ANSWER and watched["raw"]["watched"] and not watched["fixed"]["watched"]


def test_the_rule_is_told_alike_in_the_readme_and_in_its_notebook():
    def five(text): return re.findall(r"^([1-5]\. .+)$", text, re.MULTILINE)
    cells = json.loads((ROOT / "nbs/evidence/07_rule.ipynb").read_text(encoding="utf-8"))["cells"]
    notebook = five("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("### What a verdict says")[2]
    assert len(notebook) == 5 and five(readme)[:5] == notebook


# ---------------------------------------------------------------- groups

def record(seed=0, variant="baseline", config_hash="aaaa11112222", profile="demo", **more):
    return dict(
        run_id=f"{variant}{config_hash}{profile}{seed}", study="cifar", profile=profile, variant=variant,
        config={"epochs": 1}, config_hash=config_hash, seed=seed, repeat=0, batch="b", status="completed",
        started_at="2026-01-01T00:00:00+00:00", time_seconds=1.0) | more


def test_the_earliest_of_several_completed_runs_counts_in_any_order_and_time_zone():
    rows = [record(started_at="2026-01-01T11:30:00+02:00", batch="first"),     # 09:30 UTC
            record(started_at="2026-01-01T10:00:00Z", batch="second"),
            record(started_at="2026-01-01T10:00:00.250+00:00", batch="third"),
            record(started_at="2026-01-01T01:00:00+00:00", batch="never", status="failed")]  # a failed try is no result
    for seed in range(5):
        g = make_group(pd.DataFrame(rows).sample(frac=1, random_state=seed))
        assert g.runs.batch.tolist() == ["first"] and g.failed == 1
        assert g.duplicate_runs.batch.tolist() == ["second", "third"]


def test_a_run_without_id_is_not_a_duplicate_of_another():
    g = make_group(pd.DataFrame([record(run_id=None), record(run_id=None), record(started_at=None)]))
    assert len(g.runs) == 3 and g.duplicates == 0


def test_no_run_is_lost():
    rng = np.random.default_rng(2)
    def anything(second):
        return record(
            int(rng.integers(6)), rng.choice(["baseline", "crop"]), rng.choice(["aaaa11112222", "bbbb11112222"]),
            status=rng.choice(["completed", "failed", "diverged"]), started_at=f"2026-01-01T00:00:{second:02d}Z")
    frame = pd.DataFrame([anything(i % 60) for i in range(300)])
    groups = split(select(frame, "cifar"))
    assert len(groups) == 4 and sum(len(g.runs) + g.failed + g.diverged + g.duplicates for g in groups) == 300
    for g in groups:
        assert g.runs.run_id.is_unique and g.runs.seed.is_monotonic_increasing and set(g.runs.status) == {"completed"}


def test_names_of_groups():
    frame = pd.DataFrame([record(0), record(1), record(0, config_hash="aaaa11119999"), record(0, "crop", "cccc")])
    assert find_group(frame, "baseline", {"baseline": "aaaa11112222"}).config_hash == "aaaa11112222"
    assert find_group(frame, "crop").name == "crop" and find_group(frame, "crop@c").config_hash == "cccc"
    assert find_group(frame, "baseline@aaaa11119").name == "baseline@aaaa11119"
    with pytest.raises(SpeedrunError, match="baseline@aaaa11112 .2 .*baseline@aaaa11119 .1 "):
        find_group(frame, "baseline")
    with pytest.raises(SpeedrunError, match="fits 2 groups"): find_group(frame, "baseline@aaaa")
    with pytest.raises(SpeedrunError, match="other settings"): find_group(frame, "crop", {"crop": "dddd"})
    with pytest.raises(SpeedrunError, match='Did you mean "crop"'): find_group(frame, "corp")


def test_all_failed_is_a_group_too():
    g = find_group(pd.DataFrame([record(s, status="failed", time_seconds=None) for s in range(3)]), "baseline")
    assert len(g.runs) == 0 and g.failed == 3
    assert g.values("time_seconds").empty and describe(g.values("accuracy")).n == 0


def test_profiles_are_a_choice():
    frame = pd.DataFrame([record(0), record(0, profile="full")])
    assert set(select(frame, "cifar", "full").profile) == {"full"}
    assert set(select(frame.iloc[:1], "cifar").profile) == {"demo"}
    with pytest.raises(SpeedrunError, match="--profile"): select(frame, "cifar")
    with pytest.raises(SpeedrunError, match="no runs yet"): select(pd.DataFrame(), "cifar")


def test_evidence_does_not_import_torch():
    modules = "speedrun_nb.importing.import_, speedrun_nb.audit.audit, speedrun_nb.evidence.questions"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
