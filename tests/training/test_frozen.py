"""Frozen weights in bfloat16: the same training to the bit, and an artifact as if nothing had been cast."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_llava import world
from transformers import LlamaConfig, LlamaForCausalLM

from valor.context import Context
from valor.models.loading import load_policy
from valor.recipe import GrpoTextSettings, GrpoVisionSettings, Lora, SftSettings
from valor.stages.grpo_text import grpo_text
from valor.stages.grpo_vision import grpo_vision
from valor.stages.sft import sft
from valor.training import course
from valor.training.frozen import hold_in_bfloat16, restore
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
    held = {}

    def watched(model, only=None):
        names = hold_in_bfloat16(model, only=only)
        held[len(held)] = names
        kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert {name for name, kind in kinds.items() if kind == torch.bfloat16} == names
        if only is None:
            assert not any(p.requires_grad for name, p in model.named_parameters() if name in names)
        return names

    paths = []
    for hold in (watched, lambda *_, **__: frozenset()):
        monkeypatch.setattr(course, "hold_in_bfloat16", hold)
        paths.append(tmp_path / str(len(paths)))
        context = Context(work_root=str(tmp_path / f"work-{len(paths)}"))
        stage(settings, dataset=world().dataset, **inputs, checkpoint=paths[-1], context=context)
    with_held, without = (load_file(path / "model.safetensors") for path in paths)
    assert {value.dtype for value in with_held.values()} == {torch.float32}
    assert all(torch.equal(value, without[name]) for name, value in with_held.items())
    assert held[0]
    # A reference model beside the policy is cast where the policy is, or their divergence would start above nothing.
    assert len(set(held.values())) == 1


def test_what_trains_and_what_enters_no_product_stays_and_everything_comes_back():
    model, _ = load_policy(world().parent)
    choose_trained(model, projector_only=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    held = hold_in_bfloat16(model)
    assert any("language_model" in name for name in held)
    assert any("patch_embedding" in name for name in held)
    assert not [name for name in held if "norm" in name or "embed_tokens" in name or "multi_modal_projector" in name]
    restore(model, world().parent)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.dtype == torch.float32


def test_an_embedding_that_is_the_output_layer_too_stays():
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    for tied in (True, False):
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).requires_grad_(False)
        hold_in_bfloat16(model)
        assert model.model.embed_tokens.weight.dtype == torch.float32
        assert (model.lm_head.weight.dtype == torch.float32) == tied
