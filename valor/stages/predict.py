"""Predict: reports of one checkpoint on one split, with the judge's similarity and attention maps.

What was predicted is kept in `work_root/predictions/<digest of weights, data, settings and code>`: today's candidate is
tomorrow's champion, and the champion's reports of the same studies need not be written again.
"""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from valor import artifacts, progress, storage
from valor.context import Context
from valor.data.manifest import in_share, read_studies
from valor.errors import DataError, IntegrityError, UserError
from valor.evaluation import predict as predictions_table
from valor.recipe import PredictSettings
from valor.stages import StageResult

log = logging.getLogger(__name__)

_CODE = (
    "models", "clinical", "evaluation/predict.py", "evaluation/attention.py", "data/manifest.py", "stages/predict.py",
)  # fmt: skip
_LIBRARIES = ("torch", "transformers", "tokenizers", "pillow")


def predict(
    settings: PredictSettings,
    *,
    name: str,
    dataset: Path,
    judge: Path,
    predictions: Path,
    context: Context,
    expert: Path | None = None,
    checkpoint: Path | None = None,
    checkpoint_uri: str = "",
    checkpoint_digest: str = "",
) -> StageResult:
    """Write the predictions of one checkpoint.

    Args:
        settings: the recipe's `predict` section.
        name: `sft`, `text`, `vision` or `champion`.
        dataset: the dataset artifact.
        judge: the dual encoder of the similarity column.
        predictions: the directory to make.
        context: `work_root` keeps predictions between runs.
        expert: the dual encoder that chooses, with `best_of` above 1.
        checkpoint: the checkpoint artifact; absent for the champion.
        checkpoint_uri: where the champion lies in the model store; "" where there is none.
        checkpoint_digest: the champion's digest.

    Raises:
        UserError: `best_of` without an expert, or with one that has no measured gate.
        DataError: the split holds no study.
        IntegrityError: the checkpoint's weights, or the champion's digest, do not match.
    """
    if (settings.best_of > 1) != (expert is not None):
        raise UserError(
            f"predict.best_of is {settings.best_of}, the input expert is {'given' if expert else 'missing'}; an expert "
            "chooses among several reports: give best_of above 1 and an expert, or neither"
        )
    dataset_digest = artifacts.read_stamp(dataset)["digest"]
    info = {"dataset_digest": dataset_digest, "split": settings.split}
    if checkpoint is None and not checkpoint_uri:
        log.info("there is no champion yet: its predictions are an empty table")
        with artifacts.atomic_dir(predictions) as path:
            predictions_table.write_table(path, [])
            metrics = predictions_table.write_info(path, name=name, checkpoint_digest="", **info)
        return StageResult(metrics=metrics)
    digest = artifacts.digest_dir(checkpoint) if checkpoint else checkpoint_digest
    predictions.parent.mkdir(parents=True, exist_ok=True)
    # Beside the artifact: reports are never staged outside restricted storage.
    with tempfile.TemporaryDirectory(dir=predictions.parent) as scratch, artifacts.atomic_dir(predictions) as path:
        table = Path(scratch) / "kept"
        experts = [artifacts.read_stamp(path)["digest"] for path in (judge, expert) if path]
        identity = [digest, dataset_digest, *experts, settings.model_dump(mode="json")]
        key = artifacts.digest_value([*identity, artifacts.digest_code(_CODE, _LIBRARIES)])
        kept = storage.join(context.work_root, "predictions", key)
        if not storage.get_kept(kept, table):
            if checkpoint is None:
                checkpoint = _fetch_champion(checkpoint_uri, checkpoint_digest, Path(scratch) / "champion")
            table.mkdir()
            rows = _predict(settings, checkpoint=checkpoint, dataset=dataset, judge=judge, expert=expert)
            predictions_table.write_table(table, rows)
            storage.keep(table, kept)
        shutil.copy2(table / predictions_table.TABLE, path)
        metrics = predictions_table.write_info(path, name=name, checkpoint_digest=digest, **info)
    return StageResult(metrics=metrics)


def _fetch_champion(uri: str, digest: str, local: Path) -> Path:
    storage.get_dir(uri, local)
    found = artifacts.digest_dir(local)
    if found != digest:
        raise IntegrityError(f"{uri}: the champion's digest is {found}, preflight saw {digest}; the store was altered")
    return local


def _predict(
    settings: PredictSettings, *, checkpoint: Path, dataset: Path, judge: Path, expert: Path | None
) -> list[dict]:
    from valor.models.expert import Expert
    from valor.models.generate import generate_reports, sample_reports
    from valor.models.loading import fastest_device, load_policy, model_pixels, prompt_of

    studies = in_share(read_studies(dataset, split=settings.split), settings.share)[: settings.max_studies or None]
    if not studies:
        raise DataError(f"{dataset}: split {settings.split!r} holds no study; give data.split_fractions a share for it")
    model, processor = load_policy(checkpoint)
    model.to(fastest_device())
    prompt = prompt_of(checkpoint)
    images = [model_pixels(study, processor) for study in studies]
    common: dict[str, Any] = {
        "prompt": prompt,
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "progress": lambda done, total: progress.report(done, total, unit="reports"),
    }
    if expert is None:
        generated = generate_reports(model, processor, images, **common)
    else:
        candidates = sample_reports(model, processor, images, samples=settings.best_of, seed=settings.seed, **common)
        generated = predictions_table.likeliest(Expert.load(expert), studies, candidates)
    reports = [report.text for report in generated]
    similarity = predictions_table.similarities(Expert.load(judge), studies, reports)
    attention: list[list[dict]] = [[] for _ in studies]
    if settings.attention_maps:
        subjects = [study.subject_id for study in studies]
        attention = predictions_table.attention_rows(
            model, processor, images, reports, subjects=subjects, prompt=prompt
        )
    return predictions_table.rows(studies, generated, similarity, attention)
