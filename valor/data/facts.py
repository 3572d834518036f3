"""Facts about a dataset: numbers per study, per image and overall, which the data gate checks.

One pass over the rows that training will read, images decoded. The tables hold ids, lengths and grey levels, never
text; repeated reports are counted by hash, and the hash itself is not kept.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valor.data.images import contrast
from valor.data.manifest import SPLITS, Study, decode_image, row_digest

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class Facts:
    """The three tables of facts (columns in docs/data.md), and the rows' digests.

    Attributes:
        studies: one row per dataset row.
        images: one row per image.
        overall: one row.
        row_digests: one per dataset row.
    """

    studies: "pd.DataFrame"
    images: "pd.DataFrame"
    overall: "pd.DataFrame"
    row_digests: list[str]

    def tables(self) -> dict[str, "pd.DataFrame"]:
        """Return the tables by name."""
        return {"studies": self.studies, "images": self.images, "overall": self.overall}

    def write(self, folder: Path) -> None:
        """Write each table to `<folder>/<name>_facts.parquet`."""
        for name, table in self.tables().items():
            table.to_parquet(folder / f"{name}_facts.parquet", index=False)


def gather(studies: Iterable[Study], *, quarantined: int, progress: Callable[[int], None] = lambda done: None) -> Facts:
    """Compute the facts of a dataset.

    Args:
        studies: the dataset's rows; read once, not held.
        quarantined: how many studies were rejected.
        progress: called with the number of studies done.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    hashes: list[str] = []
    digests: list[str] = []
    for study in studies:
        rows.append(_study_facts(study))
        images += _image_facts(study)
        hashes.append(hashlib.sha256(study.text.encode()).hexdigest())
        digests.append(row_digest(study))
        progress(len(rows))
    table = pd.DataFrame(rows, columns=list(_study_facts(_NOBODY)))
    repeats = Counter(hashes)
    table["same_report_studies"] = [repeats[value] for value in hashes]
    table["subject_splits"] = table.groupby("subject_id")["split"].transform("nunique")
    return Facts(
        studies=table,
        images=pd.DataFrame(images, columns=_IMAGE_COLUMNS),
        overall=pd.DataFrame([_overall(table, distinct_reports=len(repeats), quarantined=quarantined)]),
        row_digests=digests,
    )


_NOBODY = Study("", "", (), None, None, None, None, None, None, None, "", "")
_IMAGE_COLUMNS = (
    *("study_id", "dicom_id", "split", "view", "width", "height", "longer_side", "stored_rows", "stored_columns"),
    *("grey_mean", "grey_std", "contrast", "grey_min", "grey_max", "png_bytes", "inverted"),
)


def _study_facts(study: Study) -> dict[str, Any]:
    def words(text: str | None) -> int:
        return len((text or "").split())

    return {
        "study_id": study.study_id,
        "subject_id": study.subject_id,
        "split": study.split,
        "images": len(study.images),
        "has_findings": study.findings is not None,
        "has_impression": study.impression is not None,
        "findings_words": words(study.findings),
        "impression_words": words(study.impression),
        "report_words": words(study.findings) + words(study.impression),
    }


def _image_facts(study: Study) -> list[dict[str, Any]]:
    facts = []
    for image in study.images:
        pixels = decode_image(image.bytes)
        height, width = pixels.shape
        transform = json.loads(image.transform)
        facts.append(
            {
                "study_id": study.study_id,
                "dicom_id": image.dicom_id,
                "split": study.split,
                "view": image.view,
                "width": width,
                "height": height,
                "longer_side": max(width, height),
                "stored_rows": transform["rows"],
                "stored_columns": transform["columns"],
                "grey_mean": float(pixels.mean()),
                "grey_std": float(pixels.std()),
                "contrast": contrast(pixels),
                "grey_min": int(pixels.min()),
                "grey_max": int(pixels.max()),
                "png_bytes": len(image.bytes),
                "inverted": bool(transform["inverted"]),
            }
        )
    return facts


def _overall(studies: "pd.DataFrame", *, distinct_reports: int, quarantined: int) -> dict[str, Any]:
    count = len(studies)
    return {
        "studies": count,
        **{f"{split}_studies": int((studies["split"] == split).sum()) for split in SPLITS},
        **{
            f"{split}_subjects": int(studies.loc[studies["split"] == split, "subject_id"].nunique()) for split in SPLITS
        },
        "quarantined_studies": quarantined,
        "quarantined_fraction": quarantined / max(1, count + quarantined),
        "duplicate_report_fraction": 1.0 - distinct_reports / count if count else 0.0,
        "empty_findings_fraction": float((~studies["has_findings"].astype(bool)).mean()) if count else 0.0,
    }
