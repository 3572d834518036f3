"""What `valor experiments` does: the jobs of the chosen arms and seeds, then the page."""

import fcntl
from collections.abc import Sequence
from pathlib import Path

from valor.context import home
from valor.errors import Interrupted, UserError, ValorError

TEST_SEEDS = (51_001, 51_002, 51_003, 51_004, 51_005)
"""To be opened once, after every choice was made on other seeds. Those of earlier plans have been read: their results
lie in folders of their own, and choices may be made on them."""
RESULTS = Path(__file__).parents[2] / "docs" / "experiments"
"""Where results go unless told otherwise, and those of the test seeds always: their ledger is there."""


def listing() -> str:
    """Return the arms, a line each."""
    from pipelines.experiments.arms import ARMS

    return "\n".join(f"{name:15} {arm.seeds} seeds  {arm.title}: {arm.question}" for name, arm in ARMS.items())


def run_all(names: Sequence[str], *, seeds: Sequence[int], cores: int, folder: Path) -> Path:
    """Run the arms' jobs, collect their results in `folder` and write the page there.

    Raises:
        UserError: no such arm, or a folder that holds test seeds and others, or results of other code.
        Interrupted: told to end; there is no page.
        ValorError: a job failed; all that do not need it were run, and the page tells of it.
    """
    from pipelines.experiments import ledger, run
    from pipelines.experiments.arms import ARMS, Seed, curves
    from pipelines.experiments.collect import require_own
    from pipelines.experiments.jobs import with_ancestors

    asked = _asked(names, seeds)
    _keep_apart(folder, tuple(asked))
    require_own(folder)
    jobs = []
    for number, arms in asked.items():
        seed = Seed(number)
        # Queued before any reinforcement: whether there is headroom, and what a bias alone gives.
        jobs += [ARMS["sft"].reports(seed), seed.probe(), curves(seed)["sft"]] if "sft" in arms else []
        jobs += [ARMS[name].reports(seed) for name in arms]
        jobs += [job for name, job in curves(seed).items() if name in arms]
        jobs += [seed.signal()] if "truth" in arms else []
    ledger.append(folder, tuple(asked))
    failure: ValorError | None = None
    try:
        run.run(with_ancestors(jobs), root=_root(), cores=cores)
    except Interrupted:
        raise
    except ValorError as error:
        # An arm that collapses is a result too; the others' must not wait for it.
        failure = error
    try:
        return collect_all(names, seeds=seeds, folder=folder)
    finally:
        if failure is not None:
            raise failure


def collect_all(names: Sequence[str], *, seeds: Sequence[int], folder: Path) -> Path:
    """Collect in `folder` what is finished so far, and write the page there.

    Raises:
        UserError: no such arm, a folder that holds test seeds and others or results of other code, or nothing is
            finished.
    """
    from pipelines.experiments.collect import collect, require_own

    asked = _asked(names, seeds)
    _keep_apart(folder, tuple(asked))
    require_own(folder)
    _root().mkdir(parents=True, exist_ok=True)
    # Experiments that run side by side have one page, which none may read while another's tables are half there.
    with (_root() / "collect.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        collect(_root(), folder, asked=asked)
        return document(folder)


def _asked(names: Sequence[str], seeds: Sequence[int]) -> dict[int, list[str]]:
    """Return the arms to run by seed; raise UserError for an unknown one."""
    from pipelines.experiments.arms import ARMS

    for name in names:
        if name not in ARMS:
            raise UserError(f"--arm {name}: no such arm; there are {', '.join(ARMS)}")
    # An arm of few seeds takes the first ones; seeds that were asked for by name are all taken.
    return {
        number: [name for name in names or ARMS if seeds or place < ARMS[name].seeds]
        for place, number in enumerate(tuple(seeds) or TEST_SEEDS)
    }


def _root() -> Path:
    return home() / "experiments"


def _keep_apart(folder: Path, seeds: Sequence[int]) -> None:
    """Refuse a folder where test seeds would stand beside seeds that choices were made on, or be opened unseen."""
    from pipelines.experiments.collect import facts_paths

    every = set(facts_paths(folder)) | set(seeds)
    if every & set(TEST_SEEDS) and not every <= set(TEST_SEEDS):
        others = ", ".join(str(seed) for seed in sorted(every - set(TEST_SEEDS)))
        raise UserError(
            f"--results {folder}: test seeds and seed {others} would stand on one page; choose another folder for the "
            "latter"
        )
    if set(seeds) & set(TEST_SEEDS) and folder.resolve() != RESULTS.resolve():
        raise UserError(f"--results {folder}: test seeds are opened in {RESULTS} alone, where their ledger is")


def document(folder: Path) -> Path:
    """Write the page again.

    Raises:
        UserError: there are no results, or such as cannot stand on one page.
    """
    from pipelines.experiments.document import write

    return write(folder)
