"""KFP wrapper of the stage `fetch_models`."""

from kfp import dsl

from components.wrap import component


@component
def fetch_models(
    task: str,
    run: str,
    settings: str,
    models_digest: str,
    base: dsl.Output[dsl.Model],
    expert: dsl.Output[dsl.Model],
    judge: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Resolve the base model, the expert and the judge."""
    from components.entry import run_stage

    run_stage(
        "fetch_models",
        task=task,
        run=run,
        settings=settings,
        metrics=metrics,
        outputs={"base": base, "expert": expert, "judge": judge},
        values={"models_digest": models_digest},
    )
