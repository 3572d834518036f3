"""Registered versions of the model, and which of them is the champion.

A version is a small MLflow model whose code loads a checkpoint from the model store by reference, after its digest
is verified; no weights enter MLflow. Locally a candidate that passed the gate becomes the champion at once. On a
cluster tasks should write to a model of candidates whose alias nobody serves from, and a promoter with an identity of
its own copies a version into the released model: MLflow's permissions cannot protect an alias.
"""

import dataclasses
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valor.errors import GateRefused
from valor.tracking import pipeline_runs, store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models.model import ModelInfo

CHAMPION = "champion"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What a version is made from.

    Attributes:
        model_name: the registered model.
        checkpoint_uri: its place in the model store; `checkpoint_digest` its content digest.
        evaluation_digest: digest of the evaluation that the gate read.
        tags: what the version carries of its lineage.
        code_path: the code file that MLflow runs to load the version.
        model_config: what that code is given.
        run_id: the run of the stage that registers.
    """

    model_name: str
    checkpoint_uri: str
    checkpoint_digest: str
    evaluation_digest: str
    tags: Mapping[str, str]
    code_path: Path
    model_config: Mapping[str, Any]
    run_id: str


def champion(model_name: str) -> tuple[str, str]:
    """Return (checkpoint uri in the model store, digest) of a model's champion, or ("", "") where there is none."""
    if not store.enabled():
        return "", ""
    version = champion_version(model_name)
    if version is None:
        return "", ""
    return version.tags.get("valor.checkpoint_uri", ""), version.tags.get("valor.checkpoint_digest", "")


def champion_version(model_name: str) -> "ModelVersion | None":
    """Return the registered version under the alias `champion`, or None."""
    from mlflow.exceptions import MlflowException

    client = store.client()
    with store.service_errors(f"asking for the champion of {model_name!r}"):
        try:
            return client.get_model_version_by_alias(model_name, CHAMPION)
        except MlflowException as error:
            # MLflow says INVALID_PARAMETER_VALUE for a model without that alias.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def known_versions(model_name: str) -> list[str]:
    """Return up to 20 registered versions as NAME/VERSION: the model's own, or everybody's where it has none."""
    found = [(version.name, int(version.version)) for version in store.client().search_model_versions(max_results=1000)]
    own = [version for version in found if version[0] == model_name]
    return [f"{name}/{number}" for name, number in sorted(own or found)[-20:]]


def register(candidate: Candidate, *, champion_digest: str) -> str:
    """Register a candidate, make it the champion, and return its version.

    Registering the same checkpoint with the same evaluation again, or the checkpoint that already is the champion,
    returns the version that exists.

    Args:
        candidate: what to register.
        champion_digest: digest of the champion that the gate compared with; "" for none.

    Raises:
        GateRefused: another champion was made since the gate compared.
    """
    with store.registry_lock(candidate.model_name):
        version = _promote(candidate, champion_digest)
    _tell_parent(candidate, version)
    return version


def _promote(candidate: Candidate, champion_digest: str) -> str:
    """Return the candidate's version as the champion, created where it is missing."""
    current = _require_champion(candidate, champion_digest)
    if current is not None and current.tags.get("valor.checkpoint_digest") == candidate.checkpoint_digest:
        return str(current.version)
    with store.service_errors(f"registering {candidate.model_name!r}"):
        version = _find(candidate) or _create(candidate)
        # Creating a version takes a while; on a server another run may have been quicker.
        _require_champion(candidate, champion_digest)
        store.client().set_registered_model_alias(candidate.model_name, CHAMPION, version)
    return version


def _tell_parent(candidate: Candidate, version: str) -> None:
    """Name the version on the pipeline run that it came from: there people compare runs."""
    with store.service_errors("recording the version"):
        parent = store.client().get_run(candidate.run_id).data.tags.get(pipeline_runs.PARENT)
        if parent:
            pipeline_runs.set_tags(parent, {"valor.version": f"{candidate.model_name}/{version}"})


def _require_champion(candidate: Candidate, champion_digest: str) -> "ModelVersion | None":
    """Return the champion if it is the one that the gate compared with, or the candidate itself."""
    current = champion_version(candidate.model_name)
    digest = current.tags.get("valor.checkpoint_digest", "") if current is not None else ""
    if digest not in (champion_digest, candidate.checkpoint_digest):
        raise GateRefused(
            f"{candidate.model_name}: the champion is {digest or 'none'} now, the gate compared the candidate with "
            f"{champion_digest or 'none'}; run the pipeline again, so that it meets the new champion"
        )
    return current


def _find(candidate: Candidate) -> str:
    """Return the version with the candidate's checkpoint and evaluation, or "" where there is none."""
    for found in store.client().search_model_versions(f"name = '{candidate.model_name}'"):
        known = found.tags.get("valor.checkpoint_digest"), found.tags.get("valor.evaluation_digest")
        if known == (candidate.checkpoint_digest, candidate.evaluation_digest):
            return str(found.version)
    return ""


def _create(candidate: Candidate) -> str:
    client = store.client()
    _ensure_model(candidate.model_name)
    logged = _log_model(candidate)
    version = client.create_model_version(
        candidate.model_name,
        source=logged.model_uri,
        model_id=logged.model_id,
        run_id=candidate.run_id,
        tags={
            **candidate.tags,
            "valor.checkpoint_uri": candidate.checkpoint_uri,
            "valor.checkpoint_digest": candidate.checkpoint_digest,
            "valor.evaluation_digest": candidate.evaluation_digest,
        },
    )
    return str(version.version)


def _ensure_model(name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.client().create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _log_model(candidate: Candidate) -> "ModelInfo":
    """Log the model by reference (a few kB: code, configuration, signature) under the run."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image")]), outputs=Schema([ColSpec(DataType.string, "report")])
    )
    # Otherwise MLflow waits about 45 s for the model hub where there is no network. Not for the whole process: only the
    # stage that registers comes here, and fetch_models needs the hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with _current(candidate.run_id):
        return mlflow.pyfunc.log_model(
            name=candidate.model_name.replace(".", "-"),
            python_model=str(candidate.code_path),
            model_config=dict(candidate.model_config),
            signature=signature,
            # Named, because MLflow would otherwise load the model to find out what it imports.
            pip_requirements=[f"valor-rrg[train,gcp]=={importlib.metadata.version('valor-rrg')}"],
            tags={"valor.digest": candidate.checkpoint_digest},
        )


@contextmanager
def _current(run_id: str) -> Iterator[None]:
    """Make a run MLflow's current one without ending it, for calls that know no run id."""
    import mlflow

    mlflow.start_run(run_id=run_id, log_system_metrics=False)
    try:
        yield
    finally:
        mlflow.end_run("RUNNING")
