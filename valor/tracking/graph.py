"""Inputs and outputs of a run in MLflow's own graph, and in full as tags.

MLflow's graph knows datasets (digest of at most 36 characters) and logged models. So checkpoints become
external logged models, other inputs become datasets, and tags carry every full sha256:

- `valor.input.<name>` and `valor.output.<name>`: JSON `{"digest", "kind", "stage", "producer_run"}`;
- `valor.model.<name>`: id of the logged model of an output checkpoint;
- `valor.value.<name>` and `valor.result.<name>`: string parameters in and out.

No content goes here: digests, names and ids only.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DATASET_DIGEST_CHARS = 36
MODEL_KINDS = frozenset({"base", "expert", "judge", "checkpoint"})
"""Kinds of artifact that are weights; the name of a checkpoint among several inputs is its parameter's."""
_VALUE_CHARS = 2000


def reference(stamp: Mapping[str, Any]) -> str:
    """Return what a tag says of an artifact, as JSON."""
    kept = {key: stamp.get(key, "") for key in ("digest", "kind", "stage", "producer_run")}
    return json.dumps(kept, sort_keys=True)


def input_tags(inputs: Mapping[str, Mapping[str, Any]], values: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that tell what a run was given."""
    tags = {f"valor.input.{name}": reference(stamp) for name, stamp in inputs.items()}
    return tags | {f"valor.value.{name}": str(value)[:_VALUE_CHARS] for name, value in values.items()}


def output_tags(outputs: Mapping[str, Mapping[str, Any]], values: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that tell what a run made."""
    tags = {f"valor.output.{name}": reference(stamp) for name, stamp in outputs.items()}
    return tags | {f"valor.result.{name}": str(value)[:_VALUE_CHARS] for name, value in values.items()}


def references(run: "Run", direction: str) -> dict[str, dict[str, str]]:
    """Return a run's `input` or `output` artifacts by name, as its tags tell them."""
    prefix = f"valor.{direction}."
    found = {key.removeprefix(prefix): value for key, value in run.data.tags.items() if key.startswith(prefix)}
    return {name: json.loads(value) for name, value in found.items()}


def log_inputs(client: "MlflowClient", run_id: str, inputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw edges from a run's inputs: checkpoints as models, everything else as datasets."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

    models, datasets = [], []
    for name, stamp in inputs.items():
        model_id = _model_of(client, stamp) if stamp.get("kind") in MODEL_KINDS else ""
        if model_id:
            models.append(LoggedModelInput(model_id))
            continue
        dataset = Dataset(
            name=name,
            digest=stamp["digest"][:DATASET_DIGEST_CHARS],
            source_type="valor",
            source=json.dumps({"sha256": stamp["digest"], "producer_run": stamp.get("producer_run", "")}),
        )
        datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", name)]))
    if models or datasets:
        client.log_inputs(run_id, datasets=datasets, models=models)


def log_outputs(
    client: "MlflowClient", run_id: str, experiment_id: str, outputs: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Make an external logged model of every output checkpoint; return the tags that name them."""
    import mlflow
    from mlflow.entities import LoggedModelOutput

    tags = {}
    for name, stamp in outputs.items():
        if stamp.get("kind") not in MODEL_KINDS:
            continue
        model = mlflow.create_external_model(
            name=f"{stamp.get('task') or stamp['stage']}-{name}",
            source_run_id=run_id,
            tags={"valor.digest": stamp["digest"]},
            experiment_id=experiment_id,
        )
        client.log_outputs(run_id, models=[LoggedModelOutput(model.model_id, step=0)])
        tags[f"valor.model.{name}"] = model.model_id
    return tags


def _model_of(client: "MlflowClient", stamp: Mapping[str, Any]) -> str:
    """Return the id of the logged model that an input's producing run made, or "" where there is none here."""
    from mlflow.exceptions import MlflowException

    if not stamp.get("producer_run"):
        return ""
    try:
        tags = client.get_run(stamp["producer_run"]).data.tags
    except MlflowException as error:
        # An artifact from another store: its digest is still recorded.
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return ""
        raise
    return tags.get(f"valor.model.{stamp['kind']}", "")


def edge_problems(client: "MlflowClient", run: "Run") -> list[str]:
    """Compare MLflow's graph around a run with the run's tags; return one line per edge that differs."""
    drawn = {i.dataset.digest for i in run.inputs.dataset_inputs} if run.inputs else set()
    drawn |= {_digest_of(client, i.model_id) for i in (run.inputs.model_inputs if run.inputs else [])}
    problems = [
        f"run {run.info.run_id}: its tag says it was given {name} {ref['digest']}, MLflow's graph has no such input"
        for name, ref in references(run, "input").items()
        if not drawn & {ref["digest"], ref["digest"][:DATASET_DIGEST_CHARS]}
    ]
    made = {_digest_of(client, o.model_id) for o in (run.outputs.model_outputs if run.outputs else [])}
    problems += [
        f"run {run.info.run_id}: its tag says it made {name} {ref['digest']}, MLflow's graph has no such model"
        for name, ref in references(run, "output").items()
        if ref["kind"] in MODEL_KINDS and ref["digest"] not in made
    ]
    return problems


def _digest_of(client: "MlflowClient", model_id: str) -> str:
    """Return the digest that a logged model stands for, or "" for one that was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_logged_model(model_id).tags.get("valor.digest", "")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return ""
        raise
