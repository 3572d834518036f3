"""Copies what a run of experiments left into a folder small enough to be committed: tables, and facts per seed."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.experiments import facts, results, run
from pipelines.experiments.arms import ARMS, EXPERTS, Seed, curves
from pipelines.experiments.execute import code_digest
from pipelines.experiments.jobs import Job, with_ancestors
from valor import artifacts
from valor.errors import IntegrityError, UserError
from valor.models import gate_file

_COSTLY = ("sft", "grpo_text", "grpo_vision", "truth", "predict")


def collect(root: Path, folder: Path, *, asked: Mapping[int, Sequence[str]]) -> None:
    """Copy the results that are there into `folder`: a table per arm and seed, and a JSON of facts per seed.

    What stood there of a seed goes, or a table would outlive the job that made it; a seed without a finished arm in
    `root` keeps what was collected elsewhere.

    Args:
        root: where the results are.
        folder: where the collected ones go.
        asked: by seed, the arms that were asked for; of others a result is collected, a failure is not.

    Raises:
        UserError: a result is there that other code made; what was collected stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, wanted in asked.items():
        seed = Seed(number)
        reports = {name: arm.reports(seed) for name, arm in ARMS.items()}
        stopped = {name: verdict for name in wanted if (verdict := run.verdict_on(reports[name], root))}
        reports = {name: job for name, job in reports.items() if job.is_done(root)}
        if not reports and not stopped:
            continue
        drawn = {name: job for name, job in curves(seed).items() if job.is_done(root)}
        measured = [job for job in (seed.probe(), seed.signal()) if job.is_done(root)]
        models = seed.models()
        # Before anything that stands there goes.
        found = with_ancestors([*reports.values(), *drawn.values(), *measured, models])
        run.require_made_by(found, root, code_digest())
        evidence = seed.data.output("evidence").path(root)
        tables = {name: _table(evidence, job.output("predictions").path(root)) for name, job in reports.items()}
        told: dict[str, Any] = {"seed": number, "stopped": stopped, "scored_by": code_digest()}
        told["arms"] = {name: _cost(job, seed, root) for name, job in reports.items()}
        for job in measured:
            told[job.stage] = artifacts.read_json(job.output(job.stage).path(root) / f"{job.stage}.json")
        if models.is_done(root):
            told["models"] = {
                "processor_seconds": round(models.record(root)["processor_seconds"]),
                "expert_subjects": models.settings["phantom_expert"]["subjects"],
                "train_subjects": seed.schedule.train,
            }
            told["expert"] = _gate(models, root)
        others = {level: seed.models(expert=level) for level in EXPERTS if level != "strong"}
        told["other_experts"] = {level: _gate(job, root) for level, job in others.items() if job.is_done(root)}
        told["jobs"] = _records([*reports.values(), *drawn.values(), *measured], root)
        # All that could be damaged has been read by now.
        for path in _tables(folder, number):
            path.unlink()
        for name, table in tables.items():
            results.save(folder / f"{name}-{number}.npz", table)
        for name, job in drawn.items():
            for path in sorted(job.output("curve").path(root).glob("*.npz")):
                shutil.copyfile(path, folder / f"curve-{name}-{number}_{path.name}")
        told["tables"] = digests(folder, number)
        facts.write(folder / f"facts-{number}.json", told)


def require_own(folder: Path) -> None:
    """Refuse a folder with results of other code: some would be replaced, and no page could show the rest.

    Raises:
        UserError: there are such results.
        IntegrityError: a facts file is damaged.
    """
    own = code_digest()
    for number, path in facts_paths(folder).items():
        if other := sorted({*facts.read(path, seed=number).codes} - {own}):
            raise UserError(
                f"{path}: holds results of code {other[0]}, and this is code {own}; move what is there to a folder of "
                "its own, or give another --results"
            )


def _table(evidence: Path, predictions: Path) -> Any:
    """Return an arm's table of studies.

    Raises:
        IntegrityError: its reports, or the truth that they are scored by, are damaged.
    """
    try:
        return results.study_table(evidence=evidence, predictions=predictions)
    except (pa.ArrowException, FileNotFoundError) as error:
        raise IntegrityError(
            f"{predictions}: it, or the truth in {evidence}, is damaged ({type(error).__name__}); delete the job's "
            "folder and run the experiments again"
        ) from error


def _gate(models: Job, root: Path) -> dict[str, Any]:
    """Return what the gate of a job's expert found."""
    gate = gate_file.read(models.output("expert").path(root))
    kept = {key: gate[key] for key in ("masked", "masked_sides", "overall", "findings")}
    return kept | {"tolerance": gate["paraphrase_noise"]["statements"]}


def facts_paths(folder: Path) -> dict[int, Path]:
    """Return the facts files of a folder by seed.

    Raises:
        UserError: a file is called like one and names no seed.
    """
    found = {}
    for path in sorted(folder.glob("facts-*.json")):
        number = path.stem.removeprefix("facts-")
        # `isdecimal` alone would take the digits of any script, and two spellings of one seed.
        if not number.isdecimal() or number != str(int(number)):
            raise UserError(f"{path}: is called {number!r}, expected facts-SEED.json; delete or rename it")
        found[int(number)] = path
    return found


def digests(folder: Path, number: int) -> dict[str, str]:
    """Return the sha256 of each of a seed's tables by file name: what its facts are told of and nothing else."""
    return {path.name: artifacts.digest_file(path) for path in _tables(folder, number)}


def _tables(folder: Path, number: int) -> list[Path]:
    # A curve's point may end as a seed's tables do: curve-sft-5_-1.npz is none of seed 1.
    arms = [path for path in folder.glob(f"*-{number}.npz") if not path.name.startswith("curve-")]
    return sorted([*arms, *folder.glob(f"curve-*-{number}_*.npz")])


def _cost(reports: Job, seed: Seed, root: Path) -> dict[str, Any]:
    """Return what an arm took after the supervised checkpoint that all share.

    Its reports of the test studies count where they are the method: the best of several. A resumed job's time is that
    of its last try alone, so such a sum is a lower bound.
    """
    before = with_ancestors([seed.reports(seed.sft)])
    shared = {job.key for job in [*before, *with_ancestors([seed.models()])]}
    shared |= set() if "best_of" in reports.settings else {reports.key}
    own = [job for job in with_ancestors([reports]) if job.stage in _COSTLY and job.key not in shared]
    records = [job.record(root) for job in own]
    return {
        "took": [job.name.rpartition(", seed ")[0] for job in own],
        "processor_seconds": round(sum(record["processor_seconds"] for record in records)),
        "resumed": any(map(_is_resumed, records)),
    }


def _records(jobs: Sequence[Job], root: Path) -> dict[str, Any]:
    """Return what results were made by: name, settings, commit, code and cost of every job."""
    kept = ("name", "settings", "commit", "code")
    return {
        f"{job.stage}-{job.key}": {key: record.get(key) for key in kept}
        | {"processor_seconds": round(record["processor_seconds"]), "resumed": _is_resumed(record)}
        for job in with_ancestors(list(jobs))
        for record in [job.record(root)]
    }


def _is_resumed(record: Mapping[str, Any]) -> bool:
    """Tell whether a job's time is that of its last try alone; a stage that begins anew spends it all in that one."""
    begun_at = record["metrics"].get("resumed_from_step")
    return record["tries"] > 1 if begun_at is None else begun_at > 0
