"""The recipe's DAG, once for all targets (docs/architecture.md draws it).

Each section of the recipe is a pipeline parameter: a JSON string whose default is the compiled recipe. So one
template serves many recipes, and an edit of one stage's section leaves the identity of the others alone.
"""

from collections.abc import Callable

from kfp import dsl
from kfp.dsl import graph_component, pipeline_task

from components.evaluate import evaluate
from components.fetch_models import fetch_models
from components.finalize import finalize
from components.finish import finish
from components.gate import gate
from components.grpo_text import grpo_text
from components.grpo_vision import grpo_vision
from components.ingest import ingest
from components.predict import predict, predict_champion
from components.preflight import preflight
from components.register import register
from components.sft import sft
from components.validate_data import validate_data
from valor.recipe import Recipe

RUN = dsl.PIPELINE_JOB_ID_PLACEHOLDER
_TASKS_BEFORE_FAN_OUT, _FAN_OUT = ("preflight",), "ingest"
_TASKS_AFTER_FAN_OUT = (
    "validate_data", "fetch_models", "sft", "grpo_text", "grpo_vision", "predict-sft", "predict-text",
    "predict-vision", "predict-champion", "evaluate", "gate", "register", "finalize",
)  # fmt: skip

Dress = Callable[[pipeline_task.PipelineTask, str], None]
"""Gives a task of a stage its image, resources and environment."""


def task_names(shards: int) -> list[str]:
    """Return the names under which a person sees the tasks, in the DAG's order."""
    return [*_TASKS_BEFORE_FAN_OUT, *(f"{_FAN_OUT}-{i}" for i in range(shards)), *_TASKS_AFTER_FAN_OUT]


def build(recipe: Recipe, *, dress: Dress, serial: bool = False) -> graph_component.GraphComponent:
    """Build the pipeline of a recipe.

    Args:
        recipe: gives the defaults of the pipeline's parameters.
        dress: called once per task with the task and its stage's name (`finish` for the exit handler).
        serial: tasks run one at a time, so the data's checks come before the models are fetched.
    """

    def step(stage: str, task: pipeline_task.PipelineTask, name: str = "", *, cached: bool = True):
        task.set_display_name(name or stage)
        task.set_caching_options(enable_caching=cached)
        dress(task, stage)
        return task

    @dsl.pipeline(name=f"valor-{recipe.name.replace('_', '-')}", description=recipe.description or None)
    def pipeline(
        data: str = recipe.section_json("data"),
        models: str = recipe.section_json("models"),
        sft_settings: str = recipe.section_json("sft"),
        grpo_text_settings: str = recipe.section_json("grpo_text"),
        grpo_vision_settings: str = recipe.section_json("grpo_vision"),
        predict_settings: str = recipe.section_json("predict"),
        evaluation: str = recipe.section_json("evaluation"),
        gate_settings: str = recipe.section_json("gate"),
        registry: str = recipe.section_json("registry"),
        data_root: str = recipe.data.root,
        annotations_root: str = recipe.data.annotations_root,
        data_public: bool = recipe.data.public,
    ):
        places = {"root": data_root, "annotations_root": annotations_root}
        the_end = step("finish", finish(run=RUN), cached=False)
        with dsl.ExitHandler(the_end, name="recipe"):
            # What is there: the source, its shards, the models and the champion. Everything waits for this cheap look.
            look = step(
                "preflight",
                preflight(
                    task="preflight",
                    run=RUN,
                    settings=data,
                    registry=registry,
                    models=models,
                    evaluation=evaluation,
                    gate=gate_settings,
                    vision=grpo_vision_settings,
                    public=data_public,
                    **places,
                ),
                cached=False,
            )
            champion_uri, champion_digest = look.outputs["champion_uri"], look.outputs["champion_digest"]

            # Data: one task per shard, then the gate that stops the run before any training.
            with dsl.ParallelFor(items=look.outputs["Output"], name="shards") as shard:
                rows = step("ingest", ingest(task="ingest", run=RUN, settings=data, shard=shard, **places))
            valid = step(
                "validate_data",
                validate_data(
                    task="validate_data", run=RUN, settings=data, shards=dsl.Collected(rows.outputs["output"])
                ),
            )
            dataset, evidence = valid.outputs["dataset"], valid.outputs["evidence"]
            fetched = step(
                "fetch_models",
                fetch_models(
                    task="fetch_models", run=RUN, settings=models, models_digest=look.outputs["models_digest"]
                ),
            )
            if serial:
                fetched.after(valid)
            expert, judge = fetched.outputs["expert"], fetched.outputs["judge"]

            # Training: supervised, then text rewards, then the expert's similarity.
            tuned = step(
                "sft",
                sft(task="sft", run=RUN, settings=sft_settings, dataset=dataset, base=fetched.outputs["base"]),
            ).outputs["checkpoint"]
            text = step(
                "grpo_text",
                grpo_text(task="grpo_text", run=RUN, settings=grpo_text_settings, dataset=dataset, parent=tuned),
            ).outputs["checkpoint"]
            vision = step(
                "grpo_vision",
                grpo_vision(
                    task="grpo_vision",
                    run=RUN,
                    settings=grpo_vision_settings,
                    dataset=dataset,
                    parent=text,
                    expert=expert,
                ),
            ).outputs["checkpoint"]
            checkpoints = {"sft": tuned, "text": text, "vision": vision}

            # Reports of every checkpoint, and of the version that is in use.
            common = {"run": RUN, "settings": predict_settings, "dataset": dataset, "judge": judge}
            predicted = {
                f"predictions_{name}": step(
                    "predict",
                    predict(task=f"predict-{name}", name=name, checkpoint=checkpoint, **common),
                    f"predict-{name}",
                ).outputs["predictions"]
                for name, checkpoint in checkpoints.items()
            }
            predicted["predictions_champion"] = step(
                "predict",
                predict_champion(
                    task="predict-champion", checkpoint_uri=champion_uri, checkpoint_digest=champion_digest, **common
                ),
                "predict-champion",
            ).outputs["predictions"]

            # Evidence, verdict and, where it is "pass", a new version.
            scores = step(
                "evaluate",
                evaluate(
                    task="evaluate", run=RUN, settings=evaluation, dataset=dataset, evidence=evidence, **predicted
                ),
            ).outputs["evaluation"]
            judged = step(
                "gate",
                gate(task="gate", run=RUN, settings=gate_settings, champion_digest=champion_digest, evaluation=scores),
            )
            with dsl.If(judged.outputs["Output"] == "pass", name="passed"):
                step(
                    "register",
                    register(
                        task="register",
                        run=RUN,
                        settings=registry,
                        champion_digest=champion_digest,
                        checkpoint=checkpoints[recipe.gate.candidate],
                        evaluation=scores,
                        verdict=judged.outputs["verdict"],
                    ),
                    # It acts on the registry, which may be another one by now; registering again is idempotent.
                    cached=False,
                )
            step(
                "finalize",
                finalize(
                    task="finalize",
                    run=RUN,
                    settings=registry,
                    shards=dsl.Collected(rows.outputs["output"]),  # KFP rewrites a Collected: one per consumer
                    dataset=dataset,
                    evidence=evidence,
                    data_docs=valid.outputs["data_docs"],
                    base=fetched.outputs["base"],
                    expert=expert,
                    judge=judge,
                    sft=tuned,
                    grpo_text=text,
                    grpo_vision=vision,
                    **predicted,
                    evaluation=scores,
                    verdict=judged.outputs["verdict"],
                ),
                cached=False,
            )

    return pipeline
