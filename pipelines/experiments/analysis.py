"""What the arms' tables say: values per seed, and paired differences with intervals over subjects and seeds.

A difference is the mean of the seeds' differences, and its interval is Student's. A seed has models and test subjects
of its own, so what its difference departs from the mean by holds both sources of chance, and the seeds' differences are
independent draws. A bootstrap that draws seeds and then subjects would count the subjects twice, and of few seeds that
differ it would be too narrow. Beside the interval stands a percentile bootstrap over subjects with the seeds held: how
sure the sign is for these very models.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from valor.errors import UserError
from valor.evaluation.bootstrap import Sums, interval, resampled_sums
from valor.evaluation.measures import Measure

SAMPLES = 2000
SHOWN = (
    "truth_f1_micro", "truth_f1_macro", "truth_hallucination", "truth_omission", "truth_abnormal_recall",
    "truth_side_accuracy", "flip_rate", "similarity", "report_f1_micro",
)  # fmt: skip
"""The metrics of the document's tables."""


@dataclasses.dataclass(frozen=True)
class Table:
    """One arm's numbers of one seed.

    Attributes:
        subjects: (N,) a number per subject.
        columns: their names.
        values: (N, columns) float64.
        studies: a digest of the N studies' identifiers, in order.
    """

    subjects: np.ndarray
    columns: tuple[str, ...]
    values: np.ndarray
    studies: str = ""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Ours minus theirs.

    Attributes:
        value: the mean over seeds.
        low, high: its bounds by Student's t of the seeds' differences; infinite for one seed.
        within: its bounds by a bootstrap over subjects with the seeds held.
        seeds: each seed's own difference.
    """

    value: float
    low: float
    high: float
    within: tuple[float, float]
    seeds: Mapping[int, float]

    @property
    def is_sure(self) -> bool:
        """Whether zero lies outside the bounds."""
        return self.low > 0 or self.high < 0


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

    Raises:
        UserError: the tables of a seed are of different studies.
    """
    seeds = sorted(set(ours) & set(theirs))
    drawn = np.stack([_resampled(measure, ours[s], theirs[s], seed=seed + s) for s in seeds])
    single = {s: value(measure, ours[s]) - value(measure, theirs[s]) for s in seeds}
    mean, low, high = student(list(single.values()), confidence=confidence)
    held = interval(mean, drawn.mean(axis=0), confidence=confidence)
    return Difference(mean, low, high, (held.low, held.high), single)


def student(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return (mean, low, high) with the mean's bounds by the t distribution, which are infinite for one value."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -np.inf, np.inf
    half = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def _resampled(measure: Measure, ours: Table, theirs: Table, *, seed: int) -> np.ndarray:
    """Return (SAMPLES,) differences over redrawn subjects of one seed."""
    if ours.studies != theirs.studies or not np.array_equal(ours.subjects, theirs.subjects):
        raise UserError(
            "two arms' tables of one seed hold different studies; delete them and run valor experiments again"
        )
    tables = {"ours": ours.values, "theirs": theirs.values}
    subjects = ours.subjects.astype(str).tolist()
    sums = resampled_sums(tables, ours.columns, subjects=subjects, samples=SAMPLES, seed=seed)
    a, b = (np.asarray(measure.compute(sums[name][1])) for name in tables)
    return a - b


def best_of_curve(curve: Mapping[str, Table], measure: Callable[[Table], float]) -> tuple[str, float]:
    """Return the bias at which a curve is best, and its value there: chosen on the test studies, in its favour."""
    return max(((bias, measure(table)) for bias, table in curve.items()), key=lambda pair: pair[1])


def least_missed(points: Sequence[tuple[float, float]], *, invented: float) -> float:
    """Return what an operating curve misses at least where it invents no more than `invented`, taken in its favour.

    Between two points a convex curve runs below their chord, but not below the lines through its neighbours, nor below
    the lower of the two. A curve that invents more throughout misses at least what it does where it invents least.

    Args:
        points: (missed, invented), each in [0, 1], along the curve.
        invented: in [0, 1].
    """
    reached = [missed for missed, said in points if said <= invented]
    for place, (one, two) in enumerate(itertools.pairwise(points)):
        if min(one[1], two[1]) < invented < max(one[1], two[1]):
            before, after = points[max(0, place - 1) : place + 1], points[place + 1 : place + 3]
            lines = [pair for pair in (before, after) if len(pair) == 2 and pair[0][1] != pair[1][1]]
            lowest = max([min(one[0], two[0]), *(_on_line(*line, invented=invented) for line in lines)])
            reached.append(min(_on_line(one, two, invented=invented), lowest))
    return min(reached, default=min(points, key=lambda point: point[1])[0])


def _on_line(one: tuple[float, float], two: tuple[float, float], *, invented: float) -> float:
    """Return what the line through two points, which must not invent the same, misses."""
    (missed, said), (next_missed, next_said) = one, two
    return missed + (next_missed - missed) * (invented - said) / (next_said - said)


def relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the change of the means, relative to theirs."""
    return float(np.mean(ours) / np.mean(theirs) - 1)
