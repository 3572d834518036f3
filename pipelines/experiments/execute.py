"""What one job does, in a process of its own: a stage of VALOR, or one of the steps that only experiments take."""

import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pipelines.experiments.jobs import RECORD, Job
from valor import artifacts, stages
from valor.context import Context
from valor.errors import UserError
from valor.tracking.runs import code_identity

_CODE = ("clinical", "data", "evaluation", "metrics", "models", "recipe", "rewards", "stages", "training")
_OWN_CODE = ("analysis", "curve", "execute", "probe", "results", "signal", "truth")
_LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "tokenizers", "numpy", "scikit-learn")


def execute(job: Job, root: Path, *, code: str) -> None:
    """Run a job and write its record; what it prints goes to `logs` in its folder.

    Args:
        job: what to run.
        root: where results are kept.
        code: the digest of the code when the experiments began, of which this process may hold modules already.

    Raises:
        UserError: the code is another by now.
        ValorError: the stage's verdict; the job can be run again.
    """
    import torch

    torch.set_num_threads(1)
    folder = job.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["VALOR_RUN_DIR"] = str(folder)
    if code_digest() != code:
        raise UserError(f"{job.name}: the code has changed since the experiments began; start them again")
    made_by = {**code_identity(), "code": code, "tries": _count_try(folder)}
    begun, processor = time.monotonic(), _processor_seconds()
    outputs = {name: folder / name for name in job.outputs}
    inputs = {name: output.path(root) for name, output in job.inputs.items()}
    with stages.log_to_file(_task(job)):
        metrics = OWN.get(job.stage, _stage)(job, root, inputs, outputs)
    artifacts.write_json(
        folder / RECORD,
        {
            "name": job.name,
            "stage": job.stage,
            "settings": dict(job.settings),
            # Of the last try alone.
            "seconds": time.monotonic() - begun,
            "processor_seconds": _processor_seconds() - processor,
            "metrics": {key: float(value) for key, value in metrics.items()},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **made_by,
        },
    )


def _count_try(folder: Path) -> int:
    """Return the number of this try; what an earlier one spent is known to nobody."""
    path = folder / "tries.json"
    number = 1 + (int(path.read_text(encoding="ascii")) if path.is_file() else 0)
    artifacts.write_json(path, number)
    return number


def _processor_seconds() -> float:
    """Return what this process has spent, and its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@functools.cache
def code_digest() -> str:
    """Return the digest of the code that results depend on: results of different code are not compared."""
    here = Path(__file__).parent
    own = [artifacts.digest_file(here / f"{name}.py") for name in _OWN_CODE]
    return artifacts.digest_value([artifacts.digest_code(_CODE, _LIBRARIES), own])[:12]


def _task(job: Job) -> str:
    return f"{job.stage}-{job.key[:6]}"


def _stage(job: Job, root: Path, inputs: dict[str, Path], outputs: dict[str, Path]) -> Mapping[str, float]:
    context = Context(task=_task(job), work_root=str(root / "work"), models_root=str(root / "models"))
    result = stages.run(
        job.stage,
        settings_json=json.dumps(dict(job.settings)),
        context=context,
        inputs=inputs,
        outputs=outputs,
        values=dict(job.values),
    )
    return result.metrics


def _data(job: Job, root: Path, inputs: dict[str, Path], outputs: dict[str, Path]) -> Mapping[str, float]:
    """Draw the phantom and make dataset and evidence of it, as the pipeline's first tasks do."""
    context = Context(task=_task(job), work_root=str(root / "work"))
    settings = json.dumps(dict(job.settings))
    places = {"root": "phantom", "annotations_root": ""}
    from valor.data.shards import plan_shards
    from valor.recipe import parse_section

    shards, _ = plan_shards(**places, settings=parse_section("ingest", settings))  # type: ignore[arg-type]
    parts = []
    for shard in shards:
        part = job.folder(root) / f"shard-{shard.index}"
        stages.run(
            "ingest",
            settings_json=settings,
            context=context,
            outputs={"output": part},
            values={**places, "shard": shard.to_json()},
        )
        parts.append(part)
    return stages.run(
        "validate_data",
        settings_json=settings,
        context=context,
        inputs={"shards": parts},
        outputs={**outputs, "data_docs": job.folder(root) / "data_docs"},
    ).metrics


def _curve(job: Job, root: Path, inputs: dict[str, Path], outputs: dict[str, Path]) -> Mapping[str, float]:
    from pipelines.experiments.curve import curve

    return curve(**inputs, output=outputs["curve"], **job.settings)  # type: ignore[arg-type]


def _probe(job: Job, root: Path, inputs: dict[str, Path], outputs: dict[str, Path]) -> Mapping[str, float]:
    from pipelines.experiments.probe import probe

    return probe(**inputs, output=outputs["probe"], **job.settings)  # type: ignore[arg-type]


def _truth(job: Job, root: Path, inputs: dict[str, Path], outputs: dict[str, Path]) -> Mapping[str, float]:
    from pipelines.experiments.truth import train_on_truth

    # The reward is this package's, of which the stage's identity knows nothing: other code begins anew.
    work_root = str(root / "work" / code_digest())
    return train_on_truth(**inputs, **outputs, settings=job.settings, work_root=work_root)


def _signal(job: Job, root: Path, inputs: dict[str, Path], outputs: dict[str, Path]) -> Mapping[str, float]:
    from pipelines.experiments.signal import signal

    return signal(**inputs, output=outputs["signal"], **job.settings)  # type: ignore[arg-type]


def _relabel(job: Job, root: Path, inputs: dict[str, Path], outputs: dict[str, Path]) -> Mapping[str, float]:
    """Make a dataset whose training reports are those of a predictions artifact, where it has a row.

    A study whose prediction is empty or cut is left out: its own report is what this arm must do without.
    """
    import dataclasses

    import pyarrow.parquet as pq

    from valor.data.manifest import (
        DATASET_INFO,
        SCHEMA,
        SCHEMA_VERSION,
        SPLITS,
        TableWriter,
        dataset_digest,
        iter_studies,
        row_digest,
        shard_paths,
    )
    from valor.evaluation.predict import TABLE

    chosen = pq.read_table(inputs["predictions"] / TABLE).to_pylist()
    texts = {row["study_id"]: "" if row["truncated"] else row["hypothesis"] for row in chosen}
    digests, replaced, left_out = [], 0, 0
    counts = dict.fromkeys(SPLITS, 0)
    with artifacts.atomic_dir(outputs["dataset"]) as folder:
        with TableWriter(folder / "shard-00000.parquet", SCHEMA) as table:
            for study in iter_studies(shard_paths(inputs["dataset"])):
                if study.split == "train" and study.study_id in texts:
                    if not texts[study.study_id]:
                        left_out += 1
                        continue
                    findings, _, impression = texts[study.study_id].partition("IMPRESSION: ")
                    findings = findings.removeprefix("FINDINGS: ").strip()
                    study = dataclasses.replace(study, findings=findings or None, impression=impression or None)
                    replaced += 1
                table.write(study)
                digests.append(row_digest(study))
                counts[study.split] += 1
        digest = dataset_digest(digests)
        info = {"schema_version": SCHEMA_VERSION, "digest": digest, "studies": counts}
        artifacts.write_json(folder / DATASET_INFO, info)
    artifacts.stamp(outputs["dataset"], kind="dataset", stage="relabel", digest=digest)
    return {"replaced": replaced, "left_out": left_out}


OWN: dict[str, Callable[[Job, Path, dict[str, Path], dict[str, Path]], Mapping[str, float]]] = {
    "data": _data,
    "curve": _curve,
    "probe": _probe,
    "relabel": _relabel,
    "signal": _signal,
    "truth": _truth,
}
"""Jobs that are no single stage."""
