"""How each finding alters a chest. Lengths are in units of the image: 1/6 is one patch of a 16-pixel ViT at 96.

`shape` functions run before the canvas is built (they move diaphragm, heart, ribs); `paint` functions after it.
Every function draws from the finding's own random stream and records where the finding is in `canvas.masks`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from valor.data.phantom.anatomy import MARGIN, SIDE_SIGN, Canvas, Field, ramp
from valor.data.phantom.disease import Finding

_BOTH = ("right", "left")
_ZONE_Y = {"upper": 0.24, "mid": 0.42, "lower": 0.60}
_STRENGTH = {"mild": 0, "moderate": 1, "severe": 2}


def painting_order(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings in the order to paint: pleural fluid and air first, since they bound what a lung shows."""
    return sorted(findings, key=lambda f: f.finding not in ("Pleural Effusion", "Pneumothorax"))


def alter_shape(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """Change the chest's measures for findings that move borders."""
    level = _STRENGTH.get(finding.severity or "", 0)
    if finding.finding == "Cardiomegaly":
        canvas.ctr = (0.545, 0.60, 0.67)[level] + rng.uniform(-0.01, 0.02)
    elif finding.finding == "Enlarged Cardiomediastinum":
        canvas.pedicle_extra = (0.035, 0.055, 0.08)[level] + rng.uniform(-0.005, 0.008)
        canvas.pedicle_bumps = rng.uniform(0.0, 0.02)
    elif finding.finding == "Atelectasis":
        for side in _sides(finding):
            canvas.domes[side] -= (0.015, 0.04, 0.075)[level]
    elif finding.finding == "Fracture":
        _break_ribs(canvas, finding, level, rng)


def paint(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> None:
    """Draw one finding into the built canvas and record its mask."""
    level = _STRENGTH.get(finding.severity or "", 0)
    canvas.masks[finding.finding] = _PAINTERS[finding.finding](canvas, finding, level, rng)


def _sides(finding: Finding) -> tuple[str, ...]:
    return _BOTH if finding.side == "bilateral" else (finding.side or "left",)


def _wall_at(canvas: Canvas, y: float) -> float:
    return float(np.interp(y, canvas.y[:, 0], canvas.chest_wall()[:, 0]))


def _lung_point(canvas: Canvas, side: str, finding: Finding, rng: np.random.Generator) -> tuple[float, float]:
    """Return a place within the finding's zone, between hilum and chest wall, beside the heart in the lower zone."""
    y = _ZONE_Y[finding.zone or "mid"] + rng.uniform(-0.03, 0.03)
    inner, outer = (0.62, 0.75) if finding.zone == "lower" else (0.52, 0.72)
    reach = _wall_at(canvas, y) * rng.uniform(inner, outer)
    return canvas.anatomy.midline + SIDE_SIGN[side] * reach, y


def _cardiomegaly(canvas: Canvas, finding: Finding, level: int, rng: np.random.Generator) -> Field:
    return canvas.heart


def _enlarged_mediastinum(canvas: Canvas, finding: Finding, level: int, rng: np.random.Generator) -> Field:
    return canvas.mediastinum * ramp(0.46 - np.abs(canvas.y - 0.30) * 2, 0.02)


def _edema(canvas: Canvas, finding: Finding, level: int, rng: np.random.Generator) -> Field:
    a = canvas.anatomy
    wing = np.zeros_like(canvas.haze)
    for side in _BOTH:
        wing += canvas.blob(a.midline + SIDE_SIGN[side] * 0.13, 0.46, 0.14, 0.22)
    texture = np.clip(0.9 + 0.22 * canvas.noise(rng, 40), 0.3, 1.5)
    strength = (0.13, 0.22, 0.33)[level] * rng.uniform(0.9, 1.1)
    field = np.clip(wing, 0, 1) * canvas.air
    canvas.haze += np.float32(strength) * field * texture
    canvas.vessel_gain = 1.0 + (0.5, 0.8, 1.0)[level]
    return np.clip(wing * 1.1, 0, 1) * canvas.air


def _consolidation(canvas: Canvas, finding: Finding, level: int, rng: np.random.Generator) -> Field:
    mask = np.zeros_like(canvas.haze)
    radius = (0.09, 0.115, 0.145)[level]
    texture = canvas.noise(rng, 12)
    for side in _sides(finding):
        x, y = _lung_point(canvas, side, finding, rng)
        distance = (canvas.x - np.float32(x)) ** 2 / (radius * 1.15) ** 2 + (canvas.y - np.float32(y)) ** 2 / radius**2
        cloud = ramp(1.15 - np.sqrt(distance) + 0.16 * texture, 0.55) * canvas.air
        canvas.haze += np.float32((0.26, 0.32, 0.38)[level]) * cloud
        mask = np.maximum(mask, cloud)
    return mask


def _atelectasis(canvas: Canvas, finding: Finding, level: int, rng: np.random.Generator) -> Field:
    a, mask = canvas.anatomy, np.zeros_like(canvas.haze)
    thick = (0.024, 0.028, 0.032)[level]
    for side in _sides(finding):
        d = canvas.side_distance(side)
        lift = {"lower": 0.05, "mid": 0.22, "upper": 0.40}[finding.zone or "lower"]
        tilt = rng.uniform(-0.25, 0.25)
        center = min(canvas.domes[side] - lift, canvas.fluid.get(side, 1.0) - 0.03) + rng.uniform(-0.01, 0.01)
        for k in range(level + 1):
            course = np.float32(center - 0.055 * k) + np.float32(tilt) * (d - np.float32(0.2))
            along = ramp(np.minimum(d - 0.07, a.half_width - 0.03 - d), 0.03)
            band = along * ramp(np.float32(thick * 1.6) - np.abs(canvas.y - course), thick) * canvas.air
            canvas.haze += np.float32(0.32) * band
            mask = np.maximum(mask, band)
    return mask


def _lesion(canvas: Canvas, finding: Finding, level: int, rng: np.random.Generator) -> Field:
    # At least 1.5 patches of the tiny models across: what is smaller than a patch, no tiny tower learns.
    radius = (0.132, 0.142, 0.155)[level] * rng.uniform(1.0, 1.06)
    x, y = _lung_point(canvas, _sides(finding)[0], finding, rng)
    distance = np.sqrt((canvas.x - np.float32(x)) ** 2 + (canvas.y - np.float32(y)) ** 2)
    spicule = 1 + 0.06 * canvas.noise(rng, 20) * (level > 0)
    ball = ramp(np.float32(radius) * spicule - distance, 0.018)
    # It takes the place of air, so it stands out less where it lies before heart or diaphragm.
    canvas.haze += np.float32((0.24, 0.30, 0.38)[level]) * ball * (0.2 + 0.8 * canvas.air)
    return ball


def _pneumothorax(canvas: Canvas, finding: Finding, level: int, rng: np.random.Generator) -> Field:
    side, a = _sides(finding)[0], canvas.anatomy
    d, wall = canvas.side_distance(side), canvas.chest_wall()
    gap = (0.06, 0.095, 0.15)[level] * rng.uniform(0.92, 1.1)
    # Air rises: the gap is widest at the apex and thins towards the base unless the pneumothorax is large.
    profile = gap * np.clip(1.25 - (canvas.y - a.apex) * (1.3, 0.9, 0.45)[level], 0.0, 1.3)
    cap = np.float32(a.apex + gap * 1.2) + 3 * np.clip(d - np.float32(0.09), 0, None) ** 2
    lung_edge = np.minimum(wall - profile - d, canvas.y - cap)
    outside = canvas.lungs[side] * (1 - ramp(lung_edge, 0.006)) * canvas.air
    rim = canvas.lungs[side] * np.clip(1 - np.abs(lung_edge - 0.006) / 0.008, 0, 1) * canvas.air
    collapsed = canvas.lungs[side] * ramp(lung_edge, 0.006)
    canvas.dark = np.maximum(canvas.dark, outside)
    canvas.haze += np.float32(0.10) * rim + np.float32((0.02, 0.05, 0.10)[level]) * collapsed * canvas.air
    return outside


def _effusion(canvas: Canvas, finding: Finding, level: int, rng: np.random.Generator) -> Field:
    mask, wall = np.zeros_like(canvas.haze), canvas.chest_wall()
    for side in _sides(finding):
        d = canvas.side_distance(side)
        height = (0.025, 0.13, 0.26)[level] + rng.uniform(-0.01, 0.02)
        top = canvas.domes[side] + 0.035 - height
        canvas.fluid[side] = top
        # The meniscus climbs at the chest wall and, less, at the mediastinum.
        climb = 0.10 * np.exp(-np.clip(wall - d, 0, None) / 0.055)
        fluid = ramp(canvas.y - np.float32(top) + climb.astype(np.float32), 0.02) * (d > 0)
        seen = fluid * canvas.lungs[side] * (1 - canvas.heart)
        canvas.air *= 1 - fluid
        canvas.bright += np.float32(0.04) * seen
        mask = np.maximum(mask, seen)
    return mask


def _break_ribs(canvas: Canvas, finding: Finding, level: int, rng: np.random.Generator) -> None:
    """Shift ribs across a break and remember the breaks' places for the painter."""
    side = _sides(finding)[0]
    d = canvas.side_distance(side)
    y = {"upper": 0.27, "mid": 0.44, "lower": 0.60}[finding.zone or "mid"] + rng.uniform(-0.02, 0.02)
    place = _wall_at(canvas, y) * rng.uniform(0.78, 0.88)
    reach = (0.085, 0.10, 0.125)[level]
    step = (0.022, 0.028, 0.034)[level]
    beyond = ramp(d - np.float32(place), 0.006)
    canvas.rib_shift[side] = np.float32(step) * beyond * np.exp(-(((canvas.y - np.float32(y)) / reach) ** 4))
    canvas.breaks = (side, place, y, reach)


def _fracture(canvas: Canvas, finding: Finding, level: int, rng: np.random.Generator) -> Field:
    side, place, y, reach = canvas.breaks
    x = canvas.anatomy.midline + SIDE_SIGN[side] * place
    # Overlapping ends are denser than the rib, and blood lifts the pleura off the chest wall beside them.
    along = np.exp(-(((canvas.y - np.float32(y)) / reach) ** 4))
    ends = along * np.exp(-(((canvas.x - np.float32(x)) / 0.055) ** 2))
    canvas.bright += np.float32((0.34, 0.38, 0.42)[level]) * ends * np.clip(canvas.ribs(), 0, 1)
    inward = canvas.chest_wall() - canvas.side_distance(side)
    bulge = ramp((0.065, 0.08, 0.095)[level] * along - inward, 0.012) * canvas.lungs[side] * (along > 0.05)
    canvas.haze += np.float32((0.32, 0.35, 0.38)[level]) * bulge * canvas.air
    return np.maximum(ends > 0.3, bulge).astype(np.float32)


def _lines(canvas: Canvas, lines: list[list[tuple[float, float]]], width: float) -> Field:
    """Return anti-aliased polylines given in unit coordinates."""
    scale = canvas.size / (1 + 2 * MARGIN)
    over = 2
    image = Image.new("L", (canvas.size * over, canvas.size * over))
    pen = ImageDraw.Draw(image)
    for line in lines:
        points = [((x + MARGIN) * scale * over, (y + MARGIN) * scale * over) for x, y in line]
        pen.line(points, fill=255, width=max(1, round(width * scale * over)), joint="curve")
    small = image.resize((canvas.size, canvas.size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def _curve(*points: tuple[float, float], steps: int = 24) -> list[tuple[float, float]]:
    """Return a smooth curve through the points (Catmull-Rom)."""
    p = np.array([points[0], *points, points[-1]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    parts = []
    for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True):
        parts.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    return [(float(x), float(y)) for x, y in np.vstack([*parts, p[-1:]])]


def _device(canvas: Canvas, finding: Finding, level: int, rng: np.random.Generator) -> Field:
    field = _DEVICES[finding.kind](canvas, finding, rng)
    canvas.bright += np.float32(0.34) * field
    return field


def _tube(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> Field:
    x, tip = canvas.anatomy.midline + rng.uniform(-0.006, 0.006), rng.uniform(0.27, 0.33)
    return _lines(canvas, [_curve((x + 0.01, -0.04), (x, 0.12), (x, tip))], 0.026)


def _stomach_tube(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> Field:
    x, end = canvas.anatomy.midline, canvas.anatomy.dome_left + 0.11
    return _lines(
        canvas, [_curve((x, -0.04), (x + 0.008, 0.3), (x + 0.012, 0.6), (x + 0.06, end), (x + 0.15, end + 0.03))], 0.022
    )


def _central_line(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> Field:
    m, s = canvas.anatomy.midline, SIDE_SIGN[finding.side or "right"]
    tip = rng.uniform(0.40, 0.46)
    return _lines(
        canvas,
        [_curve((m + s * 0.36, -0.02), (m + s * 0.27, 0.16), (m + s * 0.12, 0.19), (m - 0.045, 0.27), (m - 0.05, tip))],
        0.020,
    )


def _pacemaker(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> Field:
    m, s = canvas.anatomy.midline, SIDE_SIGN[finding.side or "left"]
    x, y = m + s * rng.uniform(0.25, 0.29), rng.uniform(0.21, 0.25)
    box = np.minimum(0.060 - np.abs(canvas.x - np.float32(x)), 0.050 - np.abs(canvas.y - np.float32(y)))
    apex = (m + 0.15, canvas.anatomy.dome_left - 0.06)
    lead = _lines(
        canvas, [_curve((x, y - 0.03), (m + s * 0.12, 0.17), (m - 0.04, 0.26), (m - 0.045, 0.5), apex)], 0.018
    )
    return np.maximum(lead, ramp(box, 0.012))


def _chest_tube(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> Field:
    a, s = canvas.anatomy, SIDE_SIGN[finding.side or "left"]
    m, w = a.midline, a.half_width
    low = rng.uniform(0.52, 0.6)
    return _lines(
        canvas,
        [_curve((m + s * (w + 0.09), low + 0.05), (m + s * (w - 0.04), low), (m + s * 0.22, 0.4), (m + s * 0.16, 0.2))],
        0.028,
    )


_DEVICES: dict[str, Callable[[Canvas, Finding, np.random.Generator], Field]] = {
    "endotracheal tube": _tube,
    "nasogastric tube": _stomach_tube,
    "central line": _central_line,
    "pacemaker": _pacemaker,
    "chest tube": _chest_tube,
}
_PAINTERS: dict[str, Callable[[Canvas, Finding, int, np.random.Generator], Field]] = {
    "Cardiomegaly": _cardiomegaly,
    "Enlarged Cardiomediastinum": _enlarged_mediastinum,
    "Edema": _edema,
    "Consolidation": _consolidation,
    "Atelectasis": _atelectasis,
    "Lung Lesion": _lesion,
    "Pneumothorax": _pneumothorax,
    "Pleural Effusion": _effusion,
    "Fracture": _fracture,
    "Support Devices": _device,
}
