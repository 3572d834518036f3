"""Which fields of a trainer are the recipe's to set, and the values that each may take."""

import difflib
import json
import math
from typing import Any

from valor.errors import UserError, shown
from valor.recipe.trainer_defaults import GRPO_DEFAULTS, SFT_DEFAULTS, VISION_DEFAULTS
from valor.recipe.trainer_fields import PATH

TRAINER_CLASS = {"sft": "SFTConfig", "grpo_text": "GRPOConfig", "grpo_vision": "GRPOConfig"}
_DEFAULTS = {"sft": SFT_DEFAULTS, "grpo_text": GRPO_DEFAULTS, "grpo_vision": VISION_DEFAULTS}
_OWNED_BY_VALOR = {
    "output_dir": "the stage's work directory",
    "seed": "the recipe's seed",
    "data_seed": "the recipe's seed",
    "report_to": "VALOR's own tracking",
    "run_name": "VALOR's own tracking",
    "resume_from_checkpoint": "work_root",
    "reward_weights": "grpo_text.rewards",
    "max_completion_length": "max_new_tokens",
    "max_length": "the model: image tokens must not be cut",
    "remove_unused_columns": "the stage: rewards and collators read every column",
    "save_only_model": "the stage: a stopped run resumes from optimizer and scheduler too",
    "save_total_limit": "the stage: an old checkpoint goes once a newer one is committed",
    "bf16": "the stage's dtype",
    "fp16": "the stage's dtype (float32 or bfloat16: float16 overflows at first, which the guards take for a collapse)",
    "deepspeed": "the stage's strategy",
    "fsdp": "the stage's strategy",
    "fsdp_config": "the stage's strategy",
    "parallelism_config": "the stage's processes, nodes and strategy",
}
"""Trainer fields that a recipe cannot set, and what sets them."""
_PUBLISHING = {
    ("log_completions", "log_multimodal", "log_unique_prompts", "num_completions_to_print"): (
        "it would write prompts, reports or images to the log"
    ),
    ("hub_", "push_to_hub"): "it would send the model to a hub; models go to the model store",
    ("trackio_", "wandb_", "project", "logging_dir"): "it belongs to another tracker; VALOR tracks with MLflow alone",
    ("vllm_server_",): "it would send prompts and images to another server",
}
"""Beginnings of trainer fields that could carry text, images or models out, and why each is refused."""
_REFUSED = {
    "enable_jit_checkpoint": (
        "it takes SIGTERM from VALOR, which saves and leaves by itself, and ends a training as if it were done"
    ),
    "sync_ref_model": "the synced reference is not in checkpoints, so a resumed stage would be another training",
    "ignore_data_skip": "a resumed stage would begin its epoch anew, which is another training",
    "auto_find_batch_size": (
        "it would train with another batch than the recipe's where memory runs out; lower per_device_train_batch_size"
    ),
    "logging_nan_inf_filter": "it would hide a loss that is no number, which ends a stage",
    "trust_remote_code": "it would run code that comes with the model",
    "model_init_kwargs": "VALOR loads the model (the stage's dtype is its setting), so TRL would ignore it",
    **dict.fromkeys(
        ("use_transformers_continuous_batching", "use_transformers_paged"), "TRL has it for models without images alone"
    ),
    "use_liger_kernel": "VALOR does not install its kernels, and shared prompts would go past them",
    **dict.fromkeys(("do_eval", "do_predict", "eval_on_start", "eval_strategy"), "no stage evaluates while it trains"),
    "load_best_model_at_end": "no stage evaluates, so none would be the best",
    "accelerator_config": "it would deal batches to processes in another way than the recipe says",
    **dict.fromkeys(
        ("chat_template_path", "eos_token", "pad_token"), "these are the model's own, in training as when it serves"
    ),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), "VALOR teaches the report alone"),
    **dict.fromkeys(("packing", "eval_packing", "padding_free"), "TRL packs no rows that hold images"),
    "optim_args": "it is read once the models are loaded; learning_rate, weight_decay and adam_* say the same",
    "optim_target_modules": "it belongs to optimizers whose packages VALOR does not install",
    "debug": "it would write statistics of every tensor to the log; a loss or weight that is no number stops a stage",
    **dict.fromkeys(
        ("ref_model_mixup_alpha", "ref_model_sync_steps", "liger_kernel_config", "packing_strategy", "truncation_mode"),
        "it belongs to what no stage does",
    ),
}
"""Trainer fields that would undo what VALOR promises of every stage, and how."""
_IN_FORCE = {"completion_only_loss": (True, None)}
"""Values of refused fields that ask for nothing new; of the others these are null and false."""
_MOST = 2**31 - 1
"""Above any number that a training could mean, and below those that torch cannot hold."""
_TINY = 5e-324
"""The smallest number above 0: as a lower bound it keeps 0 out."""
_BELOW_1 = math.nextafter(1, 0)
_AT_LEAST_1 = (
    "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_generations", "num_generations_eval", "num_iterations", "steps_per_generation", "generation_batch_size",
    "pad_to_multiple_of", "torch_empty_cache_steps", "dataloader_prefetch_factor", "vllm_tensor_parallel_size",
    "vllm_max_model_length",
)  # fmt: skip
_AT_LEAST_0 = (
    "dataloader_num_workers", "top_k", "warmup_steps", "weight_decay", "adam_epsilon", "max_grad_norm",
    "neftune_noise_alpha", "beta", "epsilon", "epsilon_high",
)  # fmt: skip
_ABOVE_0 = ("save_steps", "logging_steps", "temperature", "repetition_penalty", "delta")
_NUMBERS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_AT_LEAST_1, (1, _MOST)),
    **dict.fromkeys(_AT_LEAST_0, (0, _MOST)),
    **dict.fromkeys(_ABOVE_0, (_TINY, _MOST)),
    "learning_rate": (0, 10),
    "num_train_epochs": (_TINY, 1_000_000),
    "adam_beta1": (0, _BELOW_1),
    "adam_beta2": (0, _BELOW_1),
    "label_smoothing_factor": (0, 1),
    "top_p": (_TINY, 1),
    "min_p": (0, 1),
    "top_entropy_quantile": (0, 1),
    "vllm_gpu_memory_utilization": (_TINY, 1),
}
"""Trainer fields whose value a recipe most often gets wrong, and their bounds, both included; the libraries fail on
them late and without their name, or not at all. Steps of warm-up, saves and log lines may be fractions of the training.
"""
_SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "constant_with_warmup": (),
    "linear": (),
    "inverse_sqrt": ("timescale",),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
}
"""Schedules of the learning rate, each with what `lr_scheduler_kwargs` may hold."""
_LEVELS = ("debug", "info", "warning", "error", "critical", "passive", "detail")
_CHOICES: dict[str, tuple[str | bool, ...]] = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    # Not "best": no stage evaluates, so nothing would be saved. Not "epoch": a generation may end within the next one.
    "save_strategy": ("steps", "no"),
    # The guards look at log lines, and the first of them is what they compare with.
    "logging_strategy": ("steps",),
    # TRL's own order of prompts, whatever it says.
    "train_sampling_strategy": ("random",),
    # Those that come with torch and transformers.
    "optim": ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"),
    "lr_scheduler_type": tuple(_SCHEDULES),
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
"""What TRL and transformers know of a field, which they look at once data and models are made, or not at all."""
_SFT_CHOICES = {
    **_CHOICES,
    "loss_type": ("nll", "dft", "chunked_nll"),
    # Not "batch_rebalance", which wants rows of tokens.
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
}
_ONE_SAMPLE = ("num_beams", "num_return_sequences")
_SET_ELSEWHERE = {
    "max_new_tokens": "the stage's max_new_tokens",
    "max_length": "the stage's max_new_tokens",
    "do_sample": "VALOR: without samples all completions of a group are alike",
    **{name: f"trainer.{name}" for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    "cache_implementation": "trainer.cache_implementation",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens"), "the model"),
}
"""Names in `generation_kwargs` that would replace what is set elsewhere, such as the temperature that the loss divides
by, and where."""
_KINDS: dict[str, tuple[str, Any]] = {
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number (no point)", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    "str": ("a text", lambda value: isinstance(value, str)),
    "list": ("a list", lambda value: isinstance(value, list)),
    "dict": ("a mapping", lambda value: isinstance(value, dict)),
    "null": ("null", lambda value: value is None),
}
"""The kinds of value in `trainer_fields.json`: in words, and what is one."""


def check_trainer_fields(section: str, trainer: dict[str, Any], source: str) -> None:
    """Refuse fields of a stage's trainer that TRL does not know, VALOR sets itself, or that break its promises.

    Raises:
        UserError: it names the field and the fix.
    """
    class_name = TRAINER_CLASS[section]
    fields = json.loads(PATH.read_text(encoding="utf-8"))[class_name]
    for field, value in trainer.items():
        place = f"{source}: {section}.trainer.{field}"
        if reason := _whose(field, value):
            raise UserError(f"{place}: {reason}; remove it")
        if field not in fields:
            close = difflib.get_close_matches(field, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{place}: {class_name} has no such field{hint}")
        if expected := _expected(class_name, field, fields[field].split(" | "), value):
            raise UserError(f"{place}: is {shown(repr(value))}, expected {expected}")
        if reason := _reason_against(section, field, value):
            raise UserError(f"{place}: {reason}; remove it")
    _check_schedule(f"{source}: {section}.trainer", {**_DEFAULTS[section], **trainer})


def _whose(field: str, value: Any) -> str:
    """Return why a field is not the recipe's to set; "" where it is, or where its value asks for nothing new."""
    if field in _OWNED_BY_VALOR:
        return f"set by VALOR from {_OWNED_BY_VALOR[field]}"
    for beginnings, reason in _PUBLISHING.items():
        if field.startswith(beginnings):
            return reason
    is_in_force = any(value is same for same in _IN_FORCE.get(field, (False, None)))
    return "" if is_in_force else _REFUSED.get(field, "")


def _expected(class_name: str, field: str, kinds: list[str], value: Any) -> str:
    """Return what a field takes where `value` is none of it; "" where it is."""
    choices = (_SFT_CHOICES if class_name == "SFTConfig" else _CHOICES).get(field)
    if choices is not None:
        hint = " (in quotes: YAML reads no as false)" if value is False and "no" in choices else ""
        # 1 equals True, and a list could be no key.
        known = isinstance(value, str | bool) and value in choices
        more = " (others need packages that VALOR does not install)" if field == "optim" else ""
        return "" if known else f"one of {', '.join(str(choice) for choice in choices)}{hint or more}"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if not any(_KINDS[kind][1](value) for kind in kinds):
        return " or ".join(_KINDS[kind][0] for kind in kinds)
    if isinstance(value, int | float) and not isinstance(value, bool) and not _within(field, value):
        return _bounds(field, value)
    return ""


def _check_schedule(place: str, trainer: dict[str, Any]) -> None:
    """Refuse what the learning rate's schedule does not take; transformers would, once the models are loaded."""
    schedule, given = trainer["lr_scheduler_type"], trainer.get("lr_scheduler_kwargs") or {}
    known = _SCHEDULES[schedule]
    for name, value in given.items():
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise UserError(f"{place}.lr_scheduler_kwargs: {shown(repr(name))}: {schedule} {takes}; remove it")
        # A least rate may be none at all, which is 0 or null.
        is_off = name.startswith("min_lr") and value in (0, None)
        if not is_off and not (_KINDS["float"][1](value) and 0 < value <= _MOST):
            raise UserError(f"{place}.lr_scheduler_kwargs.{name}: is {shown(repr(value))}, expected a number above 0")
    if schedule == "cosine_with_min_lr" and (given.get("min_lr") is None) == (given.get("min_lr_rate") is None):
        raise UserError(f"{place}.lr_scheduler_kwargs: {schedule} needs either min_lr or min_lr_rate; set one of them")


def _within(field: str, value: float) -> bool:
    low, high = _NUMBERS.get(field, (-_MOST, _MOST))
    return low <= value <= high or (field == "max_steps" and value == -1)


def _bounds(field: str, value: float) -> str:
    """Say in words which numbers a field takes."""
    low, high = _NUMBERS.get(field, (-_MOST, _MOST))
    least = "above 0" if low == _TINY else f"at least {low}"
    most = " and below 1" if high == _BELOW_1 else f" and at most {high}" if value > high or high != _MOST else ""
    return f"a number that is {least}{most}" + (", or -1 for whole epochs" if field == "max_steps" else "")


def _reason_against(section: str, field: str, value: Any) -> str:
    """Return why a section's trainer cannot take a value that TRL would take; "" where it can."""
    vision = section == "grpo_vision"
    if field == "vllm_mode" and value != "colocate":
        return "it would send prompts and images to a server"
    if field == "use_vllm" and vision and value:
        return (
            "vLLM keeps the projector's image embeddings (trl#7198), and nothing but the projector trains here; that "
            "they are dropped after each step is untested"
        )
    if field == "pad_to_multiple_of" and isinstance(value, str) and value != "auto":
        return f"is {shown(repr(value))}, which is neither a number nor auto"
    if field == "dataloader_num_workers" and value:
        return "images are decoded already, so workers spare nothing, and only forked ones could share them"
    if field == "generation_kwargs" and isinstance(value, dict):
        for name in _ONE_SAMPLE:
            if value.get(name) not in (None, 1):
                return f"{name} is {shown(repr(value[name]))}, and GRPO learns from one sample of its policy per row"
        for name in value:
            if name in _SET_ELSEWHERE:
                return f"{name} is set by {_SET_ELSEWHERE[name]}"
    return ""
