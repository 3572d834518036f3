"""KFP wrapper of the stage `grpo_vision`."""

from kfp import dsl

from components.wrap import component


@component
def grpo_vision(
    task: str,
    run: str,
    settings: str,
    dataset: dsl.Input[dsl.Dataset],
    parent: dsl.Input[dsl.Model],
    expert: dsl.Input[dsl.Model],
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Stage 2: align the projector with the frozen expert's similarity."""
    from components.entry import run_stage

    run_stage(
        "grpo_vision",
        task=task,
        run=run,
        settings=settings,
        metrics=metrics,
        inputs={"dataset": dataset, "parent": parent, "expert": expert},
        outputs={"checkpoint": checkpoint},
    )
