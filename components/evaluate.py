"""KFP wrapper of the stage `evaluate`."""

from kfp import dsl

from components.wrap import component


@component
def evaluate(
    task: str,
    run: str,
    settings: str,
    dataset: dsl.Input[dsl.Dataset],
    evidence: dsl.Input[dsl.Artifact],
    predictions_sft: dsl.Input[dsl.Artifact],
    predictions_text: dsl.Input[dsl.Artifact],
    predictions_vision: dsl.Input[dsl.Artifact],
    predictions_champion: dsl.Input[dsl.Artifact],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Score every checkpoint's reports and draw the evaluation page."""
    from components.entry import run_stage

    run_stage(
        "evaluate",
        task=task,
        run=run,
        settings=settings,
        metrics=metrics,
        inputs={
            "dataset": dataset,
            "evidence": evidence,
            "predictions": [predictions_sft, predictions_text, predictions_vision, predictions_champion],
        },
        outputs={"evaluation": evaluation},
    )
