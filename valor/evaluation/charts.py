"""Charts as inline SVG: per-finding F1 by checkpoint, hallucination against omission; colours come from page.css."""

from collections.abc import Mapping, Sequence
from typing import Any

from valor.evaluation.inputs import LABELS
from valor.evaluation.measures import slug

_ROW = 38
_LEFT, _RIGHT, _TOP = 232, 24, 8
_WIDTH = 720


def per_finding(metrics: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """Return a dot plot of F1 with intervals, one row per finding that the source holds, or None where it holds none.

    Rows run from the most to the least frequent finding; the template draws what this lays out.
    """
    support = metrics["support"][source]
    findings = sorted((f for f in support if support[f]), key=lambda f: (-support[f], f))
    if not findings:
        return None
    names = list(metrics["checkpoints"])
    rows = []
    for i, finding in enumerate(findings):
        middle = _TOP + _ROW * (i + 0.5)
        marks = [
            mark
            for j, name in enumerate(names)
            if (mark := _mark(metrics, name, f"{source}_f1_{slug(finding)}", middle + (j - (len(names) - 1) / 2) * 9))
        ]
        place = {"y": middle, "top": middle - _ROW / 2}
        rows.append({"finding": finding, "support": support[finding], "marks": marks, **place})
    height = _TOP + _ROW * len(findings)
    ticks = [{"x": _x(v / 100), "label": f"{v}"} for v in (0, 20, 40, 60, 80, 100)]
    return {
        "width": _WIDTH, "height": height + 42, "bottom": height, "left": _LEFT, "right": _WIDTH - _RIGHT,
        "row": _ROW, "rows": rows, "ticks": ticks, "legend": legend(names),
    }  # fmt: skip


def trade_off(metrics: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """Return hallucination against omission, a cross of intervals per checkpoint, or None where either is undefined."""
    names = list(metrics["checkpoints"])
    keys = f"{source}_omission", f"{source}_hallucination"
    cells = {name: tuple(metrics["checkpoints"][name][key] for key in keys) for name in names}
    if any(cell["value"] is None for pair in cells.values() for cell in pair):
        return None
    highest = max(cell["high"] for pair in cells.values() for cell in pair)
    step = next(s for s in (0.05, 0.1, 0.2, 0.25) if highest <= 5 * s or s == 0.25)
    limit = step * (int(highest / step) + 1)
    size, left, top = 330.0, 58.0, 12.0

    def x(value: float) -> float:
        return round(left + value / limit * size, 1)

    def y(value: float) -> float:
        return round(top + size - value / limit * size, 1)

    points = [
        {
            "name": name, "label": LABELS[name], "x": x(o["value"]), "y": y(h["value"]),
            "x0": x(o["low"]), "x1": x(o["high"]), "y0": y(h["low"]), "y1": y(h["high"]),
            "title": f"{LABELS[name]}: {_percent(o)} omitted, {_percent(h)} hallucinated",
        }
        for name, (o, h) in cells.items()
    ]  # fmt: skip
    count = round(limit / step)
    ticks = [{"x": x(i * step), "y": y(i * step), "label": f"{i * step * 100:.0f}"} for i in range(count + 1)]
    path = [point for point in points if point["name"] != "champion"]
    return {
        "width": left + size + 24, "height": top + size + 46, "left": left, "top": top, "size": size,
        "points": points, "path": path, "ticks": ticks, "legend": legend(names),
    }  # fmt: skip


def legend(names: Sequence[str]) -> list[dict[str, str]]:
    """Return the checkpoints' marks with their labels."""
    return [{"name": name, "label": LABELS[name]} for name in names]


def bar(row: Mapping[str, Any], *, limit: float) -> dict[str, float] | None:
    """Return a difference's interval as fractions of a bar from -limit to limit, clipped; None where undefined."""
    cell = row["difference"]
    if not cell or cell["value"] is None or limit <= 0:
        return None

    def place(value: float) -> float:
        return round(50 + 50 * max(-1.0, min(1.0, value / limit)), 2)

    return {"low": place(cell["low"]), "value": place(cell["value"]), "high": place(cell["high"])}


def _mark(metrics: Mapping[str, Any], name: str, key: str, y: float) -> dict[str, Any] | None:
    cell = metrics["checkpoints"][name][key]
    if cell["value"] is None:
        return None
    return {
        "name": name, "y": round(y, 1), "x": _x(cell["value"]), "x0": _x(cell["low"]), "x1": _x(cell["high"]),
        "title": f"{LABELS[name]}: F1 {_percent(cell)}",
    }  # fmt: skip


def _x(value: float) -> float:
    return round(_LEFT + value * (_WIDTH - _LEFT - _RIGHT), 1)


def _percent(cell: Mapping[str, float]) -> str:
    return f"{cell['value']:.1%} [{cell['low']:.1%}, {cell['high']:.1%}]"
