"""What made a registered version: the chain from the version back to the digests of dataset and source.

The chain is told three times, and `chain` compares the three: MLflow's runs (tags, and its graph of datasets and
logged models), the version (the tags stamped on it when it was registered, and what its model loads), and
`valor.json` with the manifest in the model store. It cannot tell whether the recorded digests were true when they
were recorded.
"""

import dataclasses
from collections.abc import Mapping

from valor import storage
from valor.errors import IntegrityError, UserError, shown
from valor.tracking import agreement, graph, registry, store
from valor.tracking.trace import Node, Trace, trace


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


def chain(name: str, version: str) -> Lineage:
    """Return the lineage of a registered version (or of `champion`), with every disagreement between its records.

    Raises:
        UserError: there is no such version.
        IntegrityError: the run that registered it is gone, so that there is no chain to walk.
        ServiceError: MLflow or the model store cannot be reached.
    """
    with store.service_errors(f"reading {name}/{version}"):
        if version == registry.CHAMPION:
            registered = registry.champion_version(name)
        else:
            registered = store.found(lambda: store.client().get_model_version(name, version))
        if registered is None:
            there = registry.known_versions(name)
            raise UserError(
                f"{shown(name)}/{version}: no such registered version at {store.shown_uri()}; "
                + (f"there are {', '.join(there)}" if there else "none is registered there")
            )
        run = store.found(lambda: store.client().get_run(str(registered.run_id)))
    if run is None:
        raise IntegrityError(
            f"{name}/{version}: the run that registered it, {registered.run_id}, is not in this MLflow"
        )
    traced = trace(graph.references(run, "input"))
    problems = [*traced.problems, *agreement.disagreements(registered, traced)]
    return Lineage(
        name=name, version=str(registered.version), tags=registered.tags, trace=traced, problems=tuple(problems)
    )


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
