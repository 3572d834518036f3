"""What a training stage builds its trainer from: a checkpoint opened for it, checked before anything is trained."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from valor.data.manifest import Study
from valor.errors import IntegrityError, UserError
from valor.models.loading import load_policy, model_pixels, prompt_of, question
from valor.recipe import TrainStage
from valor.training.memo import TowerMemo
from valor.training.parts import choose_trained
from valor.training.prompts import SharedPrompts
from valor.training.rows import require_no_image_token, require_reports_fit, training_studies

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Policy:
    """What a stage builds its trainer from."""

    model: Any
    processor: Any
    prompt: str
    studies: Sequence[Study]
    output_dir: Path

    @property
    def references(self) -> dict[str, str]:
        """The studies' reports by study_id."""
        return {study.study_id: study.text for study in self.studies}


def open_policy(
    stage: str, settings: TrainStage, *, dataset: Path, parent: Path, output_dir: Path, projector_only: bool
) -> tuple[Policy, list[Any]]:
    """Load a checkpoint as a stage trains it: its parts frozen, its studies chosen, its speedups attached.

    Args:
        stage: the stage's name.
        settings: its section.
        dataset: the dataset artifact.
        parent: the checkpoint to start from.
        output_dir: where the trainer may write.
        projector_only: train the vision projector alone; else all but the vision tower.

    Returns:
        The policy, and the speedups, each with `detach()`.

    Raises:
        UserError: the model has no projector that VALOR knows, or no room for `max_new_tokens`.
        DataError: a report holds the processor's image token, or is too long for the model.
        IntegrityError: a weight is no number.
    """
    model, processor = load_policy(parent)
    _require_finite_parent(model, parent)
    choose_trained(model, projector_only=projector_only)
    speedups: list[Any] = [TowerMemo.attach(model)]
    if settings.strategy == "ddp":
        speedups.append(SharedPrompts.attach(model))
    else:
        # A prompt shared in one process alone would be one more forward pass there, and each of them gathers weights
        # from all the processes: they would wait for each other for ever.
        log.info("strategy %s: generation computes a prompt once per completion", settings.strategy)
    studies = training_studies(dataset, studies=settings.studies, seed=settings.seed, share=settings.share)
    require_no_image_token(studies, processor)
    policy = Policy(model, processor, prompt_of(parent), studies, output_dir)
    _require_context(stage, policy, max_new_tokens=settings.max_new_tokens)
    return policy, [part for part in speedups if part]


def _require_context(stage: str, policy: Policy, *, max_new_tokens: int) -> None:
    """Refuse what goes beyond the positions that the model was built for: a report to learn from, or one to write."""
    text = question(policy.processor, policy.prompt)
    image = model_pixels(policy.studies[0], policy.processor)
    asked = policy.processor(images=[image], text=[text], return_tensors="pt")["input_ids"].shape[1]
    context = _context_of(policy.model.config.get_text_config())
    if context is None:
        return
    if asked >= context:
        raise UserError(
            f"{stage}: prompt and image take {asked} tokens, and the model's context has {context}; take a base "
            "with a longer context or smaller images"
        )
    if stage == "sft":
        require_reports_fit(policy.studies, policy.processor, room=context - asked)
    elif asked + max_new_tokens > context:
        raise UserError(
            f"{stage}.max_new_tokens is {max_new_tokens}, and the model's context of {context} tokens leaves "
            f"{context - asked} beside prompt and image; lower it"
        )


def _context_of(config: Any) -> int | None:
    """Return the tokens that a language model was built for, None where its configuration does not tell.

    Rotary positions that are stretched reach as many times further.
    """
    positions = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    return None if positions is None else int(positions * (rotary.get("factor") or 1))


def _require_finite_parent(model: Any, parent: Path) -> None:
    """Raise IntegrityError where a weight is no number: sampling fails on it without a name, training goes nowhere."""
    from valor.training.callbacks import broken_weight

    name = broken_weight(model.named_parameters())
    if name is not None:
        raise IntegrityError(f"{parent}: {name} holds a NaN or an infinity; train or fetch the checkpoint again")
