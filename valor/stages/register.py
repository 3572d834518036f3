"""Register: put the candidate's checkpoint into the model store and make a registered version that points there."""

import logging
from pathlib import Path
from typing import Any

from valor import artifacts, storage
from valor.context import Context
from valor.errors import GateRefused, IntegrityError, UserError
from valor.recipe import RegistrySettings
from valor.stages import StageResult

log = logging.getLogger(__name__)
_CODE_PATH = Path(__file__).parents[1] / "serving" / "model.py"


def register(
    settings: RegistrySettings,
    *,
    checkpoint: Path,
    evaluation: Path,
    verdict: Path,
    registration: Path,
    champion_digest: str,
    context: Context,
) -> StageResult:
    """Register the checkpoint that passed the gate; the same one again gives the same version.

    Args:
        settings: the recipe's `registry` section.
        checkpoint: the candidate.
        evaluation: the evaluation that the gate read.
        verdict: the gate's verdict on it (`verdict.json`).
        registration: the directory to make: `registration.json` and `lineage.json`.
        champion_digest: digest of the champion that the gate compared with; "" for none.
        context: names the model store.

    Returns:
        value `version`.

    Raises:
        GateRefused: the verdict is no "pass", or another champion was made since.
        IntegrityError: an artifact does not match its stamp, the gate judged another checkpoint or evaluation, or
            the chain behind the checkpoint is broken.
        UserError: tracking is off.
    """
    from valor.tracking import registry, runs
    from valor.tracking.trace import trace

    run = runs.active()
    if run is None or not run.run_id:
        raise UserError("register: VALOR_TRACKING is off, and a version needs MLflow; unset VALOR_TRACKING")
    stamps = _verified_stamps(checkpoint=checkpoint, evaluation=evaluation, verdict=verdict)
    traced = trace(stamps)
    if traced.problems:
        raise IntegrityError(f"{checkpoint}: its lineage is broken, so it is not registered: {traced.problems[0]}")
    uri = _to_model_store(checkpoint, stamps["checkpoint"]["digest"], context.models_root)
    candidate = registry.Candidate(
        model_name=settings.model_name,
        checkpoint_uri=uri,
        checkpoint_digest=stamps["checkpoint"]["digest"],
        evaluation_digest=stamps["evaluation"]["digest"],
        tags=traced.tags() | {"valor.verdict": "pass", "valor.pipeline_run": context.pipeline_run},
        code_path=_CODE_PATH,
        model_config={
            "checkpoint_uri": uri,
            "sha256": stamps["checkpoint"]["digest"],
            "image_px": _image_px(traced),
        },
        run_id=run.run_id,
    )
    version = registry.register(candidate, champion_digest=champion_digest)
    log.info("%s: version %s is the champion", settings.model_name, version)
    with artifacts.atomic_dir(registration) as folder:
        facts = {"model_name": settings.model_name, "version": version, "checkpoint_uri": uri}
        digests = {f"{name}_digest": stamp["digest"] for name, stamp in stamps.items()}
        artifacts.write_json(folder / "registration.json", facts | digests | {"champion_before": champion_digest})
        artifacts.write_json(folder / "lineage.json", traced.as_tree())
    return StageResult(values={"version": version}, notes=facts)


def _verified_stamps(*, checkpoint: Path, evaluation: Path, verdict: Path) -> dict[str, dict[str, Any]]:
    """Return the three stamps after checking content, that they belong together, and that the verdict is "pass"."""
    artifacts.load_checkpoint_info(checkpoint)
    folders = {"checkpoint": checkpoint, "evaluation": evaluation, "verdict": verdict}
    stamps = {name: artifacts.read_stamp(folder) for name, folder in folders.items()}
    found = artifacts.digest_dir(checkpoint)
    if found != stamps["checkpoint"]["digest"]:
        raise IntegrityError(
            f"{checkpoint}: its digest is {found}, its stamp says {stamps['checkpoint']['digest']}; it was altered, "
            "run the stage that made it again"
        )
    judged = stamps["verdict"]["parents"].get("evaluation", "")
    if judged != stamps["evaluation"]["digest"]:
        raise IntegrityError(
            f"{verdict}: the gate judged evaluation {judged or 'none'}, this one is {stamps['evaluation']['digest']}; "
            "run the gate on it"
        )
    value = artifacts.read_json(verdict / "verdict.json")
    if value["verdict"] != "pass":
        raise GateRefused(f"{verdict}: the verdict is {value['verdict']!r}; only a candidate that passed is registered")
    if value["candidate_digest"] != found:
        raise IntegrityError(
            f"{verdict}: the gate judged checkpoint {value['candidate_digest']}, this one is {found}; give register "
            "the checkpoint that gate.candidate names"
        )
    return stamps


def _to_model_store(checkpoint: Path, digest: str, models_root: str) -> str:
    """Copy a checkpoint to models_root/<digest>, once; what is there already is verified and stays as it is."""
    uri = storage.join(models_root if storage.is_remote(models_root) else Path(models_root).absolute(), digest)
    if storage.is_complete(uri):
        manifest = storage.read_manifest(uri) if storage.is_remote(uri) else storage.verify_dir(uri)
        if (found := artifacts.digest_manifest(manifest)) != digest:
            raise IntegrityError(f"{uri}: its digest is {found}; the model store was altered, restore it from a backup")
        return uri
    storage.put_dir(checkpoint, uri)
    return uri


def _image_px(traced: Any) -> int:
    """Return the longer side in pixels that the training images were shrunk to; 0 where the records do not tell."""
    sizes = {node.image_px for node in traced.nodes["checkpoint"].walk() if node.kind == "dataset" and node.image_px}
    return int(sizes.pop()) if len(sizes) == 1 else 0
