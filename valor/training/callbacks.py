"""Callbacks of the training stages: progress and metrics out, checkpoints committed, the guard, a clean SIGTERM."""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback

from valor import progress
from valor.errors import GuardStop, Interrupted
from valor.recipe import Guards
from valor.training.guards import blind_spots, collapse, healthy, missed_silence
from valor.training.work import Work

log = logging.getLogger(__name__)

GRACE_S = 20.0
"""How long step and save may take after SIGTERM: Kubernetes kills 30 s after it unless told otherwise."""
if TYPE_CHECKING:
    from valor.training.launch import Team

_SHOWN = ("loss", "reward", "learning_rate")


class ReportProgress(TrainerCallback):
    """Sends what the trainer logs to the stage's MLflow run and to the progress events."""

    def __init__(self) -> None:
        self._shown: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Record one line of the log."""
        from valor.tracking.runs import log_metrics

        numbers = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
        self._shown |= {key: numbers[key] for key in _SHOWN if key in numbers}
        log_metrics({f"train/{key}": value for key, value in numbers.items()}, step=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report one optimizer step."""
        progress.report(state.global_step, state.max_steps, unit="steps", **self._shown)


class StopOnNan(TrainerCallback):
    """The guard of every stage: a loss or gradient that is no number will not become one again."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Stop at the first log line with a NaN or an infinity, before the checkpoint of that step."""
        for key in ("loss", "grad_norm"):
            value = (logs or {}).get(key)
            if isinstance(value, int | float) and not math.isfinite(value):
                raise GuardStop(
                    f"step {state.global_step}: {key} is {value}; lower trainer.learning_rate or check the rewards"
                )

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Stop before a checkpoint with broken weights is committed: steps since the last log line went unseen."""
        require_finite(model, step=state.global_step)


class StopOnCollapse(TrainerCallback):
    """The guards of the GRPO stages (`valor.training.guards`).

    Args:
        guards: limits.
        prompts: of an optimizer step.
        every: optimizer steps that learn from one generation.
    """

    def __init__(self, guards: Guards | None, *, prompts: float, every: int):
        self._guards, self._prompts, self._every = guards, prompts, every
        self._told = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what the guards will not see, now that epochs and shares of them have become steps."""
        if state.is_world_process_zero:
            beta = getattr(args, "beta", 0.0)
            for gap in blind_spots(
                self._guards, beta=beta, logging_steps=state.logging_steps, max_steps=state.max_steps
            ):
                log.info("%s", gap)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop at the log line that passes a limit, before the checkpoint of that step."""
        if self._guards is not None and not self._told and state.global_step >= self._guards.window:
            self._told = True
            gap = missed_silence(state.log_history, self._guards, prompts=self._prompts, every=self._every)
            if gap and state.is_world_process_zero:
                log.warning("%s", gap)
        verdict = collapse(state.log_history, self._guards, prompts=self._prompts, every=self._every)
        if verdict:
            raise GuardStop(f"step {state.global_step}: {verdict}")


def require_finite(model: Any, *, step: int) -> None:
    """Raise GuardStop if a trained parameter holds a NaN or an infinity."""
    name = broken_weight((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    if name is not None:
        raise GuardStop(
            f"step {step}: {name} holds a NaN or an infinity; lower trainer.learning_rate or check the rewards"
        )


def broken_weight(weights: Iterable[tuple[str, Any]]) -> str | None:
    """Return the name of the first of the named weights that holds a NaN or an infinity; None where all are numbers."""
    import torch

    return next((name for name, weight in weights if not torch.isfinite(weight).all()), None)


class CommitCheckpoints(TrainerCallback):
    """Makes the trainer's checkpoints count, at steps from which a resume is exact; the processes agree on the steps.

    After SIGTERM it finishes the step, saves, and leaves with `Interrupted`, if there is time (`sigterm`). That is an
    advantage and no need: after SIGKILL the stage continues from the last checkpoint.

    Args:
        work: the stage's work in progress.
        every: optimizer steps between two generations; between them TRL holds completions that no checkpoint keeps.
        told_to_end: set by SIGTERM (`sigterm`), or what stands for it in one of several processes.
        guards: say which checkpoints are good.
    """

    def __init__(self, work: Work, *, every: int, told_to_end: "threading.Event | Team", guards: Guards | None = None):
        self._work, self._every, self._told, self._guards = work, every, told_to_end, guards
        self._due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put a save off until the next step that a resume can start from; then stop if another process took over."""
        self._due = self._due or control.should_save or _any_process(self._told.is_set())
        ready = state.global_step % self._every == 0 or state.global_step >= state.max_steps
        control.should_save = self._due and ready
        self._due = self._due and not ready
        if control.should_save:
            # The other one's checkpoints have the same names in the same folder.
            self._work.require()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Commit what the trainer has just written, then leave if told to."""
        # Each process writes its generators' state; and nobody leaves, which ends the others, before it is committed.
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            self._work.commit(state.global_step, good=healthy(state.log_history, self._guards))
        if _any_process(self._told.is_set()) and state.global_step < state.max_steps:
            raise Interrupted(f"told to end at step {state.global_step} of {state.max_steps}; run again to continue")


class KeepEpochsOrder(TrainerCallback):
    """Tells a resumed sampler which epoch it is.

    The loader that skips an epoch's first batches wraps the sampler of several processes once more, and accelerate
    finds only its own samplers in there: one of VALOR's would repeat the first epoch's order. The whole loader, which
    shares the sampler, finds it.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        """Choose the epoch's order."""
        train_dataloader.set_epoch(int(state.epoch))


def _any_process(flag: bool) -> bool:
    """Tell whether the flag is set in any of the processes that train together; all of them get the same answer."""
    import torch

    state = PartialState()
    if state.num_processes == 1:
        return flag
    return bool(gather(torch.tensor([flag], device=state.device)).any())


@contextlib.contextmanager
def sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets while the block runs, in the main thread: no other may listen.

    A step may take longer than a cluster waits before it kills. So where the block has not ended GRACE_S after the
    signal, the process leaves as it would by SIGKILL, but with its exit code and a word in the log: the stage continues
    from its last committed checkpoint.
    """
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    timer = threading.Timer(GRACE_S, _leave)
    timer.daemon = True

    def listen(*_: Any) -> None:
        if not told.is_set():
            told.set()
            timer.start()

    before = signal.signal(signal.SIGTERM, listen)
    try:
        yield told
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def _leave() -> None:
    """End the process where it stands: its main thread may be in a kernel, or half through a save."""
    error = f"told to end, and the step took longer than {GRACE_S:g} s; run again to continue from the last checkpoint"
    log.warning(error)
    progress.emit("fail", exit_code=Interrupted.exit_code, error=error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(Interrupted.exit_code)
