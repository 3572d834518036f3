"""The trainer's arguments: VALOR's defaults, then the recipe's `trainer:` verbatim, then what VALOR alone decides."""

from importlib import metadata
from pathlib import Path
from typing import Any

from valor.errors import UserError
from valor.recipe import TrainStage
from valor.recipe.trainer_defaults import SFT_DEFAULTS

_COMMON: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 0.1,
    # A hidden NaN would train on; the guard in valor.training.callbacks stops it instead.
    "logging_nan_inf_filter": False,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    # All that trains takes part in every step, so several processes need not look for what did not.
    "ddp_find_unused_parameters": False,
    "disable_tqdm": True,
    "logging_strategy": "steps",
}
VLLM_VERSIONS = ("0.22.0", "0.31.0")
"""The oldest and the newest that TRL 1.16 supports (`trl.import_utils.is_vllm_available`)."""
_HIDDEN = {"output_dir", "logging_dir", "hub_token", "push_to_hub_token", "run_name", "log_completions_hub_repo"}


def sft_arguments(settings: TrainStage, *, output_dir: Path) -> Any:
    """Return TRL's SFTConfig; raise UserError in one line where the fields contradict each other."""
    from trl import SFTConfig

    return _arguments(SFTConfig, SFT_DEFAULTS, settings, output_dir, max_length=None)


def grpo_arguments(
    settings: TrainStage, *, output_dir: Path, defaults: dict[str, Any], reward_weights: list[float]
) -> Any:
    """Return TRL's GRPOConfig; raise UserError in one line where the fields contradict each other."""
    from trl import GRPOConfig

    owned = {"max_completion_length": settings.max_new_tokens, "reward_weights": reward_weights}
    return _arguments(GRPOConfig, defaults, settings, output_dir, **owned)


def check_enough_prompts(arguments: Any, *, studies: int) -> None:
    """Refuse a generation that asks for more prompts than there are studies: TRL would train for 0 steps."""
    prompts = arguments.generation_batch_size // arguments.num_generations
    if studies < prompts:
        raise UserError(
            f"trainer: one generation takes {prompts} prompts (per_device_train_batch_size x steps_per_generation x "
            f"processes / num_generations), there are {studies} training studies; lower the batch or use more studies"
        )


def check_vllm(arguments: Any) -> None:
    """Refuse `use_vllm` without a vLLM that TRL supports: TRL would only warn of another version."""
    if not arguments.use_vllm:
        return
    from packaging.version import Version

    oldest, newest = VLLM_VERSIONS
    wanted = f"install vllm>={oldest},<={newest}, or remove it to generate with transformers"
    try:
        found = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        raise UserError(f"trainer.use_vllm: vLLM is not installed; {wanted}") from None
    if not Version(oldest) <= Version(Version(found).base_version) <= Version(newest):
        raise UserError(f"trainer.use_vllm: vLLM {found} is installed, which TRL does not support; {wanted}")


def prompts_per_step(arguments: Any) -> float:
    """Return the prompts whose completions an optimizer step of GRPO sees anew, of all processes; 0 for SFT."""
    prompts = getattr(arguments, "generation_batch_size", 0) / getattr(arguments, "num_generations", 1)
    return prompts * arguments.gradient_accumulation_steps / _generation(arguments)


def steps_between_saves(arguments: Any) -> int:
    """Return the optimizer steps from one to the next that ends where TRL's next generation begins.

    TRL generates every `steps_per_generation` x `num_iterations` micro-batches: several steps, or a part of one
    (`valor.recipe.rules` refuses what is neither).
    """
    return max(1, _generation(arguments) // arguments.gradient_accumulation_steps)


def _generation(arguments: Any) -> int:
    """Return the micro-batches from one generation to the next."""
    return getattr(arguments, "steps_per_generation", 1) * getattr(arguments, "num_iterations", 1)


def effective(arguments: Any) -> dict[str, Any]:
    """Return every trainer field as used, JSON-able, without places and secrets."""
    return {key: value for key, value in sorted(arguments.to_dict().items()) if key not in _HIDDEN}


def _arguments(config: Any, defaults: dict[str, Any], settings: TrainStage, output_dir: Path, **owned: Any) -> Any:
    import torch

    fields = {
        **_COMMON,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": settings.dtype == "bfloat16",
        **defaults,
        **settings.trainer,
        "remove_unused_columns": False,
        "output_dir": str(output_dir),
        "seed": settings.seed,
        "data_seed": settings.seed,
        "report_to": "none",
        "save_only_model": False,
        # Old checkpoints go only once a newer one is committed, which the trainer does not know (valor.training.work).
        "save_total_limit": None,
        **owned,
    }
    if "gradient_checkpointing" not in settings.trainer:
        # It trades time for memory, and memory is what a GPU lacks; the old name of the field is still accepted.
        fields.setdefault("activation_checkpointing", torch.cuda.is_available())
    try:
        arguments = config(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"trainer: {_one_line(error)}") from error
    # One process trains on one GPU, the first, however many there are; transformers would wrap the model in
    # DataParallel, which TRL refuses.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
