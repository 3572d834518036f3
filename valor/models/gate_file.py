"""`expert_gate.json`: what an expert may be asked and how its margins read; one schema for all who read it."""

import json
from pathlib import Path
from typing import Annotated, Any

import pydantic

from valor.clinical.vocabulary import OBSERVATIONS
from valor.errors import IntegrityError, shown

GATE_FILE = "expert_gate.json"
UNMEASURED = {"measured": False}
"""The gate of an expert that came without one."""


def _known(finding: str) -> str:
    if finding not in OBSERVATIONS:
        raise ValueError(f"no finding; there are {', '.join(OBSERVATIONS)}")
    return finding


Finding = Annotated[str, pydantic.AfterValidator(_known)]
Rate = Annotated[float, pydantic.Field(ge=0, le=1)]
Noise = Annotated[float, pydantic.Field(ge=0)]
Three = Annotated[list[float], pydantic.Field(min_length=3, max_length=3)]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


class _Place(_Part):
    scale: float
    bias: Three
    prior: Three


class _Line(_Part):
    scale: float
    bias: float
    side: _Place | None = None
    zone: _Place | None = None


class _Row(_Part):
    positives: int
    auc: Rate | None
    side_swap: Rate | None
    negation: Rate | None
    deletion: Rate | None
    pays: Rate | None
    pays_falsely: Rate | None
    negation_pairs: int
    masked: str
    masked_side: str


class _Noise(_Part):
    paper: Noise | None
    statements: Noise | None


class _Gate(_Part):
    measured: bool
    studies: int
    masked: list[Finding]
    masked_sides: list[Finding]
    calibration: dict[Finding, _Line]
    paraphrase_noise: _Noise
    findings: dict[Finding, _Row]
    overall: dict[str, Rate | None]
    prefers: dict[str, Rate | None]


def read(path: Path) -> dict[str, Any]:
    """Return the content of `expert_gate.json` in an expert's directory, `UNMEASURED` where there is none.

    Raises:
        IntegrityError: it is damaged.
    """
    file = path / GATE_FILE
    return parse(file.read_bytes(), place=str(file)) if file.exists() else dict(UNMEASURED)


def parse(content: bytes, *, place: str) -> dict[str, Any]:
    """Return the content of `expert_gate.json`.

    Raises:
        IntegrityError: it is damaged: what it masks, and how margins read, would be anybody's guess.
    """
    again = "measure it again (valor expert-gate)"
    try:
        gate = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{place}: not JSON ({type(error).__name__}); {again}") from None
    if isinstance(gate, dict) and gate.get("measured") is False:
        return dict(UNMEASURED)
    try:
        _Gate.model_validate_json(content)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        reason = problem["msg"].removeprefix("Value error, ")
        raise IntegrityError(f"{place}: {where} is {shown(repr(problem['input']))}: {reason}; {again}") from None
    return gate
