"""Draw phantom studies: the truth, then its pixels, masks and report, each from a random stream of its own.

Source: VALOR's own. It shows that a pipeline works where truth is known and says nothing of clinical performance.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from valor.data.phantom.anatomy import draw_anatomy
from valor.data.phantom.disease import Change, Finding, change_one, draw_findings
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
        second_site: whether it comes from the second site.
        change: what distinguishes a twin from its original; None for all other studies.
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
    second_site: bool
    change: Change | None


def draw(key: StudyKey, settings: PhantomStudies) -> PhantomStudy:
    """Draw one study of a plan, a member of `plan(settings)`; the same in any order and process."""
    truth, change = _truth(key, settings)
    brightness, masks = _image(key, settings, truth, settings.image_px)
    findings, impression = _report(key, settings, truth)
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
        second_site=_second_site(key, settings),
        change=change,
    )


def samples(settings: PhantomStudies, split: str) -> Iterator[tuple[NDArray[np.uint8], str, str]]:
    """Yield (image, findings, impression) of a split without files: the fast path for the phantom's own models.

    The image is (H, W) uint8 at `settings.image_px`, bright is dense, windowed as ingest windows the files.
    """
    for key in plan(settings):
        if key.split == split:
            truth, _ = _truth(key, settings)
            brightness, _ = _image(key, settings, truth, settings.image_px)
            findings, impression = _report(key, settings, truth)
            yield to_display(to_stored(brightness)), findings, impression


def _truth(key: StudyKey, settings: PhantomStudies) -> tuple[tuple[Finding, ...], Change | None]:
    findings = draw_findings(generator(settings.seed, key.subject, key.ordinal, Stream.TRUTH))
    if not key.twin_of:
        return findings, None
    return change_one(findings, generator(settings.seed, key.subject, key.ordinal, Stream.TWIN))


def _second_site(key: StudyKey, settings: PhantomStudies) -> bool:
    rng = generator(settings.seed, key.subject, key.ordinal, Stream.SITE)
    return key.split == "test" and bool(rng.random() < settings.second_site)


def _image(
    key: StudyKey, settings: PhantomStudies, truth: tuple[Finding, ...], image_px: int
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.bool_]]]:
    anatomy = draw_anatomy(generator(settings.seed, key.subject, 0, Stream.ANATOMY))
    rng = generator(settings.seed, key.subject, key.ordinal, Stream.POSE)
    acquisition = draw_acquisition(rng, second_site=_second_site(key, settings))
    return render(anatomy, truth, acquisition, key=key, seed=settings.seed, image_px=image_px)


def _report(key: StudyKey, settings: PhantomStudies, truth: tuple[Finding, ...]) -> tuple[str, str]:
    rng = generator(settings.seed, key.subject, key.ordinal, Stream.REPORT)
    return write_report(truth, settings.noise, rng, held_out_wording=_second_site(key, settings))
