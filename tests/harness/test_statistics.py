"""Means, paired differences and ratios against numbers worked out by hand, and their properties."""

import math

import numpy as np
import pytest

from harness import statistics

T_3 = 3.182446305  # 97.5 % point of Student's t with 3 degrees of freedom, from a printed table


def fresh_rng() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def test_mean_by_hand():
    e = statistics.mean([1.0, 2.0, 3.0, 4.0])
    assert (e.value, e.n) == (2.5, 4)
    assert e.half == pytest.approx(T_3 * math.sqrt(5 / 3) / 2)  # sd = sqrt(5/3), sqrt(n) = 2
    assert e.low == pytest.approx(2.5 - e.half)


def test_missing_values_are_left_out():
    assert statistics.mean([1.0, None, 3.0, math.nan]) == statistics.mean([1.0, 3.0])


@pytest.mark.parametrize(("values", "value"), [([], math.nan), ([7.0], 7.0)])
def test_too_few_values_have_no_interval(values, value):
    e = statistics.mean(values)
    assert e.n == len(values) and math.isnan(e.low) and math.isnan(e.half)
    assert e.value == value or math.isnan(value) and math.isnan(e.value)


def test_infinity_is_refused():
    with pytest.raises(ValueError, match="finite"):
        statistics.mean([1.0, math.inf])


def test_interval_covers_the_true_mean_95_times_of_100():
    rng = fresh_rng()
    hits = [e.low <= 5 <= e.high for e in (statistics.mean(rng.normal(5, 2, 4)) for _ in range(2000))]
    assert 0.92 < np.mean(hits) < 0.98  # six standard errors


def test_paired_difference_by_hand():
    c = statistics.paired_difference([3.0, 5.0, 7.0, 9.0], [2.0, 3.0, 8.0, 5.0])  # differences 1, 2, -1, 4
    assert (c.value, c.n, c.wins) == (1.5, 4, 3)
    assert c.half == pytest.approx(T_3 * math.sqrt(13 / 3) / 2)  # squares about 1.5: .25 + .25 + 6.25 + 6.25
    assert c.verdict == "tie"


def test_what_a_seed_adds_to_both_cancels():
    """The level of a seed is far larger than the gap, and must not matter at all."""
    rng = fresh_rng()
    a, b = rng.normal(26, 0.4, 8), rng.normal(25, 0.4, 8)
    level = rng.normal(0, 100, 8)
    plain, shifted = statistics.paired_difference(a, b), statistics.paired_difference(a + level, b + level)
    assert shifted.value == pytest.approx(plain.value)
    assert shifted.half == pytest.approx(plain.half)
    assert shifted.wins == plain.wins
    assert statistics.mean(a + level).half > 10 * shifted.half


def test_difference_is_antisymmetric():
    rng = fresh_rng()
    a, b = rng.normal(1, 1, 6), rng.normal(0, 1, 6)
    forward, back = statistics.paired_difference(a, b), statistics.paired_difference(b, a)
    assert forward.value == pytest.approx(-back.value) and forward.low == pytest.approx(-back.high)
    assert forward.wins + back.wins == 6


@pytest.mark.parametrize(("higher", "verdict", "wins"), [(True, "better", 4), (False, "worse", 0)])
def test_verdict_follows_the_direction(higher, verdict, wins):
    c = statistics.paired_difference([2.0, 3.1, 4.0, 5.1], [1.0, 2.0, 3.0, 4.0], higher_is_better=higher)
    assert (c.verdict, c.wins) == (verdict, wins)


def test_one_pair_is_no_verdict():
    assert statistics.paired_difference([2.0, 3.0], [1.0, math.nan]).verdict is None


@pytest.mark.parametrize("n", [4, 40])
def test_geometric_mean(n):
    rng = fresh_rng()
    ratios = np.exp(rng.normal(math.log(2), 0.1, n))
    e = statistics.geometric_mean(ratios)
    assert e.value == pytest.approx(np.prod(ratios) ** (1 / n))
    assert e.low < e.value < e.high
    back = statistics.geometric_mean(1 / ratios)  # the same speeds seen from the other side
    assert back.value == pytest.approx(1 / e.value)
    assert math.log(back.high) == pytest.approx(-math.log(e.low), abs=0.005)


def test_small_n_uses_the_t_interval_of_the_logs():
    e = statistics.geometric_mean([1.0, 2.0, 4.0, 8.0])  # logs 0, 1, 2, 3 times ln 2
    half = T_3 * math.sqrt(5 / 3) / 2 * math.log(2)
    assert e.value == pytest.approx(2**1.5) and e.high == pytest.approx(2**1.5 * math.exp(half))


def test_equal_ratios_have_an_interval_of_no_width():
    e = statistics.geometric_mean([1.5] * 20)
    assert (e.low, e.high) == (pytest.approx(1.5), pytest.approx(1.5))


def test_zero_ratio_is_refused():
    with pytest.raises(ValueError, match="positive"):
        statistics.geometric_mean([1.0, 0.0])


def test_speed_ratio_is_paired():
    baseline = np.array([10.0, 100.0, 1000.0])  # three machines of very different speed
    c = statistics.speed_ratio(baseline, baseline / 2)
    assert (c.value, c.n, c.wins, c.verdict) == (pytest.approx(2), 3, 3, "better")
    assert c.half == pytest.approx(0, abs=1e-9)
    assert statistics.speed_ratio(baseline, baseline).verdict == "tie"


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="align by seed"):
        statistics.paired_difference([1.0, 2.0], [1.0])
