"""What a finished trainer leaves: the checkpoint artifact and the stage's numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valor import artifacts
from valor.models.loading import save_policy
from valor.recipe import TrainStage
from valor.training.memo import is_sharded

if TYPE_CHECKING:
    from valor.training.policy import Policy

_HISTORY_POINTS = 60


def write(
    trainer: Any,
    policy: "Policy",
    checkpoint: Path,
    *,
    stage: str,
    settings: TrainStage,
    digests: Mapping[str, str],
    trained: Mapping[str, int],
) -> None:
    """Write the checkpoint artifact, whole or not at all; the first of several processes does it for all."""
    from valor.training.arguments import effective

    weights = _gathered_weights(trainer)
    if not trainer.is_world_process_zero():
        return
    parents = {name: digest for name, digest in digests.items() if name != "dataset"}
    with artifacts.atomic_dir(checkpoint) as folder:
        save_policy(
            policy.model,
            policy.processor,
            folder,
            stage=stage,
            parents=parents,
            prompt=policy.prompt,
            weights=weights,
            dataset_digest=digests["dataset"],
            settings=settings.model_dump(mode="json"),
            trainer=effective(trainer.args),
            trained_parameters=dict(trained),
            studies=len(policy.studies),
            history=_history(trainer.state.log_history),
        )


def _gathered_weights(trainer: Any) -> dict[str, Any] | None:
    """Return the whole weights, on the first process at least, where each holds a share; None where each holds all."""
    if not is_sharded(trainer.model):
        return None
    # DeepSpeed gives the whole to the first process and None to the others.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    # Gathered, a tied weight is a second tensor of the same content.
    return {name: weight for name, weight in weights.items() if name not in trainer.model.all_tied_weights_keys}


def metrics(trainer: Any, *, trained: Mapping[str, int], seconds: float, resume: Path | None) -> dict[str, float]:
    """Return the stage's numbers: what it cost, and first and last values of what it logged."""
    state = trainer.state
    found = {
        "steps": float(state.global_step),
        "seconds": seconds,
        "tokens": float(state.num_input_tokens_seen),
        "trained_parameters": float(trained["trained"]),
        "resumed_from_step": float(resume.name.removeprefix("checkpoint-")) if resume else 0.0,
    }
    lines = [line for line in state.log_history if "loss" in line]
    names = [key for key in lines[0] if key in ("loss", "reward") or key.startswith("rewards/")] if lines else []
    tenth = max(1, len(lines) // 10)
    for name in names:
        values = [line[name] for line in lines if isinstance(line.get(name), int | float)]
        short = name.removesuffix("/mean")
        if values and not name.endswith("/std"):
            found[f"{short}_first"] = sum(values[:tenth]) / len(values[:tenth])
            found[f"{short}_last"] = sum(values[-tenth:]) / len(values[-tenth:])
    return found


def _history(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the training log, thinned to at most `_HISTORY_POINTS` lines that include the last."""
    lines = [dict(line) for line in log_history if "loss" in line]
    stride = max(1, -(-len(lines) // _HISTORY_POINTS))
    return lines[::-1][::stride][::-1]
