"""The walk from artifacts back to the digests of dataset and source, along MLflow's runs.

Each artifact's stamp names the run that made it, and each run names the artifacts it was given, so the walk crosses
pipeline runs: a task that a later pipeline run reused is found under the run that executed it.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from valor import artifacts
from valor.tracking import graph, pipeline_runs, store

if TYPE_CHECKING:
    from mlflow.entities import Run


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
        for kind in ("dataset", "base", "expert", "judge"):
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


def trace(inputs: Mapping[str, Mapping[str, Any]]) -> Trace:
    """Walk from artifacts (stamps or references, by name) back to the source."""
    walker = _Walker()
    with store.service_errors("walking the lineage"):
        nodes = {name: walker.node(name, reference) for name, reference in sorted(inputs.items())}
    return Trace(nodes=nodes, problems=tuple(walker.problems))


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
