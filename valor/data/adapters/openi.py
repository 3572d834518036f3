"""Open-i's layout, the Indiana University chest X-ray collection (Demner-Fushman et al. 2016).

`ecgen-radiology/<n>.xml` is a report, `NLMCXR_png/<image id>.png` an image whose id begins with the report's
(`CXR<n>_`). The collection has no subject ids and no official split: a report is its own subject. It leaves out
the MeSH codes, and knows views only by order and caption (docs/data.md).
"""

import re
from collections import defaultdict

from valor.data.manifest import Reason, Rejected
from valor.data.reports import Report, parse_openi
from valor.data.source import Source, SourceImage, SourceStudy

_REPORT = re.compile(r"(?:^|/)ecgen-radiology/(\d+)\.xml$")
_IMAGE = re.compile(r"(?:^|/)NLMCXR_png/((CXR\d+)_[^/]+)\.png$")
_SEVERAL_VIEWS = re.compile(r"lateral|two|\b2\b", re.IGNORECASE)


def index(source: Source) -> list[SourceStudy]:
    """Return one study per XML file, with the images that its number claims."""
    images: dict[str, list[SourceImage]] = defaultdict(list)
    reports: dict[str, str] = {}
    for path in sorted(source.files):
        if match := _IMAGE.search(path):
            images[match[2]].append(SourceImage(path, match[1]))
        elif match := _REPORT.search(path):
            reports[f"CXR{match[1]}"] = path
    return [
        SourceStudy(
            study_id=uid,
            subject_id=uid,
            split="",
            report=report,
            images=tuple(images[uid]),
            stamp=source.stamp([report, *(image.path for image in images[uid])], ""),
        )
        for uid, report in reports.items()
    ]


def read(source: Source, study: SourceStudy) -> tuple[Report, tuple[SourceImage, ...]]:
    """Return a study's report and the images that its XML names, in published order, the frontal one first."""
    record = parse_openi(source.read(study.report))
    if record.uid != study.study_id:
        raise Rejected(Reason.UNREADABLE_REPORT, f"uId does not match the file's name, expected {study.study_id}")
    present = {image.dicom_id: image.path for image in study.images}
    folder = _image_folder(study)
    images = tuple(
        SourceImage(present.get(dicom_id, f"{folder}{dicom_id}.png"), dicom_id, _view(number, caption))
        for number, (dicom_id, caption) in enumerate(record.images)
    )
    return record.report, images


def _image_folder(study: SourceStudy) -> str:
    return study.report.rpartition("ecgen-radiology/")[0] + "NLMCXR_png/"


def _view(number: int, caption: str) -> str:
    """Guess the view: the first image is frontal; the second is lateral where the caption speaks of several views."""
    if number == 0:
        return "FRONTAL"
    return "LATERAL" if number == 1 and _SEVERAL_VIEWS.search(caption) else ""
