"""LoRA on the language model (arXiv 2106.09685), with peft: which modules it adapts, and the way back to one model.

The projections of the language model get adapters. The projector trains as a whole, as a copy that peft keeps beside
the original (`modules_to_save`): TRL's reference for the KL term is the model with its adapters turned off, and so sees
the parent's projector too. The vision tower stays as it is, which `target_modules="all-linear"` would not leave it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from valor.data.manifest import Study
from valor.errors import IntegrityError, UserError
from valor.models.loading import model_pixels, question
from valor.recipe import Lora

TOLERANCE = 1e-3
"""Of the largest logit: more no merge may change."""
_NOISE = 1e-4
"""Of the largest logit: float32 sums in another order, over the depth of a large model."""
_STUDIES = 4


def lora_config(model: Any, settings: Lora | None, *, projector: Any) -> Any:
    """Return peft's LoraConfig for a policy, None without settings.

    Args:
        model: the policy, an image-text-to-text model.
        settings: rank, scale and dropout.
        projector: the module of `model` that trains as a whole.

    Raises:
        UserError: the model keeps its language model where VALOR does not look.
    """
    if settings is None:
        return None
    import re

    import torch
    from peft import LoraConfig

    names = {module: name for name, module in model.named_modules()}
    language_model = getattr(model.model, "language_model", None)
    if language_model is None:
        raise UserError(f"lora: {type(model).__name__} has no `model.language_model`; train it without lora")
    kinds = {
        name.split(".")[-1] for name, module in language_model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf"{re.escape(names[language_model])}\..*\.(?:{'|'.join(sorted(kinds))})",
        modules_to_save=[names[projector]],
    )


def merge_adapters(model: Any, processor: Any, studies: Sequence[Study], *, prompt: str) -> None:
    """Merge a peft model into its base model, in place, and check on real studies that it still says the same.

    Args:
        model: the peft model; unusable afterwards. Any other model is left alone.
        processor: the policy's.
        studies: the first few are read, images and reports.
        prompt: the policy's.

    Raises:
        IntegrityError: the merged model's logits are not the adapted model's: they differ by more than `TOLERANCE`, or
            a tenth of what the adapters change, though never less than `_NOISE`.
    """
    if not hasattr(model, "merge_and_unload"):
        return
    import torch
    from peft.helpers import rescale_adapter_scale

    some = studies[:_STUDIES]
    text = question(processor, prompt)
    batch = processor(
        text=[text + study.text for study in some],
        images=[model_pixels(study, processor) for study in some],
        return_tensors="pt",
        padding=True,
    ).to(model.device)
    # Not the peft model's own forward: accelerate has put bfloat16's autocast around that one.
    base = model.get_base_model().eval()
    with torch.no_grad(), _full_precision():
        adapted = base(**batch).logits
        with rescale_adapter_scale(model, 0.0):
            effect = base(**batch).logits.sub_(adapted).abs_().max().item()
        model.merge_and_unload()
        difference = base(**batch).logits.sub_(adapted).abs_().max().item()
    scale = adapted.abs_().max().item()
    # Adapters that do little could get lost within a tolerance of the logits alone.
    allowed = min(TOLERANCE * scale, max(effect / 10, _NOISE * scale))
    # Not "greater than": a NaN must not pass.
    if not difference <= allowed:
        raise IntegrityError(
            f"lora: merged into the weights, logits differ by {difference:.2g} from those with adapters, more than "
            f"{allowed:.2g} (the largest is {scale:.2g}, the adapters change them by {effect:.2g}); train this model "
            "without lora"
        )


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply float32 as such: with TF32 on, merged weights are not the sum of their products."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
