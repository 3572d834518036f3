"""KFP wrapper of the stage `ingest`."""

from kfp import dsl

from components.wrap import component


@component
def ingest(
    task: str,
    run: str,
    settings: str,
    root: str,
    annotations_root: str,
    shard: str,
    output: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
):
    """Turn one shard of the source into rows of the dataset."""
    from components.entry import run_stage, task_label

    run_stage(
        "ingest",
        task=task_label(task, shard),
        run=run,
        settings=settings,
        metrics=metrics,
        outputs={"output": output},
        values={"root": root, "annotations_root": annotations_root, "shard": shard},
    )
