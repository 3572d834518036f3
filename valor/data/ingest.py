"""Turn one source study into a row of the dataset, or into reasons why not.

An image that cannot be used is dropped with a reason; a study is lost when its report says nothing or when no image
is left. Everything else that goes wrong (a vanished file, a full disk) stops the run: it is not the data's fault.
"""

import dataclasses
import hashlib

from valor.data.dicom import Header, read_dicom
from valor.data.images import Radiograph, contrast, read_raster, shrink
from valor.data.manifest import Reason, Rejected, Rejection, Study, StudyImage, encode_image, report_text
from valor.data.source import Adapter, Source, SourceImage, SourceStudy
from valor.recipe import DataSettings

_NO_HEADER = Header(view="", sex=None, age_band=None, device=None)


def ingest_study(
    adapter: Adapter, source: Source, study: SourceStudy, *, settings: DataSettings
) -> tuple[Study | None, list[Rejection]]:
    """Return the dataset row of a study (None where it is lost) and what of it was rejected."""
    content = hashlib.sha256()
    try:
        report, candidates = adapter.read(source, study)
        if not report_text(report.findings, report.impression):
            raise Rejected(Reason.EMPTY_REPORT, "neither findings nor impression says anything", path=study.report)
        if not candidates:
            raise Rejected(Reason.MISSING_IMAGE, "the study has no image")
    except Rejected as rejected:
        return None, [_rejection(study, rejected, scope="study", path=study.report)]
    content.update(repr(report).encode())
    images: list[StudyImage] = []
    headers: list[Header] = []
    rejections: list[Rejection] = []
    for candidate in candidates:
        if len(images) == settings.max_views:
            break
        try:
            image, header, data_digest = _read_image(source, candidate, settings=settings)
        except Rejected as rejected:
            rejections.append(_rejection(study, rejected, scope="image", path=candidate.path))
            continue
        images.append(image)
        headers.append(header)
        content.update(data_digest.encode())
    if not images:
        return None, [dataclasses.replace(rejection, scope="study") for rejection in rejections]
    row = Study(
        study_id=study.study_id,
        subject_id=study.subject_id,
        images=tuple(images),
        **dataclasses.asdict(report),
        sex=headers[0].sex,
        age_band=headers[0].age_band,
        device=headers[0].device,
        split=study.split,
        source_digest=content.hexdigest(),
    )
    return row, rejections


def _read_image(source: Source, image: SourceImage, *, settings: DataSettings) -> tuple[StudyImage, Header, str]:
    """Read, window and shrink one image; also return its header and the sha256 of its file."""
    if image.path not in source.files:
        raise Rejected(Reason.MISSING_IMAGE, "the report names it but there is no such file")
    data = source.read(image.path)
    radiograph, header = _decode(data, image.path)
    pixels, transform = shrink(radiograph, image_px=settings.image_px)
    spread = contrast(pixels)
    if spread < settings.checks.min_image_std:
        limit = settings.checks.min_image_std
        raise Rejected(Reason.BLANK, f"contrast is {spread:.2f} grey levels, expected at least {limit:g}")
    row = StudyImage(
        bytes=encode_image(pixels),
        path=image.path,
        dicom_id=image.dicom_id,
        view=image.view or header.view,
        transform=transform,
    )
    return row, header, hashlib.sha256(data).hexdigest()


def _decode(data: bytes, path: str) -> tuple[Radiograph, Header]:
    if path.endswith(".dcm"):
        return read_dicom(data)
    return read_raster(data), _NO_HEADER


def _rejection(study: SourceStudy, rejected: Rejected, *, scope: str, path: str) -> Rejection:
    return Rejection(
        study_id=study.study_id,
        subject_id=study.subject_id,
        path=rejected.path or path,
        reason=str(rejected.reason),
        scope=scope,
        detail=rejected.detail,
    )
