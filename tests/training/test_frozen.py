"""Frozen weights in bfloat16: the same training to the bit, and an artifact as if nothing had been cast."""

import pytest
import torch
from killing import survives_a_kill
from safetensors.torch import load_file
from tiny_llava import world
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig

from valor.context import Context
from valor.models.loading import load_policy
from valor.recipe import GrpoTextSettings, GrpoVisionSettings, Lora, SftSettings
from valor.stages.grpo_text import grpo_text
from valor.stages.grpo_vision import grpo_vision
from valor.stages.sft import sft
from valor.training import course
from valor.training.frozen import can_hold, hold_in_bfloat16, restore
from valor.training.parts import choose_trained

GRPO = {
    "max_steps": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 4,
    "learning_rate": 1e-2, "save_strategy": "no",
}  # fmt: skip
SFT = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no"}
SHARED = {"dtype": "bfloat16", "max_new_tokens": 12}


@pytest.mark.parametrize(
    ("stage", "settings", "inputs"),
    [
        (sft, SftSettings(**SHARED, trainer=SFT), {"base": world().base}),
        (sft, SftSettings(**SHARED, trainer=SFT, lora=Lora(r=4)), {"base": world().base}),
        (grpo_text, GrpoTextSettings(**SHARED, trainer={**GRPO, "beta": 0.1}), {"parent": world().parent}),
        (
            grpo_text, GrpoTextSettings(**SHARED, trainer={**GRPO, "beta": 0.1}, lora=Lora(r=4)),
            {"parent": world().parent},
        ),
        (
            grpo_vision, GrpoVisionSettings(**SHARED, trainer={**GRPO, "beta": 0.1}, tolerance=1e-4),
            {"parent": world().parent, "expert": world().expert},
        ),
    ],
    ids=["sft", "sft lora", "grpo_text", "grpo_text lora", "grpo_vision"],
)  # fmt: skip
def test_a_stage_ends_in_the_same_bits(tmp_path, monkeypatch, stage, settings, inputs):
    held = []

    def watched(model):
        names = hold_in_bfloat16(model)
        held.append(names)
        kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert {name for name, kind in kinds.items() if kind == torch.bfloat16} == names
        assert not any(p.requires_grad for name, p in model.named_parameters() if name in names)
        return names

    paths = []
    for hold in (watched, lambda _: frozenset()):
        monkeypatch.setattr(course, "hold_in_bfloat16", hold)
        paths.append(tmp_path / str(len(paths)))
        context = Context(work_root=str(tmp_path / f"work-{len(paths)}"))
        stage(settings, dataset=world().dataset, **inputs, checkpoint=paths[-1], context=context)
    with_held, without = (load_file(path / "model.safetensors") for path in paths)
    assert {value.dtype for value in with_held.values()} == {torch.float32}
    assert all(torch.equal(value, without[name]) for name, value in with_held.items())
    assert all(held)
    # Beside the policy a reference model, where no adapters can be switched off.
    has_reference = settings.trainer.get("beta") and getattr(settings, "lora", None) is None
    assert len(held) == (2 if has_reference else 1)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_a_killed_stage_goes_on_with_what_is_held(tmp_path, lora):
    settings = GrpoTextSettings(
        **SHARED, trainer={**GRPO, "max_steps": 12, "learning_rate": 1e-3, "save_strategy": "steps"}, lora=lora
    )
    metrics = survives_a_kill(
        grpo_text, settings, tmp_path=tmp_path, seed=5, dataset=world().dataset, parent=world().parent
    )
    assert metrics["steps"] == 12


@pytest.mark.parametrize(
    ("changes", "strategy", "holds"),
    [
        ({}, "ddp", True),
        ({"bf16": False}, "ddp", False),
        ({}, "fsdp2", False),
        ({"cast_lm_head_to_fp32": True}, "ddp", False),
    ],
)
def test_weights_are_held_where_that_changes_nothing(tmp_path, changes, strategy, holds):
    arguments = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **{"bf16": True, **changes})
    assert can_hold(arguments, strategy=strategy) == holds
    arguments.use_vllm = True
    assert not can_hold(arguments, strategy=strategy)


def test_what_trains_and_what_enters_no_product_stays_and_everything_comes_back():
    model, _ = load_policy(world().parent)
    choose_trained(model, projector_only=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    held = hold_in_bfloat16(model)
    assert any("language_model" in name for name in held)
    assert any("patch_embedding" in name for name in held)
    assert not [name for name in held if "norm" in name or "embed_tokens" in name or "multi_modal_projector" in name]
    restore(model, world().parent, held)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_is_held_unless_it_is_the_embedding_too_and_says_the_same(tied):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=16, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).eval().requires_grad_(requires_grad=False)
    tokens = torch.arange(16)[None]
    with torch.autocast("cpu", torch.bfloat16):
        before = model(tokens).logits
        assert hold_in_bfloat16(model)
        assert torch.equal(model(tokens).logits, before)
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert (model.lm_head.weight.dtype == torch.float32) == tied
