"""What is frozen, held in bfloat16 while a stage trains under bfloat16's autocast.

Autocast casts a weight for each product that it takes part in, and remembers the copies of those that train: a frozen
weight is cast anew at every use, in generation once per token. Cast once and for all, it gives the same bits in half of
the memory. So only weights that enter products are: embeddings and norms, which autocast leaves alone, stay float32,
and so does an embedding that is the output layer too. The stage's artifact gets the parent's own float32 weights back.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from valor.models.loading import load_policy


def hold_in_bfloat16(model: Any, *, only: Collection[str] | None = None) -> frozenset[str]:
    """Cast the frozen weights of linear and convolutional layers in place.

    Args:
        model: a policy, with or without adapters, on any device.
        only: names to cast, whether frozen or not; None takes all that are frozen.

    Returns:
        The names of what was cast.
    """
    import torch

    products = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    elsewhere = {
        parameter
        for module in model.modules()
        if not isinstance(module, products)
        for parameter in module.parameters(recurse=False)
    }
    held = []
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            wanted = not parameter.requires_grad if only is None else name in only
            if wanted and isinstance(module, products) and parameter not in elsewhere:
                parameter.data = parameter.data.to(torch.bfloat16)
                held.append(name)
    return frozenset(held)


def restore(model: Any, parent: Path) -> None:
    """Give the frozen weights that were cast their values of the parent checkpoint back, in place and in float32."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    held = {name: parameter for name, parameter in base.named_parameters() if parameter.dtype == torch.bfloat16}
    if not held:
        return
    # Through a model, since names in files are not those of modules.
    own = dict(load_policy(parent, verify=False)[0].named_parameters())
    for name, parameter in held.items():
        before = own[name.replace(".base_layer.", ".").replace(".original_module.", ".")]
        parameter.data = before.data.to(parameter.device)
