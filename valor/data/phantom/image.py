"""From findings to pixels: canvas, composition of densities, exposure, noise.

The chest is composed on a canvas of at most half the image's pixels beyond 256 and resampled once, with the
exposure's rotation, zoom and shift, to the image; detector noise is added at full resolution. The look of the
acquisition lives in `Acquisition` alone, so a second device is another instance.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from valor.clinical.vocabulary import FINDINGS
from valor.data.phantom.anatomy import MARGIN, SIDE_SIGN, Anatomy, Canvas, Field, ramp, resize
from valor.data.phantom.disease import Finding
from valor.data.phantom.keys import Stream, StudyKey, generator
from valor.data.phantom.paint import alter_shape, paint, painting_order

FULL_SCALE = 4095
"""The largest 12-bit pixel."""


@dataclasses.dataclass(frozen=True)
class Acquisition:
    """One exposure: `gain`, `offset`, `gamma` of brightness, `noise` (std, in brightness), pose."""

    gain: float
    offset: float
    gamma: float
    noise: float
    rotation_deg: float
    zoom: float
    shift_x: float
    shift_y: float


def draw_acquisition(rng: np.random.Generator, *, second_site: bool = False) -> Acquisition:
    """Draw one exposure; the second site's are flatter, darker, noisier and more often askew."""
    if second_site:
        return Acquisition(
            gain=rng.uniform(0.75, 0.9),
            offset=rng.normal(0.04, 0.02),
            gamma=rng.uniform(1.15, 1.35),
            noise=rng.uniform(0.02, 0.035),
            rotation_deg=float(np.clip(rng.normal(0, 2.0), -4, 4)),
            zoom=rng.uniform(1.0, 1.05),
            shift_x=rng.uniform(-0.006, 0.006),
            shift_y=rng.uniform(-0.006, 0.006),
        )
    return Acquisition(
        gain=rng.uniform(0.9, 1.1),
        offset=rng.normal(0, 0.02),
        gamma=rng.uniform(0.9, 1.12),
        noise=rng.uniform(0.008, 0.018),
        rotation_deg=float(np.clip(rng.normal(0, 1.2), -3, 3)),
        zoom=rng.uniform(0.98, 1.03),
        shift_x=rng.uniform(-0.012, 0.012),
        shift_y=rng.uniform(-0.012, 0.012),
    )


def render(
    anatomy: Anatomy, findings: Sequence[Finding], acquisition: Acquisition, *, key: StudyKey, seed: int, image_px: int
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.bool_]]]:
    """Render one study.

    Returns:
        (image_px, image_px) float32 brightness in [0, 1], bright is dense; and a boolean mask of that shape per
        drawn finding, in the same pixels.
    """
    canvas = Canvas(anatomy, min(image_px, max(256, image_px // 2)))
    streams = {f.finding: Stream.FINDING + FINDINGS.index(f.finding) for f in findings}
    rngs = {name: generator(seed, key.subject, key.ordinal, stream) for name, stream in streams.items()}
    for finding in findings:
        alter_shape(canvas, finding, rngs[finding.finding])
    canvas.build()
    for finding in painting_order(findings):
        paint(canvas, finding, rngs[finding.finding])
    noise_rng = generator(seed, key.subject, key.ordinal, Stream.ACQUISITION)
    density = compose(canvas, generator(seed, key.subject, 0, Stream.MARKINGS), noise_rng)
    warp = _warp(acquisition, canvas.size, image_px)
    brightness = _resample(density, warp, image_px)
    brightness += np.float32(acquisition.noise) * noise_rng.standard_normal(brightness.shape, dtype=np.float32)
    np.clip(brightness * np.float32(acquisition.gain) + np.float32(acquisition.offset), 0, 1, out=brightness)
    bilinear = Image.Resampling.BILINEAR
    masks = {name: _resample(field, warp, image_px, bilinear) > 0.5 for name, field in canvas.masks.items()}
    return brightness ** np.float32(acquisition.gamma), masks


def compose(canvas: Canvas, subject_rng: np.random.Generator, study_rng: np.random.Generator) -> Field:
    """Return the superimposed densities of a painted canvas, about [0, 1]."""
    a, x, y = canvas.anatomy, canvas.x, canvas.y
    mid = np.float32(a.midline)
    flank, shoulder = 0.44 + 0.14 * np.clip(y / 0.25, 0, 1) - np.abs(x - mid), y + 0.5 - np.abs(x - mid) * 1.1
    body = ramp(np.minimum(flank, shoulder), 0.02)
    below = ramp(y - np.float32(a.dome_left), 0.12)
    density = np.float32(a.tissue) + np.float32(0.05) * below - np.float32(0.43) * canvas.air
    density += np.float32(0.05) * canvas.heart + np.float32(0.03) * canvas.mediastinum
    spine = ramp(0.034 - np.abs(x - mid), 0.01) * (1 + 0.3 * np.sin((y - 0.1) * (2 * np.pi / 0.055)).astype(np.float32))
    density += np.float32(0.05) * spine
    trachea = ramp(0.019 - np.abs(x - mid), 0.01) * ramp(np.float32(0.35) - y, 0.03)
    density -= np.float32(0.08) * trachea
    shadows = np.float32(a.rib_contrast) * canvas.ribs() + np.float32(0.10) * canvas.clavicles()
    vessels = _markings(canvas, subject_rng) * canvas.vessel_gain
    density += canvas.air * (1 - canvas.dark) * np.float32(0.13) * vessels
    density -= np.float32(0.13) * canvas.dark
    if a.stomach > 0.3:
        bubble = canvas.blob(a.midline + 0.2, a.dome_left + 0.09, 0.07, 0.035)
        density -= np.float32(0.22) * bubble * ramp(y - canvas.diaphragm("left"), 0.02)
    density += canvas.haze + shadows + canvas.bright
    density += np.float32(0.012) * canvas.noise(study_rng, 24)
    return (density * body + np.float32(0.04)).astype(np.float32)


def _markings(canvas: Canvas, rng: np.random.Generator) -> Field:
    """Draw the vessels that branch from both hila, the same for a subject at every size."""
    size = 256
    image = Image.new("L", (size, size))
    pen = ImageDraw.Draw(image)
    a = canvas.anatomy
    for sign in SIDE_SIGN.values():
        for angle in np.linspace(-1.25, 1.35, 9) + rng.normal(0, 0.08, 9):
            _branch(pen, rng, a.midline + sign * 0.07, 0.42, angle, sign, width=3.0, depth=3)
    field = np.asarray(image, dtype=np.float32) / 255
    soft = resize(field, canvas.size) if canvas.size != size else field
    hila = sum(canvas.blob(a.midline + sign * 0.075, 0.42, 0.035, 0.06) for sign in SIDE_SIGN.values())
    return np.clip(soft, 0, 1) + np.float32(0.9) * hila


def _branch(
    pen: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    x: float,
    y: float,
    angle: float,
    sign: int,
    *,
    width: float,
    depth: int,
) -> None:
    length = rng.uniform(0.06, 0.10)
    x1, y1 = x + sign * np.cos(angle) * length, y + np.sin(angle) * length
    scale = 256 / (1 + 2 * MARGIN)
    ends = [((u + MARGIN) * scale, (v + MARGIN) * scale) for u, v in ((x, y), (x1, y1))]
    pen.line(ends, fill=int(90 + 40 * depth), width=max(1, round(width)))
    if depth:
        for turn in (-1, 1):
            _branch(pen, rng, x1, y1, angle + turn * rng.uniform(0.15, 0.4), sign, width=width * 0.62, depth=depth - 1)


def _warp(acquisition: Acquisition, size: int, image_px: int) -> tuple[float, ...]:
    """Return PIL's affine coefficients: image pixel -> canvas pixel."""
    angle, scale = np.deg2rad(acquisition.rotation_deg), 1 / acquisition.zoom
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    unit, per_unit = 1 / image_px, size / (1 + 2 * MARGIN)
    cx, cy = 0.5 + acquisition.shift_x, 0.5 + acquisition.shift_y
    k = unit * per_unit
    offset_x = (0.5 + MARGIN - cos * cx + sin * cy) * per_unit
    offset_y = (0.5 + MARGIN - sin * cx - cos * cy) * per_unit
    return (cos * k, -sin * k, offset_x, sin * k, cos * k, offset_y)


def _resample(
    field: Field, warp: tuple[float, ...], image_px: int, method: Image.Resampling = Image.Resampling.BICUBIC
) -> Field:
    picture = Image.fromarray(np.ascontiguousarray(field, dtype=np.float32))
    return np.array(picture.transform((image_px, image_px), Image.Transform.AFFINE, warp, resample=method))


def to_stored(brightness: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return 12-bit MONOCHROME2 pixels, 0 to 4095."""
    return np.rint(brightness * FULL_SCALE).astype(np.uint16)


def voi_window(pixels: NDArray[np.uint16]) -> tuple[int, int]:
    """Return the darkest and brightest stored value to display, as a scanner's automatic exposure would choose."""
    step = max(1, pixels.shape[0] // 96)
    low, high = np.percentile(pixels[::step, ::step], (2, 99.5))
    return int(max(0, low - 150)), int(min(FULL_SCALE, high + 150))


def to_display(pixels: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Return stored MONOCHROME2 pixels as ingest shows them: windowed to 8 bits, bright is dense."""
    low, high = voi_window(pixels)
    scaled = (pixels.astype(np.float32) - low) * np.float32(255 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
