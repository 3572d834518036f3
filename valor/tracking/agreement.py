"""Whether the version and the model store say what MLflow's runs say; one line per disagreement."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from valor import artifacts, storage
from valor.errors import IntegrityError, UserError, ValorError
from valor.tracking import store
from valor.tracking.trace import Node, Trace, trace

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def disagreements(registered: "ModelVersion", traced: Trace) -> list[str]:
    """Compare a version's tags, its model and its weights in the model store with the runs behind it.

    Raises:
        ServiceError: MLflow or the model store cannot be reached.
    """
    with store.service_errors(f"reading the model of {registered.name}/{registered.version}"):
        loaded = _model_problems(registered)
    return [*_stamp_problems(registered, traced), *loaded, *_store_problems(registered, traced)]


def _stamp_problems(registered: "ModelVersion", traced: Trace) -> list[str]:
    """Compare the version's tags with what the runs tell now."""
    return [
        f"the version's tag {key} is {registered.tags.get(key, 'missing')!r}, MLflow's runs say {value!r}"
        for key, value in traced.tags().items()
        if registered.tags.get(key) != value
    ]


def _model_problems(registered: "ModelVersion") -> list[str]:
    """Compare what the version's model loads with the checkpoint that the version names."""
    from mlflow.models import Model

    found = store.found(lambda: Model.load(registered.source))
    if found is None:
        return [f"the version's model {registered.source} is not in this MLflow"]
    config = found.flavors.get("python_function", {}).get("config") or {}
    told = {"checkpoint_uri": "valor.checkpoint_uri", "sha256": "valor.checkpoint_digest"}
    return [
        f"the model {registered.source} loads {key} {config.get(key, 'missing')!r}, the version says "
        f"{registered.tags.get(tag, 'missing')!r}"
        for key, tag in told.items()
        if config.get(key, "missing") != registered.tags.get(tag, "missing")
    ]


def _store_problems(registered: "ModelVersion", traced: Trace) -> list[str]:
    """Compare the model store with the chain: every file, the digest, and what `valor.json` says of its making."""
    uri, node = registered.tags.get("valor.checkpoint_uri", ""), traced.nodes.get("checkpoint")
    if not uri or node is None:
        return ["the version names no checkpoint in the model store"]
    try:
        manifest = storage.read_manifest(uri) if storage.is_remote(uri) else storage.verify_dir(uri)
        info = json.loads(storage.read_bytes(storage.join(uri, artifacts.CHECKPOINT_INFO)))
    except (IntegrityError, UserError, ValueError) as error:
        return [str(error) if isinstance(error, ValorError) else f"{uri}: valor.json is not JSON"]
    problems = []
    if (found := artifacts.digest_manifest(manifest)) != node.digest:
        problems.append(f"{uri}: its digest is {found}, MLflow's runs say {node.digest}")
    weights = {n: f["sha256"] for n, f in manifest["files"].items() if n.endswith(".safetensors") and "/" not in n}
    if info.get("weights") != weights:
        problems.append(f"{uri}/{artifacts.CHECKPOINT_INFO}: its weights are not those of the manifest")
    traced_problems, maker = _maker(info, node)
    problems += traced_problems
    told, known = _told(info), _known(maker)
    problems += [
        f"{uri}/{artifacts.CHECKPOINT_INFO}: {key} is {told.get(key) or 'missing'}, MLflow's runs say "
        f"{known.get(key) or 'nothing'}"
        for key in sorted(told.keys() | known.keys())
        if told.get(key, "") != known.get(key, "")
    ]
    return problems


def _maker(info: Mapping[str, Any], node: Node) -> tuple[list[str], Node]:
    """Return the checkpoint as made by the run that `valor.json` names.

    That need not be the run of this chain: another one may have made the same weights, and the model store keeps the
    first. Such a run has to say itself that it made them.
    """
    run_id = str(info.get("producer_run", ""))
    if run_id in ("", node.run_id):
        return [], node
    walked = trace({"checkpoint": {"kind": node.kind, "digest": node.digest, "producer_run": run_id}})
    return list(walked.problems), walked.nodes["checkpoint"]


def _told(info: Mapping[str, Any]) -> dict[str, str]:
    """Return what `valor.json` says of its making."""
    code = info.get("code", {})
    facts = {"parent dataset": info.get("dataset_digest", "")}
    facts |= {f"parent {name}": digest for name, digest in info.get("parents", {}).items()}
    facts |= {key: info.get(key, "") for key in ("stage", "producer_run", "pipeline_run")}
    commit = code.get("commit", "") + ("-dirty" if code.get("dirty") else "")
    return facts | {"commit": commit, "image": code.get("image", "")}


def _known(node: Node) -> dict[str, str]:
    """Return what MLflow's runs say of a checkpoint's making, under the names of `_told`."""
    facts = {f"parent {name}": parent.digest for name, parent in node.parents.items()}
    facts |= {"stage": node.stage, "producer_run": node.run_id, "pipeline_run": node.pipeline_run}
    return facts | {"commit": node.commit, "image": node.image}
