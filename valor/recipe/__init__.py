"""The recipe: one typed YAML per experiment (pydantic and yaml only, so a laptop loads it without torch).

VALOR owns only what is VALOR's; `trainer:` holds fields of TRL's SFTConfig or GRPOConfig verbatim, whose names are
checked against a committed list (`trainer_fields.json`, made by `python -m valor.recipe.trainer_fields`).
Each stage's section travels as one JSON string, so editing one stage leaves the others' identity alone.
"""

from valor.recipe.loading import builtin_names, load, parse, parse_section
from valor.recipe.rules import check_publishing
from valor.recipe.sections import (
    SECTION_OF_STAGE,
    CheckThresholds,
    DataSettings,
    EvaluationSettings,
    ExpertGate,
    GateRule,
    GateSettings,
    GrpoTextSettings,
    GrpoVisionSettings,
    Guards,
    Lora,
    ModelSettings,
    PhantomBase,
    PhantomExpert,
    PhantomStudies,
    PredictSettings,
    Recipe,
    RegistrySettings,
    ReportNoise,
    SftSettings,
    TaskResources,
    TextReward,
    TrainStage,
)

__all__ = [
    "SECTION_OF_STAGE",
    "CheckThresholds",
    "DataSettings",
    "EvaluationSettings",
    "ExpertGate",
    "GateRule",
    "GateSettings",
    "GrpoTextSettings",
    "GrpoVisionSettings",
    "Guards",
    "Lora",
    "ModelSettings",
    "PhantomBase",
    "PhantomExpert",
    "PhantomStudies",
    "PredictSettings",
    "Recipe",
    "RegistrySettings",
    "ReportNoise",
    "SftSettings",
    "TaskResources",
    "TextReward",
    "TrainStage",
    "builtin_names",
    "check_publishing",
    "load",
    "parse",
    "parse_section",
]
