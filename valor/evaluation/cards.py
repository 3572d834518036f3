"""One study as the page shows it: the image's layers, and each report cut into judged segments."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from valor.clinical.labeler import Mention
from valor.data.manifest import Study, first_pixels
from valor.evaluation import pictures, scores
from valor.evaluation.inputs import LABELS, Predictions, Truth
from valor.evaluation.measures import Source
from valor.evaluation.scores import Expected, Statement

_SEVERITY_OF_KIND = ("hallucinated", "denied", "matched", "unjudged")
"""Where mentions overlap, the first of these names the segment."""


@dataclasses.dataclass(frozen=True)
class View:
    """Everything that the page derives from; see `valor.stages.evaluate`."""

    metrics: Mapping[str, Any]
    table: Mapping[str, Any]
    predictions: Mapping[str, Predictions]
    studies: Sequence[Study]
    references: Mapping[str, Statement]
    statements: Mapping[str, Mapping[str, Statement]]
    truth: Truth | None
    expected: Mapping[Source, Mapping[str, Expected]]
    masks: Mapping[str, Mapping[str, np.ndarray]]
    page_studies: int
    publish_text: bool

    @property
    def judge(self) -> Mapping[str, Expected]:
        """What reports are judged by: truth where there is any, else the reference report."""
        return self.expected.get("truth") or self.expected["report"]


def outcome(statement: Statement, expected: Expected) -> dict[str, list[str]]:
    """Return a report's matched, hallucinated and omitted findings, each sorted."""
    said, present = scores.said(statement, expected).keys(), expected.present & expected.judged
    return {
        "matched": sorted(said & present),
        "hallucinated": sorted(said - present),
        "omitted": sorted(present - said),
    }


def kind_of(mention: Mention, statement: Statement, expected: Expected) -> str:
    """Return how a mention is shown: matched, hallucinated, denied (an omission said aloud), unjudged or "" (plain)."""
    if mention.finding == "No Finding":
        missed = (expected.present & expected.judged) - {"Support Devices"}
        denies_all = missed and not scores.said(statement, expected).keys() & missed
        return "denied" if mention.label == "positive" and denies_all else ""
    if mention.label == "negative":
        there = mention.finding in expected.present & expected.judged
        return "denied" if there and mention.finding not in scores.said(statement, expected) else ""
    names = expected.names(mention.finding)
    if not names:
        return "unjudged"
    return "matched" if names & expected.present else "hallucinated"


def segments(text: str, statement: Statement, expected: Expected) -> list[dict[str, Any]]:
    """Return a report as consecutive {text, kind, findings, spans}; joined, the texts give the report."""
    judged = [(m, kind) for m in statement.mentions if (kind := kind_of(m, statement, expected))]
    groups: list[list[tuple[Mention, str]]] = []
    for mention, kind in sorted(judged, key=lambda pair: (pair[0].start, pair[0].end)):
        if groups and mention.start < max(m.end for m, _ in groups[-1]):
            groups[-1].append((mention, kind))
        else:
            groups.append([(mention, kind)])
    parts: list[dict[str, Any]] = []
    place = 0
    for group in groups:
        start, end = group[0][0].start, max(m.end for m, _ in group)
        if start > place:
            parts.append({"text": text[place:start], "kind": ""})
        kind = min((k for _, k in group), key=_SEVERITY_OF_KIND.index)
        findings = list(dict.fromkeys(m.finding for m, k in group if k == kind))
        spans = [(m.start, m.end) for m, _ in group]
        parts.append({"text": text[start:end], "kind": kind, "findings": findings, "spans": spans})
        place = end
    if place < len(text):
        parts.append({"text": text[place:], "kind": ""})
    return parts


def card(view: View, study: Study, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the template needs of one study; `rows` are its predictions by checkpoint."""
    expected = view.judge[study.study_id]
    masks = view.masks.get(study.study_id, {})
    pixels = first_pixels(study)
    columns = [_reference(view, study, rows)]
    for name, row in rows.items():
        columns.append(_column(name, row, view.statements[name][study.study_id], expected, masks))
    outcomes = {column["key"]: column["outcome"] for column in columns[1:]}
    first = next(iter(rows.values()))
    x0, y0, x1, y1 = first["image_box"]
    return {
        "study_id": study.study_id,
        "image": pictures.radiograph(pixels),
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "box": {"left": x0, "top": y0, "width": x1 - x0, "height": y1 - y0},
        "outlines": [{"finding": f, "src": pictures.outline(mask)} for f, mask in sorted(masks.items())],
        "present": [
            {"finding": finding, "words": _place(view, study.study_id, finding)}
            for finding in sorted(expected.present & expected.judged)
        ],
        "columns": columns,
        "outcomes": outcomes,
        "numbers": _sort_numbers(outcomes, rows),
    }


def _reference(view: View, study: Study, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    statement, expected = view.references[study.study_id], view.judge[study.study_id]
    text = next(iter(rows.values()))["reference"]
    return {
        "key": "reference",
        "title": "Reference report",
        "segments": segments(text, statement, expected),
        "outcome": outcome(statement, expected),
        "similarity": None,
        "truncated": False,
    }


def _column(
    name: str, row: Mapping[str, Any], statement: Statement, expected: Expected, masks: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    parts = segments(row["hypothesis"], statement, expected)
    maps = {(m["start"], m["end"], m["finding"]): m for m in row["attention"] or []}
    for part in parts:
        if part["kind"]:
            found = [m for (start, end, _), m in maps.items() if (start, end) in part["spans"]]
            part["attention"] = _attention(found[0], masks, row["image_box"]) if found else None
    return {
        "key": name,
        "title": LABELS[name],
        "segments": parts,
        "outcome": outcome(statement, expected),
        "similarity": row["similarity"] if row["similarity"] == row["similarity"] else None,
        "truncated": row["truncated"],
    }


def _attention(mention: Mapping[str, Any], masks: Mapping[str, np.ndarray], box: Sequence[float]) -> dict[str, Any]:
    grid = np.asarray(mention["grid"], dtype=np.float64).reshape(mention["grid_h"], mention["grid_w"])
    mask = masks.get(mention["finding"])
    ours, shuffled = scores.mention_ratios(mention, mask, box=box) if mask is not None else (None, None)
    return {"src": pictures.heat(grid), "finding": mention["finding"], "ratio": ours, "shuffled": shuffled}


def _place(view: View, study_id: str, finding: str) -> str:
    """Return the finding's side, zone and severity where truth knows them."""
    present = view.truth.studies[study_id].get(finding) if view.truth else None
    if present is None:
        return ""
    side = "bilateral" if len(present.sides) == 2 else next(iter(present.sides), "")
    return " ".join(word for word in (present.severity, side, present.zone and f"{present.zone} zone") if word)


def _sort_numbers(outcomes: Mapping[str, Mapping[str, list[str]]], rows: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that cards are sorted by: errors per checkpoint, and the change from the first to the last."""
    numbers: dict[str, float] = {}
    for name, found in outcomes.items():
        numbers[f"hallucinated-{name}"] = len(found["hallucinated"])
        numbers[f"omitted-{name}"] = len(found["omitted"])
        numbers[f"errors-{name}"] = len(found["hallucinated"]) + len(found["omitted"])
    stages = [name for name in outcomes if name != "champion"]
    if len(stages) > 1:
        numbers["worse"] = numbers[f"errors-{stages[-1]}"] - numbers[f"errors-{stages[0]}"]
    return numbers
