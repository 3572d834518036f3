"""KFP wrapper of the stage `validate_data`."""

from kfp import dsl

from components.wrap import component


@component
def validate_data(
    task: str,
    run: str,
    settings: str,
    shards: dsl.Input[list[dsl.Dataset]],
    dataset: dsl.Output[dsl.Dataset],
    evidence: dsl.Output[dsl.Artifact],
    data_docs: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Join the shards and check them; failing checks stop the run."""
    from components.entry import run_stage

    run_stage(
        "validate_data",
        task=task,
        run=run,
        settings=settings,
        metrics=metrics,
        inputs={"shards": shards},
        outputs={"dataset": dataset, "evidence": evidence, "data_docs": data_docs},
    )
