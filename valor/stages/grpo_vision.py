"""Stage 2, vision GRPO: the projector alone learns from a frozen expert's similarity (arXiv 2512.16201).

The expert scores the X-ray against each candidate report; the scores become rank-normalised advantages. No reference
report takes part: the rows that the rewards see do not hold one.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from valor.context import Context
from valor.recipe import GrpoVisionSettings
from valor.stages import StageResult

log = logging.getLogger(__name__)


def grpo_vision(
    settings: GrpoVisionSettings, *, dataset: Path, parent: Path, expert: Path, checkpoint: Path, context: Context
) -> StageResult:
    """Align the projector of `parent` with the expert's similarity and write `checkpoint`."""
    from valor.data.manifest import other_subjects
    from valor.models.expert import Expert
    from valor.rewards.expert import expert_reward
    from valor.training.arguments import VISION_DEFAULTS, check_enough_prompts, grpo_arguments
    from valor.training.course import Policy, end_tokens, train
    from valor.training.rows import grpo_rows

    def build(policy: Policy) -> Any:
        from valor.training.trainers import VisionGRPOTrainer

        judge = Expert.load(expert)
        reward = expert_reward(
            judge, similarity=settings.similarity, odds=settings.odds, eos_token_ids=end_tokens(policy.model)
        )
        args = grpo_arguments(settings, output_dir=policy.output_dir, defaults=VISION_DEFAULTS, reward_weights=[1.0])
        check_enough_prompts(args, studies=len(policy.studies))
        others = settings.expert_image == "other"
        seen = other_subjects([study.subject_id for study in policy.studies]) if others else ()
        rows = grpo_rows(policy.studies, policy.processor, prompt=policy.prompt, embed=judge.embed_images, seen=seen)
        return VisionGRPOTrainer(
            model=policy.model,
            reward_funcs=[reward],
            args=args,
            train_dataset=rows,
            processing_class=policy.processor,
            normalise=_normaliser(settings, judge.gate),
        )

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
