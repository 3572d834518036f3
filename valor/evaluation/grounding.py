"""Whether a model looks where the finding is: attention mass inside the finding's mask over the mask's area share.

1 is what attention spread evenly scores, whatever the mask's size; above 1 the model looks at the finding. The same
text's map under another subject's image (`shuffled`) tells how much of that is habit: where such findings usually lie.
Attention is a relative measure, not an attribution; what is left out is everything but position.
"""

import math
from collections.abc import Sequence

import numpy as np

Box = Sequence[float]


def cover(mask: np.ndarray, *, box: Box, grid: tuple[int, int]) -> np.ndarray:
    """Return how much of each grid cell the mask covers, (grid_h, grid_w) float64 in [0, 1].

    Args:
        mask: (H, W) in [0, 1], the share of each dataset pixel inside the finding (`shrink_mask`).
        box: the part of the image that the grid spans, (x0, y0, x1, y1) as fractions of its width and height; a box
            that reaches beyond the image meets an empty border there.
        grid: (grid_h, grid_w).
    """
    height, width = mask.shape
    grid_h, grid_w = grid
    x0, y0, x1, y1 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    # Eight samples per cell side: a finding of a few pixels still covers its true share of a cell.
    rows = y0 + (np.arange(grid_h * 8) + 0.5) / (grid_h * 8) * (y1 - y0)
    columns = x0 + (np.arange(grid_w * 8) + 0.5) / (grid_w * 8) * (x1 - x0)
    r, c = np.floor(rows).astype(int), np.floor(columns).astype(int)
    inside = ((r >= 0) & (r < height))[:, None] & ((c >= 0) & (c < width))[None, :]
    sampled = mask[np.clip(r, 0, height - 1)[:, None], np.clip(c, 0, width - 1)[None, :]] * inside
    return sampled.reshape(grid_h, 8, grid_w, 8).mean(axis=(1, 3))


def ratio(attention: np.ndarray, covered: np.ndarray) -> float:
    """Return the attention inside the mask over the mask's area share; nan where the grid misses the mask.

    Args:
        attention: (grid_h, grid_w), any positive total; it is normalised to sum 1.
        covered: (grid_h, grid_w) in [0, 1], from `cover`.
    """
    total, area = float(attention.sum()), float(covered.mean())
    if area <= 0 or total <= 0:
        return math.nan
    return float((attention * covered).sum()) / total / area
