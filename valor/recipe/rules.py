"""What a recipe may not say although each value alone is lawful, and which fields of a trainer are whose."""

import difflib
import json
import math
from importlib import resources
from typing import Any

from valor.errors import UserError, shown
from valor.recipe.sections import SECTION_OF_STAGE, Recipe, TrainStage
from valor.recipe.trainer_defaults import GRPO_DEFAULTS

TRAINER_CLASS = {"sft": "SFTConfig", "grpo_text": "GRPOConfig", "grpo_vision": "GRPOConfig"}
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
    "use_liger_kernel": "VALOR does not install its kernels, and shared prompts would go past them",
    **dict.fromkeys(("do_eval", "do_predict", "eval_on_start", "eval_strategy"), "no stage evaluates while it trains"),
    "load_best_model_at_end": "no stage evaluates, so none would be the best",
}
"""Trainer fields that would undo what VALOR promises of every stage, and how."""
_COUNTS: dict[str, tuple[float, float]] = {
    "max_steps": (1, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "num_generations": (1, math.inf),
    "num_generations_eval": (1, math.inf),
    "num_iterations": (1, math.inf),
    "steps_per_generation": (1, math.inf),
    "generation_batch_size": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "top_k": (0, math.inf),
}
_TINY = 5e-324
"""The smallest number above 0: as a lower bound it keeps 0 out."""
_BELOW_1 = math.nextafter(1, 0)
_NUMBERS: dict[str, tuple[float, float]] = {
    **_COUNTS,
    "learning_rate": (0, math.inf),
    "num_train_epochs": (_TINY, math.inf),
    "warmup_steps": (0, math.inf),
    "save_steps": (_TINY, math.inf),
    "logging_steps": (_TINY, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, _BELOW_1),
    "adam_beta2": (0, _BELOW_1),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "temperature": (_TINY, math.inf),
    "top_p": (_TINY, 1),
    "min_p": (0, 1),
    "repetition_penalty": (_TINY, math.inf),
    "beta": (0, math.inf),
    "epsilon": (0, math.inf),
    "epsilon_high": (0, math.inf),
    "delta": (_TINY, math.inf),
    "top_entropy_quantile": (0, 1),
}
"""Trainer fields whose value a recipe most often gets wrong, and their bounds, both included; the libraries fail on
them late and without their name, or not at all. Steps of warm-up, saves and log lines may be fractions of the training.
"""
_OPTIONAL = (
    "max_grad_norm", "min_p", "epsilon_high", "delta", "steps_per_generation", "generation_batch_size",
    "num_generations_eval",
)  # fmt: skip
"""Numbers that may be null, as they are where a recipe says nothing."""
_CHOICES: dict[str, tuple[str | bool, ...]] = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
    # Not "best": no stage evaluates, so nothing would be saved. Not "epoch": a generation may end within the next one.
    "save_strategy": ("steps", "no"),
    # The guards look at log lines, and the first of them is what they compare with.
    "logging_strategy": ("steps",),
    # TRL's own order of prompts, whatever it says.
    "train_sampling_strategy": ("random",),
}
"""What TRL knows of GRPO's variants, which it looks at after the first generation only, and when a stage may save."""
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


def check(recipe: Recipe, source: str) -> None:
    """Refuse a recipe whose parts do not fit together.

    Raises:
        UserError: it names the key, its value and the fix.
    """
    published = {
        "publish_text": recipe.publish_text,
        "evaluation.publish_text": recipe.evaluation.publish_text,
        "registry.publish_text": recipe.registry.publish_text,
    }
    for key, value in published.items():
        check_publishing(key, value, root=recipe.data.root, public=recipe.data.public, source=source)
    _check_limits(recipe, source)
    for section in TRAINER_CLASS:
        check_training(section, getattr(recipe, section), source)
        _check_gpus(recipe, section, source)
    unknown = sorted(set(recipe.resources) - set(SECTION_OF_STAGE))
    if unknown:
        raise UserError(f"{source}: resources.{unknown[0]}: no such stage; stages are {', '.join(SECTION_OF_STAGE)}")


def check_publishing(key: str, value: bool, *, root: str, public: bool, source: str) -> None:
    """Refuse to publish text of a source that nobody has declared public; VALOR's own phantoms are nobody's.

    Raises:
        UserError: the setting `key` is true and the data is neither `phantom` nor public.
    """
    if value and root != "phantom" and not public:
        raise UserError(
            f"{source}: {key} is true, and data.root is {root!r}: everyone who sees MLflow would see "
            "its reports and images; set publish_text: false, or data.public: true if the source's owner allows it"
        )


def check_training(section: str, settings: TrainStage, source: str) -> None:
    """Refuse a training stage's section that cannot train as it says; on a cluster it comes without its recipe.

    Raises:
        UserError: it names the field and the fix.
    """
    check_trainer_fields(section, settings.trainer, source)
    _check_strategy(section, settings, source)
    if TRAINER_CLASS[section] == "GRPOConfig":
        _check_generation(section, settings, source)


def check_trainer_fields(section: str, trainer: dict[str, Any], source: str) -> None:
    """Refuse fields of a stage's trainer that TRL does not know, VALOR sets itself, or that break its promises.

    Raises:
        UserError: it names the field and the fix.
    """
    class_name = TRAINER_CLASS[section]
    fields = json.loads((resources.files("valor.recipe") / "trainer_fields.json").read_text(encoding="utf-8"))[
        class_name
    ]
    lists = _SFT_CHOICES if class_name == "SFTConfig" else _CHOICES
    for field, value in trainer.items():
        if field in _OWNED_BY_VALOR:
            owner = _OWNED_BY_VALOR[field]
            raise UserError(f"{source}: {section}.trainer.{field}: set by VALOR from {owner}; remove it")
        for beginnings, reason in _PUBLISHING.items():
            if field.startswith(beginnings):
                raise UserError(f"{source}: {section}.trainer.{field}: {reason}; remove it")
        if field in _REFUSED:
            raise UserError(f"{source}: {section}.trainer.{field}: {_REFUSED[field]}; remove it")
        numeric = field in _NUMBERS and not (value is None and field in _OPTIONAL)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{source}: {section}.trainer.{field}: is {value}, expected a finite number")
        if numeric and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{source}: {section}.trainer.{field}: is {shown(repr(value))}, expected a number")
        if numeric and field in _COUNTS and not isinstance(value, int):
            raise UserError(f"{source}: {section}.trainer.{field}: is {value!r}, expected a whole number (no point)")
        if numeric and not _within(field, value):
            raise UserError(f"{source}: {section}.trainer.{field}: is {value!r}, expected {_bounds(field)}")
        if field in lists and value not in lists[field]:
            choices = ", ".join(str(choice) for choice in lists[field])
            hint = " (in quotes: YAML reads no as false)" if value is False and "no" in lists[field] else ""
            raise UserError(
                f"{source}: {section}.trainer.{field}: is {shown(repr(value))}, expected one of {choices}{hint}"
            )
        reason = _reason_against(section, field, value)
        if reason:
            raise UserError(f"{source}: {section}.trainer.{field}: {reason}; remove it")
        if field not in fields:
            close = difflib.get_close_matches(field, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{source}: {section}.trainer.{field}: {class_name} has no such field{hint}")


def _within(field: str, value: float) -> bool:
    low, high = _NUMBERS[field]
    return low <= value <= high or (field == "max_steps" and value == -1)


def _bounds(field: str) -> str:
    """Say in words which numbers a field takes."""
    low, high = _NUMBERS[field]
    least = "above 0" if low == _TINY else f"at least {low:g}"
    most = "" if high == math.inf else " and below 1" if high == _BELOW_1 else f" and at most {high:g}"
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


def _check_gpus(recipe: Recipe, section: str, source: str) -> None:
    """Refuse GPUs that no process uses, and processes without one."""
    processes = getattr(recipe, section).processes
    gpus = recipe.resources[section].gpus if section in recipe.resources else 0
    if gpus and gpus != processes:
        raise UserError(
            f"{source}: resources.{section}.gpus is {gpus} and {section}.processes {processes}: each process trains on "
            "one GPU; set both to the same number"
        )


def _check_strategy(section: str, settings: TrainStage, source: str) -> None:
    """Refuse a strategy that would not be followed, or that would fail once the last step is done."""
    if settings.strategy == "ddp":
        return
    if settings.processes * settings.nodes == 1:
        raise UserError(
            f"{source}: {section}.strategy is {settings.strategy} and {section}.processes 1: there is nobody to share "
            "the weights with; raise processes, or set strategy: ddp"
        )
    if getattr(settings, "lora", None) is not None:
        raise UserError(
            f"{source}: {section}.lora with strategy {settings.strategy}: adapters are merged into weights that no "
            "process holds whole; set strategy: ddp (of what is frozen a process keeps neither gradients nor moments)"
        )


def _check_generation(section: str, settings: TrainStage, source: str) -> None:
    """Refuse a generation that is no whole number of groups, or that begins and ends within optimizer steps.

    TRL would say the first once the stages before have run. The second no resume could continue: the last step of an
    epoch may take fewer micro-batches than the others, and where the next generation begins would be lost.
    """
    fields = {**GRPO_DEFAULTS, **settings.trainer}
    size, accumulated = fields["num_generations"], fields["gradient_accumulation_steps"]
    step = fields["per_device_train_batch_size"] * settings.processes * settings.nodes
    batch = fields.get("generation_batch_size") or step * (fields.get("steps_per_generation") or accumulated)
    if size < 2 or batch % size:
        raise UserError(
            f"{source}: {section}.trainer.num_generations is {size}, and a generation has {batch} completions "
            "(generation_batch_size, or per_device_train_batch_size x steps_per_generation x processes): set it to a "
            "divisor of them that is at least 2"
        )
    used = batch // max(step, 1) * fields.get("num_iterations", 1)
    shorter, longer = sorted((used, accumulated))
    if shorter > 0 and longer % shorter:
        raise UserError(
            f"{source}: {section}.trainer.gradient_accumulation_steps is {accumulated}, and a generation is used for "
            f"{used} micro-batches (steps_per_generation x num_iterations): set one to a multiple of the other, or a "
            "stopped stage could not continue exactly"
        )


def _check_limits(recipe: Recipe, source: str) -> None:
    """Refuse another token limit for the evaluation than the candidate's own, which the registered model uses."""
    stage = {"sft": "sft", "text": "grpo_text", "vision": "grpo_vision"}[recipe.gate.candidate]
    served, judged = getattr(recipe, stage).max_new_tokens, recipe.predict.max_new_tokens
    if served != judged:
        raise UserError(
            f"{source}: predict.max_new_tokens is {judged} and {stage}.max_new_tokens {served}: the registered model "
            "would write other reports than those that the gate saw; set both to the same number"
        )
