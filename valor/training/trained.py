"""What a trainer checkpoint holds of a model: the parameters that train, and the digest of the checkpoint they change.

Whatever is frozen is already in the parent, which a stage loads and verifies before it continues, so of a large model
whose projector alone trains a checkpoint takes megabytes. The stage's artifact is complete all the same. Left out:
buffers, of which training changes none in the model families that VALOR trains.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from valor import artifacts
from valor.errors import IntegrityError

WEIGHTS = "trained.safetensors"
PARENT = "parent.json"


def save_trained(model: Any, path: Path, *, parent: str, state: Mapping[str, Any] | None = None) -> None:
    """Write the parameters of `model` that require gradients, under its own names for them.

    Args:
        model: the model in training.
        path: the checkpoint's directory.
        parent: digest of the checkpoint artifact that the frozen parameters are of.
        state: where the values are, if not in `model`: gathered from several devices.

    Raises:
        IntegrityError: `state` lacks a parameter that trains; the model's own would be one device's part of it.
    """
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    values = _trained(model)
    if state is not None:
        if missing := sorted(values.keys() - state.keys()):
            raise IntegrityError(f"{path}: gathered weights lack {len(missing)} that train, such as {missing[0]}")
        values = {name: state[name] for name in values}
    save_file({name: value.detach().cpu().contiguous() for name, value in values.items()}, path / WEIGHTS)
    artifacts.write_json(path / PARENT, {"parent": parent})


def load_trained(model: Any, path: Path, *, parent: str) -> None:
    """Put a checkpoint's parameters into a model whose other parameters are the parent's.

    Raises:
        IntegrityError: the checkpoint is of another parent, or of other parameters than those that train.
    """
    import torch
    from safetensors.torch import load_file

    found = artifacts.read_json(path / PARENT)["parent"]
    if found != parent:
        raise IntegrityError(f"{path}: made from checkpoint {found}, the parent is {parent}; delete it and run again")
    saved, trained = load_file(path / WEIGHTS), _trained(model)
    shapes = ({name: tuple(value.shape) for name, value in values.items()} for values in (saved, trained))
    if next(shapes) != next(shapes):
        raise IntegrityError(f"{path}: does not hold the weights that train; delete it and run again")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def _trained(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
