"""How numbers stand in the document's tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.experiments.analysis import Difference
from valor.evaluation.measures import Measure


def percent(value: Any) -> str:
    """Return a fraction as a percentage."""
    return f"{100 * value:.1f}"


def change(found: Difference, measure: Measure) -> str:
    """Return a difference in points with its interval, and whether it is better or worse where that is sure."""
    mark = ""
    if found.is_sure and measure.higher_is_better is not None:
        mark = " better" if (found.value > 0) == measure.higher_is_better else " **worse**"
    return bounded(found.value, found.low, found.high) + mark


def points(value: float) -> str:
    """Return a fraction's change in points, with a second digit where the first would hide its sign."""
    shown, closer = f"{100 * value:+z.1f}", f"{100 * value:+z.2f}"
    return closer if not float(shown) and float(closer) else shown


def bounded(value: float, low: float, high: float) -> str:
    """Return a fraction's change in points with its bounds, where it has any."""
    bounds = f" [{points(low)}, {points(high)}]" if np.isfinite(low) else ""
    return f"{points(value)}{bounds}"


def heading(measure: Measure) -> str:
    """Return a metric's name, with what it is measured against."""
    source = {"truth": " (truth)", "report": " (report)"}.get(measure.name.split("_")[0], "")
    return measure.label + source


def verdicts(rows: Sequence[tuple[str, bool, str]]) -> str:
    """Return a table of what was asked, whether that is met, and what was found."""
    lines = [f"| {asked} | {got} | {'yes' if met else '**no**'} |" for asked, met, got in rows]
    return "| asked | found | met |\n|---|---:|---|\n" + "\n".join(lines) + "\n"
