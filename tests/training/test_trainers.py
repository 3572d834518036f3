"""The trainer subclasses: resume restores weights and order, ranks survive a split group, no text in the log."""

# ruff: noqa: PT012 - what fails here is a block: a process that did something and then died.

import logging
from pathlib import Path

import pytest
import torch
from killing import assert_same_weights
from tiny_llava import PROMPT, world

from valor.context import Context
from valor.errors import IntegrityError
from valor.models.loading import load_policy
from valor.recipe import GrpoTextSettings, SftSettings
from valor.stages.grpo_text import grpo_text
from valor.stages.sft import sft
from valor.training import callbacks
from valor.training.trainers import SimilarLengths

SFT = SftSettings(trainer={"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": 1})
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


def trainer_of(tmp_path: Path):
    from valor.training.arguments import sft_arguments
    from valor.training.rows import sft_rows, training_studies
    from valor.training.trainers import ReportSFTTrainer

    model, processor = load_policy(world().base)
    rows = sft_rows(training_studies(world().dataset, studies=0, seed=0), processor, prompt=PROMPT)
    args = sft_arguments(SFT, output_dir=tmp_path)
    return ReportSFTTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)


def test_resume_restores_every_weight(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer._load_from_checkpoint(str(world().parent))
    expected = load_policy(world().parent)[0].state_dict()
    found = trainer.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_resume_refuses_weights_of_another_model(tmp_path):
    from safetensors.torch import load_file, save_file

    trainer = trainer_of(tmp_path)
    broken = tmp_path / "broken"
    trainer.model.save_pretrained(broken)
    weights = load_file(broken / "model.safetensors")
    weights.pop(next(name for name in weights if "projector" in name))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="not this model's weights"):
        trainer._load_from_checkpoint(str(broken))


def test_the_log_never_quotes_a_row(caplog):
    from valor.training.trainers import _hide_rows

    logger = logging.getLogger("trl.trainer.grpo_trainer")
    logger.addFilter(_hide_rows)
    with caplog.at_level(logging.WARNING):
        logger.warning("All reward functions returned None for the following kwargs:\n{'reference': 'secret'}")
        logger.warning("something else")
    assert "secret" not in caplog.text
    assert "something else" in caplog.text


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
