"""Stage 2, vision GRPO: the projector alone learns from a frozen expert's similarity (arXiv 2512.16201).

The expert scores the X-ray against each candidate report; the scores become rank-normalised advantages. No reference
report takes part in that: the rows that the rewards see do not hold one. Guards alone compare with them.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valor.context import Context
from valor.recipe import GrpoVisionSettings
from valor.stages import StageResult

if TYPE_CHECKING:
    from valor.training.policy import Policy
    from valor.training.trainers import VisionGRPOTrainer

log = logging.getLogger(__name__)


def grpo_vision(
    settings: GrpoVisionSettings, *, dataset: Path, parent: Path, expert: Path, checkpoint: Path, context: Context
) -> StageResult:
    """Align the projector of `parent` with the expert's similarity and write `checkpoint`."""
    from valor.data.manifest import other_subjects
    from valor.models.expert import Expert
    from valor.models.generate import end_tokens
    from valor.rewards.expert import expert_reward
    from valor.training.course import train
    from valor.training.policy import Policy

    def build(policy: Policy) -> Any:
        judge = Expert.load(expert)
        ends = end_tokens(policy.model, policy.processor.tokenizer)
        reward = expert_reward(judge, similarity=settings.similarity, odds=settings.odds, eos_token_ids=ends)
        others = settings.expert_image == "other"
        seen = other_subjects([study.subject_id for study in policy.studies]) if others else ()
        normalise = _normaliser(settings, judge.gate)
        return trainer(policy, settings, reward=reward, normalise=normalise, embed=judge.embed_images, seen=seen)

    metrics, cleanup = train(
        "grpo_vision",
        settings,
        dataset=dataset,
        parents={"parent": parent, "expert": expert},
        checkpoint=checkpoint,
        context=context,
        projector_only=True,
        build=build,
    )
    return StageResult(metrics=metrics, cleanup=cleanup)


def trainer(
    policy: "Policy",
    settings: GrpoVisionSettings,
    *,
    reward: Callable[..., list[float]],
    normalise: Callable[..., Any],
    embed: Callable[..., Any] | None = None,
    seen: Sequence[int] = (),
) -> "VisionGRPOTrainer":
    """Build stage 2's trainer.

    Args:
        policy: what trains, and on which studies.
        settings: the stage's section.
        reward: in TRL's signature.
        normalise: makes a group's rewards its advantages (`valor.training.advantages`).
        embed: the expert's embeddings of images, for rewards that look at the image.
        seen: by study, whose image `embed` is shown; its own by default.

    Raises:
        UserError: a step asks for more prompts than there are studies.
    """
    from valor.recipe.trainer_defaults import VISION_DEFAULTS
    from valor.training.arguments import check_enough_prompts, grpo_arguments
    from valor.training.rows import grpo_rows
    from valor.training.trainers import VisionGRPOTrainer

    args = grpo_arguments(settings, output_dir=policy.output_dir, defaults=VISION_DEFAULTS, reward_weights=[1.0])
    check_enough_prompts(args, studies=len(policy.studies))
    return VisionGRPOTrainer(
        model=policy.model,
        reward_funcs=[reward],
        args=args,
        train_dataset=grpo_rows(policy.studies, policy.processor, prompt=policy.prompt, embed=embed, seen=seen),
        processing_class=policy.processor,
        references=policy.references,
        normalise=normalise,
        must_state=settings.similarity == "statements",
    )


def _normaliser(settings: GrpoVisionSettings, gate: Mapping[str, Any]) -> Callable[..., Any]:
    from valor.training.advantages import rank_advantages, standardised_advantages

    if settings.advantages == "group":
        return standardised_advantages
    return functools.partial(rank_advantages, tolerance=_tolerance(settings, gate))


def _tolerance(settings: GrpoVisionSettings, gate: Mapping[str, Any]) -> float:
    """Return the rewards' tolerance: the recipe's, or the noise that the expert's gate measured."""
    if settings.tolerance is not None:
        return settings.tolerance
    noise = gate.get("paraphrase_noise", {}).get(settings.similarity)
    if noise is None:
        log.warning(
            "the expert's gate knows no noise between paraphrases for similarity: %s, so ranks have no tolerance "
            "and a change of words counts in full; set grpo_vision.tolerance",
            settings.similarity,
        )
        return 0.0
    log.info("rewards closer than %.4f share a rank: the noise between paraphrases", noise)
    return float(noise)
