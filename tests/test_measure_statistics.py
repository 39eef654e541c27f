"""Intervals, power, the order of periods and the stopping rule."""

import importlib.util
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from prune2serve.serve import design, statistics
from prune2serve.serve.statistics import Values


def load_benchmark():
    path = Path(__file__).parent.parent / "benchmarks" / "measure.py"
    spec = importlib.util.spec_from_file_location("benchmark_measure", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_resampled_quantile_equals_numpy_on_the_repeated_values():
    generator = np.random.default_rng(1)
    rounds = [generator.normal(size=n) for n in (3, 5, 1, 4)]
    values, weights = Values(rounds), statistics.resample_weights(4, seed=2, num_resamples=50)
    for q in (0.0, 0.5, 0.9, 1.0):
        naive = [
            np.quantile(np.concatenate([r for r, n in zip(rounds, drawn, strict=True) for _ in range(n)]), q)
            for drawn in weights
        ]
        assert values.quantile(weights, q) == pytest.approx(naive)


def test_resampled_mean_equals_the_mean_of_the_repeated_values():
    rounds = [np.array([1.0, 2.0]), np.array([10.0])]
    weights = np.array([[2, 0], [1, 1], [0, 2]])
    assert Values(rounds).mean(weights) == pytest.approx([1.5, 13 / 3, 10.0])


def test_identical_arms_give_exactly_one_and_no_width():
    rounds = [np.array([3.0, 5.0]), np.array([4.0, 9.0]), np.array([2.0, 2.5])]
    weights = statistics.resample_weights(3, 0)
    found = statistics.compare_means(Values(rounds), Values(rounds), weights)
    assert (found.ratio, found.interval, found.difference) == (1.0, (1.0, 1.0), 0.0)
    assert found.smallest_effect == pytest.approx(0, abs=1e-5)


def test_one_round_has_no_interval_and_a_rare_percentile_has_none_either():
    one = Values([np.array([1.0, 2.0])])
    found = statistics.compare_means(one, one, statistics.resample_weights(1, 0))
    assert found.ratio == 1.0 and found.interval is None and found.smallest_effect is None
    rounds = Values([np.arange(1.0, 11.0)] * 5)  # 50 values: 2.5 lie beyond p95, 25 beyond p50
    weights = statistics.resample_weights(5, 0)
    assert statistics.compare_quantiles(rounds, rounds, 0.95, weights).interval is None
    assert statistics.compare_quantiles(rounds, rounds, 0.5, weights).interval is not None


def test_a_round_without_values_gives_no_estimate():
    a = Values([np.array([1.0]), np.array([])])
    assert statistics.compare_means(a, a, statistics.resample_weights(2, 0)) is None


def test_a_resample_of_value_zero_gives_no_interval():
    a = Values([np.array([0.0, 0.0]), np.array([4.0, 5.0]), np.array([4.0, 6.0])])
    found = statistics.compare_means(a, a, statistics.resample_weights(3, 0))
    assert found.ratio == 1.0 and found.interval is None and found.smallest_effect is None


def test_the_interval_is_the_t_interval_of_independent_rounds():
    """With one value a round and arm, log ratio +- t * s / sqrt(n), up to the bootstrap's own noise."""
    generator = np.random.default_rng(3)
    n = 30
    logs = generator.normal(size=n) * 0.01
    a = Values([np.array([100.0])] * n)
    b = Values([np.array([100.0 * math.exp(x)]) for x in logs])
    found = statistics.compare_means(a, b, statistics.resample_weights(n, 0, 4000))
    half = statistics.t_quantile(0.975, n - 1) * np.std(logs, ddof=1) / math.sqrt(n)
    assert math.log(found.interval[1] / found.ratio) == pytest.approx(half, rel=0.05)


def test_rates_are_totals_over_totals():
    a = (np.array([10.0, 20.0]), np.array([1.0, 4.0]))
    b = (np.array([10.0, 20.0]), np.array([2.0, 1.0]))
    found = statistics.compare_rates(a, b, statistics.resample_weights(2, 0))
    assert (found.baseline, found.candidate) == (6.0, 10.0)  # 30 / 5 and 30 / 3


def test_power_agrees_with_simulation():
    generator, n, spread, effect = np.random.default_rng(4), 6, 0.05, 0.06
    draws = generator.normal(math.log1p(effect), spread, size=(20_000, n))
    errors = draws.std(axis=1, ddof=1) / math.sqrt(n)
    found = np.mean(np.abs(draws.mean(axis=1)) > statistics.t_quantile(0.975, n - 1) * errors)
    assert statistics.power(effect, spread, n) == pytest.approx(found, abs=0.01)
    assert statistics.power(effect, spread, n, pilot_rounds=5) < statistics.power(effect, spread, n)


def test_rounds_needed_is_the_smallest_that_reaches_the_power():
    needed = statistics.rounds_needed(0.02, 0.05)
    assert statistics.power(0.02, 0.05, needed) >= 0.8 > statistics.power(0.02, 0.05, needed - 1)


def test_smallest_effect_is_what_the_power_promises():
    effect = statistics.smallest_effect(0.01, 8)
    assert statistics.power(effect, 0.01 * math.sqrt(8), 8) == pytest.approx(0.8, abs=1e-3)


def test_intervals_cover_and_the_plain_bootstrap_does_not():
    """A seeded part of `benchmarks/measure.py coverage`, whose 200 experiments print the real figures."""
    found = load_benchmark().coverage(150, 6, seed=11)
    for name in ("mean", "throughput", "p50"):
        assert 0.91 <= found[name] <= 0.99, (name, found[name])  # 95% +- 2.3 standard errors of 150 experiments
    assert found["mean (plain percentile bootstrap)"] < 0.91


def test_a_round_is_counterbalanced_and_its_order_random_but_repeatable():
    orders = ["".join(p.arm[0] for p in design.periods_of_round(r, seed=5)) for r in range(60)]
    assert set(orders) == {"bccb", "cbbc"}
    assert 15 <= Counter(orders)["bccb"] <= 45
    assert orders[7] == "".join(p.arm[0] for p in design.periods_of_round(7, seed=5))
    halves = [p.half_round for p in design.periods_of_round(3, seed=5)]
    assert halves == [6, 6, 7, 7]  # each half is shared by one period of either arm
    assert {p.arm for p in design.periods_of_round(3, seed=5)[:2]} == {"baseline", "candidate"}


def test_the_stopping_rule_looks_at_every_watched_width():
    rule = design.StoppingRule(precision=0.02)
    assert not rule.precise(5, [0.01, 0.01])  # too few rounds to know their own spread
    assert rule.precise(6, [0.01, 0.02])
    assert not rule.precise(9, [0.01, 0.03])
    assert not rule.precise(9, [0.01, None])
    assert not design.StoppingRule().precise(9, [0.0])


def test_the_time_limit_ends_before_a_round_that_would_not_fit():
    rule = design.StoppingRule(time_limit_s=0.5)
    begun = time.monotonic()
    count = sum(1 for _ in rule.rounds() if time.sleep(0.11) is None)
    assert count == 4 and time.monotonic() - begun < 0.5
    assert sum(1 for _ in design.StoppingRule(time_limit_s=0.0).rounds()) == design.MIN_ROUNDS
    assert sum(1 for _ in design.StoppingRule(max_rounds=2).rounds()) == 2
