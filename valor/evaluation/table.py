"""The stage table: what each stage changed, with intervals; the same rows for the page, MLflow and the terminal.

It holds numbers and names of metrics only, so it may leave restricted storage.
"""

import math
from collections.abc import Mapping
from typing import Any

from valor.clinical.vocabulary import OBSERVATIONS
from valor.evaluation.inputs import LABELS, NAMES
from valor.evaluation.measures import slug
from valor.evaluation.results import as_interval

HEADLINE = frozenset(
    [
        *("truth_f1_micro", "truth_f1_macro", "truth_hallucination", "truth_omission", "truth_abnormal_recall"),
        *("truth_side_accuracy", "report_f1_micro", "report_f1_macro", "report_hallucination", "report_omission"),
        *(
            "similarity",
            "grounding_ratio",
            "grounding_shuffled",
            "flip_rate",
            "report_bleu_1",
            "report_bleu_4",
            "report_rouge_l",
        ),
        *("report_gleu", "length", "truncated"),
    ]
)
"""The rows that a terminal shows; the page and summary.md show all."""
_CONTRASTS = (("vision", "sft"), ("text", "sft"), ("vision", "champion"))


def build(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return table.json from metrics.json: columns, and rows of formatted and raw numbers.

    The last column is the first of vision - SFT, text - SFT, vision - champion that was evaluated. Of single findings,
    those whose F1 changed with an interval that excludes zero are named; the others stay in metrics.json.
    """
    names = [name for name in NAMES if name in metrics["checkpoints"]]
    contrast = next((f"{a}-{b}" for a, b in _CONTRASTS if f"{a}-{b}" in metrics["differences"]), "")
    rows = [
        _row(name, measure, metrics, names, contrast)
        for name, measure in metrics["measures"].items()
        if not measure["finding"]
    ]
    return {
        "columns": names,
        "labels": {name: LABELS[name] for name in names},
        "contrast": contrast,
        "contrast_label": " - ".join(LABELS[part].removeprefix("+ ") for part in contrast.split("-") if part),
        "confidence": metrics["bootstrap"]["confidence"],
        "studies": metrics["studies"],
        "subjects": metrics["subjects"],
        "truth": metrics["truth"],
        "findings": _changed_findings(metrics, names, contrast),
        "rows": [row for row in rows if any(cell["value"] is not None for cell in row["cells"].values())],
    }


def direction(cell: Mapping[str, float | None], higher_is_better: bool | None) -> str:
    """Return "better", "worse", "changed" or "" for a difference: "" where its interval holds zero."""
    interval = as_interval(cell)
    if not interval.excludes_zero:
        return ""
    if higher_is_better is None:
        return "changed"
    return "better" if (interval.low > 0) == higher_is_better else "worse"


def render_text(table: Mapping[str, Any], *, full: bool = False) -> str:
    """Return the table as Markdown that lines up on a terminal; without `full`, its headline rows only.

    A difference is marked where its interval excludes zero: `+` better, `-` worse, `~` changed.
    """
    head = ["metric", *(table["labels"][name] for name in table["columns"])]
    if table["contrast"]:
        head.append(f"{table['contrast_label']} [{table['confidence']:.0%} CI]")
    rows = [row for row in table["rows"] if full or row["headline"]]
    lines = [head, *([_title(row), *_cells(row, table)] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    texts = [_line(line, widths) for line in lines]
    texts.insert(1, "|" + "-" * (widths[0] + 2) + "|" + "".join("-" * (w + 1) + ":|" for w in widths[1:]))
    return "\n".join([*texts, "", *notes(table)])


def notes(table: Mapping[str, Any]) -> list[str]:
    """Return the sentences that belong under the table."""
    lines = [
        f"{table['studies']} studies of {table['subjects']} subjects. Intervals: paired bootstrap over subjects, each "
        "for one metric alone. + better, - worse, ~ changed: the interval excludes zero."
    ]
    if table["contrast"]:
        lines.insert(0, findings_text(table))
    if table["truth"]:
        lines.append("The studies are drawn, their truth is known: these figures say nothing of clinical performance.")
    return lines


def findings_text(table: Mapping[str, Any]) -> str:
    """Return the sentence on single findings whose F1 changed: a mean may hide one that is lost."""
    sentences = []
    for which in ("worse", "better"):
        rows = [row for row in table["findings"] if row["direction"] == which]
        named = [f"{row['finding']} {difference_text(row)[:-2]}" for row in rows]
        sentences.append(f"{which}: {', '.join(named) or 'none'}")
    return f"F1 of single findings, {table['contrast_label']}, %: {'; '.join(sentences)}."


def number(value: float | None, form: str, *, signed: bool = False) -> str:
    """Return a number as people read it; percents without their sign, which the label carries."""
    if value is None or not math.isfinite(value):
        return "n/a"
    sign = "+" if signed else ""
    if form == "percent":
        return f"{value * 100:{sign}.1f}"
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign}.1f}"


def _changed_findings(metrics: Mapping[str, Any], names: list[str], contrast: str) -> list[dict[str, Any]]:
    source = "truth" if metrics["truth"] else "report"
    keys = {f"{source}_f1_{slug(finding)}": finding for finding in OBSERVATIONS if contrast}
    rows = [
        {**_row(key, metrics["measures"][key], metrics, names, contrast), "finding": finding}
        for key, finding in keys.items()
        if key in metrics["measures"]
    ]
    return sorted((row for row in rows if row["direction"]), key=lambda row: row["difference"]["value"])


def _row(
    name: str, measure: Mapping[str, Any], metrics: Mapping[str, Any], names: list[str], contrast: str
) -> dict[str, Any]:
    source = next((s for s in ("truth", "report") if name.startswith(f"{s}_")), "")
    difference = metrics["differences"][contrast][name] if contrast else None
    return {
        "metric": name,
        "label": measure["label"] + (", %" if measure["form"] == "percent" else ""),
        "source": source,
        "group": measure["group"],
        "form": measure["form"],
        "headline": name in HEADLINE,
        "higher_is_better": measure["higher_is_better"],
        "cells": {n: metrics["checkpoints"][n][name] for n in names},
        "difference": difference,
        "direction": direction(difference, measure["higher_is_better"]) if difference else "",
    }


def _cells(row: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    texts = [number(row["cells"][name]["value"], row["form"]) for name in table["columns"]]
    if table["contrast"]:
        texts.append(difference_text(row))
    return texts


def difference_text(row: Mapping[str, Any]) -> str:
    """Return a row's difference with its interval and mark."""
    value, low, high = (number(row["difference"][key], row["form"], signed=True) for key in ("value", "low", "high"))
    mark = {"better": " +", "worse": " -", "changed": " ~", "": "  "}[row["direction"]]
    return "n/a  " if value == "n/a" else f"{value} [{low}, {high}]{mark}"


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['label']} ({row['source']})" if row["source"] else row["label"]


def _line(cells: list[str], widths: list[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"
