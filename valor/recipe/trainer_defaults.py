"""What VALOR sets in TRL's configs where a recipe says nothing.

TRL's defaults are not textbook GRPO (`loss_type="dapo"`, `beta=0`, bf16 wherever it runs), so the fields that define
the algorithm are set here and recorded with every checkpoint. None of these are the paper's values, which are not
public.
"""

from typing import Any

SFT_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-5,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "completion_only_loss": True,
    "include_num_input_tokens_seen": "non_padding",
}
GRPO_DEFAULTS: dict[str, Any] = {
    "loss_type": "grpo",
    "beta": 0.0,
    "learning_rate": 1e-6,
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "temperature": 1.0,
    "scale_rewards": "group",
    "logging_steps": 1,
}
VISION_DEFAULTS: dict[str, Any] = {**GRPO_DEFAULTS, "learning_rate": 1e-5}
