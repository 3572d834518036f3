"""LoRA: what it trains, what the artifact holds, what the KL term compares with, and that merging changes nothing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_llava import world

from valor import artifacts
from valor.context import Context
from valor.errors import IntegrityError, UserError
from valor.models.loading import load_policy
from valor.recipe import GrpoTextSettings, Lora, SftSettings, load
from valor.stages.grpo_text import grpo_text
from valor.stages.sft import sft
from valor.training.prompts import packed_log_probabilities
from valor.training.trainers import ReportGRPOTrainer

LORA = Lora(r=4, alpha=8)
TEXT = GrpoTextSettings(
    max_new_tokens=16,
    lora=LORA,
    trainer={
        "max_steps": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 4,
        "learning_rate": 1e-2, "beta": 0.1, "save_steps": 1,
    },
)  # fmt: skip


def reference_logits(model, batch) -> torch.Tensor:
    """Return what TRL's reference says, from the trained model itself."""
    from trl.trainer.utils import use_adapter

    model.eval()
    with torch.no_grad(), use_adapter(model, adapter_name=None):
        return model(**batch).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "checkpoint"
    parent, _ = load_policy(world().parent)
    image_token, size = parent.config.image_token_id, parent.config.vision_config.image_size
    batch = {
        "input_ids": torch.tensor([[image_token] * parent.config.image_seq_length + [5, 6, 7]]),
        "pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)),
    }
    seen = {}
    train = ReportGRPOTrainer.train

    def watched(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        seen["reference"] = reference_logits(self.model, batch)
        seen["trained"] = self.model(**batch).logits.detach()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReportGRPOTrainer, "train", watched)
        context = Context(work_root=str(path.with_name("work")))
        grpo_text(TEXT, dataset=world().dataset, parent=world().parent, checkpoint=path, context=context)
    with torch.no_grad():
        seen["parent"] = parent.eval()(**batch).logits
        seen["artifact"] = load_policy(path)[0](**batch).logits
    return path, seen


def changed(before: Path, after: Path) -> set[str]:
    first, second = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert first.keys() == second.keys(), "the artifact is a complete model without adapters"
    return {name for name in first if not torch.equal(first[name], second[name])}


def is_projection(name: str) -> bool:
    return "language_model" in name and "_proj." in name


def test_projections_and_projector_change_and_nothing_else(trained):
    names = changed(world().parent, trained[0])
    every = load_file(trained[0] / "model.safetensors")
    assert names == {name for name in every if is_projection(name) or "multi_modal_projector" in name}
    assert not [name for name in names if "vision_tower" in name]


def test_the_reference_is_the_parent_with_the_parents_projector(trained):
    _, seen = trained
    assert torch.equal(seen["reference"], seen["parent"])
    assert not torch.allclose(seen["trained"], seen["parent"])


def test_the_merged_artifact_says_what_the_adapted_model_said(trained):
    _, seen = trained
    assert torch.allclose(seen["artifact"], seen["trained"], atol=1e-4)


def test_kl_starts_at_nothing_and_grows(trained):
    history = artifacts.load_checkpoint_info(trained[0])["history"]
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert history[-1]["kl"] > 1e-4


def test_a_trainer_checkpoint_holds_adapters_and_projector(trained):
    path, _ = trained
    newest = max(path.with_name("work").glob("*/checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    saved = load_file(newest / "trained.safetensors")
    assert all("lora_" in name or "multi_modal_projector.modules_to_save" in name for name in saved)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    counts = artifacts.load_checkpoint_info(path)["trained_parameters"]
    assert counts["trained"] == sum(value.numel() for value in saved.values()) < counts["total"]


def test_a_shared_prompt_is_the_same_training(tmp_path, monkeypatch):
    packed = []

    def counted(*args, **kwargs):
        packed.append(packed_log_probabilities(*args, **kwargs))
        return packed[-1]

    monkeypatch.setattr("valor.training.trainers.packed_log_probabilities", counted)
    settings = TEXT.model_copy(update={"trainer": {**TEXT.trainer, "beta": 0.0, "learning_rate": 1e-3}})
    logs = []
    for shares in (True, False):
        path = tmp_path / f"{shares}"
        if not shares:
            monkeypatch.setattr("valor.training.trainers.can_share", lambda model: False)
            monkeypatch.setattr("valor.training.prompts.can_share", lambda model: False)
        context = Context(work_root=str(path.with_name(f"work-{shares}")))
        grpo_text(settings, dataset=world().dataset, parent=world().parent, checkpoint=path, context=context)
        history = artifacts.load_checkpoint_info(path)["history"]
        logs.append([[line[key] for key in ("loss", "grad_norm", "entropy", "reward")] for line in history])
    assert len(packed) == 3
    assert all(found is not None for found in packed)
    assert torch.allclose(torch.tensor(logs[0]), torch.tensor(logs[1]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("rate", "merged"), [(1e-1, 1.5), (1e-5, 0.0)], ids=["too much", "a small effect lost"])
def test_a_merge_that_changes_what_the_model_says_is_an_integrity_error(rate, merged, tmp_path, monkeypatch):
    from peft.tuners.lora import Linear

    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: merged * delta(self, adapter))
    settings = SftSettings(lora=LORA, trainer={"max_steps": 2, "learning_rate": rate, "save_strategy": "no"})
    paths = {"dataset": world().dataset, "base": world().base, "checkpoint": tmp_path / "checkpoint"}
    with pytest.raises(IntegrityError, match="merged into the weights, logits differ"):
        sft(settings, **paths, context=Context(work_root=str(tmp_path / "work")))
    assert not (tmp_path / "checkpoint").exists()
    monkeypatch.undo()
    # The verdict is of that pipeline run.
    sft(settings, **paths, context=Context(work_root=str(tmp_path / "work")))
    names = changed(world().base, tmp_path / "checkpoint")
    assert {name for name in names if "language_model" in name} == {name for name in names if is_projection(name)}


def test_autocast_and_activation_checkpointing_train_adapters_too(tmp_path):
    trainer = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "activation_checkpointing": True}
    chosen, path = SftSettings(lora=LORA, dtype="bfloat16", trainer=trainer), tmp_path / "checkpoint"
    context = Context(work_root=str(tmp_path / "work"))
    sft(chosen, dataset=world().dataset, base=world().base, checkpoint=path, context=context)
    every = load_file(path / "model.safetensors")
    assert changed(world().base, path) == {
        name for name in every if is_projection(name) or "multi_modal_projector" in name
    }
    assert {value.dtype for value in every.values()} == {torch.float32}


def test_the_recipe_offers_lora_where_the_language_model_trains():
    recipe = load("phantom", ["grpo_text.lora.r=8", "sft.lora.alpha=64"])
    assert recipe.grpo_text.lora == Lora(r=8)
    assert recipe.sft.lora == Lora(alpha=64)
    assert load("phantom").grpo_text.lora is None
    with pytest.raises(UserError, match=r"grpo_vision\.lora: unknown key"):
        load("phantom", ["grpo_vision.lora.r=8"])
    with pytest.raises(UserError, match=r"grpo_text\.lora\.r"):
        load("phantom", ["grpo_text.lora.r=0"])
