"""The recipe's sections: what can be set, within which bounds, and the defaults."""

import json
from typing import Annotated, Any, Literal, Self

import pydantic

from valor.recipe.values import (
    Count,
    Fraction,
    PhantomSeed,
    Positive,
    Seed,
    Share,
    SplitFractions,
    Text,
    Vocabulary,
    Width,
)


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

    seed: PhantomSeed = 1
    train: Count = 1200
    val: Count = 100
    test: Count = 500
    second_site: Fraction = 0.5
    """Share of the test studies from a second site, which no other split sees: its device and its words differ."""
    pairs: Count = 0
    """How many of the `test` studies, at most, get a twin: the same with one finding added, removed or moved."""
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

    root: Text = "phantom"
    public: bool = False
    """The owner states that text and images of this source may be shown to everyone who sees MLflow."""
    layout: Literal["mimic_cxr", "openi"] = "mimic_cxr"
    annotations_root: str = ""
    phantom: PhantomStudies = PhantomStudies()
    image_px: int = pydantic.Field(192, ge=32, strict=True)
    shards: Positive = 2
    max_views: Positive = 1
    """Images kept per study, frontal views first."""
    split_fractions: SplitFractions = (0.7, 0.1, 0.2)
    """train, val, test by hash of subject, where the source has no official split."""
    checks: CheckThresholds = CheckThresholds()
    seed: Seed = 0


class _PhantomModel(Section):
    """What the phantom's two models share: a vision transformer on square patches."""

    subjects: Positive = 1200
    image_px: Positive = 96
    patch_px: Positive = 16
    vision_width: Width = 128
    vision_layers: Positive = 4

    @pydantic.model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.image_px % self.patch_px:
            raise ValueError(f"image_px is {self.image_px}, expected a multiple of patch_px, {self.patch_px}")
        return self


class PhantomBase(_PhantomModel):
    """The tiny LLaVA that `base: phantom` trains."""

    seed: PhantomSeed = 7001
    text_width: Width = 160
    text_layers: Positive = 4
    vocab: Vocabulary = 1024
    tower_steps: Positive = 320
    language_steps: Positive = 300


class PhantomExpert(_PhantomModel):
    """The tiny CLIP that `expert: phantom` trains, on subjects of its own."""

    seed: PhantomSeed = 8001
    text_width: Width = 128
    text_layers: Positive = 3
    vocab: Vocabulary = 1024
    steps: int = pydantic.Field(480, ge=2, strict=True)
    """Half for the vision tower, half for the pairs."""
    held_out_subjects: Positive = 300


class ExpertGate(Section):
    """An expert's finding is masked from rewards below these accuracies in [0, 1]."""

    min_auc: Fraction = 0.85
    min_side_swap: Fraction = 0.85
    min_negation: Fraction = 0.85
    min_deletion: Fraction = 0.85


class ModelSettings(Section):
    """Base, expert and judge: a hub id, a local directory, gs:// or `phantom`."""

    base: Text = "phantom"
    base_revision: str = ""
    expert: Text = "phantom"
    expert_revision: str = ""
    judge: str = ""
    """A dual encoder that scores similarity in evaluation alone; "" takes the expert, whose score is circular."""
    judge_revision: str = ""
    prompt: Text = "Describe the findings and impression."
    phantom_base: PhantomBase = PhantomBase()
    phantom_expert: PhantomExpert = PhantomExpert()
    phantom_judge: PhantomExpert = PhantomExpert(subjects=600, seed=9001, steps=240, held_out_subjects=100)
    expert_gate: ExpertGate = ExpertGate()
    seed: Seed = 0


class TrainStage(Section):
    """What the three training stages share."""

    trainer: dict[str, Any] = {}
    """Fields of TRL's config class, verbatim."""
    studies: Count = 0
    """How many training studies to use; 0 means all."""
    share: Share = (0.0, 1.0)
    """Which training subjects to use, of all of them in the order of a hash: from the first bound up to the second."""
    max_new_tokens: Positive = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    processes: Positive = 1
    """Processes on each node, one per GPU; a step's batch grows with them (docs/training.md)."""
    nodes: Positive = 1
    """Machines that train together; more than one outside a pipeline only."""
    strategy: Literal["ddp", "fsdp2", "zero3"] = "ddp"
    """What several processes share: nothing, or weights, gradients and optimizer by FSDP2 or DeepSpeed ZeRO-3."""
    seed: Seed = 0


class Lora(Section):
    """Low-rank adapters on the language model's projections, merged into the weights at the end of the stage."""

    r: int = pydantic.Field(16, ge=1, le=1024, strict=True)
    """Rank; at most 1024: beyond the width of the model an adapter is larger than what it adapts."""
    alpha: Positive = 32
    """Adapters count alpha / r times."""
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)


class SftSettings(TrainStage):
    """Supervised fine-tuning of language model and projector; the vision tower stays frozen."""

    lora: Lora | None = None
    """None trains every weight of the language model."""


class TextReward(Section):
    """One stage-1 reward by its name in `valor.rewards.text` and its weight."""

    name: Literal["clinical_agreement_reward", "gleu_reward", "length_reward", "repetition_reward"]
    weight: float = pydantic.Field(1.0, ge=0, le=1e6)
    options: dict[str, float] = {}


def _some_weight(rewards: tuple[TextReward, ...]) -> tuple[TextReward, ...]:
    if not any(reward.weight for reward in rewards):
        raise ValueError("every weight is 0, so there is nothing to learn; give one a weight")
    return rewards


class Guards(Section):
    """Limits that stop a collapsing GRPO stage; null turns one off.

    Each is of a number in the trainer's log, averaged over the last `window` optimizer steps, against its average over
    the first `window`. They are far from what a healthy stage does.
    """

    window: Positive = 10
    min_findings_ratio: Fraction | None = 0.5
    """Of what a reference states the share that its completions state."""
    max_called_rise: Fraction | None = 0.6
    """Share of completions that state a finding where their reference states none: how much of the way from its start
    to 1."""
    min_length_ratio: Fraction | None = 0.5
    max_length_ratio: float | None = pydantic.Field(2.0, ge=1)
    """Tokens per completion."""
    max_cut_rise: Fraction | None = 0.5
    """Share of completions that max_new_tokens cuts: how much of the way from its start to 1."""
    min_entropy_ratio: Fraction | None = 0.1
    max_entropy_ratio: float | None = pydantic.Field(4.0, ge=1)
    max_kl: float | None = pydantic.Field(1.0, gt=0)
    """Per token, from the parent, in nats; TRL measures it where trainer.beta is not 0."""


class GrpoTextSettings(TrainStage):
    """Stage 1: GRPO on verifiable text rewards; language model and projector train."""

    lora: Lora | None = None
    """None trains every weight of the language model."""
    guards: Guards | None = Guards()

    rewards: Annotated[tuple[TextReward, ...], pydantic.Field(min_length=1), pydantic.AfterValidator(_some_weight)] = (
        TextReward(name="clinical_agreement_reward", weight=1.0),
        TextReward(name="gleu_reward", weight=0.1),
        TextReward(name="length_reward", weight=0.2),
        TextReward(name="repetition_reward", weight=0.2),
    )


class GrpoVisionSettings(TrainStage):
    """Stage 2: GRPO on the frozen expert's similarity; the projector alone trains."""

    similarity: Literal["paper", "statements"] = "statements"
    """`paper`: image-report similarity; `statements`: VALOR's closed variant (docs/rewards.md)."""
    odds: float = pydantic.Field(1.5, gt=0)
    """Of `statements`: naming a finding pays from the expert's probability 1 / (1 + odds) on."""
    advantages: Literal["rank", "group"] = "rank"
    """`group` centres and scales by the group's deviation, as plain GRPO does (an ablation)."""
    tolerance: float | None = pydantic.Field(None, ge=0)
    """Rewards closer than this share a rank; null takes the noise between paraphrases that the gate measured."""
    expert_image: Literal["own", "other"] = "own"
    """`other`: the expert sees another patient's image, so its score says nothing of this one (an ablation)."""
    guards: Guards | None = Guards()


class PredictSettings(Section):
    """Reports of one checkpoint on one split, greedy unless `best_of` samples several."""

    split: Literal["train", "val", "test"] = "test"
    share: Share = (0.0, 1.0)
    """Which of the split's subjects, as in training."""
    batch_size: Positive = 64
    max_new_tokens: Positive = 128
    max_studies: Count = 0
    """How many studies to read; 0 means all."""
    best_of: Positive = 1
    """Reports sampled per study, of which the one that the expert finds likeliest is kept; 1 writes one, greedily."""
    attention_maps: bool = True
    seed: Seed = 0


class EvaluationSettings(Section):
    """Scores, intervals and the page."""

    bootstrap_samples: Positive = 1000
    confidence: float = pydantic.Field(0.95, gt=0, lt=1)
    page_studies: Count = 120
    publish_text: bool = False
    seed: Seed = 0


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

    model_name: str = pydantic.Field("valor", pattern=r"^\w[\w .-]{0,199}$")
    experiment: Text = "valor"
    publish_text: bool = False


_ABOVE_0 = r"(\d*[1-9]\d*(\.\d+)?|0\.\d*[1-9]\d*)"


class TaskResources(Section):
    """What a task asks of a cluster; ignored locally."""

    cpu: str = pydantic.Field("2", pattern=rf"^{_ABOVE_0}m?$")
    memory: str = pydantic.Field("8G", pattern=rf"^{_ABOVE_0}([KMGTPE]i?)?$")
    gpus: Count = 0
    gpu_type: str = ""


class Recipe(Section):
    """One experiment."""

    name: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100)
    description: str = ""
    seed: Seed = 0
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
