"""The recipe: one typed YAML per experiment (pydantic and yaml only, so a laptop loads it without torch).

VALOR owns only what is VALOR's; `trainer:` holds fields of TRL's SFTConfig or GRPOConfig verbatim, whose
names are checked against a committed list (`valor/trainer_fields.json`, made by `python -m valor.trainer_fields`).
Each stage's section travels as one JSON string, so editing one stage leaves the others' identity alone.
"""

import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from valor.errors import UserError, shown

Positive = Annotated[int, pydantic.Field(ge=1)]
Count = Annotated[int, pydantic.Field(ge=0)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]


def _sum_to_one(fractions: tuple[float, float, float]) -> tuple[float, float, float]:
    if abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"the fractions sum to {sum(fractions):g}, expected 1")
    return fractions


SplitFractions = Annotated[tuple[Fraction, Fraction, Fraction], pydantic.AfterValidator(_sum_to_one)]


class Section(pydantic.BaseModel):
    """A frozen part of the recipe that refuses unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ReportNoise(Section):
    """Rates at which a phantom's report departs from the truth, each in [0, 1] (docs/phantom.md)."""

    omission: Fraction = 0.15
    omission_subtle: Fraction = 0.30
    template_contradiction: Fraction = 0.04
    wrong_side: Fraction = 0.02
    false_prior: Fraction = 0.25
    hedged_borderline: Fraction = 0.5


class PhantomStudies(Section):
    """Which procedural studies to draw. Subjects are numbered from `seed`; other seeds share no subject."""

    seed: int = 1
    train: Count = 1200
    val: Count = 100
    test: Count = 500
    image_px: Positive = 512
    noise: ReportNoise = ReportNoise()


class CheckThresholds(Section):
    """Limits of the data gate; a study count is after quarantine."""

    min_studies: Count = 10
    max_quarantined_fraction: Fraction = 0.2
    max_duplicate_report_fraction: Fraction = 0.9
    max_empty_findings_fraction: Fraction = 0.5
    min_image_std: float = pydantic.Field(4.0, ge=0)
    """Grey levels (0-255) of contrast, the deviation of the image averaged to 16 x 16: below it an image is blank."""
    min_image_px: Count = 32
    """Longer side of a dataset image; a smaller one shows nothing."""


class DataSettings(Section):
    """Where studies come from and what becomes of them."""

    root: str = "phantom"
    public: bool = False
    """The owner states that text and images of this source may be shown to everyone who sees MLflow."""
    layout: Literal["mimic_cxr", "openi"] = "mimic_cxr"
    annotations_root: str = ""
    phantom: PhantomStudies = PhantomStudies()
    image_px: int = pydantic.Field(192, ge=32)
    shards: int = pydantic.Field(2, ge=1)
    max_views: int = pydantic.Field(1, ge=1)
    """Images kept per study, frontal views first."""
    split_fractions: SplitFractions = (0.7, 0.1, 0.2)
    """train, val, test by hash of subject, where the source has no official split."""
    checks: CheckThresholds = CheckThresholds()
    seed: int = 0


class PhantomBase(Section):
    """The tiny LLaVA that `base: phantom` trains."""

    subjects: Positive = 1200
    seed: int = 7001
    image_px: Positive = 96
    patch_px: Positive = 16
    vision_width: Positive = 128
    vision_layers: Positive = 4
    text_width: Positive = 160
    text_layers: Positive = 4
    vocab: Positive = 1024
    tower_steps: Positive = 320
    language_steps: Positive = 300


class PhantomExpert(Section):
    """The tiny CLIP that `expert: phantom` trains, on subjects of its own."""

    subjects: Positive = 1200
    seed: int = 8001
    image_px: Positive = 96
    patch_px: Positive = 16
    vision_width: Positive = 128
    vision_layers: Positive = 4
    text_width: Positive = 128
    text_layers: Positive = 3
    vocab: Positive = 1024
    steps: int = pydantic.Field(480, ge=2)
    """Half for the vision tower, half for the pairs."""
    held_out_subjects: Positive = 300


class ExpertGate(Section):
    """An expert's finding is masked from rewards below these accuracies in [0, 1]."""

    min_auc: Fraction = 0.85
    min_side_swap: Fraction = 0.85
    min_negation: Fraction = 0.85
    min_deletion: Fraction = 0.85


class ModelSettings(Section):
    """Base and expert: a hub id, a local directory, gs:// or `phantom`."""

    base: str = "phantom"
    base_revision: str = ""
    expert: str = "phantom"
    expert_revision: str = ""
    prompt: str = "Describe the findings and impression."
    phantom_base: PhantomBase = PhantomBase()
    phantom_expert: PhantomExpert = PhantomExpert()
    expert_gate: ExpertGate = ExpertGate()
    seed: int = 0


class TrainStage(Section):
    """What the three training stages share."""

    trainer: dict[str, Any] = {}
    """Fields of TRL's config class, verbatim."""
    studies: Count = 0
    """How many training studies to use; 0 means all."""
    max_new_tokens: Positive = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


class SftSettings(TrainStage):
    """Supervised fine-tuning of language model and projector; the vision tower stays frozen."""


class TextReward(Section):
    """One stage-1 reward by its name in `valor.rewards.text` and its weight."""

    name: Literal["clinical_agreement_reward", "gleu_reward", "length_reward", "repetition_reward"]
    weight: float = 1.0
    options: dict[str, float] = {}


class GrpoTextSettings(TrainStage):
    """Stage 1: GRPO on verifiable text rewards; language model and projector train."""

    rewards: Annotated[tuple[TextReward, ...], pydantic.Field(min_length=1)] = (
        TextReward(name="clinical_agreement_reward", weight=1.0),
        TextReward(name="gleu_reward", weight=0.3),
        TextReward(name="length_reward", weight=0.2),
        TextReward(name="repetition_reward", weight=0.2),
    )


class GrpoVisionSettings(TrainStage):
    """Stage 2: GRPO on the frozen expert's similarity; the projector alone trains."""

    similarity: Literal["paper", "statements"] = "statements"
    """`paper`: image-report similarity; `statements`: VALOR's closed variant (docs/rewards.md)."""
    tolerance: float = pydantic.Field(0.02, ge=0)
    """Rewards closer than this share a rank."""


class PredictSettings(Section):
    """Greedy reports of one checkpoint on the test split."""

    split: Literal["val", "test"] = "test"
    batch_size: Positive = 64
    max_new_tokens: Positive = 128
    max_studies: Count = 0
    """How many studies to read; 0 means all."""
    attention_maps: bool = True
    seed: int = 0


class EvaluationSettings(Section):
    """Scores, intervals and the page."""

    bootstrap_samples: Positive = 1000
    confidence: float = pydantic.Field(0.95, gt=0, lt=1)
    page_studies: Count = 120
    publish_text: bool = False
    seed: int = 0


class GateRule(Section):
    """`metric` of the candidate must not be worse than that of `against` by more than `margin`.

    The rule holds when the bound of the paired interval that is worst for the candidate stays within the margin.
    """

    metric: str
    against: Literal["sft", "champion"]
    margin: float = pydantic.Field(ge=0)
    higher_is_better: bool = True


class GateSettings(Section):
    """The rules a candidate must meet before it is registered."""

    candidate: Literal["sft", "text", "vision"] = "vision"
    min_subjects: Count = 30
    """A bootstrap over fewer subjects says too little: its intervals are too narrow, so such a candidate is refused."""
    rules: tuple[GateRule, ...] = ()


class RegistrySettings(Section):
    """The registered model's name and the experiment that runs go to."""

    model_name: str = "valor"
    experiment: str = "valor"
    publish_text: bool = False


class TaskResources(Section):
    """What a task asks of a cluster; ignored locally."""

    cpu: str = pydantic.Field("2", pattern=r"^\d+(\.\d+)?m?$")
    memory: str = pydantic.Field("8G", pattern=r"^\d+(\.\d+)?([KMGTPE]i?)?$")
    gpus: Count = 0
    gpu_type: str = ""


class Recipe(Section):
    """One experiment."""

    name: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    description: str = ""
    seed: int = 0
    publish_text: bool = False
    data: DataSettings = DataSettings()
    models: ModelSettings = ModelSettings()
    sft: SftSettings = SftSettings()
    grpo_text: GrpoTextSettings = GrpoTextSettings()
    grpo_vision: GrpoVisionSettings = GrpoVisionSettings()
    predict: PredictSettings = PredictSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    registry: RegistrySettings = RegistrySettings()
    resources: dict[str, TaskResources] = {}

    def section_json(self, section: str) -> str:
        """Return a section as canonical JSON; places and what may be shown are left out: they are no identity."""
        value = getattr(self, section).model_dump(mode="json")
        if section == "data":
            for key in ("root", "annotations_root", "public"):
                value.pop(key)
        return json.dumps(value, sort_keys=True, separators=(",", ":"))


SECTION_OF_STAGE: dict[str, str] = {
    "preflight": "data",
    "ingest": "data",
    "validate_data": "data",
    "fetch_models": "models",
    "sft": "sft",
    "grpo_text": "grpo_text",
    "grpo_vision": "grpo_vision",
    "predict": "predict",
    "evaluate": "evaluation",
    "gate": "gate",
    "register": "registry",
    "finalize": "registry",
}
"""The stages in the DAG's order, and the recipe section each one reads."""

_TRAINER_CLASS = {"sft": "SFTConfig", "grpo_text": "GRPOConfig", "grpo_vision": "GRPOConfig"}
_OWNED_BY_VALOR = {
    "output_dir": "the stage's work directory",
    "seed": "the recipe's seed",
    "data_seed": "the recipe's seed",
    "report_to": "VALOR's own tracking",
    "run_name": "VALOR's own tracking",
    "resume_from_checkpoint": "work_root",
    "reward_weights": "grpo_text.rewards",
    "max_completion_length": "max_new_tokens",
    "max_length": "the model: image tokens must not be cut",
    "remove_unused_columns": "the stage: rewards and collators read every column",
    "save_only_model": "the stage: a stopped run resumes from optimizer and scheduler too",
    "save_total_limit": "the stage: an old checkpoint goes once a newer one is committed",
}
"""Trainer fields that a recipe cannot set, and what sets them."""
_PUBLISHING = {
    ("log_completions", "log_multimodal", "log_unique_prompts", "num_completions_to_print"): (
        "it would write prompts, reports or images to the log"
    ),
    ("hub_", "push_to_hub"): "it would send the model to a hub; models go to the model store",
    ("trackio_", "wandb_", "project", "logging_dir"): "it belongs to another tracker; VALOR tracks with MLflow alone",
    ("vllm_server_",): "it would send prompts and images to another server",
}
"""Beginnings of trainer fields that could carry text, images or models out, and why each is refused."""
_NUMBERS = (
    "learning_rate", "max_steps", "num_train_epochs", "warmup_steps", "save_steps", "logging_steps", "weight_decay",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "temperature", "beta", "epsilon",
)  # fmt: skip
"""Trainer fields whose value a recipe most often gets wrong; the libraries fail on them late and without their name."""
_INHERITED = ("seed", "publish_text")


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe from a path or by the name of a built-in one.

    Args:
        recipe: a path, or a name such as `phantom` (looked up in the package `pipelines.recipes`).
        overrides: `key.sub=value` strings; values are YAML.

    Raises:
        UserError: no such recipe, broken YAML, unknown key, wrong value or unknown trainer field.
    """
    text, source = _read(str(recipe))
    tree = _parse_yaml(text, source)
    if not isinstance(tree, dict):
        raise UserError(f"{source}: a recipe is a mapping of sections, this is {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse(tree, source=source)


def parse(tree: dict[str, Any], *, source: str) -> Recipe:
    """Validate a recipe's tree; sections inherit the top level's `seed` and `publish_text`."""
    tree = dict(tree)
    for section, field in Recipe.model_fields.items():
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, Section)):
            continue
        value = {} if tree.get(section) is None else tree[section]
        if not isinstance(value, dict):
            raise UserError(f"{source}: {section} is {shown(repr(value))}, expected a mapping")
        inherited = {k: tree[k] for k in _INHERITED if k in tree and k in model.model_fields}
        tree[section] = {**inherited, **value}
    try:
        recipe = Recipe.model_validate(tree)
    except pydantic.ValidationError as error:
        raise UserError(_first_problem(error, source)) from None
    _check_publishing(recipe, source)
    _check_limits(recipe, source)
    for section in _TRAINER_CLASS:
        _check_trainer_fields(section, getattr(recipe, section).trainer, source)
    unknown = sorted(set(recipe.resources) - set(SECTION_OF_STAGE))
    if unknown:
        raise UserError(f"{source}: resources.{unknown[0]}: no such stage; stages are {', '.join(SECTION_OF_STAGE)}")
    return recipe


def parse_section(stage: str, settings_json: str) -> Any:
    """Parse the JSON of a stage's section into its settings class."""
    section = SECTION_OF_STAGE[stage]
    model = Recipe.model_fields[section].annotation
    try:
        settings = model.model_validate_json(settings_json)  # type: ignore[union-attr]
    except pydantic.ValidationError as error:
        raise UserError(_first_problem(error, f"settings of {stage}")) from None
    if section in _TRAINER_CLASS:
        _check_trainer_fields(section, settings.trainer, f"settings of {stage}")
    return settings


def builtin_names() -> list[str]:
    """Return the names of the built-in recipes."""
    folder = resources.files("pipelines.recipes")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


class _StrictLoader(yaml.SafeLoader):
    """yaml's safe loader, which lets the last of two equal keys win in silence, with that refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 takes 1e-4 for text, as it lacks a dot; a learning rate is what it looks like.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        at = f":{place.line + 1}" if place else ""
        raise UserError(f"{source}{at}: not valid YAML: {getattr(error, 'problem', 'cannot be read')}") from None
    except (ValueError, RecursionError) as error:
        # A date or an integer that cannot be, or nesting without end.
        raise UserError(f"{source}: not valid YAML: {shown(str(error))}") from None


def _read(recipe: str) -> tuple[str, str]:
    path = Path(recipe)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), recipe
        except UnicodeDecodeError as error:
            raise UserError(f"{recipe}: no UTF-8 text (byte {error.start}); a recipe is a YAML file") from None
    if recipe in builtin_names():
        return (resources.files("pipelines.recipes") / f"{recipe}.yaml").read_text(encoding="utf-8"), recipe
    raise UserError(f"{recipe}: no such file and no built-in recipe; built-in are {', '.join(builtin_names())}")


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: expected key=value, such as data.root=/data/mimic-cxr")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {parent} is not a section")
    node[leaf] = _parse_yaml(value, f"--set {shown(override)}")


def _first_problem(error: pydantic.ValidationError, source: str) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{source}: {where}: unknown key{_siblings(problem['loc'])}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{source}: {where}: {problem['msg']}, got {shown(repr(problem['input']))}{more}"


def _siblings(loc: tuple[int | str, ...]) -> str:
    """Name the keys that the section of an unknown key knows, closest first."""
    import difflib

    model: Any = Recipe
    for part in loc[:-1]:
        fields = getattr(model, "model_fields", {})
        model = fields[part].annotation if part in fields else None
    known = list(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known keys are {', '.join(known)}" if known else ""


def _check_publishing(recipe: Recipe, source: str) -> None:
    published = {
        "publish_text": recipe.publish_text,
        "evaluation.publish_text": recipe.evaluation.publish_text,
        "registry.publish_text": recipe.registry.publish_text,
    }
    for key, value in published.items():
        check_publishing(key, value, root=recipe.data.root, public=recipe.data.public, source=source)


def _check_limits(recipe: Recipe, source: str) -> None:
    """Refuse another token limit for the evaluation than the candidate's own, which the registered model uses."""
    stage = {"sft": "sft", "text": "grpo_text", "vision": "grpo_vision"}[recipe.gate.candidate]
    served, judged = getattr(recipe, stage).max_new_tokens, recipe.predict.max_new_tokens
    if served != judged:
        raise UserError(
            f"{source}: predict.max_new_tokens is {judged} and {stage}.max_new_tokens {served}: the registered model "
            "would write other reports than those that the gate saw; set both to the same number"
        )


def check_publishing(key: str, value: bool, *, root: str, public: bool, source: str) -> None:
    """Refuse to publish text of a source that nobody has declared public; VALOR's own phantoms are nobody's.

    Raises:
        UserError: the setting `key` is true and the data is neither `phantom` nor public.
    """
    if value and root != "phantom" and not public:
        raise UserError(
            f"{source}: {key} is true, and data.root is {root!r}: everyone who sees MLflow would see "
            "its reports and images; set publish_text: false, or data.public: true if the source's owner allows it"
        )


def _check_trainer_fields(section: str, trainer: dict[str, Any], source: str) -> None:
    import difflib

    class_name = _TRAINER_CLASS[section]
    known = json.loads(resources.files("valor").joinpath("trainer_fields.json").read_text(encoding="utf-8"))[class_name]
    for field, value in trainer.items():
        if field in _OWNED_BY_VALOR:
            owner = _OWNED_BY_VALOR[field]
            raise UserError(f"{source}: {section}.trainer.{field}: set by VALOR from {owner}; remove it")
        for beginnings, reason in _PUBLISHING.items():
            if field.startswith(beginnings):
                raise UserError(f"{source}: {section}.trainer.{field}: {reason}; remove it")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{source}: {section}.trainer.{field}: is {value}, expected a finite number")
        if field in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{source}: {section}.trainer.{field}: is {shown(repr(value))}, expected a number")
        if field not in known:
            close = difflib.get_close_matches(field, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{source}: {section}.trainer.{field}: {class_name} has no such field{hint}")
