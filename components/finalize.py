"""KFP wrapper of the stage `finalize`."""

from kfp import dsl

from components.wrap import component


@component
def finalize(
    task: str,
    run: str,
    settings: str,
    shards: dsl.Input[list[dsl.Dataset]],
    dataset: dsl.Input[dsl.Dataset],
    evidence: dsl.Input[dsl.Artifact],
    data_docs: dsl.Input[dsl.Artifact],
    base: dsl.Input[dsl.Model],
    expert: dsl.Input[dsl.Model],
    judge: dsl.Input[dsl.Model],
    sft: dsl.Input[dsl.Model],
    grpo_text: dsl.Input[dsl.Model],
    grpo_vision: dsl.Input[dsl.Model],
    predictions_sft: dsl.Input[dsl.Artifact],
    predictions_text: dsl.Input[dsl.Artifact],
    predictions_vision: dsl.Input[dsl.Artifact],
    predictions_champion: dsl.Input[dsl.Artifact],
    evaluation: dsl.Input[dsl.Artifact],
    verdict: dsl.Input[dsl.Artifact],
    summary: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Link executed and reused stage runs to this pipeline run."""
    from components.entry import run_stage

    run_stage(
        "finalize",
        task=task,
        run=run,
        settings=settings,
        metrics=metrics,
        inputs={
            "shards": shards,
            "dataset": dataset,
            "evidence": evidence,
            "data_docs": data_docs,
            "base": base,
            "expert": expert,
            "judge": judge,
            "sft": sft,
            "grpo_text": grpo_text,
            "grpo_vision": grpo_vision,
            "predictions_sft": predictions_sft,
            "predictions_text": predictions_text,
            "predictions_vision": predictions_vision,
            "predictions_champion": predictions_champion,
            "evaluation": evaluation,
            "verdict": verdict,
        },
        outputs={"summary": summary},
    )
