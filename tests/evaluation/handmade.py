"""A small evaluation made by hand from drawn studies: dataset, evidence and predictions with known skill."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from valor import artifacts
from valor.data import evidence as evidence_tables
from valor.data.images import Radiograph, Window, shrink
from valor.data.manifest import DATASET_INFO, SCHEMA, SCHEMA_VERSION, Study, StudyImage, TableWriter, encode_image
from valor.data.phantom.disease import truth_rows
from valor.data.phantom.keys import plan
from valor.data.phantom.studies import PhantomStudy, draw
from valor.evaluation import grounding, predict
from valor.models.loading import square_box
from valor.recipe import PhantomStudies

GRID = 8
DIGEST = "d" * 64
SKILL = {"sft": (0.75, 0.6, 2.0), "text": (0.85, 0.7, 3.0), "vision": (0.9, 0.8, 5.0)}
"""Per checkpoint: the share of sentences kept, of foreign positive sentences refused, attention on the finding."""


def build_inputs(root: Path, *, studies: int, image_px: int, seed: int = 5) -> dict:
    """Write drawn studies, truth, masks and reports that get better by stage; return the paths `evaluate` takes."""
    settings = PhantomStudies(seed=seed, train=0, val=0, test=studies, second_site=0, image_px=image_px)
    drawn = [draw(key, settings) for key in plan(settings) if key.split == "test"]
    rows = sorted((row_of(study, image_px) for study in drawn), key=lambda row: row.study_id)
    drawn.sort(key=lambda study: study.key.study_id)
    paths = {"dataset": write_dataset(root / "dataset", rows), "evidence": write_evidence(root / "evidence", drawn)}
    paths["predictions"] = [write_skilled(root / name, name, drawn, rows, seed=seed) for name in SKILL]
    paths["predictions"].append(write_predictions(root / "champion", "champion", [], checkpoint_digest=""))
    return paths


def row_of(study: PhantomStudy, image_px: int) -> Study:
    grey = study.pixels.astype(np.float32) / 4095
    window = Window(kind="none", low=None, high=None)
    pixels, transform = shrink(Radiograph(pixels=grey, inverted=False, window=window), image_px=min(image_px, 192))
    name = f"image-{study.key.study_id}"
    image = StudyImage(bytes=encode_image(pixels), path=name, dicom_id=name, view="PA", transform=transform)
    return Study(
        study_id=study.key.study_id, subject_id=study.key.subject_id, images=(image,), findings=study.findings,
        impression=study.impression, indication=None, comparison=None, sex=study.sex, age_band=None, device=None,
        split="test", source_digest="0" * 64,
    )  # fmt: skip


def write_dataset(path: Path, rows: list[Study]) -> Path:
    path.mkdir()
    info = {"schema_version": SCHEMA_VERSION, "digest": DIGEST, "studies": {"train": 0, "val": 0, "test": len(rows)}}
    artifacts.write_json(path / DATASET_INFO, info)
    with TableWriter(path / "shard-00000.parquet", SCHEMA) as table:
        for row in rows:
            table.write(row)
    artifacts.stamp(path, kind="dataset", stage="validate_data", digest=DIGEST)
    return path


def write_evidence(path: Path, drawn: list[PhantomStudy]) -> Path:
    from valor.data.masks import encode, format_shape

    path.mkdir()
    truth, annotations = [], []
    for study in drawn:
        truth += [{"study_id": study.key.study_id, **row} for row in truth_rows(study.truth)]
        for finding in study.truth:
            annotations.append(
                {"study_id": study.key.study_id, "dicom_id": f"image-{study.key.study_id}", "finding": finding.finding,
                 "side": finding.side, "zone": finding.zone, "severity": finding.severity,
                 "shape": format_shape(study.pixels.shape), "mask": encode(study.masks[finding.finding])}
            )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(truth), path / "truth.parquet")
    pq.write_table(pa.Table.from_pylist(annotations), path / "annotations.parquet")
    evidence_tables.write(path, [], name="pairs")
    artifacts.stamp(path, kind="evidence", stage="validate_data")
    return path


def empty_evidence(path: Path) -> Path:
    """Evidence of real data without boxes."""
    path.mkdir()
    for name in evidence_tables.TABLES:
        evidence_tables.write(path, [], name=name)
    return path


def write_skilled(path: Path, name: str, drawn: list[PhantomStudy], rows: list[Study], *, seed: int) -> Path:
    """Write predictions that keep, drop and borrow sentences, and attend to the finding, by the checkpoint's skill."""
    keep, refuse, focus = SKILL[name]
    rng = np.random.default_rng([seed, len(name)])
    hypotheses = []
    for i, row in enumerate(rows):
        own = [s for s in row.text.split(". ") if rng.random() < keep]
        other = [s for s in rows[(i + 7) % len(rows)].text.split(". ") if rng.random() > refuse]
        hypotheses.append(". ".join([*own, *(s.removeprefix("FINDINGS: ") for s in other)]))
    out = []
    for row, study, text, mentions in zip(rows, drawn, hypotheses, predict.positive_mentions(hypotheses), strict=True):
        out.append(
            {"study_id": row.study_id, "subject_id": row.subject_id, "reference": row.text, "hypothesis": text,
             "hypothesis_tokens": len(text.split()), "truncated": False, "similarity": float(rng.normal(0.3, 0.05)),
             "reference_similarity": 0.4, "image_box": list(square_box(*study.pixels.shape)),
             "attention": [attention_entry(mention, study, focus, rng) for mention in mentions]}
        )  # fmt: skip
    return write_predictions(path, name, out, checkpoint_digest=artifacts.digest_value(name))


def attention_entry(mention, study: PhantomStudy, focus: float, rng: np.random.Generator) -> dict:
    box = square_box(*study.pixels.shape)
    mask = study.masks.get(mention.finding, np.zeros(study.pixels.shape)).astype(np.float32)
    noise = rng.gamma(2.0, 0.5, size=(2, GRID, GRID))
    grid = noise[0] + focus * grounding.cover(mask, box=box, grid=(GRID, GRID))
    return {
        "finding": mention.finding, "label": mention.label, "side": mention.side, "start": mention.start,
        "end": mention.end, "grid": (grid / grid.sum()).ravel(), "grid_h": GRID, "grid_w": GRID,
        "shuffled": (noise[1] / noise[1].sum()).ravel(),
    }  # fmt: skip


def write_predictions(path: Path, name: str, rows: list[dict], *, checkpoint_digest: str, digest: str = DIGEST) -> Path:
    path.mkdir()
    predict.write_table(path, rows)
    predict.write_info(path, name=name, checkpoint_digest=checkpoint_digest, dataset_digest=digest, split="test")
    artifacts.stamp(path, kind="predictions", stage="predict")
    return path


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
