"""Jobs: one stage with its settings and inputs, kept under the digest of everything that it was asked for.

Two arms that ask for the same job share its result, and a job whose result is there is not run again. The digest is
over settings and seeds and not over the code: a finished experiment is a record, and changing a comment must not throw
hours away. What a result was made by stands beside it (`job.json`: commit, digest of the code, settings), and the page
compares no results of different code.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from valor import artifacts
from valor.errors import IntegrityError

RECORD = "job.json"
"""Written last: the job is done."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        name: what people read, such as `sft, seed 3`.
        stage: a member of `valor.stages.STAGES`, or of `pipelines.experiments.execute.OWN`.
        settings: the stage's section of the recipe, what departs from the defaults.
        outputs: names of the directories that it makes.
        inputs: output of another job by the stage's parameter name.
        values: string parameters of the stage.
        cores: how many it keeps busy.
    """

    name: str
    stage: str
    settings: Mapping[str, Any]
    outputs: tuple[str, ...]
    inputs: Mapping[str, "Output"] = dataclasses.field(default_factory=dict)
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cores: int = 1

    @functools.cached_property
    def key(self) -> str:
        """What identifies the job: not its name, nor how many cores it takes."""
        inputs = {name: [output.job.key, output.name] for name, output in self.inputs.items()}
        return artifacts.digest_value([self.stage, self.settings, inputs, self.values, list(self.outputs)])[:20]

    def folder(self, root: Path) -> Path:
        """Return where the job works and leaves its outputs."""
        return root / "jobs" / f"{self.stage}-{self.key}"

    def output(self, name: str) -> "Output":
        """Return one of its outputs."""
        if name not in self.outputs:
            raise KeyError(f"{self.name}: has no output {name!r}")
        return Output(self, name)

    def is_done(self, root: Path) -> bool:
        """Tell whether its result is there."""
        return (self.folder(root) / RECORD).is_file()

    def record(self, root: Path) -> dict[str, Any]:
        """Return what is known of a finished job: seconds, metrics, settings, commit, code.

        Raises:
            IntegrityError: its record lacks one of them.
        """
        path = self.folder(root) / RECORD
        record = artifacts.read_json(path)
        for key in ("code", "metrics", "processor_seconds", "tries"):
            if key not in record:
                raise IntegrityError(f"{path}: lacks {key}; delete {path.parent} and run valor experiments again")
        return record


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of a job."""

    job: Job
    name: str

    def path(self, root: Path) -> Path:
        """Return the directory."""
        return self.job.folder(root) / self.name


def with_ancestors(jobs: Iterator[Job] | list[Job]) -> list[Job]:
    """Return the jobs and all that they need, each once, what is needed before what needs it."""
    ordered: dict[str, Job] = {}

    def visit(job: Job) -> None:
        if job.key not in ordered:
            for output in job.inputs.values():
                visit(output.job)
            ordered[job.key] = job

    for job in jobs:
        visit(job)
    return list(ordered.values())
