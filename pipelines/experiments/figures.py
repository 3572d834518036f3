"""The document's figures as SVG files that read on a light and on a dark page: forests, and operating curves."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.experiments.analysis import Difference
from pipelines.experiments.wording import bounded

_INK, _FAINT, _GOOD, _BAD, _OPEN = "#6e7781", "#afb8c1", "#2da44e", "#cf222e", "#8c959f"
_LOOKS = (("#6e7781", "o"), ("#0969da", "s"), ("#bf8700", "^"), ("#8250df", "D"))
"""Colour and mark of each model in the operating curve."""
_STYLE: Any = {
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titleweight": "bold",
    "figure.titlesize": "medium",
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.5,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    # The same figure is the same file, and its words can be searched.
    "svg.hashsalt": "valor",
    "svg.fonttype": "none",
}


def forest(path: Path, rows: Sequence[tuple[str, Difference, bool]], *, title: str, axis: str) -> None:
    """Write a forest plot: a row per difference in percentage points, its interval, and a dot per seed.

    Args:
        path: the file.
        rows: label, difference as fractions, and whether more is better: intervals without zero are green or red.
        title: what is compared with what.
        axis: the label of the axis: the unit, and how to read it.
    """
    with axes_of(path, title, height=1.0 + 0.42 * len(rows)) as axes:
        for y, (_, found, more_is_better) in enumerate(rows):
            _difference(axes, y, found, more_is_better=more_is_better)
            _words(axes, y, bounded(found.value, found.low, found.high), _INK)
        axes.axvline(0, color=_INK, linewidth=1)
        _rows(axes, [label for label, *_ in rows])
        axes.set(xlabel=axis)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One metric of an arm and of others that are compared with it.

    Attributes:
        axis: its label: metric, unit and which side is better.
        more_is_better: whether a larger value is a better one.
        reference: the arm's mean over its seeds, in [0, 1].
        differences: by arm, the others' paired differences from it.
    """

    axis: str
    more_is_better: bool
    reference: float
    differences: Mapping[str, Difference]


def side_by_side(path: Path, reference: str, panels: Sequence[Panel], *, title: str) -> None:
    """Write a row per arm and a panel per metric: its interval, a dot per seed, and the difference in words.

    An arm stands as far from the reference as its paired differences say, so that one of fewer seeds stands right too.
    An interval that leaves zero out is green or red, by whether it is for the better.
    """
    names = [reference, *panels[0].differences]
    with axes_of(path, title, height=1.0 + 0.42 * len(names), columns=len(panels)) as axes:
        for one, panel in zip(axes, panels, strict=True):
            zero = 100 * panel.reference
            one.axvline(zero, color=_INK, linewidth=0.8, linestyle=":")
            one.plot(zero, 0, "D", color=_INK)
            _words(one, 0, f"{zero:.1f}", _INK)
            for y, found in enumerate(panel.differences.values(), start=1):
                colour = _difference(one, y, found, more_is_better=panel.more_is_better, zero=zero)
                _words(one, y, bounded(found.value, found.low, found.high), colour)
            _rows(one, names)
            one.set(xlabel=panel.axis)


def _difference(axes: Any, y: float, found: Difference, *, more_is_better: bool, zero: float = 0.0) -> str:
    """Draw a difference in points from `zero`, its interval and a dot per seed, and return its colour."""
    colour = (_GOOD if (found.value > 0) == more_is_better else _BAD) if found.is_sure else _OPEN
    if math.isfinite(found.low):
        axes.plot([zero + 100 * found.low, zero + 100 * found.high], [y, y], color=colour, linewidth=2.5)
    axes.plot(zero + 100 * found.value, y, "o", color=colour)
    seeds = [zero + 100 * value for value in found.seeds.values()]
    axes.plot(seeds, [y + 0.28] * len(seeds), "o", color=_FAINT, markersize=2.5)
    return colour


def _words(axes: Any, y: float, words: str, colour: str) -> None:
    """Write a row's words at the right of the axes."""
    axes.text(1.02, y, words, transform=axes.get_yaxis_transform(), verticalalignment="center", color=colour)


def _rows(axes: Any, names: Sequence[str]) -> None:
    """Make an axis of named rows, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def operating_curve(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], points: Mapping[str, tuple[float, float]]
) -> None:
    """Write hallucination over omission, both in [0, 1]: a line per curve, a mark per point; left and low is good.

    A curve and a point of one name have one colour. There are looks for four names.
    """
    looks = dict(zip(dict.fromkeys([*points, *curves]), _LOOKS, strict=False))
    with axes_of(path, "What is invented for what is missed: left and low is better", height=4.2) as axes:
        for name, line in curves.items():
            axes.plot(
                [100 * missed for missed, _ in line], [100 * invented for _, invented in line], ".-",
                color=looks[name][0], label=f"{name}, tokens biased",
            )  # fmt: skip
        for name, (missed, invented) in points.items():
            colour, mark = looks[name]
            axes.plot(100 * missed, 100 * invented, mark, color=colour, markersize=8, linestyle="none", label=name)
        axes.set(xlabel="findings missed, %", ylabel="stated findings that are not there, %")
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


@contextmanager
def axes_of(path: Path, title: str, *, height: float, columns: int = 1) -> Iterator[Any]:
    """Yield the axes of a new figure, `height` inches high, and write it to `path` at the end.

    With several columns it is an array of axes that share their rows.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(7.5 if columns == 1 else 9.5, height), layout="constrained")
        figure.suptitle(title, x=0.01, horizontalalignment="left")
        yield figure.subplots(1, columns, sharey=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
