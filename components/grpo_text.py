"""KFP wrapper of the stage `grpo_text`."""

from kfp import dsl

from components.wrap import component


@component
def grpo_text(
    task: str,
    run: str,
    settings: str,
    dataset: dsl.Input[dsl.Dataset],
    parent: dsl.Input[dsl.Model],
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Stage 1: align with verifiable text rewards."""
    from components.entry import run_stage

    run_stage(
        "grpo_text",
        task=task,
        run=run,
        settings=settings,
        metrics=metrics,
        inputs={"dataset": dataset, "parent": parent},
        outputs={"checkpoint": checkpoint},
    )
