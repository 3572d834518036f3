"""Copies what a run of experiments left into a folder small enough to be committed: tables, and facts per seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.experiments import results, run
from pipelines.experiments.arms import ARMS, Seed
from pipelines.experiments.curve import TABLES
from pipelines.experiments.jobs import Job, with_ancestors
from valor import artifacts

CURVES = ("sft", "continued")
"""Checkpoints whose operating curves are drawn."""
_COSTLY = ("sft", "grpo_text", "grpo_vision", "truth", "predict")


def collect(root: Path, folder: Path, *, seeds: Sequence[int]) -> None:
    """Copy the results that are there into `folder`: a table per arm and seed, and a JSON of facts per seed.

    What stood there of a seed goes, or a table would outlive the job that made it; a seed without a finished arm in
    `root` keeps what was collected elsewhere.
    """
    for number in seeds:
        seed = Seed(number)
        reports = {name: arm.reports(seed) for name, arm in ARMS.items()}
        stopped = {name: verdict for name, job in reports.items() if (verdict := run.verdict_on(job, root))}
        reports = {name: job for name, job in reports.items() if job.is_done(root)}
        if not reports and not stopped:
            continue
        for path in (*folder.glob(f"*-{number}.npz"), *folder.glob(f"curve-*-{number}_*.npz")):
            path.unlink()
        facts: dict[str, Any] = {"seed": number, "stopped": stopped}
        facts["opened"] = min((job.record(root)["finished"][:10] for job in reports.values()), default=None)
        facts["arms"] = {name: _cost(job, seed, root) for name, job in reports.items()}
        evidence = seed.data.output("evidence").path(root)
        for name, job in reports.items():
            path = job.output("predictions").path(root)
            results.save(folder / f"{name}-{number}.npz", *results.study_table(evidence=evidence, predictions=path))
        curves = {name: seed.curve(ARMS[name].reports(seed).inputs["checkpoint"]) for name in CURVES}
        curves = {name: job for name, job in curves.items() if job.is_done(root)}
        for name, job in curves.items():
            _save_curve(job.output("curve").path(root) / TABLES, folder / f"curve-{name}-{number}.npz")
        measured = [job for job in (seed.probe(), seed.signal()) if job.is_done(root)]
        for job in measured:
            facts[job.stage] = artifacts.read_json(job.output(job.stage).path(root) / f"{job.stage}.json")
        if seed.models().is_done(root):
            gate = artifacts.read_json(seed.models().output("expert").path(root) / "expert_gate.json")
            facts["expert"] = {key: gate[key] for key in ("masked", "masked_sides", "overall", "findings")}
        facts["jobs"] = _records([*reports.values(), *curves.values(), *measured], root)
        artifacts.write_json(folder / f"facts-{number}.json", facts)


def _cost(reports: Job, seed: Seed, root: Path) -> dict[str, Any]:
    """Return what an arm took after the supervised checkpoint that all share, its reports of the test studies aside.

    A resumed job's time is that of its last try alone, so such a sum is a lower bound.
    """
    before = with_ancestors([seed.reports(seed.sft)])
    shared = {job.key for job in [*before, reports, *with_ancestors([seed.models()])]}
    own = [job for job in with_ancestors([reports]) if job.stage in _COSTLY and job.key not in shared]
    records = [job.record(root) for job in own]
    return {
        "took": [job.name.split(",")[0] for job in own],
        "processor_seconds": round(sum(record["processor_seconds"] for record in records)),
        "resumed": any(record["metrics"].get("resumed_from_step") for record in records),
    }


def _records(jobs: Sequence[Job], root: Path) -> dict[str, Any]:
    """Return what results were made by: name, settings, commit and code of every job."""
    kept = ("name", "settings", "commit", "code")
    every = [(job, job.record(root)) for job in with_ancestors(list(jobs))]
    return {f"{job.stage}-{job.key}": {key: record.get(key) for key in kept} for job, record in every}


def _save_curve(source: Path, target: Path) -> None:
    with np.load(source, allow_pickle=False) as file:
        for bias in file.files:
            if bias != "subjects":
                results.save(target.with_name(f"{target.stem}_{bias}.npz"), file["subjects"].tolist(), file[bias])
