"""Which parts of a vision-language model train: language model and projector, or the latter alone; never the tower."""

from typing import Any

from valor.errors import UserError
from valor.recipe import Lora
from valor.training.lora import lora_config


def choose_trained(model: Any, *, projector_only: bool) -> None:
    """Freeze the vision tower, and with `projector_only` everything but the projector.

    Raises:
        UserError: the model has no projector that VALOR knows.
    """
    tower, projector = _vision_parts(model)
    model.requires_grad_(not projector_only)
    tower.requires_grad_(False)
    projector.requires_grad_(True)


def adapters(model: Any, lora: Lora | None) -> Any:
    """Return the peft configuration that a stage's trainer takes, None without LoRA."""
    return lora_config(model, lora, projector=_vision_parts(model)[1])


def _vision_parts(model: Any) -> tuple[Any, Any]:
    """Return the vision tower and the projector behind it, which may be a part of it."""
    inner = model.model
    if hasattr(inner, "vision_tower") and hasattr(inner, "multi_modal_projector"):
        return inner.vision_tower, inner.multi_modal_projector
    if hasattr(inner, "visual") and hasattr(inner.visual, "merger"):
        return inner.visual, inner.visual.merger
    raise UserError(f"{type(model).__name__}: has no vision projector that VALOR knows (LLaVA or Qwen-VL families)")


def count_trained(model: Any) -> int:
    """Return how many parameters train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
