"""KFP wrapper of the stage `gate`."""

from kfp import dsl

from components.wrap import component


@component
def gate(
    task: str,
    run: str,
    settings: str,
    champion_digest: str,
    evaluation: dsl.Input[dsl.Artifact],
    verdict: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Judge the candidate by the recipe's rules; return "pass" or "refuse"."""
    from components.entry import run_stage

    return run_stage(
        "gate",
        task=task,
        run=run,
        settings=settings,
        metrics=metrics,
        inputs={"evaluation": evaluation},
        outputs={"verdict": verdict},
        values={"champion_digest": champion_digest},
    )["verdict"]
