import numpy as np
import pytest
from scipy import stats

from valor.evaluation import bootstrap

SAMPLES = 4000


def mean(pair):
    whole, resampled = ((s["sum"] / s["studies"]) for s in pair)
    return float(whole[0]), resampled


def run(tables, subjects, *, samples=SAMPLES, seed=0):
    columns = ("studies", "sum")
    full = {name: np.stack([np.ones(len(v)), v], axis=1) for name, v in tables.items()}
    sums = bootstrap.resampled_sums(full, columns, subjects=subjects, samples=samples, seed=seed)
    return {name: mean(pair) for name, pair in sums.items()}


def width(interval):
    return interval.high - interval.low


@pytest.fixture
def values():
    return np.random.default_rng(1).normal(0.5, 0.2, 200)


def test_agrees_with_scipy_where_studies_are_independent(values):
    ours = bootstrap.interval(*run({"a": values}, [str(i) for i in range(200)])["a"], confidence=0.95)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=SAMPLES, method="percentile", rng=2).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.002)
    assert ours.high == pytest.approx(theirs.high, abs=0.002)


def test_clustering_widens_the_interval_of_alike_studies(values):
    alike = np.repeat(values[:50], 4)
    by_subject = bootstrap.interval(*run({"a": alike}, np.repeat(np.arange(50), 4).astype(str))["a"], confidence=0.95)
    as_if_independent = bootstrap.interval(*run({"a": alike}, [str(i) for i in range(200)])["a"], confidence=0.95)
    assert width(by_subject) > 1.6 * width(as_if_independent)


def test_pairing_narrows_the_interval_of_a_difference(values):
    better = values + 0.02 + np.random.default_rng(3).normal(0, 0.02, 200)
    subjects = [str(i) for i in range(200)]
    pairs = run({"a": values, "b": better}, subjects)
    paired = bootstrap.difference(pairs["b"], pairs["a"], confidence=0.95)
    unpaired = bootstrap.difference(run({"b": better}, subjects, seed=9)["b"], pairs["a"], confidence=0.95)
    assert width(paired) < width(unpaired) / 3
    assert paired.excludes_zero
    assert not unpaired.excludes_zero


def test_same_checkpoint_differs_by_exactly_nothing(values):
    pairs = run({"a": values, "b": values}, [str(i) for i in range(200)])
    none = bootstrap.difference(pairs["a"], pairs["b"], confidence=0.95)
    assert (none.value, none.low, none.high) == (0, 0, 0)
    assert not none.excludes_zero


def test_seed_decides_alone(values, monkeypatch):
    subjects = [str(i) for i in range(200)]
    first = run({"a": values}, subjects, samples=100, seed=4)["a"][1]
    assert (first == run({"a": values}, subjects, samples=100, seed=4)["a"][1]).all()
    assert (first != run({"a": values}, subjects, samples=100, seed=5)["a"][1]).any()
    monkeypatch.setattr(bootstrap, "_BLOCK_BYTES", 8 * 200 * 7)
    np.testing.assert_allclose(first, run({"a": values}, subjects, samples=100, seed=4)["a"][1], rtol=1e-12)


def test_wider_confidence_gives_a_wider_interval(values):
    pair = run({"a": values}, [str(i) for i in range(200)])["a"]
    assert width(bootstrap.interval(*pair, confidence=0.99)) > width(bootstrap.interval(*pair, confidence=0.8))


def test_undefined_draws_are_left_out_and_an_undefined_value_has_no_interval():
    draws = np.array([0.2, np.nan, 0.4, 0.3])
    assert bootstrap.interval(0.3, draws, confidence=0.9).low >= 0.2
    assert bootstrap.interval(0.3, draws, confidence=0.9).defined == 0.75
    assert bootstrap.interval(0.3, np.full(4, np.nan), confidence=0.9).defined == 0
    assert bootstrap.interval(0.3, draws[[0, 2, 3]], confidence=0.9).defined == 1
    assert bootstrap.interval(float("nan"), draws, confidence=0.9).as_json() == {
        "value": None,
        "low": None,
        "high": None,
        "defined": 0.75,
    }
    assert not bootstrap.interval(float("nan"), draws, confidence=0.9).excludes_zero
