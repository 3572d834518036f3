"""Predict: greedy reports of one checkpoint on one split, with the expert's similarity and attention maps.

What was predicted is kept in `work_root/predictions/<digest of weights, data, settings and code>`: today's candidate is
tomorrow's champion, and the champion's reports of the same studies need not be written again.
"""

import logging
import shutil
import tempfile
from pathlib import Path

from valor import artifacts, progress, storage
from valor.context import Context
from valor.data.manifest import read_studies
from valor.errors import DataError, IntegrityError
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
    expert: Path,
    predictions: Path,
    context: Context,
    checkpoint: Path | None = None,
    checkpoint_uri: str = "",
    checkpoint_digest: str = "",
) -> StageResult:
    """Write the predictions of one checkpoint.

    Args:
        settings: the recipe's `predict` section.
        name: `sft`, `text`, `vision` or `champion`.
        dataset: the dataset artifact.
        expert: the expert's checkpoint, for the similarity column.
        predictions: the directory to make.
        context: `work_root` keeps predictions between runs.
        checkpoint: the checkpoint artifact; absent for the champion.
        checkpoint_uri: where the champion lies in the model store; "" where there is none.
        checkpoint_digest: the champion's digest.

    Raises:
        DataError: the split holds no study.
        IntegrityError: the checkpoint's weights, or the champion's digest, do not match.
    """
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
        identity = [digest, dataset_digest, artifacts.read_stamp(expert)["digest"], settings.model_dump(mode="json")]
        key = artifacts.digest_value([*identity, artifacts.digest_code(_CODE, _LIBRARIES)])
        kept = storage.join(context.work_root, "predictions", key)
        if not storage.get_kept(kept, table):
            if checkpoint is None:
                checkpoint = _fetch_champion(checkpoint_uri, checkpoint_digest, Path(scratch) / "champion")
            table.mkdir()
            rows = _predict(settings, checkpoint=checkpoint, dataset=dataset, expert=expert)
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


def _predict(settings: PredictSettings, *, checkpoint: Path, dataset: Path, expert: Path) -> list[dict]:
    from valor.models.expert import Expert
    from valor.models.generate import generate_reports
    from valor.models.loading import fastest_device, load_policy, model_pixels, prompt_of

    studies = read_studies(dataset, split=settings.split)[: settings.max_studies or None]
    if not studies:
        raise DataError(f"{dataset}: split {settings.split!r} holds no study; give data.split_fractions a share for it")
    model, processor = load_policy(checkpoint)
    model.to(fastest_device())
    prompt = prompt_of(checkpoint)
    images = [model_pixels(study, processor) for study in studies]
    generated = generate_reports(
        model,
        processor,
        images,
        prompt=prompt,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=lambda done, total: progress.report(done, total, unit="studies"),
    )
    reports = [report.text for report in generated]
    similarity = predictions_table.similarities(Expert.load(expert), studies, reports)
    attention: list[list[dict]] = [[] for _ in studies]
    if settings.attention_maps:
        subjects = [study.subject_id for study in studies]
        attention = predictions_table.attention_rows(
            model, processor, images, reports, subjects=subjects, prompt=prompt
        )
    return predictions_table.rows(studies, generated, similarity, attention)
