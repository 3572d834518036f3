"""What a common ancestor of tasks imports before it forks them (`pipelines.local.forked`).

Only what starts no Python thread: a fork copies none, and what one of them held would stay locked for ever. Native
threads of OpenBLAS and jemalloc are stopped and started again around a fork by those libraries.
"""

import contextlib
import gc
import importlib
import os
import signal

from valor.startup import spare_the_collector

EVERY = (
    "kfp.dsl.executor_main",
    "components.entry",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "pandas",
    "pyarrow.parquet",
    "pydicom",
)
TRAINING = (
    *EVERY,
    "torch._inductor",  # torch.use_deterministic_algorithms asks for it.
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.image_processing_pil_clip",
    "valor.training.trainers",
    "valor.training.callbacks",
)


def load(modules: tuple[str, ...]) -> None:
    """Import them and make this process fit to be forked."""
    spare_the_collector()
    os.environ["_KFP_RUNTIME"] = "true"  # As KFP sets it for a task: kfp leaves its compiler out.
    for name in modules:
        # What a task needs and cannot import, for whatever reason, fails in that task with a traceback in its log.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    # A collection in a fork would write to every shared page.
    gc.collect()
    gc.freeze()
    # SIGTERM to the group is for the tasks: without their ancestor nobody would learn how they ended. It goes when the
    # last of them has, by the end of a pipe.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
