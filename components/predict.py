"""KFP wrappers of the stage `predict`: of this run's checkpoints, and of the champion in the model store."""

from kfp import dsl

from components.wrap import component


@component
def predict(
    task: str,
    run: str,
    settings: str,
    name: str,
    dataset: dsl.Input[dsl.Dataset],
    judge: dsl.Input[dsl.Model],
    checkpoint: dsl.Input[dsl.Model],
    predictions: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Write a checkpoint's reports of the test studies."""
    from components.entry import run_stage

    run_stage(
        "predict",
        task=task,
        run=run,
        settings=settings,
        metrics=metrics,
        inputs={"dataset": dataset, "judge": judge, "checkpoint": checkpoint},
        outputs={"predictions": predictions},
        values={"name": name},
    )


@component
def predict_champion(
    task: str,
    run: str,
    settings: str,
    checkpoint_uri: str,
    checkpoint_digest: str,
    dataset: dsl.Input[dsl.Dataset],
    judge: dsl.Input[dsl.Model],
    predictions: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Write the champion's reports of the test studies; an empty table where there is no champion."""
    from components.entry import run_stage

    run_stage(
        "predict",
        task=task,
        run=run,
        settings=settings,
        metrics=metrics,
        inputs={"dataset": dataset, "judge": judge},
        outputs={"predictions": predictions},
        values={"name": "champion", "checkpoint_uri": checkpoint_uri, "checkpoint_digest": checkpoint_digest},
    )
