"""Paired percentile bootstrap, clustered by subject, for metrics that are functions of sums over studies.

Source: Efron and Tibshirani 1993, chapters 8 and 13 (resampling the independent unit; percentile interval). A
subject's studies are not independent, so subjects are drawn, not studies. Each draw serves every checkpoint, so a
difference of two checkpoints is paired by study. What is left out: BCa correction, and any correction for looking at
many metrics at once; an interval is for one metric read alone.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_BLOCK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value on all studies and its bootstrap bounds; nan where undefined (no study to count).

    `defined` is the share of the draws, in [0, 1], in which the metric is defined; the bounds are of those draws alone.
    """

    value: float
    low: float
    high: float
    defined: float

    @property
    def excludes_zero(self) -> bool:
        """Whether both bounds lie on the same side of zero."""
        return self.low > 0 or self.high < 0

    def as_json(self) -> dict[str, float | None]:
        """Return {value, low, high, defined} with None for nan."""
        fields = dataclasses.asdict(self)
        return {key: float(value) if math.isfinite(value) else None for key, value in fields.items()}


class Sums(Mapping[str, np.ndarray]):
    """Sums of named per-study columns, one array (draws,) per column."""

    def __init__(self, columns: Sequence[str], values: np.ndarray):
        self._index = {name: i for i, name in enumerate(columns)}
        self._values = values

    def __getitem__(self, name: str) -> np.ndarray:
        return self._values[:, self._index[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def stack(self, names: Sequence[str]) -> np.ndarray:
        """Return several columns as one (draws, columns) array."""
        return self._values[:, [self._index[name] for name in names]]


def draws(subjects: Sequence[str], *, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield blocks of (draws, studies) float64 weights: how often each study is in each resample.

    All studies of a subject share a weight. The blocks together hold `samples` draws and depend on `seed` only.
    """
    _, cluster = np.unique(np.asarray(subjects), return_inverse=True)
    count = int(cluster.max()) + 1
    rng = np.random.default_rng(seed)
    block = max(1, min(samples, _BLOCK_BYTES // (8 * len(cluster))))
    for start in range(0, samples, block):
        size = min(block, samples - start)
        picked = np.stack([np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(size)])
        yield picked[:, cluster].astype(np.float64)


def resampled_sums(
    tables: Mapping[str, np.ndarray], columns: Sequence[str], *, subjects: Sequence[str], samples: int, seed: int
) -> dict[str, tuple[Sums, Sums]]:
    """Return, per checkpoint, its sums over all studies (1 draw) and over each of `samples` shared resamples.

    Args:
        tables: checkpoint name to (studies, columns) float64, rows in the order of `subjects`.
        columns: the columns' names.
        subjects: the subject of each study.
        samples: number of resamples.
        seed: seed of the draws.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in tables}
    for weights in draws(subjects, samples=samples, seed=seed):
        for name, table in tables.items():
            parts[name].append(weights @ table)
    return {
        name: (Sums(columns, table.sum(axis=0, keepdims=True)), Sums(columns, np.concatenate(parts[name])))
        for name, table in tables.items()
    }


def interval(value: float, resampled: np.ndarray, *, confidence: float) -> Interval:
    """Return the percentile interval of (draws,) resampled values; draws where the metric is undefined are left out."""
    defined = resampled[np.isfinite(resampled)]
    share = len(defined) / len(resampled)
    if not math.isfinite(value) or not len(defined):
        return Interval(value=math.nan, low=math.nan, high=math.nan, defined=share)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(value=float(value), low=float(low), high=float(high), defined=share)


def difference(ours: tuple[float, np.ndarray], theirs: tuple[float, np.ndarray], *, confidence: float) -> Interval:
    """Return the paired interval of `ours - theirs`, each a (value, resampled values) pair from the same draws."""
    return interval(ours[0] - theirs[0], ours[1] - theirs[1], confidence=confidence)
