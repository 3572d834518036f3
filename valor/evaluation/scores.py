"""Per-study numbers of one checkpoint: the columns whose sums `valor.evaluation.measures` turns into metrics."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from valor.clinical.hierarchy import ancestors, one_per_line
from valor.clinical.labeler import Mention, label, mentions
from valor.clinical.vocabulary import OBSERVATIONS, Label
from valor.evaluation import grounding
from valor.evaluation.inputs import Pair, Predictions, Truth, finite_or_zero, side_set
from valor.evaluation.measures import BLEU_COLUMNS, SOURCES, Source

_DEVICES = "Support Devices"
_KINDS = ("tp", "fp", "fn")
_STUDY_COUNTS = ("abnormal", "abnormal_found", "normal", "normal_kept", "side", "side_right")
COLUMNS: tuple[str, ...] = (
    *(f"{source}/{kind}/{finding}" for source in SOURCES for kind in _KINDS for finding in OBSERVATIONS),
    *(f"{source}/{name}" for source in SOURCES for name in _STUDY_COUNTS),
    "studies",
    "tokens",
    "truncated",
    "empty",
    *BLEU_COLUMNS,
    "rouge_l",
    "gleu",
    "similarity/sum",
    "similarity/count",
    "grounding/mentions",
    "grounding/ratio",
    "grounding/shuffled",
    "pairs/count",
    "pairs/flipped",
)


@dataclasses.dataclass(frozen=True)
class Statement:
    """What a report says: its labels, the sides of each finding that it states, and where it says so."""

    labels: Mapping[str, Label]
    sides: Mapping[str, frozenset[str]]
    mentions: Sequence[Mention]

    @property
    def stated(self) -> frozenset[str]:
        """Findings that it states, for sure or as a possibility."""
        return frozenset(f for f, value in self.labels.items() if value != "negative" and f in OBSERVATIONS)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a source holds for one study.

    Attributes:
        present: its findings.
        judged: the findings it can judge.
        sides: of each finding.
        knows_appearances: a narrower name says a finding that is there: "pneumonia" names the consolidation. Truth
            wants that; a report is compared by its words, as in published figures.
    """

    present: frozenset[str]
    judged: frozenset[str]
    sides: Mapping[str, frozenset[str]]
    knows_appearances: bool = False

    def names(self, finding: str) -> frozenset[str]:
        """Return the findings of this source that a finding's name says: itself, and broader ones that are there."""
        broader = ancestors(finding) & self.present if self.knows_appearances else frozenset()
        return (broader | {finding}) & self.judged


def read_report(text: str) -> Statement:
    """Label a report."""
    found = mentions(text)
    sides: dict[str, frozenset[str]] = {}
    for mention in found:
        if mention.label != "negative":
            sides[mention.finding] = sides.get(mention.finding, frozenset()) | side_set(mention.side)
    return Statement(labels=label(text), sides=sides, mentions=found)


def expected_of_report(statement: Statement) -> Expected:
    """Take a reference report at its word."""
    return Expected(present=statement.stated, judged=frozenset(OBSERVATIONS), sides=statement.sides)


def expected_of_truth(truth: Truth, study: str) -> Expected:
    """Take what is in the image; a finding that others imply is not judged there."""
    present = truth.studies[study]
    sides = {finding: value.sides for finding, value in present.items()}
    judged = frozenset(truth.findings) - truth.implied[study]
    return Expected(present=frozenset(present), judged=judged, sides=sides, knows_appearances=True)


def said(statement: Statement, expected: Expected) -> dict[str, frozenset[str]]:
    """Return the judged findings that a report says, each with the sides that it gives."""
    found: dict[str, frozenset[str]] = {}
    for finding in statement.stated:
        for name in expected.names(finding):
            found[name] = found.get(name, frozenset()) | statement.sides.get(finding, frozenset())
    return found


def expectations(references: Mapping[str, Statement], truth: Truth | None) -> dict[Source, dict[str, Expected]]:
    """Return what each source holds, per study."""
    found: dict[Source, dict[str, Expected]] = {
        "report": {study: expected_of_report(statement) for study, statement in references.items()}
    }
    if truth is not None:
        found["truth"] = {study: expected_of_truth(truth, study) for study in references}
    return found


def clinical_counts(stated: Statement, expected: Expected) -> dict[str, float]:
    """Return one study's clinical columns against one source, without the source's prefix."""
    found, present = said(stated, expected), expected.present & expected.judged
    counts = {f"tp/{f}": 1.0 for f in found.keys() & present}
    wrong = found.keys() - present
    counts |= {f"fp/{f}": 1.0 for f in (one_per_line(wrong) if expected.knows_appearances else wrong)}
    counts |= {f"fn/{f}": 1.0 for f in present - found.keys()}
    # A line or a pacemaker makes no study abnormal, as in CheXpert's "No Finding".
    kind, kept = ("abnormal", "abnormal_found") if present - {_DEVICES} else ("normal", "normal_kept")
    called_abnormal = bool(found.keys() - {_DEVICES})
    counts[kind] = 1.0
    counts[kept] = float(called_abnormal == (kind == "abnormal"))
    sided = [f for f in found.keys() & present if expected.sides.get(f)]
    counts["side"] = float(len(sided))
    counts["side_right"] = float(sum(found[f] == expected.sides[f] for f in sided))
    return counts


def grounding_counts(
    row: Mapping[str, Any], masks: Mapping[str, np.ndarray], present: frozenset[str]
) -> dict[str, float]:
    """Return one study's grounding columns: mentions of findings that are there and have a mask."""
    counts = {"grounding/mentions": 0.0, "grounding/ratio": 0.0, "grounding/shuffled": 0.0}
    for mention in row["attention"] or []:
        finding = mention["finding"]
        if finding not in masks or finding not in present:
            continue
        ours, shuffled = mention_ratios(mention, masks[finding], box=row["image_box"])
        if np.isfinite(ours) and np.isfinite(shuffled):
            counts["grounding/mentions"] += 1
            counts["grounding/ratio"] += ours
            counts["grounding/shuffled"] += shuffled
    return counts


def mention_ratios(mention: Mapping[str, Any], mask: np.ndarray, *, box: Sequence[float]) -> tuple[float, float]:
    """Return a mention's grounding ratio and that of its map under another subject's image."""
    grid = mention["grid_h"], mention["grid_w"]
    covered = grounding.cover(mask, box=box, grid=grid)
    ours, shuffled = (np.asarray(mention[key], dtype=np.float64).reshape(grid) for key in ("grid", "shuffled"))
    return grounding.ratio(ours, covered), grounding.ratio(shuffled, covered)


def flipped(pair: Pair, hypotheses: Mapping[str, Statement], truth: Truth) -> bool:
    """Tell whether a checkpoint's reports follow the change: right about the finding in either image of the pair.

    Right is naming it where it is, on its side where it was moved, and not naming it where it is not.
    """
    for study in (pair.study, pair.twin):
        expected = expected_of_truth(truth, study)
        found = said(hypotheses[study], expected)
        if (pair.finding in found) != (pair.finding in expected.present):
            return False
        if pair.change == "moved" and found[pair.finding] != expected.sides[pair.finding]:
            return False
    return True


def table(
    predictions: Predictions,
    hypotheses: Mapping[str, Statement],
    expected: Mapping[Source, Mapping[str, Expected]],
    masks: Mapping[str, Mapping[str, np.ndarray]],
    flips: Mapping[str, bool] | None = None,
) -> np.ndarray:
    """Return a checkpoint's (studies, columns) float64 table, rows in the order of the predictions.

    Args:
        predictions: its reports.
        hypotheses: what they say.
        expected: what each source holds.
        masks: per study and finding, see `inputs.read_masks`.
        flips: per study that has a twin, whether the two were told apart (`flipped`).
    """
    index = {name: i for i, name in enumerate(COLUMNS)}
    values = np.zeros((len(predictions.rows), len(COLUMNS)))
    wording = _wording(predictions.rows)
    source = expected.get("truth") or expected["report"]
    for i, row in enumerate(predictions.rows):
        study = row["study_id"]
        numbers = {**_form(row), **wording[i]}
        for name, studies in expected.items():
            counts = clinical_counts(hypotheses[study], studies[study])
            numbers |= {f"{name}/{key}": value for key, value in counts.items()}
        numbers |= grounding_counts(row, masks.get(study, {}), source[study].present)
        if flips and study in flips:
            numbers |= {"pairs/count": 1.0, "pairs/flipped": float(flips[study])}
        for key, value in numbers.items():
            values[i, index[key]] = value
    return values


def _form(row: Mapping[str, Any]) -> dict[str, float]:
    similarity, counted = finite_or_zero(row["similarity"])
    return {
        "studies": 1.0,
        "tokens": float(row["hypothesis_tokens"]),
        "truncated": float(row["truncated"]),
        "empty": float(not row["hypothesis"].strip()),
        "similarity/sum": similarity,
        "similarity/count": counted,
    }


def _wording(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the wording columns of every study: BLEU's n-gram counts, ROUGE-L and GLEU."""
    from valor.metrics.bleu import bleu_counts
    from valor.metrics.gleu import gleu
    from valor.metrics.rouge_l import rouge_l

    refs, hyps = [row["reference"] for row in rows], [row["hypothesis"] for row in rows]
    numbers = zip(
        bleu_counts(refs=refs, hyps=hyps), rouge_l(refs=refs, hyps=hyps), gleu(refs=refs, hyps=hyps), strict=True
    )
    return [
        {**dict(zip(BLEU_COLUMNS, counts, strict=True)), "rouge_l": rouge_value, "gleu": gleu_value}
        for counts, rouge_value, gleu_value in numbers
    ]


def label_columns(statement: Statement | None) -> dict[str, int | None]:
    """Return a report's labels as numbers: 1 positive, -1 uncertain, 0 negative, None not mentioned."""
    codes = {"positive": 1, "uncertain": -1, "negative": 0}
    labels = statement.labels if statement else {}
    return {finding: codes[labels[finding]] if finding in labels else None for finding in OBSERVATIONS}
