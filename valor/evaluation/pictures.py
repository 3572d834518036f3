"""Images as data URIs for the page: the radiograph, the outlines of findings, attention maps. Nothing is fetched."""

import base64
import io

import numpy as np
from PIL import Image

MAX_PX = 320
"""Longer side of a radiograph on the page: 120 studies stay within a few MB."""
_OUTLINE_PX = 384
_PALETTE = [0, 0, 0, 0, 0, 0, 255, 214, 10]
_ALPHA = bytes([0, 150, 255])
"""Colours and opacity of nothing, rim and line: a palette image is a third of the bytes of RGBA."""


def radiograph(pixels: np.ndarray) -> str:
    """Return (H, W) uint8 pixels as a JPEG data URI, shrunk to `MAX_PX`."""
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_PX, MAX_PX), Image.Resampling.LANCZOS)
    return _uri(image, "JPEG", quality=82, optimize=True)


def outline(mask: np.ndarray) -> str:
    """Return the outline of a (H, W) float32 mask in [0, 1] as a transparent PNG data URI of the same aspect."""
    from scipy import ndimage

    scale = _OUTLINE_PX / max(mask.shape)
    size = max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale))
    smooth = Image.fromarray(np.ascontiguousarray(mask, dtype=np.float32)).resize(size, Image.Resampling.BICUBIC)
    inside = np.asarray(smooth) >= 0.5
    # A dark rim on both sides keeps the line visible over bright bone.
    rim = ndimage.binary_dilation(inside, iterations=4) & ~inside
    line = ndimage.binary_dilation(inside, iterations=3) & ~ndimage.binary_dilation(inside)
    image = Image.fromarray(np.where(line, 2, rim).astype(np.uint8), mode="P")
    image.putpalette(_PALETTE)
    return _uri(image, "PNG", optimize=True, transparency=_ALPHA)


def heat(grid: np.ndarray) -> str:
    """Return a (grid_h, grid_w) attention map as a small PNG data URI: the more attention, the brighter and denser."""
    strength = np.clip(grid / max(float(grid.max()), 1e-12), 0.0, 1.0)
    picture = np.empty((*grid.shape, 4), dtype=np.uint8)
    picture[..., 0] = 255
    picture[..., 1] = np.rint(70 + 150 * strength)
    picture[..., 2] = np.rint(20 + 40 * strength)
    picture[..., 3] = np.rint(190 * strength**1.5)
    return _uri(Image.fromarray(picture), "PNG", optimize=True)


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
