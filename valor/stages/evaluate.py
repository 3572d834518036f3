"""Evaluate: scores of every checkpoint's reports with intervals, the stage table, and the page to look at."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from valor import artifacts, progress
from valor.clinical.vocabulary import OBSERVATIONS
from valor.context import Context
from valor.data.manifest import Study, read_studies
from valor.errors import IntegrityError
from valor.evaluation import inputs, page, results, scores, table
from valor.evaluation.cards import View
from valor.evaluation.inputs import Predictions
from valor.recipe import EvaluationSettings
from valor.stages import StageResult

log = logging.getLogger(__name__)


def evaluate(
    settings: EvaluationSettings,
    *,
    dataset: Path,
    evidence: Path,
    predictions: list[Path],
    evaluation: Path,
    context: Context,
) -> StageResult:
    """Write `metrics.json`, `table.json`, `scores.parquet`, `summary.*` and `evaluation.html` into `evaluation`.

    Args:
        settings: the recipe's `evaluation` section.
        dataset: the dataset artifact.
        evidence: annotations and truth, either of which may be empty.
        predictions: predictions artifacts of sft, text, vision and champion; an empty champion is left out.
        evaluation: the directory to make.
        context: unused places.

    Raises:
        IntegrityError: the predictions are of another dataset or do not cover the same studies, or truth covers a
            part of them only.
        DataError: the predictions hold no study.
    """
    every = inputs.read_predictions(predictions, dataset_digest=artifacts.read_stamp(dataset)["digest"])
    study_ids = next(iter(every.values())).study_ids
    truth = inputs.read_truth(evidence, study_ids)
    pairs = inputs.read_pairs(evidence, study_ids)
    # A twin is there for its pair alone: its patient would count twice in every other figure.
    found = {name: one.without({pair.twin for pair in pairs}) for name, one in every.items()}
    first = next(iter(found.values()))
    studies = _studies(dataset, first)
    masks = inputs.read_masks(evidence, studies)
    references = {row["study_id"]: scores.read_report(row["reference"]) for row in first.rows}
    expected = scores.expectations(references, truth)
    statements, tables = {}, {}
    for step, (name, one) in enumerate(found.items()):
        progress.report(step, len(found), unit="checkpoints")
        statements[name] = {row["study_id"]: scores.read_report(row["hypothesis"]) for row in every[name].rows}
        flips = {pair.study: scores.flipped(pair, statements[name], truth) for pair in pairs} if truth else {}
        tables[name] = scores.table(one, statements[name], expected, masks, flips)
    subjects = [row["subject_id"] for row in first.rows]
    metrics = {
        **results.run_facts(found, truth=truth is not None, annotated=len(masks), settings=settings),
        **results.compute(tables, subjects=subjects, expected=expected, settings=settings),
    }
    view = View(
        metrics=metrics, table=table.build(metrics), predictions=found, studies=studies, references=references,
        statements=statements, truth=truth, expected=expected, masks=masks,
        page_studies=settings.page_studies, publish_text=settings.publish_text,
    )  # fmt: skip
    with artifacts.atomic_dir(evaluation) as path:
        artifacts.write_json(path / "metrics.json", metrics)
        artifacts.write_json(path / "table.json", view.table)
        _write_scores(path / "scores.parquet", view, tables)
        _write_summary(path, view)
        (path / "evaluation.html").write_text(page.render(view), encoding="utf-8")
    progress.report(len(found), len(found), unit="checkpoints")
    return StageResult(metrics=_headline(metrics))


def _studies(dataset: Path, predictions: Predictions) -> list[Study]:
    wanted = set(predictions.study_ids)
    studies = [study for study in read_studies(dataset, split=predictions.split) if study.study_id in wanted]
    if len(studies) != len(wanted):
        raise IntegrityError(f"{dataset}: holds {len(studies)} of the {len(wanted)} predicted studies; predict again")
    return studies


def _write_scores(path: Path, view: View, tables: Mapping[str, Any]) -> None:
    """Write one row of numbers per study and checkpoint; no text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for name, one in view.predictions.items():
        for row, numbers in zip(one.rows, tables[name], strict=True):
            study = row["study_id"]
            labels = {f"hypothesis_label/{f}": v for f, v in scores.label_columns(view.statements[name][study]).items()}
            labels |= {f"reference_label/{f}": v for f, v in scores.label_columns(view.references[study]).items()}
            if "truth" in view.expected:
                held = view.expected["truth"][study]
                labels |= {
                    f"truth/present/{f}": int(f in held.present) if f in held.judged else None for f in OBSERVATIONS
                }
            counts = dict(zip(scores.COLUMNS, numbers.tolist(), strict=True))
            rows.append({"checkpoint": name, "study_id": study, "subject_id": row["subject_id"], **counts, **labels})
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")


def _write_summary(path: Path, view: View) -> None:
    """Write the text- and image-free summary, which may leave restricted storage."""
    facts = {key: view.metrics[key] for key in results.FACTS}
    artifacts.write_json(path / "summary.json", {**facts, "table": view.table})
    lines = ["# Evaluation", "", table.render_text(view.table, full=True), ""]
    lines += [f"Dataset `{facts['dataset_digest'][:12]}`.", ""]
    lines += [f"- {name}: checkpoint `{digest[:12]}`" for name, digest in facts["checkpoint_digests"].items()]
    (path / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that MLflow shows: those of no single finding, as `<checkpoint>/<metric>`."""
    values = {
        f"{name}/{key}": cell["value"]
        for name, found in metrics["checkpoints"].items()
        for key, cell in found.items()
        if not metrics["measures"][key]["finding"]
    }
    return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
