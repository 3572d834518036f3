"""Draw phantom studies into a folder, for `valor phantom`."""

from pathlib import Path

from valor.errors import UserError
from valor.recipe import PhantomStudies

SPLITS = (0.7, 0.1, 0.2)
"""Fractions of train, val and test."""


def write_phantom(out: Path, *, studies: int, seed: int) -> tuple[Path, Path]:
    """Write `studies` studies under `out`; return the data root and the annotations root.

    Raises:
        UserError: fewer than three studies, or `out` holds something already.
    """
    if studies < 3:
        raise UserError(f"-n is {studies}, expected at least 3: one study for each of train, val and test")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; name a new directory")
    from valor.data import phantom

    val = max(1, round(studies * SPLITS[1]))
    test = max(1, round(studies * SPLITS[2]))
    settings = PhantomStudies(seed=seed, train=studies - val - test, val=val, test=test)
    root, truth = out / "data", out / "annotations"
    drawn = (phantom.draw(key, settings) for key in phantom.plan(settings))
    phantom.write(drawn, root=root, annotations_root=truth, settings=settings)
    return root, truth
