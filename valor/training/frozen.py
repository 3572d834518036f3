"""What is frozen, held in bfloat16 while a stage trains under bfloat16's autocast.

Autocast casts a weight for each product that it takes part in, and remembers the copies of those that train: a frozen
weight is cast anew at every use, in generation once per token. Cast once and for all, it gives the same bits in half of
the memory. So only weights that enter products are: embeddings and norms, which autocast leaves alone, stay float32,
and so does an embedding that is the output layer too. The stage's artifact gets the parent's own float32 weights back.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from valor.errors import IntegrityError
from valor.models.loading import load_policy


def can_hold(arguments: Any, *, strategy: str) -> bool:
    """Tell whether a stage's frozen weights may be cast.

    Left out: sharded weights, which want one dtype; vLLM, for which TRL merges adapters into the weights and takes them
    out again at each step, with a loss in bfloat16; an output layer that TRL is told to compute in float32.
    """
    in_float32 = getattr(arguments, "use_vllm", False) or getattr(arguments, "cast_lm_head_to_fp32", False)
    return arguments.bf16 and strategy == "ddp" and not in_float32


def hold_in_bfloat16(model: Any) -> frozenset[str]:
    """Cast the frozen weights of a policy's linear and convolutional layers in place, and return their names."""
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
            if isinstance(module, products) and not parameter.requires_grad and parameter not in elsewhere:
                parameter.data = parameter.data.to(torch.bfloat16)
                held.append(name)
    return frozenset(held)


def restore(model: Any, parent: Path, held: Collection[str]) -> None:
    """Give the weights that `hold_in_bfloat16` has cast the parent checkpoint's values back, in place and in float32.

    Raises:
        IntegrityError: the parent lacks one.
    """
    # Through a model, since names in files are not those of modules.
    own = dict(load_policy(parent, verify=False)[0].named_parameters())
    for name, parameter in model.named_parameters():
        if name in held:
            # What peft puts before and into a name.
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            plain = plain.replace(".original_module.", ".")
            if plain not in own:
                raise IntegrityError(f"{parent}: has no {plain}, which was frozen in training")
            parameter.data = own[plain].data.to(parameter.device)
