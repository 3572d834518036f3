"""Per-study numbers of an arm's reports against truth, small enough to be committed, and what they add up to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.experiments.analysis import Table

_KEPT = ("truth/", "report/", "pairs/", "similarity/", "studies", "tokens", "truncated", "empty")


def save(path: Path, table: Table) -> None:
    """Write a table to an .npz file: what people may recompute the document from, without a name or a text."""
    kept = [i for i, name in enumerate(table.columns) if name.startswith(_KEPT)]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        subjects=table.subjects.astype(np.int32),
        columns=np.array([table.columns[i] for i in kept]),
        values=table.values[:, kept].astype(np.float32),
        studies=np.array(table.studies),
    )


def load(path: Path) -> Table:
    """Return a saved table."""
    with np.load(path, allow_pickle=False) as file:
        columns = tuple(str(name) for name in file["columns"])
        return Table(file["subjects"], columns, file["values"].astype(np.float64), str(file["studies"]))


def study_table(*, evidence: Path, predictions: Path) -> Table:
    """Return the table of a predictions artifact, columns those of `scores.COLUMNS`; twins have no row."""
    import pyarrow.parquet as pq

    from valor.evaluation import predict

    return _table(pq.read_table(predictions / predict.TABLE).to_pylist(), evidence=evidence)


def table_of(studies: Sequence[Any], reports: Sequence[Any], *, evidence: Path) -> Table:
    """Return the same for reports of these studies (`valor.models.generate.Generated`) that are in no artifact."""
    rows = [
        {
            "study_id": study.study_id,
            "subject_id": study.subject_id,
            "reference": study.text,
            "hypothesis": report.text,
            "hypothesis_tokens": report.tokens,
            "truncated": report.truncated,
            "similarity": None,
            "attention": [],
        }
        for study, report in zip(studies, reports, strict=True)
    ]
    return _table(rows, evidence=evidence)


def _table(rows: list[dict[str, Any]], *, evidence: Path) -> Table:
    from valor import artifacts
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
    _, numbers = np.unique([row["subject_id"] for row in one.rows], return_inverse=True)
    return Table(numbers, scores.COLUMNS, table, artifacts.digest_value(one.study_ids)[:12])
