"""Compile a recipe's DAG for a target. Needs kfp, never torch; the same recipe gives the same bytes."""

import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from valor.recipe import Recipe

Target = Literal["local", "kfp", "vertex"]


def compile_recipe(
    recipe: Recipe, *, target: Target, output: Path, image: str = "", env: Mapping[str, str] | None = None
) -> None:
    """Write the compiled pipeline.

    Args:
        recipe: gives the parameters' defaults and the tasks' resources.
        target: `local` (images are code digests, no resources), `kfp` (Kubernetes settings, two YAML documents) or
            `vertex` (one document, accelerators by Vertex AI's names).
        output: a .yaml path; its folder is made.
        image: the container image of every task; unused for `local`.
        env: environment variables of every task, such as MLFLOW_TRACKING_URI.
    """
    from kfp import compiler

    from pipelines.dag import build
    from pipelines.targets import dresser

    def compile_pipeline() -> None:
        dress = dresser(recipe, target=target, image=image, env=env or {})
        compiler.Compiler().compile(build(recipe, dress=dress, serial=target == "local"), str(output))

    output.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # KFP warns of its own future defaults; nothing that a recipe's author could act on.
        warnings.simplefilter("ignore", FutureWarning)
        # KFP inspects the whole call stack at each setting of a task's container, and for each frame whose file it does
        # not know every loaded module: 10 s below pytest or a notebook. A thread's stack is short.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(compile_pipeline).result()
