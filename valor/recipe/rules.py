"""What a recipe may not say although each value alone is lawful."""

from valor.errors import UserError
from valor.recipe.sections import SECTION_OF_STAGE, Recipe, TrainStage
from valor.recipe.trainer_defaults import GRPO_DEFAULTS
from valor.recipe.trainer_rules import TRAINER_CLASS, check_trainer_fields


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
    if not size or size < 2 or batch % size:
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
