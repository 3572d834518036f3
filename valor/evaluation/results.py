"""metrics.json: every metric of every checkpoint and every paired difference, with intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from valor.clinical.vocabulary import OBSERVATIONS
from valor.evaluation import bootstrap
from valor.evaluation.bootstrap import Interval, Sums
from valor.evaluation.inputs import Predictions
from valor.evaluation.measures import SOURCES, Measure, Source, measures
from valor.evaluation.scores import COLUMNS, Expected
from valor.recipe import EvaluationSettings

FACTS = (
    *("schema_version", "dataset_digest", "split", "studies", "subjects", "truth", "annotated_studies"),
    *("checkpoint_digests", "bootstrap"),
)
"""The keys of metrics.json that say what was evaluated and how."""
PAIRS = (
    ("text", "sft"),
    ("vision", "text"),
    ("vision", "sft"),
    ("sft", "champion"),
    ("text", "champion"),
    ("vision", "champion"),
)
"""Differences, first minus second; each candidate meets the champion, since the recipe's gate chooses one."""


def compute(
    tables: Mapping[str, np.ndarray],
    *,
    subjects: Sequence[str],
    expected: Mapping[Source, Mapping[str, Expected]],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """Return `checkpoints`, `differences`, `measures` and `support` of metrics.json.

    Args:
        tables: per checkpoint (studies, columns) from `scores.table`.
        subjects: the subject of each study.
        expected: what each source holds; with `truth` there are `truth_*` metrics.
        settings: samples, confidence and seed.
    """
    support = {source: _support(studies) for source, studies in expected.items()}
    held = {source: [f for f in OBSERVATIONS if support.get(source, {}).get(f)] for source in SOURCES}
    wanted = measures(truth="truth" in expected, findings=held)
    sums = bootstrap.resampled_sums(
        tables, COLUMNS, subjects=subjects, samples=settings.bootstrap_samples, seed=settings.seed
    )
    values = {name: {m.name: _values(m, *pair) for m in wanted} for name, pair in sums.items()}
    checkpoints = {
        name: {key: bootstrap.interval(*pair, confidence=settings.confidence).as_json() for key, pair in found.items()}
        for name, found in values.items()
    }
    return {
        "checkpoints": checkpoints,
        "differences": {
            f"{ours}-{theirs}": _differences(values[ours], values[theirs], settings.confidence)
            for ours, theirs in PAIRS
            if ours in values and theirs in values
        },
        "measures": {m.name: _describe(m) for m in wanted},
        "support": support,
    }


def run_facts(
    predictions: Mapping[str, Predictions], *, truth: bool, annotated: int, settings: EvaluationSettings
) -> dict[str, Any]:
    """Return `FACTS`: digests, counts, and how the intervals were made."""
    first = next(iter(predictions.values()))
    return {
        "schema_version": 1,
        "dataset_digest": first.dataset_digest,
        "split": first.split,
        "studies": len(first.rows),
        "subjects": len({row["subject_id"] for row in first.rows}),
        "truth": truth,
        "annotated_studies": annotated,
        "checkpoint_digests": {name: one.checkpoint_digest for name, one in predictions.items()},
        "bootstrap": {
            "samples": settings.bootstrap_samples,
            "confidence": settings.confidence,
            "seed": settings.seed,
            "unit": "subject_id",
        },
    }


def as_interval(cell: Mapping[str, float | None]) -> Interval:
    """Return a {value, low, high, defined} cell of metrics.json as an Interval, None as nan."""
    fields = {key: cell[key] for key in ("value", "low", "high", "defined")}
    return Interval(**{key: math.nan if value is None else float(value) for key, value in fields.items()})


def _values(measure: Measure, whole: Sums, resampled: Sums) -> tuple[float, np.ndarray]:
    return float(measure.compute(whole)[0]), np.asarray(measure.compute(resampled))


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], confidence: float) -> dict[str, Any]:
    return {key: bootstrap.difference(ours[key], theirs[key], confidence=confidence).as_json() for key in ours}


def _support(studies: Mapping[str, Expected]) -> dict[str, int]:
    """Return in how many studies each finding is held by the source."""
    return {f: sum(f in expected.present for expected in studies.values()) for f in OBSERVATIONS}


def _describe(measure: Measure) -> dict[str, Any]:
    return {
        "label": measure.label,
        "group": measure.group,
        "higher_is_better": measure.higher_is_better,
        "form": measure.form,
        "finding": measure.finding,
    }
