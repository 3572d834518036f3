"""What made a registered version: the chain from the version back to the digests of dataset and source.

Each artifact's stamp names the run that made it, and each run names the artifacts it was given, so the walk crosses
pipeline runs: a task that a later pipeline run reused is found under the run that executed it. The same chain is
told three times, and `chain` compares the three: MLflow's runs (tags, and its graph of datasets and logged models),
the version (the tags stamped on it when it was registered, and what its model loads), and `valor.json` with the
manifest in the model store. It cannot tell whether the recorded digests were true when they were recorded.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valor import artifacts, storage
from valor.errors import IntegrityError, UserError, ValorError
from valor.tracking import graph, pipeline_runs, store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion


@dataclasses.dataclass(frozen=True)
class Node:
    """An artifact and the run that made it.

    Attributes:
        kind: the artifact's kind, such as `checkpoint`.
        digest: its sha256.
        task: the task that made it, such as `predict-text`; `stage` the stage.
        run_id: the MLflow run; `pipeline_run` the pipeline run that executed it.
        commit: git commit; `image` the image or local code digest.
        settings_digest: sha256 of the recipe section.
        source_digest: what preflight saw at the source, for what `ingest` made.
        image_px: `data.image_px` where the run had it as a setting; else "".
        parents: the artifacts that the run was given, by name.
    """

    kind: str
    digest: str
    stage: str
    task: str = ""
    run_id: str = ""
    pipeline_run: str = ""
    commit: str = ""
    image: str = ""
    settings_digest: str = ""
    source_digest: str = ""
    image_px: str = ""
    parents: Mapping[str, "Node"] = dataclasses.field(default_factory=dict)

    def walk(self) -> "Iterator[Node]":
        """Yield this node and its ancestors, each once, ancestors last."""
        yield from _unique([self])


@dataclasses.dataclass(frozen=True)
class Trace:
    """The artifacts behind something, by name, and what is wrong with the records about them."""

    nodes: Mapping[str, Node]
    problems: tuple[str, ...]

    def tags(self) -> dict[str, str]:
        """Return what a version carries of the chain: readable tags per task, and one digest over everything."""
        everything = list(_unique(self.nodes.values()))
        tags = {f"valor.{name}_digest": node.digest for name, node in self.nodes.items()}
        for kind in ("dataset", "base", "expert"):
            tags[f"valor.{kind}_digest"] = _joined(node.digest for node in everything if node.kind == kind)
        tags["valor.source_digest"] = _joined(node.source_digest for node in everything)
        for task in sorted({node.task for node in everything if node.task}):
            ours = [node for node in everything if node.task == task]
            tags[f"valor.run.{task}"] = _joined(node.run_id for node in ours)
            tags[f"valor.settings.{task}"] = _joined(node.settings_digest for node in ours)
        tags["valor.commit"] = _joined(node.commit for node in everything)
        tags["valor.lineage_sha256"] = artifacts.digest_value([self.as_tree(), sorted(tags.items())])
        return tags

    def as_tree(self) -> list[dict[str, Any]]:
        """Return the chain as JSON-able rows, one per artifact; parents are named by digest."""
        rows = []
        for node in _unique(self.nodes.values()):
            row = {f.name: getattr(node, f.name) for f in dataclasses.fields(Node) if f.name != "parents"}
            rows.append(row | {"parents": {name: parent.digest for name, parent in node.parents.items()}})
        return sorted(rows, key=lambda row: (row["stage"], row["kind"], row["digest"]))


@dataclasses.dataclass(frozen=True)
class Lineage:
    """The chain behind a registered version, and whether its three records agree."""

    name: str
    version: str
    tags: Mapping[str, str]
    trace: Trace
    problems: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether MLflow's runs, the version's stamp and the model store tell the same."""
        return not self.problems

    def require_agreement(self) -> None:
        """Raise IntegrityError with the first disagreement where there is one."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise IntegrityError(f"{self.name}/{self.version}: {self.problems[0]}{more}; do not release this version")


def trace(inputs: Mapping[str, Mapping[str, Any]]) -> Trace:
    """Walk from artifacts (stamps or references, by name) back to the source."""
    walker = _Walker()
    with store.service_errors("walking the lineage"):
        nodes = {name: walker.node(name, reference) for name, reference in sorted(inputs.items())}
    return Trace(nodes=nodes, problems=tuple(walker.problems))


def chain(name: str, version: str) -> Lineage:
    """Return the lineage of a registered version, with every disagreement between its records.

    Raises:
        UserError: there is no such version.
        IntegrityError: the run that registered it is gone, so that there is no chain to walk.
        ServiceError: MLflow or the model store cannot be reached.
    """
    with store.service_errors(f"reading {name}/{version}"):
        registered = store.found(lambda: store.client().get_model_version(name, version))
        if registered is None:
            raise UserError(f"{name}/{version}: no such registered version at {store.shown_uri()}")
        run = store.found(lambda: store.client().get_run(registered.run_id))
    if run is None:
        raise IntegrityError(
            f"{name}/{version}: the run that registered it, {registered.run_id}, is not in this MLflow"
        )
    traced = trace(graph.references(run, "input"))
    with store.service_errors(f"reading the model of {name}/{version}"):
        loaded = _model_problems(registered)
    problems = [*traced.problems, *_stamp_problems(registered, traced), *loaded, *_store_problems(registered, traced)]
    return Lineage(name=name, version=version, tags=registered.tags, trace=traced, problems=tuple(problems))


def render(lineage: Lineage) -> str:
    """Return the chain as a tree of text, with the verdict in the last line."""
    lines = [f"{lineage.name}/{lineage.version}"]
    seen: set[str] = set()
    nodes = list(lineage.trace.nodes.items())
    for index, (name, node) in enumerate(nodes):
        _render(node, name, lines, seen, prefix="", last=index == len(nodes) - 1)
    lines.append("")
    if storage.is_remote(uri := lineage.tags.get("valor.checkpoint_uri", "")):
        lines.append(f"The weights at {uri} were compared by their manifest only; serving reads and verifies them.")
    lines += [f"problem: {problem}" for problem in lineage.problems]
    verdict = "agree" if lineage.agrees else "DISAGREE"
    lines.append(f"MLflow's runs, the version's stamp and the model store {verdict}.")
    return "\n".join(lines)


def _render(node: Node, name: str, lines: list[str], seen: set[str], *, prefix: str, last: bool) -> None:
    lines.append(f"{prefix}{'└─ ' if last else '├─ '}{name}  sha256 {node.digest[:12]}")
    below = prefix + ("   " if last else "│  ")
    key = f"{node.kind}/{node.digest}"
    if key in seen:
        lines[-1] += f"  (made by {node.task}, above)"
        return
    seen.add(key)
    facts = f"{below}{'│  ' if node.parents else '   '}"
    lines.append(
        f"{facts}made by {node.task or '?'}, run {node.run_id or '?'}, pipeline run {node.pipeline_run or '-'}"
    )
    lines.append(f"{facts}commit {node.commit or '?'}, image {node.image or '-'}, recipe {node.settings_digest[:12]}")
    if node.source_digest:
        lines.append(f"{facts}source {node.source_digest}")
    if node.kind in ("dataset", *graph.MODEL_KINDS):
        lines.append(f"{facts}digest {node.digest}")
    parents = list(node.parents.items())
    for index, (parent_name, parent) in enumerate(parents):
        _render(parent, parent_name, lines, seen, prefix=below, last=index == len(parents) - 1)


class _Walker:
    """Reads each run once and collects what does not fit."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._nodes: dict[tuple[str, str, str], Node] = {}
        self._sources: dict[str, str] = {}

    def node(self, name: str, reference: Mapping[str, Any]) -> Node:
        """Return the node of a referenced artifact."""
        key = (reference["kind"], reference["digest"], reference.get("producer_run", ""))
        if key not in self._nodes:
            self._nodes[key] = self._read(name, reference)
        return self._nodes[key]

    def _read(self, name: str, reference: Mapping[str, Any]) -> Node:
        kind, digest, run_id = reference["kind"], reference["digest"], reference.get("producer_run", "")
        run = self._run(name, run_id)
        if run is None:
            return Node(kind=kind, digest=digest, stage=reference.get("stage", ""), run_id=run_id)
        tags = run.data.tags
        made = graph.references(run, "output").get(kind, {}).get("digest", "nothing")
        if made != digest:
            self.problems.append(f"{name}: the artifact is {digest}, its run {run_id} says it made {made}")
        self.problems += graph.edge_problems(store.client(), run)
        if not tags.get("valor.commit") and not tags.get("valor.image"):
            self.problems.append(
                f"{name}: its run {run_id} names neither commit nor image; set VALOR_COMMIT where the code is no "
                "git checkout and make it again"
            )
        given = graph.references(run, "input")
        return Node(
            kind=kind,
            digest=digest,
            stage=tags.get("valor.stage", ""),
            task=tags.get("valor.task", ""),
            run_id=run_id,
            pipeline_run=tags.get("valor.pipeline_run", ""),
            commit=tags.get("valor.commit", ""),
            image=tags.get("valor.image", ""),
            settings_digest=tags.get("valor.settings_digest", ""),
            source_digest=self._source(tags) if tags.get("valor.stage") == "ingest" else "",
            image_px=run.data.params.get("image_px", ""),
            parents={parent: self.node(parent, given[parent]) for parent in sorted(given)},
        )

    def _run(self, name: str, run_id: str) -> "Run | None":
        if not run_id:
            self.problems.append(f"{name}: its stamp names no producing run; it was made with VALOR_TRACKING=off")
            return None
        run = store.found(lambda: store.client().get_run(run_id))
        if run is None:
            self.problems.append(
                f"{name}: its producing run {run_id} is not in this MLflow; make it again without reuse"
            )
        return run

    def _source(self, tags: Mapping[str, str]) -> str:
        """Return what the preflight of the ingesting pipeline run saw at the source."""
        pipeline_run = tags.get("valor.pipeline_run", "")
        if pipeline_run and pipeline_run not in self._sources:
            query = f"tags.`valor.stage` = 'preflight' and tags.`valor.pipeline_run` = '{pipeline_run}'"
            found = [run.data.tags.get("valor.result.source_digest", "") for run in pipeline_runs.search(query)]
            self._sources[pipeline_run] = next(filter(None, found), "")
        return self._sources.get(pipeline_run, "")


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
    if (found := content_digest(manifest)) != node.digest:
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
    walker = _Walker()
    with store.service_errors("walking the lineage"):
        maker = walker.node("checkpoint", {"kind": node.kind, "digest": node.digest, "producer_run": run_id})
    return walker.problems, maker


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


def content_digest(manifest: Mapping[str, Any]) -> str:
    """Return what `artifacts.digest_dir` gives for the directory that a storage manifest describes."""
    rows = [
        [name, facts["sha256"]]
        for name, facts in manifest["files"].items()
        if Path(name).name not in (artifacts.STAMP, artifacts.CHECKPOINT_INFO, artifacts.MANIFEST)
    ]
    return artifacts.digest_value(sorted(rows, key=lambda row: Path(row[0])))


def _unique(nodes: Any) -> Iterator[Node]:
    seen: set[int] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop(0)
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            queue += node.parents.values()


def _joined(values: Any) -> str:
    return " ".join(sorted({value for value in values if value}))
