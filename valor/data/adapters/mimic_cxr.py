"""MIMIC-CXR 2.0.0's layout (Johnson et al. 2019, physionet.org/content/mimic-cxr).

`files/pNN/pSUBJECT/sSTUDY.txt` is the report, `files/pNN/pSUBJECT/sSTUDY/DICOM.dcm` (or `.jpg` as in MIMIC-CXR-JPG)
an image; `*-split.csv[.gz]` holds the official split per image, `*-metadata.csv[.gz]` the view. Reports and images
may lie in separate trees below the root. It leaves out the record and study lists, CheXpert tables and addenda files.
"""

import re
from collections import defaultdict

from valor.data.dicom import known_view, read_header
from valor.data.manifest import Reason, Rejected
from valor.data.reports import Report, parse_mimic
from valor.data.source import Source, SourceImage, SourceStudy
from valor.errors import UserError

_FILE = re.compile(r"(?:^|/)p\d\d/p(\d+)/s(\d+)(?:\.txt|/([^/]+)\.(?:dcm|jpg|jpeg|png))$")
_SPLITS = {"": "", "train": "train", "validate": "val", "test": "test"}
"""The split table's names, letter by letter: a guess at another could bring a test study into training."""
_FRONTAL = ("PA", "AP", "FRONTAL")


def index(source: Source) -> list[SourceStudy]:
    """Return the studies that the listing shows; a study may lack its report or its images.

    Raises:
        UserError: a table lacks a column, or names a split that is none of MIMIC-CXR's.
    """
    reports: dict[tuple[str, str], str] = {}
    images: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for path in source.files:
        match = _FILE.search(path)
        if not match:
            continue
        subject, study, dicom_id = match.groups()
        if dicom_id is None:
            reports[subject, study] = path
        else:
            images[subject, study].append((path, dicom_id))
    splits = _splits(source)
    views = {
        row["dicom_id"]: known_view(row["ViewPosition"])
        for _, row in source.table("-metadata", ("dicom_id", "ViewPosition"))
    }
    return [
        _study(source, key, report=reports.get(key, ""), files=images.get(key, []), splits=splits, views=views)
        for key in sorted(reports.keys() | images.keys())
    ]


def _splits(source: Source) -> dict[str, str]:
    """Return the official split by study; raise UserError where the table puts a study into two."""
    splits: dict[str, str] = {}
    for path, row in source.table("-split", ("study_id", "split")):
        study, split = row["study_id"], _split(row["split"], path)
        if split and splits.setdefault(study, split) != split:
            raise UserError(f"{path}: study {study[:20]} is in {splits[study]} and in {split}; mend the table")
    return splits


def _split(name: str, path: str) -> str:
    if name not in _SPLITS:
        known = ", ".join(split for split in _SPLITS if split)
        raise UserError(f"{path}: split is {name[:40]!r}, expected one of {known} (or none); mend the table")
    return _SPLITS[name]


def _study(
    source: Source,
    key: tuple[str, str],
    *,
    report: str,
    files: list[tuple[str, str]],
    splits: dict[str, str],
    views: dict[str, str],
) -> SourceStudy:
    subject, study = key
    split = splits.get(study, "")
    images = tuple(SourceImage(path, dicom_id, views.get(dicom_id, "")) for path, dicom_id in sorted(files))
    paths = [image.path for image in images] + ([report] if report else [])
    return SourceStudy(
        study_id=study,
        subject_id=subject,
        split=split,
        report=report,
        images=images,
        stamp=source.stamp(paths, [split, [image.view for image in images]]),
    )


def read(source: Source, study: SourceStudy) -> tuple[Report, tuple[SourceImage, ...]]:
    """Return a study's report and images, frontal views first."""
    if not study.report:
        raise Rejected(Reason.MISSING_REPORT, f"no s{study.study_id}.txt")
    text = source.read(study.report).decode("utf-8", errors="replace")
    images = study.images
    if len(images) > 1:
        images = tuple(image if image.view else _with_view(source, image) for image in images)
    return parse_mimic(text), tuple(sorted(images, key=lambda image: (_rank(image.view), image.path)))


def _with_view(source: Source, image: SourceImage) -> SourceImage:
    """Take the view from the DICOM header where the metadata table does not tell."""
    if not image.path.endswith(".dcm"):
        return image
    try:
        view = read_header(source.read(image.path)).view
    except Rejected:
        return image  # a damaged file is rejected with its reason when its pixels are read
    return SourceImage(image.path, image.dicom_id, view)


def _rank(view: str) -> int:
    """Order frontal views before unknown ones, and those before lateral ones."""
    if view.startswith(_FRONTAL):
        return 0
    return 1 if not view else 2
