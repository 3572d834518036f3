"""What the three training stages share: identity, seeds, freezing, resume, the checkpoint artifact, the numbers.

A stage says which parts train and builds its trainer; everything else happens here, in this order: hold the work in
progress, load the parent, freeze, attach what spares work (the tower's memo, shared prompts), hold what is frozen in
bfloat16, resume or begin, train, give the frozen weights back, merge adapters, write the checkpoint artifact.
"""

import contextlib
import errno
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from valor import artifacts
from valor.context import Context, home
from valor.errors import Interrupted, ResourceError, UserError
from valor.recipe import Guards, TrainStage
from valor.training import launch, outcome
from valor.training.frozen import can_hold, hold_in_bfloat16, restore
from valor.training.lora import merge_adapters
from valor.training.memo import TowerMemo
from valor.training.parts import count_trained
from valor.training.policy import Policy, open_policy
from valor.training.processes import name_layers_to_shard
from valor.training.work import Work, open_work

log = logging.getLogger(__name__)

_CODE = (
    "training", "rewards", "metrics", "clinical", "models", "data/manifest.py", "recipe/trainer_defaults.py",
    "stages/{stage}.py",
)  # fmt: skip
"""Packages and modules of valor that a stage's weights depend on; its settings are in the identity by value."""
_LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "tokenizers")
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def train(
    stage: str,
    settings: TrainStage,
    *,
    dataset: Path,
    parents: Mapping[str, Path],
    checkpoint: Path,
    context: Context,
    projector_only: bool,
    build: Callable[[Policy], Any],
) -> tuple[dict[str, float], Callable[[], None]]:
    """Run a training stage from its parent checkpoint to its own.

    Args:
        stage: the stage's name.
        settings: its section of the recipe.
        dataset: the dataset artifact.
        parents: artifact directories by name; the first is the checkpoint to start from.
        checkpoint: the directory to make.
        context: where the work in progress lies, and the pipeline run's id.
        projector_only: train the vision projector alone; else all but the vision tower.
        build: makes the trainer.

    Returns:
        The stage's metrics, and what removes the work in progress: to be called once the artifact is stamped.

    Raises:
        UserError: impossible settings, or another process works on this very stage.
        IntegrityError: a weight of the parent is no number, or a merged adapter changed what the model says.
        GuardStop: the loss or a trained parameter became NaN, or the policy collapsed.
        ResourceError: out of memory or disk.
        ServiceError: another process has taken the work over.
        Interrupted: SIGTERM, or the trainer stopped before its last step; run again to continue.
    """
    from valor.training.callbacks import require_finite

    digests = {name: artifacts.read_stamp(path)["digest"] for name, path in {"dataset": dataset, **parents}.items()}
    identity = {
        "stage": stage,
        "inputs": digests,
        "settings": settings.model_dump(mode="json"),
        "code": artifacts.digest_code([part.format(stage=stage) for part in _CODE], _LIBRARIES),
    }
    work_root = context.work_root or str(home() / "work")
    if launch.team() is None and settings.processes * settings.nodes > 1:
        inputs = {"dataset": dataset, **parents}
        return launch.train(
            stage, settings, identity=identity, inputs=inputs, checkpoint=checkpoint, context=context,
            work_root=work_root,
        )  # fmt: skip
    with (
        _held(work_root, identity=identity, pipeline_run=context.pipeline_run) as (work, told_to_end),
        _deterministic(settings.seed),
        _out_of_memory_is_a_resource_error(stage, settings, projector_only=projector_only),
        artifacts.full_disk_is_a_resource_error(work.scratch),
        warnings.catch_warnings(),
    ):
        # transformers and TRL warn about each other's old names at every step.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
        start = time.monotonic()
        parent = next(iter(parents.values()))
        policy, speedups = open_policy(
            stage, settings, dataset=dataset, parent=parent, output_dir=work.scratch, projector_only=projector_only
        )
        total = sum(parameter.numel() for parameter in policy.model.parameters())
        trainer = _build(build, policy)
        holds = can_hold(trainer.args, strategy=settings.strategy)
        held = hold_in_bfloat16(trainer.model) if holds else frozenset()
        if (reference := getattr(trainer, "ref_model", None)) is not None:
            reference.requires_grad_(requires_grad=False)
            if memo := TowerMemo.attach(reference):
                speedups.append(memo)
            if holds:
                hold_in_bfloat16(reference)
        trainer.parent = digests[next(iter(parents))]
        trained = {"trained": count_trained(trainer.model), "total": total}
        name_layers_to_shard(trainer)
        _add_callbacks(trainer, work, told_to_end, guards=getattr(settings, "guards", None))
        resume = _latest(trainer, work)
        if resume is not None:
            log.info("%s: continuing from %s", stage, resume.name)
        if resume is None or not _restore_finished(trainer, resume):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            _require_last_step(stage, trainer.state)
        for speedup in speedups:
            speedup.detach()
        metrics = outcome.metrics(trainer, trained=trained, seconds=time.monotonic() - start, resume=resume)
        # Steps behind the last log line and the last save went unseen.
        require_finite(trainer.model, step=trainer.state.global_step)
        if trainer.is_world_process_zero():
            if held:
                # What was cast needs the room that optimizer and gradients have taken.
                trainer.optimizer = None
                trainer.model.zero_grad(set_to_none=True)
                trainer.accelerator.free_memory()
                restore(trainer.model, parent, held)
            merge_adapters(trainer.model, policy.processor, policy.studies, prompt=policy.prompt)
        # Who has taken over writes the same artifact at the same place.
        work.require()
        outcome.write(trainer, policy, checkpoint, stage=stage, settings=settings, digests=digests, trained=trained)
    return metrics, work.remove


@contextlib.contextmanager
def _held(work_root: str, *, identity: dict[str, Any], pipeline_run: str) -> Iterator[tuple[Work, Any]]:
    """Hold the work in progress and listen for SIGTERM; for one of several processes its parent does both."""
    from valor.training.callbacks import sigterm

    team = launch.team()
    if team is not None:
        yield team.work, team
        return
    with open_work(work_root, identity=identity, pipeline_run=pipeline_run) as work, sigterm() as told_to_end:
        yield work, told_to_end


def _build(build: Callable[[Policy], Any], policy: Policy) -> Any:
    """Build the trainer; TRL complains about settings with ValueError, a damaged file with a kind of it."""
    from transformers import PrinterCallback

    try:
        trainer = build(policy)
    except (json.JSONDecodeError, UnicodeError):
        raise
    except ValueError as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _add_callbacks(trainer: Any, work: Any, told_to_end: Any, *, guards: Guards | None) -> None:
    from valor.training.arguments import prompts_per_step, steps_between_saves
    from valor.training.callbacks import (
        CommitCheckpoints,
        KeepEpochsOrder,
        ReportProgress,
        StopOnCollapse,
        StopOnNan,
    )

    every = steps_between_saves(trainer.args)
    # Before the guards, which end the stage in the midst of a line: the line that showed it is the one to look at.
    if trainer.is_world_process_zero():
        trainer.add_callback(ReportProgress())
    trainer.add_callback(StopOnNan())
    trainer.add_callback(StopOnCollapse(guards, prompts=prompts_per_step(trainer.args), every=every))
    trainer.add_callback(KeepEpochsOrder())
    trainer.add_callback(CommitCheckpoints(work, every=every, told_to_end=told_to_end, guards=guards))


def _latest(trainer: Any, work: Work) -> Path | None:
    """Return the checkpoint to continue from; the first of several processes looks for all of them."""
    from accelerate.utils import broadcast_object_list

    found = [work.latest() if trainer.is_world_process_zero() else None]
    return broadcast_object_list(found)[0]


def _restore_finished(trainer: Any, resume: Path) -> bool:
    """Restore weights and state from a checkpoint of the last step; return False for one of any other.

    transformers would train a step more than there are.
    """
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    trainer._load_from_checkpoint(str(resume))
    trainer.state = state
    return True


def _require_last_step(stage: str, state: Any) -> None:
    """Raise where the trainer returned before its last step: half a training is no artifact, nor is none.

    Raises:
        UserError: it took no step, and would take none if it ran again.
        Interrupted: it stopped on the way.
    """
    if state.global_step == 0:
        raise UserError(
            f"{stage}: trained for 0 of {state.max_steps} steps: the data fill no batch; use more studies, lower "
            "trainer.per_device_train_batch_size, or remove trainer.dataloader_drop_last"
        )
    if state.global_step < state.max_steps:
        raise Interrupted(
            f"{stage}: the trainer stopped at step {state.global_step} of {state.max_steps} without a word; run again "
            "to continue from the last checkpoint"
        )


@contextlib.contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Seed every generator and, on a CPU, choose deterministic kernels (there they cost nothing)."""
    import torch
    from transformers import set_seed

    set_seed(seed)
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def _out_of_memory_is_a_resource_error(stage: str, settings: TrainStage, *, projector_only: bool) -> Iterator[None]:
    """Turn an exhausted device or host memory into an error that names the settings to change."""
    import torch

    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        # An exhausted host shows as a RuntimeError of torch's allocator, a device that others have filled as one of
        # CUDA's own; every other RuntimeError, of whichever kind, is another fault.
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            isinstance(error, OSError) and error.errno == errno.ENOMEM
        )
        if not is_memory and not any(words in str(error) for words in _NO_MEMORY):
            raise
        checkpoints = settings.trainer.get("activation_checkpointing", torch.cuda.is_available())
        could = {
            "trainer.activation_checkpointing: true": not checkpoints,
            "dtype: bfloat16": settings.dtype == "float32",
            "lora: {}": not projector_only and settings.strategy == "ddp" and settings.lora is None,  # type: ignore[attr-defined]
        }
        more = ", ".join(setting for setting, helps in could.items() if helps)
        raise ResourceError(
            f"{stage}: out of memory; lower {stage}.trainer.per_device_train_batch_size (and raise "
            f"gradient_accumulation_steps)" + (f", or set {more}" if more else "")
        ) from error
