"""The trainer subclasses: resume restores weights and order, no text in the log."""

# ruff: noqa: PT012 - what fails here is a block: a process that did something and then died.

import contextlib
import logging
from pathlib import Path

import pytest
import torch
from killing import assert_same_weights
from safetensors.torch import load_file
from tiny_llava import PROMPT, world

from valor import artifacts
from valor.context import Context
from valor.errors import IntegrityError, Interrupted, ValorError
from valor.models.loading import load_policy
from valor.recipe import GrpoTextSettings, Lora, SftSettings
from valor.stages.grpo_text import grpo_text
from valor.stages.sft import sft
from valor.training import callbacks, trainers
from valor.training.rows import training_studies
from valor.training.trained import PARENT, WEIGHTS
from valor.training.trainers import SimilarLengths

SFT = SftSettings(
    trainer={
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": 1, "logging_steps": 1,
    },
)  # fmt: skip
TEXT = GrpoTextSettings(
    max_new_tokens=16,
    trainer={
        "max_steps": 8, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "num_generations": 4,
        "learning_rate": 1e-3, "save_steps": 1,
    },
)  # fmt: skip


class Died(Exception):
    """Stands for the death of the process."""


def run(function, settings, path: Path, **paths: Path) -> dict[str, float]:
    context = Context(work_root=str(path.with_name("work")))
    return dict(function(settings, dataset=world().dataset, **paths, checkpoint=path, context=context).metrics)


def run_until(step: int, monkeypatch, *args, **kwargs) -> None:
    """Run a stage that dies right after the checkpoint of `step`."""
    commit = callbacks.CommitCheckpoints.on_save

    def on_save(self, args, state, control, **rest):
        commit(self, args, state, control, **rest)
        if state.global_step == step:
            raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(callbacks.CommitCheckpoints, "on_save", on_save)
        run(*args, **kwargs)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    run(sft, SFT, root / "sft", base=world().base)
    run(grpo_text, TEXT, root / "text", parent=world().parent)
    return root


@pytest.mark.parametrize("step", [1, 3, 7, 8])
def test_sft_continues_exactly_within_and_across_epochs(tmp_path, monkeypatch, undisturbed, step):
    run_until(step, monkeypatch, sft, SFT, tmp_path / "sft", base=world().base)
    assert run(sft, SFT, tmp_path / "sft", base=world().base)["resumed_from_step"] == step
    assert_same_weights(undisturbed / "sft", tmp_path / "sft")
    logs = [artifacts.load_checkpoint_info(root / "sft")["history"] for root in (undisturbed, tmp_path)]
    tokens = [[line["num_tokens"] for line in log] for log in logs]
    assert tokens[0] == tokens[1]


def test_batches_of_similar_length_continue_exactly_in_a_later_epoch(tmp_path, monkeypatch):
    grouped = SFT.model_copy(update={"trainer": {**SFT.trainer, "train_sampling_strategy": "group_by_length"}})
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "random").mkdir()
    run(sft, grouped, tmp_path / "undisturbed" / "sft", base=world().base)
    run_until(7, monkeypatch, sft, grouped, tmp_path / "sft", base=world().base)
    assert run(sft, grouped, tmp_path / "sft", base=world().base)["resumed_from_step"] == 7
    assert_same_weights(tmp_path / "undisturbed" / "sft", tmp_path / "sft")
    run(sft, SFT, tmp_path / "random" / "sft", base=world().base)
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_same_weights(tmp_path / "undisturbed" / "sft", tmp_path / "random" / "sft")


def padding(order: list[int], lengths: list[int], size: int) -> int:
    batches = [[lengths[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


@pytest.mark.parametrize("count", [3, 4, 64, 70])
def test_batches_of_similar_length_hold_every_example_once_in_an_order_per_epoch(count):
    lengths = [(i * 37) % 101 for i in range(count)]
    sampler = SimilarLengths(lengths, batch_size=4, seed=5)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again
    assert sorted(first) == sorted(second) == list(range(count))
    assert len(sampler) == count
    if count >= 64:
        assert first != second
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
        assert padding(first, lengths, 4) < 0.5 * padding(shuffled, lengths, 4)
        heads = [lengths[i] for i in first[::4]]
        assert heads not in (sorted(heads), sorted(heads, reverse=True))


@pytest.mark.parametrize("step", [2, 3, 5, 8])
def test_grpo_continues_exactly_within_and_across_epochs(tmp_path, monkeypatch, undisturbed, step):
    run_until(step, monkeypatch, grpo_text, TEXT, tmp_path / "text", parent=world().parent)
    assert run(grpo_text, TEXT, tmp_path / "text", parent=world().parent)["resumed_from_step"] == step
    assert_same_weights(undisturbed / "text", tmp_path / "text")


def test_a_training_that_stops_before_its_last_step_is_no_artifact(tmp_path, monkeypatch, undisturbed):
    def stop(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 3

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"^sft: .* step 3 of 8 .*; run again"):
        patch.setattr(callbacks.KeepEpochsOrder, "on_step_end", stop)
        run(sft, SFT, tmp_path / "sft", base=world().base)
    assert not (tmp_path / "sft").exists()
    assert run(sft, SFT, tmp_path / "sft", base=world().base)["resumed_from_step"] == 3
    assert_same_weights(undisturbed / "sft", tmp_path / "sft")


def with_lora(settings):
    return settings.model_copy(update={"lora": Lora(r=4, alpha=8, dropout=0.1)})


@pytest.mark.parametrize(
    ("function", "settings", "parent"), [(sft, SFT, "base"), (grpo_text, TEXT, "parent")], ids=["sft", "text"]
)
def test_adapters_continue_exactly(tmp_path, monkeypatch, function, settings, parent):
    chosen, paths = with_lora(settings), {parent: getattr(world(), parent)}
    (tmp_path / "other").mkdir()
    run(function, chosen, tmp_path / "other" / "undisturbed", **paths)
    run_until(5, monkeypatch, function, chosen, tmp_path / "continued", **paths)
    assert run(function, chosen, tmp_path / "continued", **paths)["resumed_from_step"] == 5
    assert_same_weights(tmp_path / "other" / "undisturbed", tmp_path / "continued")


def trainer_of(tmp_path: Path, *, source: Path, projector_only: bool = False):
    from valor.training.arguments import sft_arguments
    from valor.training.parts import choose_trained
    from valor.training.rows import sft_rows, training_studies
    from valor.training.trainers import ReportSFTTrainer

    model, processor = load_policy(source)
    choose_trained(model, projector_only=projector_only)
    rows = sft_rows(training_studies(world().dataset, studies=0, seed=0), processor, prompt=PROMPT)
    args = sft_arguments(SFT, output_dir=tmp_path)
    trainer = ReportSFTTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)
    trainer.parent = "digest of the parent"
    return trainer


@pytest.mark.parametrize("projector_only", [True, False])
def test_a_checkpoint_holds_what_trains_and_restores_it_exactly(tmp_path, projector_only):
    source, target = (trainer_of(tmp_path, source=world().base, projector_only=projector_only) for _ in range(2))
    with torch.no_grad():
        for parameter in source.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    checkpoint = tmp_path / "checkpoint"
    source.save_model(str(checkpoint))
    trained = {name for name, parameter in source.model.named_parameters() if parameter.requires_grad}
    assert load_file(checkpoint / WEIGHTS).keys() == trained
    assert not [name for name in trained if "vision_tower" in name]
    assert all("projector" in name for name in trained) == projector_only
    assert sorted(path.name for path in checkpoint.iterdir()) == [PARENT, WEIGHTS]
    target._load_from_checkpoint(str(checkpoint))
    expected, found = source.model.state_dict(), target.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {name for name, parameter in target.model.named_parameters() if parameter.requires_grad} == trained


def test_a_checkpoint_of_another_parent_or_of_other_weights_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, source=world().base)
    checkpoint = tmp_path / "checkpoint"
    trainer.save_model(str(checkpoint))
    other = trainer_of(tmp_path, source=world().base, projector_only=True)
    with pytest.raises(IntegrityError, match="does not hold the weights that train"):
        other._load_from_checkpoint(str(checkpoint))
    trainer.parent = "another"
    with pytest.raises(IntegrityError, match="made from checkpoint digest of the parent, the parent is another"):
        trainer._load_from_checkpoint(str(checkpoint))


def test_the_log_never_quotes_a_row(tmp_path, caplog, monkeypatch):
    """TRL warns with the whole row, report included, where no reward has a word to say."""

    def silent(completions, **rows):
        return [None] * len(completions)

    # Those of the trainers before would be asked first.
    monkeypatch.setattr(logging.getLogger("trl.trainer.grpo_trainer"), "filters", [])
    kept: list[bool] = []
    hide = trainers._hide_rows
    monkeypatch.setattr(trainers, "_hide_rows", lambda record: kept.append(hide(record)) or kept[-1])
    monkeypatch.setattr("valor.rewards.text.build", lambda *_, **__: ([silent], [1.0]))
    trainer = {**TEXT.trainer, "max_steps": 1, "logging_steps": 1}
    settings = TEXT.model_copy(update={"trainer": trainer, "guards": None})
    with caplog.at_level(logging.DEBUG), contextlib.suppress(ValorError):
        run(grpo_text, settings, tmp_path / "checkpoint", parent=world().parent)
    logged = " ".join(record.getMessage() for record in caplog.records)
    references = [study.text for study in training_studies(world().dataset, studies=0, seed=0)]
    assert False in kept, "TRL has warned"
    assert not [text for text in references if text[:30] in logged]
    logging.getLogger("trl.trainer.grpo_trainer").warning("something else")
    assert "something else" in caplog.text


def test_vllm_forgets_images_after_the_weights_have_come():
    from types import SimpleNamespace

    from valor.training.trainers import forget_images_at_each_sync

    calls = []
    engine = SimpleNamespace(reset_encoder_cache=lambda: calls.append("forget"))
    generation = SimpleNamespace(sync_weights=lambda: calls.append("sync"), llm=SimpleNamespace(llm_engine=engine))
    forget_images_at_each_sync(generation)
    generation.sync_weights()
    assert calls == ["sync", "forget"]


def test_what_is_hooked_into_vllm_is_the_installed_trls():
    """vLLM itself is not installed: that its engine still has `reset_encoder_cache` is not looked at."""
    import inspect

    from trl.generation.vllm_generation import VLLMGeneration

    generation, trainer = inspect.getsource(VLLMGeneration), inspect.getsource(trainers.GRPOTrainer)
    assert callable(VLLMGeneration.sync_weights)
    assert "self.llm = LLM(" in generation
    assert "self.llm.llm_engine." in generation
    assert "self.vllm_generation = VLLMGeneration(" in trainer
    assert "self.vllm_generation.sync_weights()" in trainer


LOSSES = {
    "grpo": ({}, True),
    "dr_grpo": ({"loss_type": "dr_grpo"}, True),
    "dapo": ({"loss_type": "dapo"}, True),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, True),
    "luspo": ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, True),
    "sapo": ({"loss_type": "sapo"}, True),
    "vespo": ({"loss_type": "vespo"}, True),
    "bnpo": ({"loss_type": "bnpo"}, False),
    "entropy bonus": ({"entropy_coef": 0.5}, False),
    "high entropy alone": ({"top_entropy_quantile": 0.5}, False),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_completions_change_micro_batches_only_where_the_loss_does_not_see_it(tmp_path, monkeypatch, loss):
    fields, lawful = LOSSES[loss]
    step = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "optim": "sgd"}
    chosen = TEXT.model_copy(update={"trainer": {**TEXT.trainer, **step, "learning_rate": 1.0, **fields}})
    parent, regroup, moved = load_file(world().parent / "model.safetensors"), trainers.by_prompt, []

    def changes(name: str) -> torch.Tensor:
        run(grpo_text, chosen, tmp_path / name / "text", parent=world().parent)
        after = load_file(tmp_path / name / "text" / "model.safetensors")
        return torch.cat([(after[key] - parent[key]).flatten() for key in sorted(parent)])

    def counted(batches):
        found = regroup(batches)
        dealt, together = ([batch["completion_ids"].tolist() for batch in each] for each in (batches, found))
        moved.append(dealt != together)
        return found

    for name in ("as dealt", "by prompt"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(trainers, "by_prompt", list)
    expected = changes("as dealt")
    monkeypatch.setattr(trainers, "by_prompt", counted)
    found = changes("by prompt")
    assert moved == ([True] if lawful else [])
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_an_epochs_order_does_not_depend_on_the_epochs_before():
    from valor.training.trainers import EpochRepeatSampler

    def order(*epochs: int) -> list[int]:
        sampler = EpochRepeatSampler(range(20), mini_repeat_count=2, batch_size=2, seed=5)
        for epoch in epochs:
            sampler.set_epoch(epoch)
            drawn = list(sampler)
        return drawn

    assert order(0, 1, 2) == order(2)
    assert order(2) != order(1)
