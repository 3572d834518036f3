"""Draw phantom studies: the truth, then its pixels, masks and report, each from a random stream of its own.

Source: VALOR's own. It shows that a pipeline works where truth is known and says nothing of clinical performance.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from valor.data.phantom.anatomy import draw_anatomy
from valor.data.phantom.disease import Finding, draw_findings
from valor.data.phantom.image import draw_acquisition, render, to_display, to_stored
from valor.data.phantom.keys import Stream, StudyKey, generator, plan
from valor.data.phantom.report import write_report
from valor.recipe import PhantomStudies


@dataclasses.dataclass(frozen=True)
class PhantomStudy:
    """One drawn study.

    Attributes:
        key: who it is.
        pixels: (H, W) uint16, 0 to 4095, MONOCHROME2 (bright is dense).
        truth: the findings as drawn; empty for a normal study.
        masks: {finding: (H, W) bool} in the pixels' coordinates.
        findings, impression: the report's sections, with noise.
        view: `PA` or `AP`.
        sex: `M` or `F`.
        age: years at this study.
    """

    key: StudyKey
    pixels: NDArray[np.uint16]
    truth: tuple[Finding, ...]
    masks: dict[str, NDArray[np.bool_]]
    findings: str
    impression: str
    view: str
    sex: str
    age: int


def draw(key: StudyKey, settings: PhantomStudies, *, held_out_wording: bool = False) -> PhantomStudy:
    """Draw one study of a plan; the same in any order and process.

    Args:
        key: a member of `plan(settings)`.
        held_out_wording: write the report in the wordings that no training report uses.
    """
    truth = _truth(key, settings)
    brightness, masks = _image(key, settings, truth, settings.image_px)
    findings, impression = _report(key, settings, truth, held_out_wording=held_out_wording)
    subject = generator(settings.seed, key.subject, 0, Stream.HEADER)
    sex, age = str(subject.choice(["M", "F"])), int(subject.integers(25, 88)) + key.ordinal
    bedside = any(f.kind in ("endotracheal tube", "nasogastric tube", "chest tube") for f in truth)
    return PhantomStudy(
        key=key,
        pixels=to_stored(brightness),
        truth=truth,
        masks=masks,
        findings=findings,
        impression=impression,
        view="AP" if bedside else "PA",
        sex=sex,
        age=age,
    )


def samples(settings: PhantomStudies, split: str) -> Iterator[tuple[NDArray[np.uint8], str, str]]:
    """Yield (image, findings, impression) of a split without files: the fast path for the phantom's own models.

    The image is (H, W) uint8 at `settings.image_px`, bright is dense, windowed as ingest windows the files.
    """
    for key in plan(settings):
        if key.split == split:
            truth = _truth(key, settings)
            brightness, _ = _image(key, settings, truth, settings.image_px)
            findings, impression = _report(key, settings, truth, held_out_wording=False)
            yield to_display(to_stored(brightness)), findings, impression


def _truth(key: StudyKey, settings: PhantomStudies) -> tuple[Finding, ...]:
    return draw_findings(generator(settings.seed, key.subject, key.ordinal, Stream.TRUTH))


def _image(
    key: StudyKey, settings: PhantomStudies, truth: tuple[Finding, ...], image_px: int
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.bool_]]]:
    anatomy = draw_anatomy(generator(settings.seed, key.subject, 0, Stream.ANATOMY))
    acquisition = draw_acquisition(generator(settings.seed, key.subject, key.ordinal, Stream.POSE))
    return render(anatomy, truth, acquisition, key=key, seed=settings.seed, image_px=image_px)


def _report(
    key: StudyKey, settings: PhantomStudies, truth: tuple[Finding, ...], *, held_out_wording: bool
) -> tuple[str, str]:
    rng = generator(settings.seed, key.subject, key.ordinal, Stream.REPORT)
    return write_report(truth, settings.noise, rng, held_out_wording=held_out_wording)
