"""KFP wrapper of the stage `sft`."""

from kfp import dsl

from components.wrap import component


@component
def sft(
    task: str,
    run: str,
    settings: str,
    dataset: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Fine-tune the base on image and report."""
    from components.entry import run_stage

    run_stage(
        "sft",
        task=task,
        run=run,
        settings=settings,
        metrics=metrics,
        inputs={"dataset": dataset, "base": base},
        outputs={"checkpoint": checkpoint},
    )
