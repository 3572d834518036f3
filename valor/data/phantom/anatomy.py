"""A chest in unit coordinates: x grows to the image's right (the patient's left), y downwards, both 0 to 1.

Shapes are analytic, so one subject has the same chest at every resolution. `Canvas` holds the coordinate grids and
the fields (float32 in [0, 1]) that findings alter before `image.compose` turns them into brightness. It is a
drawing of superimposed densities, no simulation of X-ray transport: no scatter, no beam hardening, no lateral view.
"""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Field = NDArray[np.floating[Any]]
MARGIN = 0.04
"""The canvas reaches this far beyond the image on each side, so that a rotated exposure has no empty corners."""
SIDE_SIGN = {"right": -1, "left": 1}
"""Sign of x - midline on the patient's right and left (the patient faces the reader)."""


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """One subject's build, in unit lengths (0.1 is about 4 cm)."""

    midline: float
    half_width: float
    apex: float
    dome_right: float
    dome_left: float
    heart_ratio: float
    heart_shear: float
    pedicle: float
    rib_spacing: float
    rib_phase: float
    rib_contrast: float
    clavicle: float
    tissue: float
    stomach: float


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a subject's build."""
    dome = rng.uniform(0.66, 0.74)
    return Anatomy(
        midline=rng.normal(0.5, 0.008),
        half_width=rng.uniform(0.36, 0.42),
        apex=rng.uniform(0.09, 0.13),
        dome_right=dome,
        dome_left=dome + rng.uniform(0.01, 0.035),
        heart_ratio=rng.uniform(0.40, 0.47),
        heart_shear=rng.uniform(0.2, 0.45),
        pedicle=rng.uniform(0.05, 0.062),
        rib_spacing=rng.uniform(0.074, 0.086),
        rib_phase=rng.random(),
        rib_contrast=rng.uniform(0.05, 0.085),
        clavicle=rng.uniform(0.145, 0.18),
        tissue=rng.uniform(0.60, 0.68),
        stomach=rng.uniform(0.0, 1.0),
    )


def ramp(distance: Field, softness: float) -> Field:
    """Return 0 where `distance` <= 0, 1 beyond `softness`, linear between: the edge of a shape."""
    return np.clip(distance * np.float32(1 / softness), 0, 1)


def resize(field: Field, size: int) -> Field:
    """Return a square float32 field resampled bicubically to (size, size)."""
    return np.asarray(Image.fromarray(field).resize((size, size), Image.Resampling.BICUBIC))


class Canvas:
    """Coordinate grids and the fields of one chest.

    Attributes:
        x, y: (1, N) and (N, 1) unit coordinates.
        air: aerated lung, 1 inside.
        lungs: {side: the lung's outline}, untouched by findings.
        heart, mediastinum: soft tissue in the middle.
        markings: vessels within the lungs.
        haze: added density within lungs and pleura.
        bright: added density anywhere (bone, metal).
        dark: pleural air, without markings.
        fluid: {side: height of its pleural fluid}.
        masks: {finding: strength}, from which pixel masks are cut at 0.5.
    """

    def __init__(self, anatomy: Anatomy, size: int):
        self.anatomy, self.size = anatomy, size
        line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / size * (1 + 2 * MARGIN) - MARGIN
        self.x, self.y = line[None, :].astype(np.float32), line[:, None].astype(np.float32)
        self.domes = {"right": anatomy.dome_right, "left": anatomy.dome_left}
        self.ctr, self.pedicle_extra, self.pedicle_bumps = anatomy.heart_ratio, 0.0, 0.0
        self.rib_shift: dict[str, Field] = {}
        self.haze, self.bright, self.dark = (np.zeros((size, size), np.float32) for _ in range(3))
        self.vessel_gain = 1.0
        self.fluid: dict[str, float] = {}
        self.breaks: tuple[str, float, float, float] = ("left", 0.0, 0.0, 0.0)
        self.masks: dict[str, Field] = {}

    def side_distance(self, side: str) -> Field:
        """Return (1, N): distance from the midline towards `side`."""
        return np.float32(SIDE_SIGN[side]) * (self.x - np.float32(self.anatomy.midline))

    def chest_wall(self) -> Field:
        """Return (N, 1): the inner chest wall's distance from the midline at each height."""
        a = self.anatomy
        t = np.clip((self.y - a.apex) / 0.5, 0, 1)
        return 0.13 + (a.half_width - 0.13) * (1 - (1 - t) ** 2) ** 0.66

    def diaphragm(self, side: str) -> Field:
        """Return (1, N): the diaphragm's height over the side's width, lowest at the costophrenic angle."""
        d, top = self.side_distance(side), 0.19
        drop = np.where(d > top, 0.13 / (self.anatomy.half_width - top) ** 2, 1.4).astype(np.float32)
        return np.float32(self.domes[side]) + drop * (d - np.float32(top)) ** 2

    def build(self) -> None:
        """Draw lungs, heart and mediastinum from the (possibly altered) measures."""
        y, a = self.y, self.anatomy
        t = np.clip((y - a.apex) / 0.12, 0, 1)
        wall = self.chest_wall()
        inner = 0.04 + 0.03 * (1 - t) ** 2
        self.lungs = {}
        for side in SIDE_SIGN:
            d = self.side_distance(side)
            edge = np.minimum(np.minimum(wall - d, d - inner), self.diaphragm(side) - y)
            roof = np.float32(a.apex) + 14 * np.clip(np.float32(0.125) - d, 0, 0.1) ** 2
            self.lungs[side] = ramp(np.minimum(edge, y - roof), 0.012)
        self.heart = self._heart()
        self.mediastinum = self._mediastinum()
        self.air = (self.lungs["right"] + self.lungs["left"]) * (1 - np.maximum(self.heart, self.mediastinum))

    def _heart(self) -> Field:
        a = self.anatomy
        width = self.ctr * 2 * a.half_width
        tall = 0.14 + 0.25 * max(width - 0.3, 0)
        half = (max((width / 2) ** 2 - (a.heart_shear * tall) ** 2, 0.01)) ** 0.5
        center_x, center_y = a.midline + 0.17 * width, a.dome_left - 0.72 * tall
        dx = self.x - np.float32(center_x) - np.float32(a.heart_shear) * (self.y - np.float32(center_y))
        radius = np.sqrt((dx / half) ** 2 + ((self.y - np.float32(center_y)) / tall) ** 2)
        return ramp((1 - radius) * np.float32(half), 0.014)

    def _mediastinum(self) -> Field:
        a, y = self.anatomy, self.y
        low = 0.03 * np.clip((y - 0.45) / 0.2, 0, 1)
        waist = 0.045 * np.clip((y - 0.34) / 0.2, 0, 1)
        middle = np.exp(-(((y - 0.30) / 0.13) ** 2))
        knob = 0.022 * np.exp(-(((y - 0.29) / 0.035) ** 2))
        left = a.pedicle + waist + knob + (self.pedicle_extra + self.pedicle_bumps) * middle
        right = a.pedicle + low + self.pedicle_extra * middle
        d = self.x - np.float32(a.midline)
        return ramp(np.minimum(left - d, right + d), 0.014).astype(np.float32)

    def ribs(self) -> Field:
        """Return the density of posterior and anterior ribs, [0, ~1.3]."""
        a = self.anatomy
        wall = self.chest_wall()
        total = np.zeros((self.size, self.size), np.float32)
        for side in SIDE_SIGN:
            d = self.side_distance(side)
            inside = ramp(np.minimum(np.minimum(wall + 0.02 - d, d - 0.02), (0.95 - self.y) * 0.1), 0.015)
            inside = inside * ramp(self.y - np.float32(a.apex - 0.03), 0.02)
            rows = self.y + self.rib_shift[side] if side in self.rib_shift else self.y
            total += inside * self._rib_band(rows, 1.5 * (d - 0.11) ** 2, 0.0)
            front = inside * ramp(d - 0.14, 0.03)
            total += np.float32(0.45) * front * self._rib_band(self.y, -0.5 * d, 0.35)
        return total

    def _rib_band(self, rows: Field, course: Field, offset: float) -> Field:
        a = self.anatomy
        position = (rows - course) * np.float32(1 / a.rib_spacing) + np.float32(a.rib_phase + offset)
        away = np.abs(position - np.floor(position) - np.float32(0.5))
        core = ramp(np.float32(0.23) - away, 0.05)
        cortex = np.clip(1 - np.abs(away - np.float32(0.2)) * 25, 0, 1)
        return core + np.float32(0.35) * cortex

    def clavicles(self) -> Field:
        """Return the density of both clavicles, [0, 1]."""
        a = self.anatomy
        total = np.zeros((self.size, self.size), np.float32)
        for side in SIDE_SIGN:
            d = self.side_distance(side)
            course = a.clavicle + 0.02 - 0.22 * d - 0.012 * np.sin(d * 16)
            inside = ramp(np.minimum(d - 0.035, 0.40 - d), 0.02)
            total += inside * ramp(0.016 - np.abs(self.y - course.astype(np.float32)), 0.007)
        return total

    def blob(self, x: float, y: float, rx: float, ry: float) -> Field:
        """Return exp(-r^2) around (x, y) with radii rx, ry."""
        return np.exp(-(((self.x - np.float32(x)) / rx) ** 2)) * np.exp(-(((self.y - np.float32(y)) / ry) ** 2))

    def noise(self, rng: np.random.Generator, cells: int) -> Field:
        """Return smooth standard noise with `cells` cells per side, the same at every canvas size."""
        return resize(rng.standard_normal((cells, cells), dtype=np.float32), self.size)
