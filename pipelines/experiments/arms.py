"""The arms: what is compared with what, and how each checkpoint comes about.

Everything that two arms have in common is the same job (`pipelines.experiments.jobs`). All arms of a seed share its
subjects, models, supervised checkpoint and test studies; seeds share nothing. Three quarters of the training subjects
are for supervised training, the last one for the rewards; arms that go on with supervised training get all of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.experiments.jobs import Job, Output

SUPERVISED, REWARDED, UNION = (0.0, 0.75), (0.75, 1.0), (0.0, 1.0)
TOKENS = 120

_SFT = {
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "train_sampling_strategy": "group_by_length",
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "save_steps": 100,
    "logging_steps": 20,
}
_GRPO = {
    "lr_scheduler_type": "constant",
    "num_generations": 8,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "loss_type": "dapo",
    "beta": 0.0,
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "save_steps": 20,
    "logging_steps": 5,
}
_FORM: Sequence[Mapping[str, Any]] = [{"name": f"{name}_reward", "weight": 0.2} for name in ("length", "repetition")]
"""What every stage 1 is held to, whatever else it is paid for."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much of each training an arm gets; docs/experiments.md tells what was fixed before the test seeds."""

    train: int = 3600
    test: int = 800
    pairs: int = 250
    sft_steps: int = 1000
    continued_steps: int = 2100
    continued_lr: float = 1.0e-4
    pseudo_label_steps: int = 1800
    text_steps: int = 200
    vision_steps: int = 100
    text_lr: float = 1.0e-4
    vision_lr: float = 1.0e-4
    vision_odds: float = 1.0
    invention: float = 8.0
    place: float = 1.5
    gleu: float = 0.1
    base: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"subjects": 4000, "tower_steps": 1200})


EXPERTS: Mapping[str, Mapping[str, int]] = {
    "strong": {"subjects": 10_000, "steps": 3000},
    "medium": {"subjects": 3000, "steps": 1200},
    "weak": {"subjects": 1200, "steps": 480},
}
"""Image-report pairs and steps by level; the recipe takes the first, and the last is the default of `models`."""


class Seed:
    """The jobs of one seed."""

    def __init__(self, seed: int, schedule: Schedule | None = None):
        self.seed, self.schedule = seed, schedule or Schedule()

    def _name(self, what: str) -> str:
        return f"{what}, seed {self.seed}"

    @functools.cached_property
    def data(self) -> Job:
        """Draw the subjects; ingest and check them."""
        s = self.schedule
        phantom = {
            "seed": self.seed, "train": s.train, "val": 100, "test": s.test, "pairs": s.pairs, "image_px": 192,
        }  # fmt: skip
        settings = {"phantom": phantom, "image_px": 96, "shards": 2}
        return Job(self._name("data"), "data", settings, ("dataset", "evidence"))

    def models(self, *, expert: str = "strong") -> Job:
        """Train base, expert and judge, each on subjects of its own; `expert` is one of `EXPERTS`."""
        settings = {
            "seed": self.seed,
            "judge": "phantom",
            "phantom_base": {"seed": 10_000_000 + self.seed, **self.schedule.base},
            "phantom_expert": {"seed": 20_000_000 + self.seed, "held_out_subjects": 500, **EXPERTS[expert]},
            "phantom_judge": {"seed": 30_000_000 + self.seed, "subjects": 1500, "steps": 600},
        }
        name = self._name("models" if expert == "strong" else f"models, {expert} expert")
        outputs = ("base", "expert", "judge")
        return Job(name, "fetch_models", settings, outputs, values={"models_digest": ""}, cores=2)

    def _dataset(self) -> Output:
        return self.data.output("dataset")

    @functools.cached_property
    def sft(self) -> Output:
        """The supervised checkpoint that all arms start from."""
        trainer = {"max_steps": self.schedule.sft_steps}
        return self._supervised("sft", self.models().output("base"), self._dataset(), share=SUPERVISED, trainer=trainer)

    def continued(self) -> Output:
        """Go on with supervised training, on the studies of both shares, for as long as both stages take."""
        return self._continued("sft continued", self._dataset(), steps=self.schedule.continued_steps)

    def continued_on_pseudo_labels(self) -> Output:
        """The same where the expert has chosen the rewarded share's reports, which takes a part of the time."""
        return self._continued("sft on pseudo-labels", self.pseudo_labels(), steps=self.schedule.pseudo_label_steps)

    def _continued(self, name: str, dataset: Output, *, steps: int) -> Output:
        trainer = {"learning_rate": self.schedule.continued_lr, "max_steps": steps}
        return self._supervised(name, self.sft, dataset, share=UNION, trainer=trainer)

    def _supervised(
        self, name: str, base: Output, dataset: Output, *, share: tuple[float, float], trainer: Mapping[str, Any]
    ) -> Output:
        settings = {"max_new_tokens": TOKENS, "share": share, "seed": self.seed, "trainer": {**_SFT, **trainer}}
        inputs = {"dataset": dataset, "base": base}
        return Job(self._name(name), "sft", settings, ("checkpoint",), inputs).output("checkpoint")

    @property
    def clinical(self) -> Mapping[str, Any]:
        """Stage 1's clinical reward."""
        s = self.schedule
        return {
            "name": "clinical_agreement_reward",
            "options": {"invention": s.invention, "side": s.place, "zone": s.place},
        }

    def text(self, *, rewards: Sequence[Mapping[str, Any]] = (), label: str = "text") -> Output:
        """Train stage 1."""
        s = self.schedule
        settings = {
            "max_new_tokens": TOKENS,
            "share": REWARDED,
            "seed": self.seed,
            "rewards": list(rewards) or [self.clinical, {"name": "gleu_reward", "weight": s.gleu}, *_FORM],
            "trainer": {**_GRPO, "learning_rate": s.text_lr, "max_steps": s.text_steps},
        }
        inputs = {"dataset": self._dataset(), "parent": self.sft}
        return Job(self._name(label), "grpo_text", settings, ("checkpoint",), inputs).output("checkpoint")

    def vision(
        self, *, parent: Output | None = None, models: Job | None = None, label: str = "vision", **changes: Any
    ) -> Output:
        """Train stage 2; `changes` are settings of its section."""
        inputs = {
            "dataset": self._dataset(),
            "parent": parent or self.text(),
            "expert": (models or self.models()).output("expert"),
        }
        settings = self._vision_settings() | changes
        return Job(self._name(label), "grpo_vision", settings, ("checkpoint",), inputs).output("checkpoint")

    def vision_on_truth(self) -> Output:
        """Train stage 2 on truth instead of the expert's word."""
        inputs = {"dataset": self._dataset(), "evidence": self.data.output("evidence"), "parent": self.text()}
        settings = self._vision_settings()
        return Job(self._name("vision on truth"), "truth", settings, ("checkpoint",), inputs).output("checkpoint")

    def signal(self) -> Job:
        """Measure how much each reward tells the projector where stage 2 begins."""
        inputs = {
            "dataset": self._dataset(), "evidence": self.data.output("evidence"), "checkpoint": self.text(),
            "expert": self.models().output("expert"),
        }  # fmt: skip
        settings = {"groups": 320, "clinical": self.clinical["options"], "settings": self._vision_settings()}
        return Job(self._name("signal"), "signal", settings, ("signal",), inputs)

    def _vision_settings(self) -> dict[str, Any]:
        s = self.schedule
        trainer = {**_GRPO, "learning_rate": s.vision_lr, "max_steps": s.vision_steps}
        return {
            "max_new_tokens": TOKENS, "share": REWARDED, "seed": self.seed, "odds": s.vision_odds, "trainer": trainer,
        }  # fmt: skip

    def reports(self, checkpoint: Output, *, split: str = "test", best_of: int = 1) -> Job:
        """Write a checkpoint's reports."""
        settings: dict[str, Any] = {
            "split": split, "batch_size": 64, "max_new_tokens": TOKENS, "attention_maps": False, "seed": self.seed,
        }  # fmt: skip
        inputs = {"dataset": self._dataset(), "judge": self.models().output("judge"), "checkpoint": checkpoint}
        if best_of > 1:
            settings |= {"best_of": best_of, "share": UNION if split == "test" else REWARDED}
            inputs["expert"] = self.models().output("expert")
        whose = checkpoint.job.name.rpartition(", seed ")[0]
        name = f"reports of {whose}" + (f", best of {best_of}" if best_of > 1 else "")
        return Job(self._name(name), "predict", settings, ("predictions",), inputs, values={"name": "sft"})

    def pseudo_labels(self) -> Output:
        """Replace the rewarded share's reports by the best of 8 of SFT's own in the eyes of the expert."""
        chosen = self.reports(self.sft, split="train", best_of=8).output("predictions")
        inputs = {"dataset": self._dataset(), "predictions": chosen}
        return Job(self._name("pseudo-labels"), "relabel", {}, ("dataset",), inputs).output("dataset")

    def curve(self, checkpoint: Output) -> Job:
        """Draw the operating curve of a checkpoint."""
        inputs = {
            "dataset": self._dataset(), "evidence": self.data.output("evidence"), "checkpoint": checkpoint,
        }  # fmt: skip
        name = self._name(f"curve of {checkpoint.job.name.rpartition(', seed ')[0]}")
        return Job(name, "curve", {"max_new_tokens": TOKENS, "batch_size": 64}, ("curve",), inputs)

    def probe(self) -> Job:
        """Measure what a linear probe reads off the base's frozen tower."""
        inputs = {
            "dataset": self._dataset(), "evidence": self.data.output("evidence"), "base": self.models().output("base"),
        }  # fmt: skip
        settings = {"taught": SUPERVISED, "tuned": REWARDED}
        return Job(self._name("probe"), "probe", settings, ("probe",), inputs)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        title: its name in tables and figures.
        question: what it is there to answer.
        seeds: how many of the seeds it runs on.
        reports: the job that writes its reports of the test studies.
    """

    title: str
    question: str
    seeds: int
    reports: Callable[[Seed], Job]


def _of(checkpoint: Callable[[Seed], Output]) -> Callable[[Seed], Job]:
    return lambda seed: seed.reports(checkpoint(seed))


ARMS: Mapping[str, Arm] = {
    "sft": Arm("SFT", "Where everything starts.", 5, _of(lambda s: s.sft)),
    "continued": Arm(
        "SFT continued", "What would the same time of supervised training on all studies give?", 5,
        _of(lambda s: s.continued()),
    ),
    "text": Arm("Stage 1", "What does text GRPO alone give?", 5, _of(lambda s: s.text())),
    "valor": Arm("Stages 1 and 2", "What does the whole recipe give?", 5, _of(lambda s: s.vision())),
    "other_image": Arm(
        "Another image", "Does stage 2 learn from this image, or from images in general?", 5,
        # The guards would stop it on the way, and rightly: it is asked how far it falls.
        _of(lambda s: s.vision(label="vision, another image", expert_image="other", guards=None)),
    ),
    "paper": Arm(
        "Paper's similarity", "Is the closed reward better than the mean similarity of sentences?", 3,
        _of(lambda s: s.vision(label="vision, paper's similarity", similarity="paper")),
    ),
    "exact_ranks": Arm(
        "Ranks, no tolerance", "Does the tolerance matter?", 3,
        _of(lambda s: s.vision(label="vision, exact ranks", tolerance=0.0)),
    ),
    "group": Arm(
        "Group-standardised", "Do ranks matter?", 3,
        _of(lambda s: s.vision(label="vision, group advantages", advantages="group")),
    ),
    "vision_only": Arm(
        "Stage 2 alone", "Does stage 2 need stage 1?", 3,
        _of(lambda s: s.vision(parent=s.sft, label="vision without text")),
    ),
    "medium_expert": Arm(
        "Medium expert", "How good must the expert be?", 3,
        _of(lambda s: s.vision(models=s.models(expert="medium"), label="vision, medium expert")),
    ),
    "weak_expert": Arm(
        "Weak expert", "How good must the expert be?", 3,
        _of(lambda s: s.vision(models=s.models(expert="weak"), label="vision, weak expert")),
    ),
    "truth": Arm(
        "Stage 2 on truth", "Could a perfect expert help?", 3, _of(lambda s: s.vision_on_truth())
    ),
    "best_of_8": Arm(
        "Best of 8", "What does the expert give with no training?", 3, lambda s: s.reports(s.sft, best_of=8)
    ),
    "pseudo_labels": Arm(
        "SFT on the expert's choice", "Is it the expert's knowledge, or learning by reward?", 3,
        _of(lambda s: s.continued_on_pseudo_labels()),
    ),
    "clinical_only": Arm(
        "Stage 1, clinical only", "Does the lexical reward help?", 3,
        _of(lambda s: s.text(label="text, clinical only", rewards=[s.clinical, *_FORM])),
    ),
    "lexical_only": Arm(
        "Stage 1, lexical only", "Would a lexical reward do?", 3,
        _of(lambda s: s.text(label="text, lexical only", rewards=[{"name": "gleu_reward"}, *_FORM])),
    ),
}  # fmt: skip
"""In the order of the document's table."""


CURVES = ("sft", "continued", "valor")
"""Arms whose checkpoints' operating curves are drawn."""


def curves(seed: Seed) -> dict[str, Job]:
    """Return the jobs of the operating curves by arm."""
    return {name: seed.curve(ARMS[name].reports(seed).inputs["checkpoint"]) for name in CURVES}
