"""What the tasks' common ancestor imports before it forks them (`pipelines.local.forked`).

Only what starts no thread: a fork copies none, and what one of them held would stay locked for ever.
"""

import contextlib
import gc
import importlib
import os

from valor.startup import spare_the_collector

MODULES = (
    "kfp.dsl.executor_main",
    "components.entry",
    "mlflow",
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
    "pandas",
    "pyarrow.parquet",
    "pydicom",
    "torch._inductor",  # torch.use_deterministic_algorithms asks for it.
    "trl.trainer.grpo_trainer",
    "trl.trainer.sft_trainer",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.image_processing_pil_clip",
    "valor.training.trainers",
    "valor.training.callbacks",
)

spare_the_collector()
os.environ["_KFP_RUNTIME"] = "true"  # As KFP sets it for a task: kfp leaves its compiler out.
for name in MODULES:
    # What a task needs and cannot import fails in that task, with a traceback in its log.
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
# A collection in a fork would write to every shared page.
gc.collect()
gc.freeze()
