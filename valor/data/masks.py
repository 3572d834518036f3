"""Pixel masks as text: row-major run lengths, as annotations.parquet holds them in stored-pixel coordinates.

The text is space-separated decimal run lengths that alternate between background and mask, background first (0 when
the first pixel is mask); they add up to H * W. COCO's uncompressed RLE is the same in column-major order.
"""

import numpy as np
from numpy.typing import NDArray

from valor.errors import IntegrityError


def encode(mask: NDArray[np.bool_]) -> str:
    """Return the run lengths of a (H, W) bool mask."""
    flat = np.ascontiguousarray(mask, dtype=bool).ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate([[0], edges, [flat.size]])
    runs = np.diff(bounds).tolist()
    if flat.size and flat[0]:
        runs.insert(0, 0)
    return " ".join(map(str, runs))


def decode(text: str, shape: tuple[int, int] | str) -> NDArray[np.bool_]:
    """Return the (H, W) bool mask of an encoded text.

    Args:
        shape: (rows, columns), or the `shape` column's text such as `512x512`.

    Raises:
        IntegrityError: the text is no run-length code of that shape.
    """
    rows, columns = parse_shape(shape) if isinstance(shape, str) else shape
    try:
        runs = np.array([int(run) for run in text.split()], dtype=np.int64)
    except ValueError:
        raise IntegrityError(
            f"mask of {rows}x{columns}: not a list of run lengths; write the annotations again"
        ) from None
    if (runs < 0).any() or runs.sum() != rows * columns:
        raise IntegrityError(
            f"mask of {rows}x{columns}: run lengths add up to {runs.sum()}, expected {rows * columns}; "
            "the shape belongs to another image, or the text was cut"
        )
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(rows, columns)


def format_shape(shape: tuple[int, ...]) -> str:
    """Return a mask's (rows, columns) as the `shape` column holds it: `512x512`."""
    return f"{shape[0]}x{shape[1]}"


def parse_shape(text: str) -> tuple[int, int]:
    """Return (rows, columns) of a `shape` column's text; raise IntegrityError for anything but `ROWSxCOLUMNS`."""
    rows, separator, columns = text.partition("x")
    if not separator or not rows.isdigit() or not columns.isdigit():
        raise IntegrityError(f"mask shape is {text!r}, expected ROWSxCOLUMNS such as 512x512")
    return int(rows), int(columns)
