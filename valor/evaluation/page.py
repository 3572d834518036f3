"""The evaluation page: one HTML file that holds everything it shows and asks nobody for anything.

Every text passes jinja2's escaping; a content security policy with the script's own hash is the second lock, since
reports are foreign text. Without scripts the page still shows all it holds.
"""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from valor.evaluation import charts
from valor.evaluation.cards import View, card, outcome
from valor.evaluation.inputs import LABELS
from valor.evaluation.measures import slug
from valor.evaluation.table import direction, findings_text, number

_HERE = Path(__file__).parent
_TILES = ("f1_micro", "hallucination", "omission")
_SPREAD = 0.5
"""The share of cards taken as the worst; the others are spread evenly over the rest."""


def render(view: View) -> str:
    """Return the page as HTML."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "slug": slug}
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    source = "truth" if view.metrics["truth"] else "report"
    chosen = choose(view)
    by_study = {study.study_id: study for study in view.studies}
    rows = {name: {row["study_id"]: row for row in one.rows} for name, one in view.predictions.items()}
    return environment.get_template("page.html").render(
        metrics=view.metrics,
        table=view.table,
        groups=_groups(view.table),
        tiles=_tiles(view.table, source),
        findings_text=findings_text(view.table) if view.table["contrast"] else "",
        worse=any(row["direction"] == "worse" for row in view.table["findings"]),
        findings=_findings(view.metrics, view.table["contrast"], source),
        dots=charts.per_finding(view.metrics, source),
        trade_off=charts.trade_off(view.metrics, source),
        source=source,
        labels=LABELS,
        last=last_stage(view),
        cards=[card(view, by_study[s], {name: found[s] for name, found in rows.items()}) for s in chosen],
        publish_text=view.publish_text,
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704  our own file
        js=Markup(script),  # noqa: S704  our own file
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def last_stage(view: View) -> str:
    """Return the latest training stage that was evaluated: cards are ranked by its errors."""
    return [name for name in view.predictions if name != "champion" or len(view.predictions) == 1][-1]


def choose(view: View) -> list[str]:
    """Return the studies that the page shows, worst first: half are the worst, half are spread over the rest.

    Worst is the number of hallucinated and omitted findings of the last stage, ties by study id.
    """
    statements = view.statements[last_stage(view)]

    def errors(study: str) -> int:
        found = outcome(statements[study], view.judge[study])
        return len(found["hallucinated"]) + len(found["omitted"])

    ranked = sorted((study.study_id for study in view.studies), key=lambda study: (-errors(study), study))
    wanted = min(view.page_studies, len(ranked))
    worst = ranked[: max(1, round(wanted * _SPREAD))] if wanted else []
    rest = ranked[len(worst) :]
    count = wanted - len(worst)
    return worst + [rest[i * len(rest) // count] for i in range(count)]


def _groups(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the table's rows under their headings, each with its difference as a bar on the group's own scale."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in table["rows"]:
        found.setdefault(row["group"], []).append(row)
    groups = []
    for name, rows in found.items():
        # Bars share a scale only where units agree: percents of one group, and every other row on its own.
        shared = max((_reach(row) for row in rows if row["form"] == "percent"), default=0.0)
        bars = [charts.bar(row, limit=shared if row["form"] == "percent" else _reach(row)) for row in rows]
        groups.append({"name": name, "rows": [{**row, "bar": bar} for row, bar in zip(rows, bars, strict=True)]})
    return groups


def _reach(row: Mapping[str, Any]) -> float:
    cell = row["difference"]
    return max(abs(cell["low"]), abs(cell["high"])) if cell and cell["value"] is not None else 0.0


def _tiles(table: Mapping[str, Any], source: str) -> list[Mapping[str, Any]]:
    wanted = [f"{source}_{name}" for name in _TILES] + ["grounding_ratio"]
    rows = {row["metric"]: row for row in table["rows"]}
    return [rows[name] for name in wanted if name in rows]


def _findings(metrics: Mapping[str, Any], contrast: str, source: str) -> list[dict[str, Any]]:
    """Return the per-finding table: support, F1 of each checkpoint, and its difference."""
    rows = []
    for finding, support in sorted(metrics["support"][source].items(), key=lambda pair: (-pair[1], pair[0])):
        key = f"{source}_f1_{slug(finding)}"
        cells = {name: found[key] for name, found in metrics["checkpoints"].items()}
        if all(cell["value"] is None for cell in cells.values()):
            continue
        difference = metrics["differences"][contrast][key] if contrast else None
        rows.append(
            {
                "finding": finding,
                "support": support,
                "cells": cells,
                "difference": difference,
                "direction": direction(difference, True) if difference else "",
            }
        )
    return rows
