"""Stage 1, text GRPO: rewards that can be verified against the reference report (arXiv 2512.16201).

The language model and the projector train; the vision tower is frozen. Every reward is logged by its name.
"""

from pathlib import Path
from typing import Any

from valor.context import Context
from valor.recipe import GrpoTextSettings
from valor.stages import StageResult


def grpo_text(
    settings: GrpoTextSettings, *, dataset: Path, parent: Path, checkpoint: Path, context: Context
) -> StageResult:
    """Align `parent` with the text rewards of the recipe and write `checkpoint`."""
    from valor.models.generate import end_tokens
    from valor.recipe.trainer_defaults import GRPO_DEFAULTS
    from valor.rewards.text import build as build_rewards
    from valor.training.arguments import check_enough_prompts, check_vllm, grpo_arguments
    from valor.training.course import train
    from valor.training.parts import adapters
    from valor.training.policy import Policy
    from valor.training.rows import grpo_rows

    def build(policy: Policy) -> Any:
        from valor.training.trainers import ReportGRPOTrainer

        ends = end_tokens(policy.model, policy.processor.tokenizer)
        functions, weights = build_rewards(settings.rewards, eos_token_ids=ends)
        args = grpo_arguments(
            settings, output_dir=policy.output_dir, defaults=GRPO_DEFAULTS, reward_weights=list(weights)
        )
        check_enough_prompts(args, studies=len(policy.studies))
        check_vllm(args)
        return ReportGRPOTrainer(
            model=policy.model,
            reward_funcs=list(functions),
            args=args,
            train_dataset=grpo_rows(policy.studies, policy.processor, prompt=policy.prompt),
            processing_class=policy.processor,
            references=policy.references,
            peft_config=adapters(policy.model, settings.lora),
        )

    metrics, cleanup = train(
        "grpo_text",
        settings,
        dataset=dataset,
        parents={"parent": parent},
        checkpoint=checkpoint,
        context=context,
        projector_only=False,
        build=build,
    )
    return StageResult(metrics=metrics, cleanup=cleanup)
