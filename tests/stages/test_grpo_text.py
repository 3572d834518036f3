"""The grpo_text stage, end to end on a tiny LLaVA."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.llama.modeling_llama import LlamaModel

sys.path.append(str(Path(__file__).parents[1] / "training"))
from killing import survives_a_kill
from tiny_llava import world

from valor import artifacts
from valor.context import Context
from valor.errors import UserError
from valor.recipe import GrpoTextSettings, Lora
from valor.stages.grpo_text import grpo_text
from valor.training.trainers import ReportGRPOTrainer

SIZE = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "learning_rate": 1e-3,
}


def settings(**trainer) -> GrpoTextSettings:
    return GrpoTextSettings(max_new_tokens=24, trainer={"max_steps": 4, **SIZE, **trainer})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "checkpoint"
    context = Context(work_root=str(path.with_name("work")))
    result = grpo_text(settings(), dataset=world().dataset, parent=world().parent, checkpoint=path, context=context)
    return path, dict(result.metrics)


def test_language_model_and_projector_learn_and_the_tower_does_not(trained):
    path, _ = trained
    before, after = load_file(world().parent / "model.safetensors"), load_file(path / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("multi_modal_projector" in name for name in changed)
    assert any("language_model" in name for name in changed)
    assert not [name for name in changed if "vision_tower" in name]


def test_every_reward_is_logged_by_name_and_the_algorithm_recorded(trained):
    path, metrics = trained
    info = artifacts.load_checkpoint_info(path)
    for reward in GrpoTextSettings().rewards:
        assert f"rewards/{reward.name}/mean" in info["history"][0]
        assert f"rewards/{reward.name}_last" in metrics
    assert any(line["reward_std"] > 0 for line in info["history"])
    assert (info["trainer"]["loss_type"], info["trainer"]["beta"]) == ("grpo", 0.0)
    assert info["trainer"]["reward_weights"] == [reward.weight for reward in GrpoTextSettings().rewards]


def test_generations_that_do_not_divide_the_batch(tmp_path):
    with pytest.raises(UserError, match="divisible by num_generations") as caught:
        grpo_text(
            settings(num_generations=3), dataset=world().dataset, parent=world().parent,
            checkpoint=tmp_path / "checkpoint", context=Context(work_root=str(tmp_path / "work")),
        )  # fmt: skip
    assert "\n" not in str(caught.value)


VARIANTS = {
    "DAPO": {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True},
    "Dr. GRPO": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "GSPO": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "KL": {"beta": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_trls_variants_train_and_are_recorded_as_asked(tmp_path, variant):
    asked, path = VARIANTS[variant], tmp_path / "checkpoint"
    grpo_text(
        settings(max_steps=2, num_iterations=2, **asked), dataset=world().dataset, parent=world().parent,
        checkpoint=path, context=Context(work_root=str(tmp_path / "work")),
    )  # fmt: skip
    info = artifacts.load_checkpoint_info(path)
    assert {name: info["trainer"][name] for name in asked} == asked
    plain = trained_default()
    assert not [name for name in asked if plain[name] == asked[name]], "each would have been recorded unasked"
    before, after = load_file(world().parent / "model.safetensors"), load_file(path / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    kl = [line.get("kl") for line in info["history"]]
    if variant == "KL":
        assert kl[0] == pytest.approx(0, abs=1e-6)
        assert kl[1] > 1e-5
    else:
        assert kl == [None, None]


def trained_default():
    """Return what is recorded of a stage that asks for none of them."""
    from valor.recipe.trainer_defaults import GRPO_DEFAULTS
    from valor.training.arguments import effective, grpo_arguments

    plain = settings(max_steps=2, num_iterations=2)
    return effective(grpo_arguments(plain, output_dir=Path(), defaults=GRPO_DEFAULTS, reward_weights=[1.0]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss_type", "drgrpo"),
        ("importance_sampling_level", "word"),
        ("scale_rewards", "rank"),
        ("multi_objective_aggregation", "sum"),
    ],
)
def test_a_variant_that_trl_does_not_know_is_refused_before_anything_runs(field, value):
    from valor.recipe import load

    with pytest.raises(UserError, match=rf"grpo_text\.trainer\.{field}: is '{value}', expected one of "):
        load("phantom", [f"grpo_text.trainer.{field}={value}"])


def test_vllm_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match="vLLM is not installed; install vllm>="):
        grpo_text(
            settings(use_vllm=True), dataset=world().dataset, parent=world().parent,
            checkpoint=tmp_path / "checkpoint", context=Context(work_root=str(tmp_path / "work")),
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [{}, {"num_iterations": 2, "save_steps": 3}])
def test_survives_sigkill(tmp_path, trainer):
    chosen = settings(max_steps=16, **trainer)
    metrics = survives_a_kill(
        grpo_text, chosen, tmp_path=tmp_path, seed=2, dataset=world().dataset, parent=world().parent
    )
    assert metrics["resumed_from_step"] % chosen.trainer.get("num_iterations", 1) == 0


@pytest.mark.parametrize(
    ("changes", "towers"),
    [
        ({}, 1),
        ({"dtype": "bfloat16"}, 1),
        ({"dtype": "bfloat16", "lora": Lora(r=4)}, 1),
        ({"trainer": {"beta": 0.1}}, 2),
    ],
)
def test_each_tower_sees_each_image_once_and_samples_come_from_the_policy_of_the_loss(
    tmp_path, monkeypatch, changes, towers
):
    seen, autocast, found = Counter(), set(), {}
    look, read, train = CLIPVisionModel.forward, LlamaModel.forward, ReportGRPOTrainer.train

    def looked(self, pixel_values, *args, **kwargs):
        seen[id(self)] += len(pixel_values)
        return look(self, pixel_values, *args, **kwargs)

    def was_read(self, *args, **kwargs):
        autocast.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return read(self, *args, **kwargs)

    def trained(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        # Merging adapters is checked on studies of its own.
        found["seen"], found["autocast"] = list(seen.values()), set(autocast)
        return result

    monkeypatch.setattr(CLIPVisionModel, "forward", looked)
    monkeypatch.setattr(LlamaModel, "forward", was_read)
    monkeypatch.setattr(ReportGRPOTrainer, "train", trained)
    chosen = settings(max_steps=1, save_strategy="no", **changes.get("trainer", {}))
    grpo_text(
        chosen.model_copy(update={key: value for key, value in changes.items() if key != "trainer"}),
        dataset=world().dataset, parent=world().parent, checkpoint=tmp_path / "checkpoint",
        context=Context(work_root=str(tmp_path / "work")),
    )  # fmt: skip
    prompts = SIZE["per_device_train_batch_size"] // SIZE["num_generations"]
    assert found == {"seen": [prompts] * towers, "autocast": {("dtype" in changes, torch.bfloat16)}}
