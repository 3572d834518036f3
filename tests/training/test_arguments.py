"""Trainer arguments: defaults, the recipe's word, and what VALOR alone decides."""

import functools
import json
import re
from types import SimpleNamespace

import pytest

from valor.errors import UserError
from valor.recipe import GrpoTextSettings, SftSettings, load, parse_section, trainer_fields
from valor.recipe.trainer_defaults import GRPO_DEFAULTS
from valor.recipe.trainer_rules import check_trainer_fields
from valor.training import arguments


def grpo(tmp_path, **trainer):
    settings = GrpoTextSettings(trainer=trainer, max_new_tokens=33, seed=4)
    return arguments.grpo_arguments(settings, output_dir=tmp_path, defaults=GRPO_DEFAULTS, reward_weights=[1.0])


def test_sft_never_cuts_image_tokens_and_learns_the_report_alone(tmp_path):
    args = arguments.sft_arguments(SftSettings(), output_dir=tmp_path)
    assert args.max_length is None
    assert args.completion_only_loss
    assert not args.save_only_model


def test_the_recipe_overrides_defaults_but_not_what_valor_owns(tmp_path):
    args = grpo(tmp_path, learning_rate=3e-4, loss_type="dr_grpo", gradient_accumulation_steps=2, logging_steps=7)
    assert (args.learning_rate, args.loss_type, args.logging_steps) == (3e-4, "dr_grpo", 7)
    assert (args.max_completion_length, args.seed, args.data_seed) == (33, 4, 4)
    assert args.report_to == []


@pytest.mark.parametrize(
    ("section", "field", "words"),
    [
        ("grpo_text", "log_completions", "write prompts, reports or images to the log"),
        ("grpo_vision", "log_completions_hub_repo", "write prompts, reports or images to the log"),
        ("grpo_vision", "log_multimodal", "write prompts, reports or images to the log"),
        ("sft", "push_to_hub", "send the model to a hub"),
        ("sft", "hub_model_id", "send the model to a hub"),
        ("sft", "trackio_space_id", "another tracker"),
        ("sft", "project", "another tracker"),
        ("sft", "logging_dir", "another tracker"),
        ("grpo_text", "vllm_server_base_url", "another server"),
        ("sft", "save_total_limit", "set by VALOR"),
        ("sft", "enable_jit_checkpoint", "SIGTERM"),
        ("grpo_text", "sync_ref_model", "the synced reference is not in checkpoints"),
        ("sft", "ignore_data_skip", "begin its epoch anew"),
        ("grpo_vision", "auto_find_batch_size", "another batch than the recipe's"),
        ("sft", "trust_remote_code", "run code that comes with the model"),
        ("grpo_text", "model_init_kwargs", "VALOR loads the model"),
        ("sft", "eval_on_start", "no stage evaluates"),
        ("grpo_text", "eval_strategy", "no stage evaluates"),
        ("sft", "use_liger_kernel", "does not install its kernels"),
        ("grpo_text", "use_transformers_continuous_batching", "models without images"),
        ("sft", "bf16", "the stage's dtype"),
        ("grpo_text", "fp16", "the stage's dtype .*float16 overflows"),
        ("sft", "deepspeed", "the stage's strategy"),
        ("grpo_vision", "fsdp", "the stage's strategy"),
        ("grpo_text", "fsdp_config", "the stage's strategy"),
        ("sft", "parallelism_config", "processes, nodes and strategy"),
        ("sft", "accelerator_config", "another way than the recipe says"),
        ("sft", "chat_template_path", "the model's own"),
        ("sft", "eos_token", "the model's own"),
        ("grpo_text", "pad_token", "the model's own"),
        ("sft", "completion_only_loss", "the report alone"),
        ("sft", "packing", "packs no rows that hold images"),
        ("sft", "optim_args", "once the models are loaded"),
        ("grpo_vision", "debug", "statistics of every tensor"),
    ],
)
def test_fields_that_are_not_the_recipes_to_set_are_refused_with_the_reason(section, field, words):
    with pytest.raises(UserError, match=rf"{section}\.trainer\.{field}: .*{words}.*; remove it") as caught:
        load("phantom", [f"{section}.trainer.{field}=x"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=words):
        parse_section(section, json.dumps({"trainer": {field: "x"}}))


@pytest.mark.parametrize(("field", "value"), [("logging_steps", 3), ("log_level", "info"), ("learning_rate", 3)])
def test_fields_that_publish_nothing_are_the_recipes(field, value):
    assert load("phantom", [f"grpo_text.trainer.{field}={value}"]).grpo_text.trainer[field] == value


@pytest.mark.parametrize(
    "field",
    ["num_generations", "gradient_accumulation_steps", "per_device_train_batch_size", "max_steps", "num_iterations"],
)
def test_what_is_counted_is_a_whole_number(field):
    for section in ("grpo_text", "grpo_vision"):
        with pytest.raises(UserError, match=rf"{section}\.trainer\.{field}: is 8\.0, expected a whole number"):
            load("phantom", [f"{section}.trainer.{field}=8.0"])
        assert getattr(load("phantom", [f"{section}.trainer.{field}=8"]), section).trainer[field] == 8


@pytest.mark.parametrize("field", ["save_steps", "logging_steps", "warmup_steps"])
def test_some_steps_may_be_a_share_of_the_training(field):
    assert load("phantom", [f"sft.trainer.{field}=0.25"]).sft.trainer[field] == 0.25


@pytest.mark.parametrize(
    ("wrong", "words", "lawful"),
    [
        ("sft.trainer.save_strategy=best", "is 'best', expected one of steps, no", "'no'"),
        ("sft.trainer.save_strategy=no", "is False, expected one of steps, no .in quotes", "'no'"),
        ("grpo_text.trainer.save_strategy=epoch", "is 'epoch', expected one of steps, no", "'no'"),
        ("sft.trainer.dataloader_num_workers=2", "only forked ones could share them; remove it", "0"),
        ("grpo_vision.trainer.dataloader_num_workers=2", "only forked ones could share them; remove it", "0"),
        ("grpo_text.trainer.generation_kwargs={num_beams: 2}", "num_beams is 2, .* one sample", "{num_beams: 1}"),
        ("grpo_vision.trainer.generation_kwargs={num_return_sequences: 2}", "is 2, .* one sample", "{num_beams: 1}"),
        ("grpo_text.trainer.generation_kwargs={do_sample: false}", "do_sample is set by VALOR", "{typical_p: 0.9}"),
        ("grpo_text.trainer.generation_kwargs={temperature: 2}", "set by trainer.temperature; remove it", "{}"),
        ("grpo_vision.trainer.generation_kwargs={max_new_tokens: 9}", "by the stage's max_new_tokens", "{}"),
        ("sft.trainer.logging_strategy=no", "is False, expected one of steps", "steps"),
        ("grpo_text.trainer.logging_strategy=epoch", "is 'epoch', expected one of steps", "steps"),
        ("sft.trainer.loss_type=grpo", "is 'grpo', expected one of nll, dft", "nll"),
        ("grpo_text.trainer.loss_type=nll", "is 'nll', expected one of grpo, bnpo", "dapo"),
        ("sft.trainer.train_sampling_strategy=nope", "expected one of random, sequential", "group_by_length"),
        ("sft.trainer.max_grad_norm=x", "is 'x', expected a number", "0"),
        ("sft.trainer.optim=galore_adamw", "expected one of adamw_torch_fused", "adafactor"),
        ("sft.trainer.optim=[1]", r"is \[1\], expected one of adamw_torch_fused", "sgd"),
        ("sft.trainer.lr_scheduler_type=reduce_lr_on_plateau", "expected one of constant", "linear"),
        ("sft.trainer.lr_scheduler_kwargs=[1]", r"is \[1\], expected a mapping or null", "{num_cycles: 0.4}"),
        ("sft.trainer.log_level=zzz", "expected one of debug", "error"),
        ("sft.trainer.seed_worker=1", "SFTConfig has no such field", None),
        ("sft.trainer.neftune_noise_alpha=x", "is 'x', expected a number or null", "5"),
        ("sft.trainer.pad_to_multiple_of=x", "neither a number nor auto", "auto"),
        ("sft.trainer.torch_compile=3", "is 3, expected true or false", "false"),
        ("sft.trainer.ddp_timeout=3e90", "expected a whole number", "60"),
        ("grpo_text.trainer.use_vllm='yes'", "is 'yes', expected true or false", "false"),
        ("grpo_text.trainer.generation_kwargs=x", "is 'x', expected a mapping or null", "{}"),
        ("grpo_text.trainer.cache_implementation=3", "is 3, expected a text or null", "static"),
        (f"grpo_text.trainer.max_tool_calling_iterations={10**30}", "and at most 2147483647", "3"),
    ],
)
def test_values_that_would_undo_a_stage_are_refused_and_their_neighbours_pass(wrong, words, lawful):
    field = wrong.partition("=")[0]
    with pytest.raises(UserError, match=rf"{re.escape(field)}: .*{words}") as caught:
        load("phantom", [wrong])
    assert "\n" not in str(caught.value)
    assert lawful is None or load("phantom", [f"{field}={lawful}"])


@pytest.mark.parametrize(
    ("schedule", "kwargs", "words"),
    [
        (None, {"min_lr": 1e-5}, "'min_lr': constant takes none; remove it"),
        ("cosine", {"power": 2}, "'power': cosine takes num_cycles; remove it"),
        ("cosine", {3: 2}, "3: cosine takes num_cycles"),
        ("cosine", {"num_cycles": None}, r"\.num_cycles: is None, expected a number above 0"),
        ("cosine", {"num_cycles": "x"}, r"\.num_cycles: is 'x', expected a number above 0"),
        ("inverse_sqrt", {"timescale": 0}, r"\.timescale: is 0, expected a number above 0"),
        ("cosine_with_min_lr", None, "needs either min_lr or min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1e-6, "min_lr_rate": 0.1}, "needs either min_lr or min_lr_rate"),
    ],
)
def test_what_a_schedule_does_not_take_is_refused(schedule, kwargs, words):
    """transformers would say it after the models are loaded, and as a TypeError."""
    asked = {"lr_scheduler_kwargs": kwargs, **({"lr_scheduler_type": schedule} if schedule else {})}
    with pytest.raises(UserError, match=rf"s: grpo_text\.trainer\.lr_scheduler_kwargs.*{words}"):
        check_trainer_fields("grpo_text", asked, "s")


@pytest.mark.parametrize(
    ("schedule", "kwargs"),
    [
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}), ("cosine_with_min_lr", {"min_lr_rate": None, "min_lr": 0}),
        ("cosine_with_restarts", {"num_cycles": 2}), ("linear", None), ("inverse_sqrt", {"timescale": 10}),
        ("constant_with_warmup", {}), ("cosine", {"num_cycles": 0.4}),
    ],
)  # fmt: skip
def test_every_schedule_that_a_recipe_may_name_can_be_made(schedule, kwargs):
    import torch
    from transformers import get_scheduler

    check_trainer_fields("sft", {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": kwargs}, "s")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    made = get_scheduler(schedule, optimizer, 1, 10, scheduler_specific_kwargs=kwargs)
    assert made.get_last_lr()


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_every_optimizer_that_a_recipe_may_name_is_installed(optim, tmp_path):
    import torch
    from transformers import Trainer

    check_trainer_fields("sft", {"optim": optim}, "s")
    args = arguments.sft_arguments(SftSettings(trainer={"optim": optim}), output_dir=tmp_path)
    assert Trainer(torch.nn.Linear(2, 2), args).create_optimizer()


@pytest.mark.parametrize(
    ("field", "wrong", "words", "lawful"),
    [
        ("max_steps", (0, -2), "at least 1, or -1 for whole epochs", (-1, 1)),
        ("num_train_epochs", (0, -1, 1e300), "above 0 and at most 1000000", (0.5,)),
        ("per_device_train_batch_size", (0, -1), "at least 1", (8,)),
        ("gradient_accumulation_steps", (0,), "at least 1", (1,)),
        ("dataloader_num_workers", (-1,), "at least 0", (0,)),
        ("learning_rate", (-1, 1e30), "at least 0 and at most 10", (1e-6,)),
        ("adam_beta1", (1, 2, -0.1), "at least 0 and below 1", (0, 0.9)),
        ("adam_epsilon", (-1,), "at least 0", (1e-8,)),
        ("max_grad_norm", (-1,), "at least 0", (0, 1.0)),
        ("max_steps", (10**40,), "at least 1 and at most 2147483647, or -1 for whole epochs", (7,)),
        ("save_steps", (0,), "above 0", (0.1, 5)),
        ("temperature", (0, -1), "above 0", (0.7,)),
        ("top_k", (-5,), "at least 0", (0, 50)),
        ("top_p", (0, 1.1), "above 0 and at most 1", (1, 0.9)),
        ("min_p", (2, -0.1), "at least 0 and at most 1", (0.1, None)),
        ("repetition_penalty", (0,), "above 0", (1.1,)),
        ("num_iterations", (0,), "at least 1", (1,)),
        ("steps_per_generation", (0,), "at least 1", (8, None)),
        ("epsilon", (-1,), "at least 0", (0.2,)),
        ("beta", (-1,), "at least 0", (0, 0.04)),
        ("top_entropy_quantile", (2, -1), "at least 0 and at most 1", (0.2, 1)),
    ],
)
def test_numbers_are_within_their_bounds(field, wrong, words, lawful):
    """The libraries would fail on them once data and models are made, or ignore them."""
    for value in wrong:
        with pytest.raises(
            UserError, match=rf"^s: grpo_text\.trainer\.{field}: is {re.escape(str(value))}, expected .*{words}$"
        ):
            check_trainer_fields("grpo_text", {field: value}, "s")
    for value in lawful:
        check_trainer_fields("grpo_text", {field: value}, "s")
    with pytest.raises(UserError, match="SFTConfig has no such field"):
        check_trainer_fields("sft", {"steps_per_generation": None}, "s")


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([{"name": "gleu_reward", "weight": 0}, {"name": "length_reward", "weight": 0}], "every weight is 0"),
        ([{"name": "gleu_reward", "weight": 1e300}], "less than or equal to 1000000"),
        ([{"name": "gleu_reward", "weight": -0.5}], "greater than or equal to 0"),
    ],
)
def test_rewards_from_which_nothing_can_be_learned_are_refused(rewards, words):
    with pytest.raises(UserError, match=rf"settings of grpo_text: rewards.*: .*{words}"):
        parse_section("grpo_text", json.dumps({"rewards": rewards}))
    assert parse_section("grpo_text", json.dumps({"rewards": [*rewards[1:], {"name": "gleu_reward", "weight": 0.5}]}))


@pytest.mark.parametrize(
    ("trainer", "used"),
    [
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, 3),
        ({"gradient_accumulation_steps": 6, "steps_per_generation": 4}, 4),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 3, "num_iterations": 2}, 6),
        ({"gradient_accumulation_steps": 4, "generation_batch_size": 24, "per_device_train_batch_size": 8}, 3),
    ],
)
def test_a_generation_neither_begins_nor_ends_within_a_step(trainer, used):
    """An epoch's last step may be shorter, so whether a later step ends with its generation could not be told."""
    words = rf"gradient_accumulation_steps is \d, and a generation is used for {used} micro-batches"
    for section in ("grpo_text", "grpo_vision"):
        with pytest.raises(UserError, match=rf"{section}\.trainer\.{words}"):
            parse_section(section, json.dumps({"trainer": trainer}))
    for accumulation in (1, used, 2 * used):
        assert parse_section(
            "grpo_text", json.dumps({"trainer": {**trainer, "gradient_accumulation_steps": accumulation}})
        )


@pytest.mark.parametrize(
    ("field", "harmless", "asking"),
    [("completion_only_loss", (True, None), False), ("packing", (False,), True), ("optim_args", (None,), "x"),
     ("eos_token", (None,), "</s>"), ("trust_remote_code", (False,), True)],
)  # fmt: skip
def test_a_refused_field_may_say_what_is_so_anyway(field, harmless, asking):
    for value in harmless:
        check_trainer_fields("sft", {field: value}, "s")
    with pytest.raises(UserError, match=rf"{field}: .*; remove it"):
        check_trainer_fields("sft", {field: asking}, "s")


def committed():
    return json.loads(trainer_fields.PATH.read_text(encoding="utf-8"))


def test_the_committed_fields_are_those_of_the_installed_trl():
    assert committed() == trainer_fields.installed_fields(), "run: python -m valor.recipe.trainer_fields"


ASKED = (7331, 0.7331, "asked", True, False, {"asked": 1}, None)
ALWAYS_LAWFUL = {
    "7331": "max_steps", "0.7331": "learning_rate", "'asked'": "torch_compile_mode", "True": "gradient_checkpointing",
    "False": "dataloader_drop_last", "{'asked': 1}": "gradient_checkpointing_kwargs", "None": "neftune_noise_alpha",
}  # fmt: skip


@pytest.mark.parametrize("section", ["sft", "grpo_text"])
@pytest.mark.parametrize("asked", ASKED, ids=repr)
def test_no_field_that_a_recipe_may_set_is_overridden_in_silence(section, asked, tmp_path, monkeypatch):
    import trl

    name = "SFTConfig" if section == "sft" else "GRPOConfig"
    monkeypatch.setattr(trl, name, functools.partial(SimpleNamespace, n_gpu=0))
    lawful = {}
    for field in committed()[name]:
        try:
            check_trainer_fields(section, {field: asked}, "the test")
        except UserError:
            continue
        lawful[field] = asked
    assert ALWAYS_LAWFUL[repr(asked)] in lawful
    assert not [field for field in lawful if "hub" in field or "log_comp" in field or "trackio" in field]
    if section == "sft":
        used = arguments.sft_arguments(SftSettings(trainer=lawful), output_dir=tmp_path)
    else:
        used = grpo(tmp_path, **lawful)
    assert {field for field in lawful if getattr(used, field) != asked} == set()


def test_grpo_names_its_algorithm_and_needs_no_second_model(tmp_path):
    args = grpo(tmp_path)
    assert (args.loss_type, args.beta) == ("grpo", 0.0)
    assert args.steps_per_generation == args.gradient_accumulation_steps
    assert not args.activation_checkpointing
    assert not args.bf16


def test_checkpointing_of_activations_can_be_asked_for_by_either_name(tmp_path):
    assert grpo(tmp_path, gradient_checkpointing=True).activation_checkpointing
    assert grpo(tmp_path, activation_checkpointing=True).activation_checkpointing


def test_bfloat16_is_autocast_over_float32_weights(tmp_path):
    assert arguments.sft_arguments(SftSettings(dtype="bfloat16"), output_dir=tmp_path).bf16
    assert not arguments.sft_arguments(SftSettings(), output_dir=tmp_path).bf16


def test_one_process_trains_on_one_of_several_gpus(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = arguments.sft_arguments(SftSettings(trainer={"per_device_train_batch_size": 3}), output_dir=tmp_path)
    assert (args.use_cpu, args.n_gpu, args.train_batch_size) == (False, 1, 3)


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"num_generations": 5}, "must be divisible by num_generations"),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"steps_per_generation": 2, "generation_batch_size": 64}, "can not be both configured"),
        ({"lr_scheduler_type": "sawtooth"}, "sawtooth"),
    ],
)
def test_contradictions_are_one_line(tmp_path, trainer, words):
    with pytest.raises(UserError, match=words) as caught:
        grpo(tmp_path, **trainer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.21.9", False), ("0.22.0", True), ("0.24.0+cu129", True), ("0.31.0", True), ("0.31.1", False)],
)
def test_vllm_must_be_one_that_trl_supports(tmp_path, monkeypatch, version, supported):
    monkeypatch.setattr(arguments.metadata, "version", lambda name: {"vllm": version}[name])
    arguments.check_vllm(grpo(tmp_path))
    if supported:
        arguments.check_vllm(grpo(tmp_path, use_vllm=True))
        return
    with pytest.raises(UserError, match=rf"vLLM {version} is installed, which TRL does not support; install vllm>="):
        arguments.check_vllm(grpo(tmp_path, use_vllm=True))


def test_the_supported_vllm_is_the_installed_trls():
    import inspect

    from trl.import_utils import is_vllm_available

    source = inspect.getsource(is_vllm_available)
    assert all(f'Version("{version}")' in source for version in arguments.VLLM_VERSIONS)


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("grpo_vision", "use_vllm", "true", r"keeps the projector's image embeddings \(trl#7198\)"),
        ("grpo_vision", "vllm_mode", "server", "to a server"),
        ("grpo_text", "vllm_mode", "server", "to a server"),
    ],
)
def test_vllm_is_refused_where_it_would_read_old_images_or_send_them_away(section, field, value, words):
    with pytest.raises(UserError, match=rf"{section}\.trainer\.{field}: .*{words}.* remove it"):
        load("phantom", [f"{section}.trainer.{field}={value}"])
    assert load("phantom", ["grpo_text.trainer.use_vllm=true", "grpo_text.trainer.vllm_mode=colocate"])
    assert load("phantom", ["grpo_vision.trainer.use_vllm=false"])


def test_more_prompts_than_studies(tmp_path):
    args = grpo(tmp_path)
    arguments.check_enough_prompts(args, studies=8)
    with pytest.raises(UserError, match=r"takes 8 prompts .* there are 7 training studies"):
        arguments.check_enough_prompts(args, studies=7)


def test_effective_fields_are_json_without_places(tmp_path):
    fields = arguments.effective(grpo(tmp_path))
    assert fields["learning_rate"] == GRPO_DEFAULTS["learning_rate"]
    assert str(tmp_path) not in json.dumps(fields)


@pytest.mark.parametrize(
    ("per_generation", "iterations", "accumulation", "steps"),
    [(8, 1, 8, 1), (2, 1, 8, 1), (8, 2, 8, 2), (8, 1, 2, 4), (3, 2, 2, 3), (2, 2, 8, 1)],
)
def test_saves_wait_for_a_step_that_ends_with_its_generation(tmp_path, per_generation, iterations, accumulation, steps):
    args = grpo(
        tmp_path, steps_per_generation=per_generation, num_iterations=iterations,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    found = arguments.steps_between_saves(args)
    assert found == steps
    ends = [step * accumulation % (per_generation * iterations) == 0 for step in range(1, found + 1)]
    assert ends == [False] * (found - 1) + [True]


def test_supervised_training_may_save_at_any_step(tmp_path):
    args = arguments.sft_arguments(SftSettings(trainer={"gradient_accumulation_steps": 4}), output_dir=tmp_path)
    assert arguments.steps_between_saves(args) == 1
