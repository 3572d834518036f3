"""What `valor experiments` does: the jobs of the chosen arms and seeds, then the page."""

from collections.abc import Sequence
from pathlib import Path

from valor.context import home
from valor.errors import UserError

TEST_SEEDS = (47_001, 47_002, 47_003, 47_004, 47_005)
"""Opened once, after every choice was made on other seeds."""
_CURVES = ("sft", "continued")


def listing() -> str:
    """Return the arms, a line each."""
    from pipelines.experiments.arms import ARMS

    return "\n".join(f"{name:15} {arm.seeds} seeds  {arm.title}: {arm.question}" for name, arm in ARMS.items())


def run_all(names: Sequence[str], *, seeds: Sequence[int], cores: int, folder: Path) -> Path:
    """Run the arms' jobs, collect their results in `folder` and write the page there.

    Raises:
        UserError: no such arm.
        ValorError: a job failed; all that do not need it were run, and the page tells of it.
    """
    from pipelines.experiments import run
    from pipelines.experiments.arms import ARMS, Seed
    from pipelines.experiments.document import BASELINE, PAGE, collect, write
    from pipelines.experiments.jobs import with_ancestors

    for name in names:
        if name not in ARMS:
            raise UserError(f"--arm {name}: no such arm; there are {', '.join(ARMS)}")
    chosen = names or tuple(ARMS)
    numbers = tuple(seeds) or TEST_SEEDS
    jobs = []
    for place, number in enumerate(numbers):
        seed = Seed(number)
        # An arm of few seeds takes the first ones; seeds that were asked for by name are all taken.
        jobs += [ARMS[name].reports(seed) for name in chosen if seeds or place < ARMS[name].seeds]
        if set(_CURVES) <= set(chosen):
            jobs += [seed.probe(), seed.curve(seed.sft), seed.curve(seed.continued())]
    root = home() / "experiments"
    try:
        run.run(with_ancestors(jobs), root=root, cores=cores)
    finally:
        # An arm that collapses is a result too; the others' must not wait for it.
        collect(root, folder, seeds=numbers)
        if any(folder.glob(f"{BASELINE}-*.npz")):
            write(folder)
    return folder / PAGE


def document(folder: Path) -> Path:
    """Write the page again.

    Raises:
        UserError: there are no results.
    """
    from pipelines.experiments.document import write

    if not any(folder.glob("continued-*.npz")):
        raise UserError(f"{folder}: holds no results; run valor experiments first")
    return write(folder)
