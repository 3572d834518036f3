"""Pixels of one radiograph: PNG and JPEG files, the one shrink, and the way back to stored pixels.

DICOM files are read in `valor.data.dicom`. Every model derives its own pixels from the shrunken image, so the
expensive work on full-size pixels happens once, at ingest.
"""

import dataclasses
import io
import json

import numpy as np
from PIL import Image, UnidentifiedImageError

from valor.data.manifest import Reason, Rejected

MAX_PIXELS = 100_000_000
"""A larger image is a damaged header or an attack on memory."""


@dataclasses.dataclass(frozen=True)
class Window:
    """How stored values became grey: `kind` is window, voi_lut, percentile or none; limits after the modality LUT."""

    kind: str
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Radiograph:
    """One image at full size: `pixels` (H, W) float32 in [0, 1], bright is dense; `inverted` where stored dark was."""

    pixels: np.ndarray
    inverted: bool
    window: Window


def scale_robust(values: np.ndarray, *, reference: np.ndarray) -> tuple[np.ndarray, Window]:
    """Scale by the 0.5th and 99.5th percentile of `reference`, since markers and collimation own the extremes.

    Returns (H, W) float32 in [0, 1]. Raises Rejected (blank) where the values do not differ.
    """
    low, high = (float(v) for v in np.percentile(reference, [0.5, 99.5]))
    if high <= low:
        low, high = float(reference.min()), float(reference.max())
    if high <= low:
        raise Rejected(Reason.BLANK, f"every pixel is {low:g}")
    pixels = np.clip((values.astype(np.float32) - low) / (high - low), 0.0, 1.0)
    return pixels, Window(kind="percentile", low=low, high=high)


def read_raster(data: bytes) -> Radiograph:
    """Return a radiograph from a PNG or JPEG file, which is display-ready: bright is dense, no window.

    Three equal channels are grayscale (as Open-i's files are). Raises Rejected on colour and damage.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejected(Reason.UNDECODABLE, f"{image.width} x {image.height} pixels, limit {MAX_PIXELS}")
            frames = int(getattr(image, "n_frames", 1))
            if frames != 1:
                raise Rejected(Reason.MULTI_FRAME, f"{frames} frames, expected 1")
            deep = image.mode.startswith(("I", "F"))
            array = np.asarray(image if deep or image.mode == "L" else image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise Rejected(Reason.UNDECODABLE, f"{type(error).__name__} while decoding") from None
    if array.ndim == 3:
        if (array != array[..., :1]).any():
            raise Rejected(Reason.COLOUR, "the channels differ")
        array = array[..., 0]
    if array.min() == array.max():
        raise Rejected(Reason.BLANK, f"every stored pixel is {array.flat[0]}")
    if deep:
        pixels, window = scale_robust(array, reference=array)
    else:
        pixels, window = array.astype(np.float32) / 255.0, Window(kind="none", low=0.0, high=255.0)
    return Radiograph(pixels=pixels, inverted=False, window=window)


def shrink(radiograph: Radiograph, *, image_px: int) -> tuple[np.ndarray, str]:
    """Shrink to a longer side of `image_px` (never enlarging), aspect kept, Lanczos.

    Returns:
        (h, w) uint8 pixels and the `transform` JSON that maps stored pixels to them.
    """
    rows, columns = radiograph.pixels.shape
    factor = min(1.0, image_px / max(rows, columns))
    height, width = max(1, round(rows * factor)), max(1, round(columns * factor))
    image = Image.fromarray(np.ascontiguousarray(radiograph.pixels, dtype=np.float32), mode="F")
    small = image if factor == 1.0 else image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.clip(np.rint(np.asarray(small) * 255.0), 0, 255).astype(np.uint8)
    transform = {
        "rows": rows,
        "columns": columns,
        "height": height,
        "width": width,
        "inverted": radiograph.inverted,
        "window": dataclasses.asdict(radiograph.window),
    }
    return pixels, json.dumps(transform, sort_keys=True)


def contrast(pixels: np.ndarray) -> float:
    """Return the standard deviation, in grey levels, of (H, W) uint8 pixels averaged to 16 x 16.

    Noise averages out and anatomy does not, so that an empty exposure stretched to full contrast still shows as blank.
    """
    return float(np.asarray(Image.fromarray(pixels).convert("F").resize((16, 16), Image.Resampling.BOX)).std())


def shrink_mask(mask: np.ndarray, transform: str) -> np.ndarray:
    """Bring a stored-pixel mask onto the dataset image.

    Args:
        mask: (rows, columns) bool in stored-pixel coordinates.
        transform: the image's `transform`.

    Returns:
        (h, w) float32 in [0, 1], the share of each dataset pixel that the mask covers.

    Raises:
        ValueError: the mask has another shape than the stored image.
    """
    info = json.loads(transform)
    if mask.shape != (info["rows"], info["columns"]):
        raise ValueError(f"mask is {mask.shape}, the stored image {(info['rows'], info['columns'])}")
    image = Image.fromarray(mask.astype(np.float32), mode="F")
    return np.asarray(image.resize((info["width"], info["height"]), Image.Resampling.BOX))
