"""Supervised fine-tuning: next-token training on (image, report), with TRL's SFTTrainer.

The vision tower is frozen, projector and language model train, and the loss falls on the report alone.
"""

from pathlib import Path
from typing import Any

from valor.context import Context
from valor.recipe import SftSettings
from valor.stages import StageResult


def sft(settings: SftSettings, *, dataset: Path, base: Path, checkpoint: Path, context: Context) -> StageResult:
    """Fine-tune `base` on the training split and write `checkpoint`."""
    from valor.training.arguments import sft_arguments
    from valor.training.course import train
    from valor.training.parts import adapters
    from valor.training.policy import Policy
    from valor.training.rows import sft_rows

    def build(policy: Policy) -> Any:
        from valor.training.trainers import ReportSFTTrainer

        return ReportSFTTrainer(
            model=policy.model,
            args=sft_arguments(settings, output_dir=policy.output_dir),
            train_dataset=sft_rows(policy.studies, policy.processor, prompt=policy.prompt),
            processing_class=policy.processor,
            peft_config=adapters(policy.model, settings.lora),
            lengths=[len(study.text) for study in policy.studies],
        )

    metrics, cleanup = train(
        "sft",
        settings,
        dataset=dataset,
        parents={"base": base},
        checkpoint=checkpoint,
        context=context,
        projector_only=False,
        build=build,
    )
    return StageResult(metrics=metrics, cleanup=cleanup)
