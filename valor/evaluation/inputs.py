"""What an evaluation reads: predictions of several checkpoints over the same studies, truth, masks and pairs.

Everything derives from the predictions, dataset and evidence artifacts; no model is loaded.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from valor import artifacts
from valor.clinical.vocabulary import OBSERVATIONS
from valor.data.manifest import Study
from valor.errors import DataError, IntegrityError
from valor.evaluation import predict

NAMES = ("sft", "text", "vision", "champion")
"""Checkpoints in the order of the table."""
LABELS = {"sft": "SFT", "text": "+ text", "vision": "+ vision", "champion": "champion"}


@dataclasses.dataclass(frozen=True)
class Predictions:
    """One checkpoint's predictions; `rows` are sorted by study_id (columns: `valor.evaluation.predict.schema`)."""

    name: str
    checkpoint_digest: str
    dataset_digest: str
    split: str
    rows: list[dict[str, Any]]

    @property
    def study_ids(self) -> list[str]:
        """The studies, sorted."""
        return [row["study_id"] for row in self.rows]

    def without(self, studies: Collection[str]) -> "Predictions":
        """Return the predictions of all other studies."""
        return dataclasses.replace(self, rows=[row for row in self.rows if row["study_id"] not in studies])


@dataclasses.dataclass(frozen=True)
class Present:
    """A finding that is in the image: its sides ("left", "right"; empty where unknown), zone and severity words."""

    sides: frozenset[str]
    zone: str
    severity: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """A study and its counterfactual twin, which differs from it in one finding: `added`, `removed` or `moved`."""

    study: str
    twin: str
    finding: str
    change: str


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is in the images.

    Attributes:
        findings: the findings that the truth speaks of; others are not judged against it.
        studies: study to {finding: Present}.
        implied: study to findings that follow from others (Lung Opacity from Edema): naming one is right, leaving it
            out is no omission, so it is not judged in that study.
    """

    findings: tuple[str, ...]
    studies: Mapping[str, Mapping[str, Present]]
    implied: Mapping[str, frozenset[str]]


def read_predictions(paths: Sequence[Path], *, dataset_digest: str) -> dict[str, Predictions]:
    """Return the predictions by name, in the table's order; an empty champion is left out.

    Raises:
        IntegrityError: two share a name or have an unknown one, were made from another dataset than
            `dataset_digest`, or do not cover the same studies in the same split.
        DataError: there is no prediction at all.
    """
    found: dict[str, Predictions] = {}
    for path in paths:
        one = _read_one(path)
        if one.name not in NAMES:
            raise IntegrityError(f"{path}: predictions are named {one.name!r}, expected one of {', '.join(NAMES)}")
        if one.name in found:
            raise IntegrityError(f"{path}: a second set of predictions named {one.name!r}; pass each checkpoint once")
        if one.dataset_digest != dataset_digest:
            raise IntegrityError(
                f"{path}: predictions of {one.name!r} were made from dataset {one.dataset_digest[:12]}, this is "
                f"{dataset_digest[:12]}; predict again on this dataset"
            )
        if one.rows or one.name != "champion":
            found[one.name] = one
    ordered = {name: found[name] for name in NAMES if name in found}
    if not ordered or not next(iter(ordered.values())).rows:
        raise DataError("evaluate: the predictions hold no study; give predict.split a split that has studies")
    _check_same_studies(ordered)
    return ordered


def _read_one(path: Path) -> Predictions:
    import pyarrow.parquet as pq

    info = artifacts.read_json(path / predict.INFO)
    table = path / predict.TABLE
    if not table.is_file():
        raise IntegrityError(f"{table}: missing; run predict again")
    rows = pq.read_table(table).to_pylist()
    return Predictions(
        name=info["name"],
        checkpoint_digest=info["checkpoint_digest"],
        dataset_digest=info["dataset_digest"],
        split=info["split"],
        rows=sorted(rows, key=lambda row: row["study_id"]),
    )


def _check_same_studies(predictions: Mapping[str, Predictions]) -> None:
    first, *others = predictions.values()
    if len(set(first.study_ids)) != len(first.rows):
        raise IntegrityError(f"predictions of {first.name!r} hold a study twice; run predict again")
    for other in others:
        if other.study_ids != first.study_ids or other.split != first.split:
            differing = sorted(set(other.study_ids) ^ set(first.study_ids))
            raise IntegrityError(
                f"predictions of {first.name!r} ({first.split}, {len(first.rows)} studies) and {other.name!r} "
                f"({other.split}, {len(other.rows)} studies) differ"
                f"{f', first at study {differing[0]}' if differing else ''}; predict both with the same settings"
            )
        if [row["reference"] for row in other.rows] != [row["reference"] for row in first.rows]:
            raise IntegrityError(
                f"predictions of {first.name!r} and {other.name!r} hold different references; predict again"
            )


def read_truth(evidence: Path, study_ids: Iterable[str]) -> Truth | None:
    """Return the truth of these studies, or None where the evidence has none of any of them.

    Raises:
        IntegrityError: it has some of the studies but not all; a score over a part would pass for the whole.
    """
    import pyarrow.parquet as pq

    wanted = set(study_ids)
    rows = pq.read_table(evidence / "truth.parquet").to_pylist()
    covered = {row["study_id"] for row in rows} & wanted
    if not covered:
        return None
    if missing := sorted(wanted - covered):
        raise IntegrityError(
            f"{evidence}: truth covers {len(covered)} of {len(wanted)} studies, study {missing[0]} is missing; "
            "write a truth row for every study, or none"
        )
    studies: dict[str, dict[str, Present]] = {study: {} for study in covered}
    implied: dict[str, set[str]] = {study: set() for study in covered}
    for row in rows:
        if row["study_id"] in wanted and row["present"] and row["finding"] in OBSERVATIONS:
            if row.get("implied"):
                implied[row["study_id"]].add(row["finding"])
                continue
            known = studies[row["study_id"]]
            known[row["finding"]] = _merge(known.get(row["finding"]), row)
    named = {row["finding"] for row in rows}
    return Truth(
        findings=tuple(f for f in OBSERVATIONS if f in named),
        studies=studies,
        implied={study: frozenset(found) for study, found in implied.items()},
    )


def read_pairs(evidence: Path, study_ids: Iterable[str]) -> list[Pair]:
    """Return the pairs of which both studies are among these, in the order of their twins."""
    import pyarrow.parquet as pq

    known = set(study_ids)
    rows = pq.read_table(evidence / "pairs.parquet").to_pylist()
    return [
        Pair(study=row["twin_of"], twin=row["study_id"], finding=row["finding"], change=row["change"])
        for row in rows
        if {row["twin_of"], row["study_id"]} <= known
    ]


def _merge(known: Present | None, row: Mapping[str, Any]) -> Present:
    sides = side_set(row.get("side"))
    zone, severity = row.get("zone") or "", row.get("severity") or ""
    if known is None:
        return Present(sides=sides, zone=zone, severity=severity)
    # One finding may lie in two places: keep both sides, and a word only where the places agree.
    return Present(
        sides=known.sides | sides,
        zone=known.zone if known.zone == zone else "",
        severity=known.severity if known.severity == severity else "",
    )


def side_set(side: str | None) -> frozenset[str]:
    """Return {"left"}, {"right"}, both for "bilateral", or nothing."""
    if side == "bilateral":
        return frozenset({"left", "right"})
    return frozenset({side} if side in ("left", "right") else ())


def read_masks(evidence: Path, studies: Sequence[Study]) -> dict[str, dict[str, np.ndarray]]:
    """Return, per study and finding, the union of the finding's masks on the study's first image.

    A mask is (h, w) float32 in [0, 1], the share of each dataset pixel that the finding covers. Studies without an
    annotation of their first image are absent.
    """
    import pyarrow.parquet as pq

    from valor.data.images import shrink_mask
    from valor.data.masks import decode

    images = {study.study_id: study.images[0] for study in studies}
    masks: dict[str, dict[str, np.ndarray]] = {}
    for row in pq.read_table(evidence / "annotations.parquet").to_pylist():
        image = images.get(row["study_id"])
        if image is None or row["dicom_id"] != image.dicom_id or not row["mask"]:
            continue
        mask = shrink_mask(decode(row["mask"], row["shape"]), image.transform)
        found = masks.setdefault(row["study_id"], {})
        found[row["finding"]] = np.maximum(found[row["finding"]], mask) if row["finding"] in found else mask
    return masks


def finite_or_zero(value: float | None) -> tuple[float, float]:
    """Return (value, 1), or (0, 0) for a value that is missing: a sum and its count."""
    return (float(value), 1.0) if value is not None and math.isfinite(value) else (0.0, 0.0)
