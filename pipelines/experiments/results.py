"""Per-study numbers of an arm's reports against truth, small enough to be committed, and what they add up to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.experiments.analysis import Table

_KEPT = ("truth/", "report/", "pairs/", "similarity/", "studies", "tokens", "truncated", "empty")


def save(path: Path, subjects: Sequence[str], table: np.ndarray) -> None:
    """Write a study table to an .npz file: what people may recompute the document from, without a name or a text."""
    from valor.evaluation.scores import COLUMNS

    kept = [i for i, name in enumerate(COLUMNS) if name.startswith(_KEPT)]
    _, numbers = np.unique(np.asarray(subjects), return_inverse=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = np.array([COLUMNS[i] for i in kept])
    np.savez_compressed(
        path, subjects=numbers.astype(np.int32), columns=names, values=table[:, kept].astype(np.float32)
    )


def load(path: Path) -> Table:
    """Return a saved table."""
    with np.load(path, allow_pickle=False) as file:
        columns = tuple(str(name) for name in file["columns"])
        return Table(file["subjects"], columns, file["values"].astype(np.float64))


def study_table(*, evidence: Path, predictions: Path) -> tuple[list[str], np.ndarray]:
    """Return the subjects (N) and the (N, columns) float64 table of `scores.COLUMNS`; twins have no row."""
    import pyarrow.parquet as pq

    from valor.evaluation import predict

    return _table(pq.read_table(predictions / predict.TABLE).to_pylist(), evidence=evidence)


def table_of(studies: Sequence[Any], hypotheses: Mapping[str, str], *, evidence: Path) -> tuple[list[str], np.ndarray]:
    """Return the same for reports that are in no predictions artifact."""
    rows = [
        {
            "study_id": study.study_id,
            "subject_id": study.subject_id,
            "reference": study.text,
            "hypothesis": hypotheses[study.study_id],
            "hypothesis_tokens": len(hypotheses[study.study_id].split()),
            "truncated": False,
            "similarity": None,
            "attention": [],
        }
        for study in studies
    ]
    return _table(rows, evidence=evidence)


def _table(rows: list[dict[str, Any]], *, evidence: Path) -> tuple[list[str], np.ndarray]:
    from valor.evaluation import inputs, scores

    rows = sorted(rows, key=lambda row: row["study_id"])
    every = inputs.Predictions(name="", checkpoint_digest="", dataset_digest="", split="test", rows=rows)
    truth = inputs.read_truth(evidence, every.study_ids)
    assert truth is not None
    pairs = inputs.read_pairs(evidence, every.study_ids)
    one = every.without({pair.twin for pair in pairs})
    statements = {row["study_id"]: scores.read_report(row["hypothesis"]) for row in rows}
    references = {row["study_id"]: scores.read_report(row["reference"]) for row in one.rows}
    flips = {pair.study: scores.flipped(pair, statements, truth) for pair in pairs}
    table = scores.table(one, statements, scores.expectations(references, truth), {}, flips)
    return [row["subject_id"] for row in one.rows], table
