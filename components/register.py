"""KFP wrapper of the stage `register`."""

from kfp import dsl

from components.wrap import component


@component
def register(
    task: str,
    run: str,
    settings: str,
    champion_digest: str,
    checkpoint: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    verdict: dsl.Input[dsl.Artifact],
    registration: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Copy the candidate into the model store and create its version; return the version."""
    from components.entry import run_stage

    return run_stage(
        "register",
        task=task,
        run=run,
        settings=settings,
        metrics=metrics,
        inputs={"checkpoint": checkpoint, "evaluation": evaluation, "verdict": verdict},
        outputs={"registration": registration},
        values={"champion_digest": champion_digest},
    )["version"]
