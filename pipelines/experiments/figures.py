"""The document's figures as SVG files that read on a light and on a dark page: forests, and SFT's operating curve."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.experiments.analysis import Difference

_WIDTH, _ROW, _LEFT, _RIGHT = 720, 34, 190, 128
_INK, _FAINT, _GOOD, _BAD, _OPEN = "#57606a", "#afb8c1", "#1a7f37", "#cf222e", "#6e7781"
_FONT = 'font-family="system-ui, sans-serif"'
_COLOURS = ("#6e7781", "#0969da", "#bf8700", "#8250df", "#1a7f37")


def forest(path: Path, rows: Sequence[tuple[str, Difference, bool]], *, title: str, unit: str = "points") -> None:
    """Write a forest plot: a row per difference in percentage points, its interval, and a dot per seed.

    Args:
        path: the file.
        rows: label, difference as fractions, and whether more is better: intervals without zero are green or red.
        title: what is compared with what.
        unit: of the axis.
    """
    values = [100 * v for _, d, _ in rows for v in (d.low, d.high, *d.seeds.values())]
    limit = max(1.0, *(abs(v) for v in values)) * 1.1
    low, high = min(0.0, min(values)) - 0.05 * limit, max(0.0, max(values)) + 0.05 * limit
    height = 70 + _ROW * len(rows)
    axis = height - 32

    def x(points: float) -> float:
        return round(_LEFT + (points - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    parts = [_text(12, 20, title, weight=600)]
    for tick in _ticks(low, high):
        parts.append(_line(x(tick), 34, x(tick), axis, _FAINT, width=1.5 if tick == 0 else 0.5))
        parts.append(_text(x(tick), axis + 16, f"{tick:+g}" if tick else "0", anchor="middle", size=11))
    parts.append(_text(_WIDTH - _RIGHT + 12, axis + 16, unit, size=11))
    for i, (label, found, more_is_better) in enumerate(rows):
        y = 34 + _ROW * (i + 0.5)
        sure = found.low > 0 or found.high < 0
        colour = (_GOOD if (found.value > 0) == more_is_better else _BAD) if sure else _OPEN
        parts.append(_text(_LEFT - 12, y + 4, label, anchor="end"))
        parts.append(_line(x(100 * found.low), y, x(100 * found.high), y, colour, width=3))
        parts += [_dot(x(100 * v), y + 9, 2, _FAINT) for v in found.seeds.values()]
        parts.append(_dot(x(100 * found.value), y, 5, colour))
        parts.append(
            _text(
                _WIDTH - _RIGHT + 12,
                y + 4,
                f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]",
                size=11,
            )
        )
    _write(path, parts, width=_WIDTH, height=height, title=title)


def operating_curve(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], points: Mapping[str, tuple[float, float]]
) -> None:
    """Write hallucination over omission, both in [0, 1]: a line per curve, a mark per point; left and low is good.

    A curve and a point of one name have one colour.
    """
    colours = dict(zip(dict.fromkeys([*curves, *points]), _COLOURS, strict=False))
    size, left, top = 380.0, 60.0, 40.0
    every = [pair for line in curves.values() for pair in line] + list(points.values())
    low_x, high_x = min(p[0] for p in every) - 0.03, max(p[0] for p in every) + 0.03
    low_y, high_y = min(p[1] for p in every) - 0.03, max(p[1] for p in every) + 0.03

    def place(pair: tuple[float, float]) -> tuple[float, float]:
        return (
            round(left + (pair[0] - low_x) / (high_x - low_x) * size, 1),
            round(top + size - (pair[1] - low_y) / (high_y - low_y) * size, 1),
        )

    parts = [_text(12, 20, "Left and low is better: findings missed against findings invented", weight=600)]
    for tick in _ticks(100 * low_x, 100 * high_x):
        at = place((tick / 100, low_y))
        parts += [_line(at[0], top, at[0], at[1], _FAINT, width=0.5)]
        parts += [_text(at[0], at[1] + 16, f"{tick:g}", anchor="middle", size=11)]
    for tick in _ticks(100 * low_y, 100 * high_y):
        at = place((low_x, tick / 100))
        parts += [_line(at[0], at[1], left + size, at[1], _FAINT, width=0.5)]
        parts += [_text(at[0] - 8, at[1] + 4, f"{tick:g}", anchor="end", size=11)]
    parts.append(_text(left + size / 2, top + size + 36, "findings missed, %", anchor="middle", size=12))
    parts.append(f'<g transform="rotate(-90 16 {top + size / 2})">')
    parts.append(_text(16, top + size / 2, "stated findings that are not there, %", anchor="middle", size=12))
    parts.append("</g>")
    key = top + 10
    for label, line in curves.items():
        colour = colours[label]
        corners = " ".join(f"{px},{py}" for px, py in map(place, line))
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [_dot(*place(pair), 2, colour) for pair in line]
        parts += [_line(left + size + 20, key, left + size + 44, key, colour, width=2)]
        parts += [_text(left + size + 52, key + 4, f"{label}, tokens biased", size=12)]
        key += 22
    for label, pair in points.items():
        parts += [_dot(*place(pair), 6, colours[label]), _dot(left + size + 32, key, 6, colours[label])]
        parts += [_text(left + size + 52, key + 4, label, size=12)]
        key += 22
    _write(path, parts, width=_WIDTH, height=int(top + size + 50), title="Findings missed against findings invented")


def _ticks(low: float, high: float) -> list[float]:
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 100) if (high - low) / s <= 8)
    first = -(-low // step)
    return [step * (first + i) for i in range(int((high - step * first) // step) + 1)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, weight: int = 400) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{_INK}" {_FONT}>'
        f"{html.escape(text)}</text>"
    )


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, *, width: float) -> str:
    return f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="{colour}" stroke-width="{width}"/>'


def _dot(x: float, y: float, radius: float, colour: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"/>'


def _write(path: Path, parts: Sequence[str], *, width: int, height: int, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    lines = [head, f"<title>{html.escape(title)}</title>", *parts, "</svg>"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
