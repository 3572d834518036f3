"""What is known of a seed beside its tables, `facts-SEED.json`: one schema for who writes it and who reads it."""

import json
from pathlib import Path
from typing import Annotated, Any, Self

import pydantic

from pipelines.experiments.arms import ARMS
from valor import artifacts
from valor.errors import IntegrityError, shown

Seconds = Annotated[int, pydantic.Field(ge=0, lt=10**9)]
Rate = Annotated[float, pydantic.Field(ge=0, le=1)]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, allow_inf_nan=False, strict=True)


class Cost(_Part):
    """What an arm took after the supervised checkpoint that all share; resumed, the seconds are a lower bound."""

    took: list[str]
    processor_seconds: Seconds
    resumed: bool


class Job(_Part):
    """What a result was made by."""

    name: str
    settings: dict[str, Any]
    commit: str
    code: str
    processor_seconds: Seconds
    resumed: bool


class Probe(_Part):
    """The linear probe's scores on the tower's features, each in [0, 1]."""

    f1_macro: Rate
    f1_micro: Rate
    auc_macro: Rate
    auc: dict[str, Rate]


class Finding(_Part):
    """A finding's accuracies at the expert's gate, each in [0, 1]; None where the held-out reports have no case."""

    auc: Rate | None
    side_swap: Rate | None
    negation: Rate | None
    deletion: Rate | None


class Expert(_Part):
    """What the expert's gate found, and the tolerance that ranks took from it."""

    masked: list[str]
    masked_sides: list[str]
    overall: dict[str, Rate | None]
    findings: dict[str, Finding]
    tolerance: Annotated[float, pydantic.Field(ge=0)] | None = None

    @pydantic.model_validator(mode="after")
    def _masks_what_it_rates(self) -> Self:
        if unknown := sorted({*self.masked, *self.masked_sides} - self.findings.keys()):
            raise ValueError(f"masks {shown(unknown[0])!r}, which it does not rate")
        return self


class Models(_Part):
    """What base, expert and judge took, and what they learned from."""

    processor_seconds: Seconds
    expert_subjects: int
    train_subjects: int


class Bounds(_Part):
    """Of a reward's signal, (low, high) of 90%; None where most draws have none."""

    signal_to_noise: tuple[float, float] | None
    cosine: tuple[float, float] | None


class Signal(_Part):
    """How much a reward tells of its gradient (`pipelines/experiments/signal.py`)."""

    signal_to_noise: float | None
    cosine: float | None
    bounds: Bounds


class Facts(_Part):
    """One seed: by arm its cost or the verdict that stopped it, the jobs, the tables' sha256, and what was measured.

    `expert` is the one that all arms have but those that ask how good it must be, which have `other_experts`.
    """

    seed: int
    scored_by: str
    stopped: dict[str, str]
    arms: dict[str, Cost]
    jobs: dict[str, Job]
    tables: dict[str, str]
    models: Models | None = None
    expert: Expert | None = None
    other_experts: dict[str, Expert] = {}
    probe: Probe | None = None
    signal: Annotated[dict[str, Signal], pydantic.Field(min_length=1)] | None = None

    @property
    def codes(self) -> list[str]:
        """The versions of the code that made and scored the results."""
        return list(dict.fromkeys([*(job.code for job in self.jobs.values()), self.scored_by]))

    @pydantic.model_validator(mode="after")
    def _tables_are_the_arms(self) -> Self:
        if unknown := [name for name in (*self.arms, *self.stopped) if name not in ARMS]:
            raise ValueError(f"names the arm {shown(unknown[0])}; there are {', '.join(ARMS)}")
        tables = {name.removesuffix(f"-{self.seed}.npz") for name in self.tables if not name.startswith("curve-")}
        if tables != set(self.arms):
            raise ValueError(f"has tables of {', '.join(sorted(tables))} and arms {', '.join(sorted(self.arms))}")
        if self.arms and not self.jobs:
            raise ValueError("has arms and no job that made them")
        return self


def write(path: Path, values: dict[str, Any]) -> None:
    """Write a seed's facts.

    Raises:
        IntegrityError: what the jobs left is no such facts.
    """
    _checked(values, f"{path}: not written: ", "delete the job that left it below VALOR_HOME/experiments/jobs")
    artifacts.write_json(path, values)


def read(path: Path, *, seed: int) -> Facts:
    """Read the facts of a seed.

    Raises:
        IntegrityError: the file is cut, of another seed, of an arm that this code does not have, or no such facts.
    """
    again = f"restore it, or run valor experiments --seed {seed} again"
    values = artifacts.read_json(path)
    if values.get("seed", seed) != seed:
        raise IntegrityError(f"{path}: holds the facts of seed {shown(repr(values['seed']))}; {again}")
    return _checked(values, f"{path}: ", again)


def _checked(values: dict[str, Any], place: str, advice: str) -> Facts:
    try:
        # As JSON, which has no tuples.
        return Facts.model_validate_json(json.dumps(values))
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        words = problem["msg"].removeprefix("Value error, ")
        value = f"{where} is {shown(repr(problem['input']))}: {words}" if where else words
        raise IntegrityError(f"{place}{value}; {advice}") from None
