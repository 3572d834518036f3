"""Phantom studies on disk in MIMIC-CXR 2.0.0's layout, so that the real adapter reads them.

Truth and masks go to a root of their own: no reader of the images or reports can come across them.
"""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from valor.data import masks
from valor.data.phantom import wording
from valor.data.phantom.disease import truth_rows
from valor.data.phantom.headers import dicom_bytes
from valor.data.phantom.keys import Stream, generator
from valor.data.phantom.studies import PhantomStudy
from valor.recipe import PhantomStudies

_MIMIC_SPLIT = {"train": "train", "val": "validate", "test": "test"}
_TABLES = {
    "cxr-record-list.csv": ("subject_id", "study_id", "dicom_id", "path"),
    "cxr-study-list.csv": ("subject_id", "study_id", "path"),
    "mimic-cxr-2.0.0-split.csv": ("dicom_id", "study_id", "subject_id", "split"),
    "mimic-cxr-2.0.0-metadata.csv": ("dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"),
}
_TEXT = pa.string()
_TRUTH = pa.schema(
    [
        ("study_id", _TEXT),
        ("finding", _TEXT),
        ("present", pa.bool_()),
        ("side", _TEXT),
        ("zone", _TEXT),
        ("severity", _TEXT),
        ("implied", pa.bool_()),
    ]
)
_ANNOTATIONS = pa.schema(
    [(name, _TEXT) for name in ("study_id", "dicom_id", "finding", "side", "zone", "severity", "shape", "mask")]
)
_PAIRS = pa.schema([(name, _TEXT) for name in ("study_id", "twin_of", "finding", "change")])


def write(studies: Iterable[PhantomStudy], *, root: Path, annotations_root: Path, settings: PhantomStudies) -> None:
    """Write studies; the tables of either root cover exactly the studies given, so each shard takes roots of its own.

    Args:
        root: gets `files/p10/pSUBJECT/sSTUDY/DICOM.dcm`, `files/p10/pSUBJECT/sSTUDY.txt` and the four csv lists.
        annotations_root: gets truth.parquet (with `implied` beside the contract's columns), annotations.parquet
            (`shape` as in `masks.format_shape`, `mask` as in `masks.encode`) and pairs.parquet (a row per twin).
    """
    lists: dict[str, list[dict[str, Any]]] = {name: [] for name in _TABLES}
    truth: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for study in studies:
        row = _write_study(study, root=root, seed=settings.seed)
        for rows in lists.values():
            rows.append(row)
        lists["cxr-study-list.csv"][-1] = {**row, "path": row["report_path"]}
        truth += [{"study_id": study.key.study_id, **finding} for finding in truth_rows(study.truth)]
        annotations += _annotations(study)
        if study.change:
            change = {"finding": study.change.finding, "change": study.change.kind}
            pairs.append({"study_id": study.key.study_id, "twin_of": study.key.twin_of, **change})
    root.mkdir(parents=True, exist_ok=True)
    for name, columns in _TABLES.items():
        with (root / name).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(lists[name])
    annotations_root.mkdir(parents=True, exist_ok=True)
    for name, rows, schema in (
        ("truth", truth, _TRUTH), ("annotations", annotations, _ANNOTATIONS), ("pairs", pairs, _PAIRS)
    ):  # fmt: skip
        table = pa.Table.from_pylist(rows, schema)
        pq.write_table(table, annotations_root / f"{name}.parquet", compression="zstd")


def report_file(study: PhantomStudy, *, seed: int) -> str:
    """Return a study's report as MIMIC-CXR's text files hold it."""
    rng = generator(seed, study.key.subject, study.key.ordinal, Stream.INDICATION)
    indication = wording.INDICATION[rng.integers(len(wording.INDICATION))]
    return (
        f"{'FINAL REPORT':>45}\n EXAMINATION:  CHEST ({study.view})\n \n INDICATION:  {indication}\n \n"
        f" COMPARISON:  None.\n \n FINDINGS:\n \n {study.findings}\n \n IMPRESSION:\n \n {study.impression}\n"
    )


def _write_study(study: PhantomStudy, *, root: Path, seed: int) -> dict[str, Any]:
    """Write image and report; return the row that the csv lists pick their columns from."""
    key = study.key
    folder = f"files/p{key.subject_id[:2]}/p{key.subject_id}"
    path, report_path = f"{folder}/s{key.study_id}/{key.dicom_id}.dcm", f"{folder}/s{key.study_id}.txt"
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(dicom_bytes(study, seed=seed))
    (root / report_path).write_text(report_file(study, seed=seed), encoding="utf-8")
    return {
        "subject_id": key.subject_id,
        "study_id": key.study_id,
        "dicom_id": key.dicom_id,
        "path": path,
        "report_path": report_path,
        "split": _MIMIC_SPLIT[key.split],
        "ViewPosition": study.view,
        "Rows": study.pixels.shape[0],
        "Columns": study.pixels.shape[1],
    }


def _annotations(study: PhantomStudy) -> list[dict[str, Any]]:
    drawn = {finding.finding: finding for finding in study.truth}
    return [
        {
            "study_id": study.key.study_id,
            "dicom_id": study.key.dicom_id,
            "finding": name,
            "side": drawn[name].side,
            "zone": drawn[name].zone,
            "severity": drawn[name].severity,
            "shape": masks.format_shape(mask.shape),
            "mask": masks.encode(mask),
        }
        for name, mask in study.masks.items()
    ]
