"""What was collected, read once: the arms' tables, operating curves and what is known of each seed."""

import dataclasses
import functools
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.experiments import analysis, facts, results
from pipelines.experiments.analysis import Difference, Table
from pipelines.experiments.arms import ARMS, CURVES
from pipelines.experiments.collect import facts_paths
from pipelines.experiments.facts import Facts
from valor import artifacts
from valor.errors import IntegrityError, UserError
from valor.evaluation.measures import Measure

BASELINE, FINAL = "continued", "valor"
"""The arms of the headline."""
RIVALS = ("sft", BASELINE)
"""The arms above whose operating curves the final model must rise."""


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """The collected results of a folder.

    Attributes:
        facts: what `collect` wrote of each seed.
        tables: by arm and seed; arms without results are left out.
        curves: by arm, seed and bias; the same.
    """

    facts: Sequence[Facts]
    tables: Mapping[str, Mapping[int, Table]]
    curves: Mapping[str, Mapping[int, Mapping[str, Table]]]

    @functools.cached_property
    def measures(self) -> dict[str, Measure]:
        """The metrics that the tables allow, by name."""
        return analysis.measured(next(iter(self.tables.values())))

    def shared(self, *arms: str) -> list[int]:
        """Return the seeds that all these arms have."""
        return sorted(set.intersection(*(set(self.tables.get(name, ())) for name in arms)))

    def values(self, key: str, arm: str, *, seeds: Sequence[int]) -> list[float]:
        """Return a metric of an arm on each of the seeds."""
        return [analysis.value(self.measures[key], self.tables[arm][seed]) for seed in seeds]

    def compare(self, key: str, ours: str, theirs: str) -> Difference:
        """Return a metric of one arm minus that of another, over the seeds that both have."""
        return analysis.compare(self.measures[key], self.tables[ours], self.tables[theirs])

    def relative(self, key: str) -> float:
        """Return by what part a metric's mean changes from the baseline to the final model."""
        seeds = self.shared(FINAL, BASELINE)
        return analysis.relative(*(self.values(key, arm, seeds=seeds) for arm in (FINAL, BASELINE)))

    def best_of(self, curve: str) -> dict[int, tuple[str, float]]:
        """Return per seed the bias at which an arm's operating curve has its best F1, and that F1."""
        measure = self.measures["truth_f1_micro"]
        return {
            seed: analysis.best_of_curve(points, lambda t: analysis.value(measure, t))
            for seed, points in sorted(self.curves.get(curve, {}).items())
        }

    def above_best(self, curve: str, arm: str, *, at_its_best: bool = False) -> Difference | None:
        """Return an arm's F1 minus that of the best point of an arm's operating curve; None without a shared seed.

        With `at_its_best` the arm, too, takes the best point of its own curve.
        """
        best = self._tables_at_best(curve)
        ours = self._tables_at_best(arm) if at_its_best else self.tables.get(arm, {})
        return analysis.compare(self.measures["truth_f1_micro"], ours, best) if set(ours) & set(best) else None

    def errors(self, table: Table) -> tuple[float, float]:
        """Return what a table's reports miss and what they invent, each in [0, 1]."""
        missed, invented = (self.measures[key] for key in ("truth_omission", "truth_hallucination"))
        return analysis.value(missed, table), analysis.value(invented, table)

    def curve_points(self, curve: str, seed: int) -> list[tuple[float, float]]:
        """Return `errors` along an arm's operating curve, from the least bias on."""
        points = sorted(self.curves[curve][seed].items(), key=lambda item: float(item[0]))
        return [self.errors(table) for _, table in points]

    def missed_above(self, curve: str, arm: str) -> dict[int, float]:
        """Return per seed what an arm misses minus the least that a curve misses where it invents no more."""
        found = {}
        for seed in sorted(set(self.curves.get(curve, ())) & set(self.tables.get(arm, ()))):
            missed, invented = self.errors(self.tables[arm][seed])
            found[seed] = missed - analysis.least_missed(self.curve_points(curve, seed), invented=invented)
        return found

    def _tables_at_best(self, curve: str) -> dict[int, Table]:
        return {seed: self.curves[curve][seed][bias] for seed, (bias, _) in self.best_of(curve).items()}

    def probed(self) -> list[tuple[int, float, float, str]]:
        """Return per seed the macro F1 of probe and SFT, and the findings that the expert's gate masks."""
        found = []
        for one in self.facts:
            if one.probe and one.seed in self.tables.get("sft", ()):
                (ours,) = self.values("truth_f1_macro", "sft", seeds=[one.seed])
                masked = ", ".join(one.expert.masked) if one.expert else "not known"
                found.append((one.seed, one.probe.f1_macro, ours, masked))
        return found


def load(folder: Path) -> Outcomes:
    """Read a folder that `collect` filled.

    Raises:
        UserError: there are no results, they were made by more than one version of the code, or a table by none.
        IntegrityError: facts or a table are not what was collected.
    """
    known = [facts.read(path, seed=seed) for seed, path in facts_paths(folder).items()]
    _require_one_code(folder, known)
    _require_tables(folder, known)
    tables = {name: table for name in ARMS if (table := _tables(folder, name))}
    if not tables:
        raise UserError(f"{folder}: holds no results; run valor experiments first")
    return Outcomes(known, tables, {name: curve for name in CURVES if (curve := _curves(folder, name))})


def _require_one_code(folder: Path, known: Sequence[Facts]) -> None:
    """Raise UserError where results were made by several versions of the code, or nobody knows by which."""
    codes = {code: one.seed for one in known for code in one.codes}
    if len(codes) > 1:
        found = ", ".join(f"{code} (seed {seed})" for code, seed in codes.items())
        raise UserError(
            f"{folder}: its results were made by {len(codes)} versions of the code, {found}, and cannot be compared; "
            "delete the jobs of the older one below VALOR_HOME/experiments/jobs (their job.json names it) and run again"
        )


def _require_tables(folder: Path, known: Sequence[Facts]) -> None:
    """Raise where tables are not those that were collected: each that facts name, as it was, and no other."""
    digests = {name: digest for one in known for name, digest in one.tables.items()}
    for path in sorted(folder.glob("*.npz")):
        if path.name not in digests:
            raise UserError(f"{path}: no facts file says what made it; delete it, or run valor experiments again")
    for name, digest in digests.items():
        path = folder / name
        found = artifacts.digest_file(path) if path.is_file() else "missing"
        if found != digest:
            raise IntegrityError(
                f"{path}: sha256 is {found}, its facts file says {digest}; restore it, or run valor experiments again"
            )


def _table(path: Path) -> Table:
    """Return a collected table; one that cannot be read, or holds what is no number, is an IntegrityError."""
    try:
        table = results.load(path)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise IntegrityError(f"{path}: cannot be read ({error}); run valor experiments again") from None
    if not np.isfinite(table.values).all():
        raise IntegrityError(f"{path}: holds values that are not finite; run valor experiments again")
    return table


def _tables(folder: Path, name: str) -> dict[int, Table]:
    found = {}
    for path in sorted(folder.glob(f"{name}-*.npz")):
        number = path.stem.removeprefix(f"{name}-")
        if number.isdigit():
            found[int(number)] = _table(path)
    return found


def _curves(folder: Path, name: str) -> dict[int, dict[str, Table]]:
    found: dict[int, dict[str, Table]] = {}
    for path in sorted(folder.glob(f"curve-{name}-*_*.npz")):
        number, bias = path.stem.removeprefix(f"curve-{name}-").split("_")
        found.setdefault(int(number), {})[bias] = _table(path)
    return found
