"""Clinical agreement by CheXpert-14 labels: precision, recall, F1, hallucination and omission.

The reference is a report's labels or an external truth; both are mappings finding -> label with unmentioned findings
absent. A cell is positive or not. An uncertain label counts as positive by default ("ones", as in the CheXbert-F1 of
papers) or not ("zeros"); unmentioned and negative are alike.

Figures are sums over the 13 observations; "No Finding" follows from them, so it has its own row and no part in micro,
macro, hallucination or omission.

- hallucination rate: asserted positives that the reference does not hold, over asserted positives (1 - precision);
- omission rate: the reference's positives that are not asserted, over the reference's positives (1 - recall);
- study hallucination (omission) rate: studies with at least one such cell, over all studies.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np

from valor.clinical.labeler import label
from valor.clinical.vocabulary import FINDINGS, OBSERVATIONS, Label

Uncertain = Literal["ones", "zeros"]
Labels = Mapping[str, Label]
TP, FP, FN = 0, 1, 2


def clinical(*, refs: list[str], hyps: list[str]) -> list[float]:
    """Return each pair's F1 over the 13 observations, in [0, 1]; 1 where neither text asserts any."""
    cells = counts(reference_labels=[label(r) for r in refs], hypothesis_labels=[label(h) for h in hyps])
    totals = cells[:, : len(OBSERVATIONS)].sum(axis=1)
    f1 = _f1(totals)
    return np.where(totals.sum(axis=1) == 0, 1.0, f1).tolist()


def counts(
    *,
    reference_labels: Sequence[Labels],
    hypothesis_labels: Sequence[Labels],
    uncertain: Uncertain = "ones",
    judged: Sequence[Collection[str]] | None = None,
) -> np.ndarray:
    """Return (N, 14, 3) int64: true positive, false positive, false negative per study and finding of `FINDINGS`.

    Rows add up: a bootstrap over subjects sums the rows of its draw and calls `scores`.

    Args:
        judged: per study, the findings that the reference can judge; others count as nothing. None judges all.
    """
    if len(reference_labels) != len(hypothesis_labels):
        raise ValueError(f"{len(reference_labels)} reference and {len(hypothesis_labels)} hypothesis labels")
    truth = positives(reference_labels, uncertain=uncertain)
    stated = positives(hypothesis_labels, uncertain=uncertain)
    cells = np.stack([truth & stated, ~truth & stated, truth & ~stated], axis=-1)
    if judged is not None:
        known = np.array([[f in row for f in FINDINGS] for row in judged], dtype=bool).reshape(-1, len(FINDINGS))
        cells &= known[..., None]
    return cells.astype(np.int64)


def positives(labels: Sequence[Labels], *, uncertain: Uncertain = "ones") -> np.ndarray:
    """Return (N, 14) bool: which findings of `FINDINGS` each study asserts."""
    yes = {"positive", "uncertain"} if uncertain == "ones" else {"positive"}
    return np.array([[row.get(f) in yes for f in FINDINGS] for row in labels], dtype=bool).reshape(-1, len(FINDINGS))


def truth_labels(present: Mapping[str, bool]) -> dict[str, Label]:
    """Return labels of an external truth {observation: present}; "No Finding" follows as in the labeler."""
    labels: dict[str, Label] = {f: "positive" if present[f] else "negative" for f in OBSERVATIONS if f in present}
    if not any(v == "positive" for f, v in labels.items() if f != "Support Devices"):
        labels["No Finding"] = "positive"
    return labels


def scores(totals: np.ndarray) -> dict[str, np.ndarray]:
    """Return micro and macro figures from summed counts (..., 14, 3); each value has shape (...), in [0, 1] or nan.

    Keys: micro_precision, micro_recall, micro_f1, macro_f1, hallucination_rate, omission_rate. Macro is the mean over
    the observations that occur in reference or hypothesis; a rate without a denominator is nan.
    """
    totals = np.asarray(totals, dtype=np.float64)[..., : len(OBSERVATIONS), :]
    micro = totals.sum(axis=-2)
    by_finding = _f1(totals)
    occurs = totals.sum(axis=-1) > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        macro = np.where(occurs, by_finding, 0.0).sum(axis=-1) / occurs.sum(axis=-1)
        precision = micro[..., TP] / (micro[..., TP] + micro[..., FP])
        recall = micro[..., TP] / (micro[..., TP] + micro[..., FN])
    return {
        "micro_precision": precision,
        "micro_recall": recall,
        "micro_f1": _f1(micro),
        "macro_f1": macro,
        "hallucination_rate": 1.0 - precision,
        "omission_rate": 1.0 - recall,
    }


def by_finding(totals: np.ndarray) -> dict[str, dict[str, float]]:
    """Return {finding: {precision, recall, f1, support, asserted}} from counts summed over studies, (14, 3)."""
    table = {}
    for finding, (tp, fp, fn) in zip(FINDINGS, np.asarray(totals, dtype=np.float64), strict=True):
        table[finding] = {
            "precision": tp / (tp + fp) if tp + fp else float("nan"),
            "recall": tp / (tp + fn) if tp + fn else float("nan"),
            "f1": float(_f1(np.array([tp, fp, fn]))),
            "support": tp + fn,
            "asserted": tp + fp,
        }
    return table


def study_errors(counts: np.ndarray) -> np.ndarray:
    """Return (N, 2) bool per study: holds a hallucinated observation, lacks a true one. Means are the study rates."""
    cells = counts[:, : len(OBSERVATIONS)]
    return np.stack([cells[..., FP].any(axis=1), cells[..., FN].any(axis=1)], axis=-1)


def _f1(cells: np.ndarray) -> np.ndarray:
    """Return 2tp / (2tp + fp + fn) over the last axis (tp, fp, fn); nan where all are 0."""
    cells = np.asarray(cells, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 2 * cells[..., TP] / (2 * cells[..., TP] + cells[..., FP] + cells[..., FN])
