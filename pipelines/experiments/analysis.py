"""What the arms' tables say: values per seed, and paired differences with intervals over subjects and seeds.

An interval is a percentile bootstrap with two levels: seeds are drawn, and within each drawn seed its subjects, the
same ones for both arms (Davison and Hinkley 1997, section 3.8). A difference is the mean of the seeds' differences.
With five seeds the upper level is coarse, and such an interval covers less than it says where seeds differ much. So
beside it stands Student's interval of the seeds' own differences, which knows nothing of the subjects within a seed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from valor.evaluation.bootstrap import Sums, interval
from valor.evaluation.measures import Measure

SAMPLES = 2000
SHOWN = (
    "truth_f1_micro", "truth_f1_macro", "truth_hallucination", "truth_omission", "truth_abnormal_recall",
    "truth_side_accuracy", "flip_rate", "similarity", "report_f1_micro",
)  # fmt: skip
"""The metrics of the document's tables."""


@dataclasses.dataclass(frozen=True)
class Table:
    """One arm's numbers of one seed: the subject of each study (N), and (N, columns) named `columns`."""

    subjects: np.ndarray
    columns: tuple[str, ...]
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Difference:
    """Ours minus theirs: the mean over seeds with its bounds, and each seed's own."""

    value: float
    low: float
    high: float
    seeds: Mapping[int, float]

    def student(self, *, confidence: float = 0.95) -> tuple[float, float]:
        """Return the bounds of the mean by the t distribution of the seeds' differences; infinite for one seed."""
        from scipy import stats

        values = list(self.seeds.values())
        if len(values) < 2:
            return -np.inf, np.inf
        half = stats.t.ppf(0.5 + confidence / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
        return self.value - half, self.value + half


def measured(tables: Mapping[int, Table]) -> dict[str, Measure]:
    """Return the metrics that these tables allow, by name."""
    from valor.clinical.vocabulary import OBSERVATIONS
    from valor.evaluation.measures import measures

    first = next(iter(tables.values()))
    sums = Sums(first.columns, sum(table.values.sum(axis=0, keepdims=True) for table in tables.values()))
    held = {
        source: [f for f in OBSERVATIONS if sums[f"{source}/tp/{f}"][0] + sums[f"{source}/fn/{f}"][0] > 0]
        for source in ("report", "truth")
    }
    return {m.name: m for m in measures(truth=True, findings=held)}  # type: ignore[arg-type]


def value(measure: Measure, table: Table) -> float:
    """Return a metric of one table."""
    return float(measure.compute(Sums(table.columns, table.values.sum(axis=0, keepdims=True)))[0])


def compare(
    measure: Measure, ours: Mapping[int, Table], theirs: Mapping[int, Table], *, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Return the difference of two arms over the seeds that both have.

    Args:
        measure: what is compared.
        ours, theirs: tables by seed; rows of one seed are the same studies in the same order.
        confidence: of the interval.
        seed: of the draws.
    """
    seeds = sorted(set(ours) & set(theirs))
    rng = np.random.default_rng(seed)
    drawn = np.stack([_resampled(measure, ours[s], theirs[s], rng) for s in seeds])
    picks = rng.integers(0, len(seeds), (SAMPLES, len(seeds)))
    means = drawn[picks, np.arange(SAMPLES)[:, None]].mean(axis=1)
    single = {s: value(measure, ours[s]) - value(measure, theirs[s]) for s in seeds}
    found = interval(float(np.mean(list(single.values()))), means, confidence=confidence)
    return Difference(found.value, found.low, found.high, single)


def _resampled(measure: Measure, ours: Table, theirs: Table, rng: np.random.Generator) -> np.ndarray:
    """Return (SAMPLES,) differences over redrawn subjects of one seed."""
    assert (ours.subjects == theirs.subjects).all()
    _, cluster = np.unique(ours.subjects, return_inverse=True)
    count = int(cluster.max()) + 1
    weights = np.stack([np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(SAMPLES)])
    by_study = weights[:, cluster].astype(np.float64)
    a, b = (np.asarray(measure.compute(Sums(t.columns, by_study @ t.values))) for t in (ours, theirs))
    return a - b


def best_of_curve(curve: Mapping[str, Table], measure: Callable[[Table], float]) -> tuple[str, float]:
    """Return the bias at which a curve is best, and its value there: chosen on the test studies, in its favour."""
    return max(((bias, measure(table)) for bias, table in curve.items()), key=lambda pair: pair[1])


def relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the change of the means, relative to theirs."""
    return float(np.mean(ours) / np.mean(theirs) - 1)
