"""KFP wrapper of the exit handler: closes the parent run in MLflow, whatever became of the tasks; nothing else."""

from kfp import dsl

from components.wrap import component


@component
def finish(run: str, status: dsl.PipelineTaskFinalStatus):
    """Close the parent run in MLflow with the pipeline's final state."""
    import os

    from valor.tracking.runs import finish_pipeline

    ended = {"SUCCEEDED": "FINISHED", "CANCELLED": "KILLED"}.get(status.state, "FAILED")
    finish_pipeline(os.environ.get("VALOR_PIPELINE_RUN") or run, ended)
