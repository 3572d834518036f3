"""What differs between targets: a task's image, environment and resources. The DAG itself is the same.

kfp-kubernetes settings make a second YAML document, which Vertex AI's PipelineJob refuses, so only `kfp` gets them.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from valor.context import TARGET
from valor.errors import UserError
from valor.recipe import Recipe, TaskResources

RETRIES, BACKOFF = 2, "60s"
"""For nodes that vanish. A stage that failed for good leaves a marker, so that a retry ends at once."""
TRAINING_STAGES = ("sft", "grpo_text", "grpo_vision")
GPU_RESOURCE = "nvidia.com/gpu"
GPU_NODE_LABEL = "cloud.google.com/gke-accelerator"
"""GKE's label of GPU pools, also set by hand on other clusters (docs/running.md)."""


def dresser(recipe: Recipe, *, target: str, image: str, env: Mapping[str, str]) -> Callable[[Any, str], None]:
    """Return the function that gives a task of a stage what the target needs.

    Raises:
        UserError: no image for a cluster, a GPU name that Vertex AI does not know, or a stage of several nodes.
    """
    for stage in TRAINING_STAGES:
        nodes = getattr(recipe, stage).nodes
        if nodes > 1:
            raise UserError(
                f"{stage}.nodes is {nodes}: a pipeline's task is one pod; set it to 1, or start the stage on each node "
                "as a Kubeflow TrainJob or a Vertex AI custom job (docs/training.md)"
            )
    if target == "local":
        from pipelines.local.codedigest import code_digest

        return lambda task, stage: _set_image(task, f"valor-python:{code_digest(stage)}")
    if not image:
        raise UserError(f"--image is missing; target {target} runs every task in a container, such as valor:0.1.0")

    def dress(task: Any, stage: str) -> None:
        fixed = {"MLFLOW_EXPERIMENT_NAME": recipe.registry.experiment, TARGET: target}
        for name, value in sorted({**fixed, **env}.items()):
            task.set_env_variable(name, value)
        _set_image(task, image)
        if not is_pinned(image):
            task.set_caching_options(False)
        task.set_retry(num_retries=RETRIES, backoff_duration=BACKOFF)
        wanted = recipe.resources.get(stage, TaskResources())
        task.set_cpu_limit(wanted.cpu).set_memory_limit(wanted.memory)
        if wanted.gpus:
            _ask_for_gpus(task, wanted, stage=stage, target=target)

    return dress


def is_pinned(image: str) -> bool:
    """Tell whether an image is named by digest; under a tag, KFP's cache would not see that the code changed."""
    return bool(re.search("@sha256:[0-9a-f]{64}$", image))


def _set_image(task: Any, image: str) -> None:
    """Set the image, and tell the task which one it runs in, so that its MLflow run and stamps name the code."""
    task.set_container_image(image)
    task.set_env_variable("VALOR_IMAGE", image)


def _ask_for_gpus(task: Any, wanted: TaskResources, *, stage: str, target: str) -> None:
    task.set_accelerator_limit(wanted.gpus)
    if target == "vertex":
        if not wanted.gpu_type.startswith("NVIDIA_"):
            raise UserError(
                f"resources.{stage}.gpu_type is {wanted.gpu_type!r}, expected a Vertex AI name such as NVIDIA_H100_80GB"
            )
        task.set_accelerator_type(wanted.gpu_type)
        return
    from kfp import kubernetes

    task.set_accelerator_type(GPU_RESOURCE)
    kubernetes.add_toleration(task, key=GPU_RESOURCE, operator="Exists", effect="NoSchedule")
    if wanted.gpu_type:
        # One recipe serves both targets: Vertex AI's NVIDIA_H100_80GB is GKE's nvidia-h100-80gb.
        label = wanted.gpu_type.lower().replace("_", "-")
        kubernetes.add_node_selector(task, label_key=GPU_NODE_LABEL, label_value=label)
