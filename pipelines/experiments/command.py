"""What `valor experiments` does: the jobs of the chosen arms and seeds, then the page."""

from collections.abc import Sequence
from pathlib import Path

from valor.context import home
from valor.errors import Interrupted, UserError, ValorError

TEST_SEEDS = (48_001, 48_002, 48_003, 48_004, 48_005)
"""Opened once, after every choice was made on other seeds."""


def listing() -> str:
    """Return the arms, a line each."""
    from pipelines.experiments.arms import ARMS

    return "\n".join(f"{name:15} {arm.seeds} seeds  {arm.title}: {arm.question}" for name, arm in ARMS.items())


def run_all(names: Sequence[str], *, seeds: Sequence[int], cores: int, folder: Path) -> Path:
    """Run the arms' jobs, collect their results in `folder` and write the page there.

    Raises:
        UserError: no such arm, or a folder that holds test seeds and others.
        Interrupted: told to end; there is no page.
        ValorError: a job failed; all that do not need it were run, and the page tells of it.
    """
    from pipelines.experiments import ledger, run
    from pipelines.experiments.arms import ARMS, Seed
    from pipelines.experiments.collect import CURVES, collect
    from pipelines.experiments.document import PAGE, write
    from pipelines.experiments.jobs import with_ancestors

    for name in names:
        if name not in ARMS:
            raise UserError(f"--arm {name}: no such arm; there are {', '.join(ARMS)}")
    chosen = names or tuple(ARMS)
    numbers = tuple(seeds) or TEST_SEEDS
    _keep_apart(folder, numbers)
    jobs, asked = [], {}
    for place, number in enumerate(numbers):
        seed = Seed(number)
        # An arm of few seeds takes the first ones; seeds that were asked for by name are all taken.
        asked[number] = [name for name in chosen if seeds or place < ARMS[name].seeds]
        jobs += [ARMS[name].reports(seed) for name in asked[number]]
        jobs += [seed.curve(ARMS[name].reports(seed).inputs["checkpoint"]) for name in CURVES if name in chosen]
        jobs += [seed.probe()] if "sft" in chosen else []
        jobs += [seed.signal()] if "truth" in chosen and (seeds or place < ARMS["truth"].seeds) else []
    root = home() / "experiments"
    ledger.append(folder, numbers)
    failure: ValorError | None = None
    try:
        run.run(with_ancestors(jobs), root=root, cores=cores)
    except Interrupted:
        raise
    except ValorError as error:
        # An arm that collapses is a result too; the others' must not wait for it.
        failure = error
    try:
        collect(root, folder, asked=asked)
        if failure is None or any(folder.glob("*.npz")):
            write(folder)
    finally:
        if failure is not None:
            raise failure
    return folder / PAGE


def _keep_apart(folder: Path, seeds: Sequence[int]) -> None:
    """Refuse a folder in which seeds that choices were made on would stand beside those opened after them."""
    there = {int(path.stem.removeprefix("facts-")) for path in folder.glob("facts-*.json")}
    every = there | set(seeds)
    if every & set(TEST_SEEDS) and not every <= set(TEST_SEEDS):
        others = ", ".join(str(seed) for seed in sorted(every - set(TEST_SEEDS)))
        raise UserError(
            f"--results {folder}: test seeds and seed {others} would stand on one page; choose another folder for the "
            "latter"
        )


def document(folder: Path) -> Path:
    """Write the page again.

    Raises:
        UserError: there are no results, or such as cannot stand on one page.
    """
    from pipelines.experiments.document import write

    return write(folder)
