"""The sft stage, end to end on a tiny LLaVA."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1] / "training"))
from killing import assert_same_weights, survives_a_kill
from tiny_llava import PROMPT, world

from valor import artifacts
from valor.context import Context
from valor.errors import DataError, GuardStop, IntegrityError, ServiceError, UserError
from valor.models.loading import load_policy, prompt_of, save_policy
from valor.recipe import SftSettings
from valor.stages.sft import sft
from valor.training.rows import training_studies

SIZE = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}


def settings(**trainer) -> SftSettings:
    return SftSettings(trainer={"max_steps": 6, **SIZE, **trainer}, seed=3)


def run(path: Path, chosen: SftSettings, *, pipeline_run: str = "") -> dict[str, float]:
    context = Context(work_root=str(path.with_name("work")), pipeline_run=pipeline_run)
    return dict(sft(chosen, dataset=world().dataset, base=world().base, checkpoint=path, context=context).metrics)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft") / "checkpoint"
    return path, run(path, settings())


def test_projector_and_language_model_learn_and_the_tower_does_not(trained):
    path, metrics = trained
    before, after = load_file(world().base / "model.safetensors"), load_file(path / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if "vision_tower" in name]
    assert changed == {name for name in before if "vision_tower" not in name}
    assert metrics["loss_last"] < metrics["loss_first"]
    assert metrics["steps"] == 6
    assert metrics["tokens"] > 0


def test_the_checkpoint_is_complete_and_tells_where_it_comes_from(trained):
    path, metrics = trained
    info = artifacts.load_checkpoint_info(path)
    assert info["stage"] == "sft"
    assert info["parents"] == {"base": artifacts.read_stamp(world().base)["digest"]}
    assert info["dataset_digest"] == artifacts.read_stamp(world().dataset)["digest"]
    assert info["settings"]["trainer"]["learning_rate"] == info["trainer"]["learning_rate"] == 1e-3
    assert info["trained_parameters"]["trained"] == metrics["trained_parameters"]
    assert len(info["history"]) == 6
    assert prompt_of(path) == PROMPT
    assert "prompt" not in info
    load_policy(path)


def test_no_pickle_and_no_text_in_the_artifact(trained):
    path, _ = trained
    assert not [p.name for p in path.rglob("*") if p.suffix in {".pt", ".pth", ".bin", ".pkl"}]
    assert "effusion" not in (path / "valor.json").read_text()


def test_the_same_seed_gives_the_same_weights_and_another_does_not(trained, tmp_path):
    run(tmp_path / "again", settings())
    assert_same_weights(trained[0], tmp_path / "again")
    run(tmp_path / "other", settings().model_copy(update={"seed": 4}))
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_same_weights(trained[0], tmp_path / "other")


def test_loss_falls_on_the_report_alone(trained):
    from valor.models.loading import load_policy
    from valor.training.arguments import sft_arguments
    from valor.training.rows import sft_rows, training_studies
    from valor.training.trainers import ReportSFTTrainer

    model, processor = load_policy(world().base)
    studies = training_studies(world().dataset, studies=0, seed=0)
    rows = sft_rows(studies, processor, prompt=PROMPT)
    args = sft_arguments(settings(), output_dir=trained[0].with_name("unused"))
    trainer = ReportSFTTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)
    batch = trainer.data_collator([rows[0]])
    learned = batch["labels"][0][batch["labels"][0] != -100]
    text = processor.tokenizer.decode(learned)
    assert text.strip().startswith(studies[0].text)
    assert text.strip().endswith(processor.tokenizer.eos_token)
    assert PROMPT not in text


def test_a_loss_that_is_no_number_stops_the_stage_and_its_blind_retry(tmp_path):
    hopeless = settings(learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(GuardStop, match=r"lower trainer\.learning_rate"):
        run(tmp_path / "checkpoint", hopeless, pipeline_run="run-1")
    with pytest.raises(GuardStop, match="not tried again"):
        run(tmp_path / "checkpoint", hopeless, pipeline_run="run-1")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("saves", [{"save_strategy": "no"}, {"save_steps": 3}])
def test_weights_that_broke_behind_the_last_log_line_are_never_kept(tmp_path, saves):
    unseen = {"logging_steps": 100, "logging_first_step": False, **saves}
    with pytest.raises(GuardStop, match=r"step [36]: .* a NaN or an infinity; lower trainer\.learning_rate"):
        run(tmp_path / "checkpoint", settings(learning_rate=1e30, max_grad_norm=0.0, **unseen))
    assert not (tmp_path / "checkpoint").exists()
    run(tmp_path / "checkpoint", settings(**unseen))
    assert (tmp_path / "checkpoint").exists()


def test_only_trained_parameters_are_the_guards_business():
    from valor.training.callbacks import require_finite

    model = torch.nn.ModuleDict(
        {"frozen": torch.nn.Linear(2, 2).requires_grad_(False), "trained": torch.nn.Linear(2, 2)}
    )
    model["frozen"].weight.fill_(float("nan"))
    require_finite(model, step=1)
    torch.nn.init.constant_(model["trained"].bias, float("inf"))
    with pytest.raises(GuardStop, match=r"step 1: trained\.bias"):
        require_finite(model, step=1)


def test_a_failure_behind_the_training_costs_no_second_training(tmp_path, monkeypatch):
    from valor import stages
    from valor.tracking import runs

    monkeypatch.setenv("VALOR_TRACKING", "off")
    finish, work = runs.StageRun.finish, tmp_path / "work"

    def attempt(name: str) -> float:
        result = stages.run(
            "sft", settings_json=settings().model_dump_json(), context=Context(work_root=str(work), pipeline_run="r"),
            inputs={"dataset": world().dataset, "base": world().base}, outputs={"checkpoint": tmp_path / name},
        )  # fmt: skip
        return result.metrics["resumed_from_step"]

    def away(self, **_):
        raise ServiceError("MLflow does not answer")

    monkeypatch.setattr(runs.StageRun, "finish", away)
    with pytest.raises(ServiceError):
        attempt("first")
    monkeypatch.setattr(runs.StageRun, "finish", finish)
    assert attempt("second") == 6
    first, second = (artifacts.read_stamp(tmp_path / name)["digest"] for name in ("first", "second"))
    assert first == second
    histories = [artifacts.load_checkpoint_info(tmp_path / name)["history"] for name in ("first", "second")]
    assert histories[0] == histories[1]
    assert list(work.iterdir()) == []
    # Nothing of what was finished is left to resume.
    assert attempt("third") == 0


def test_a_training_without_a_whole_batch_is_no_training(tmp_path):
    """Running it again would end there again."""
    with pytest.raises(UserError, match=r"^sft: trained for 0 of 6 steps: .*remove trainer\.dataloader_drop_last"):
        run(tmp_path / "checkpoint", settings(per_device_train_batch_size=64, dataloader_drop_last=True))
    assert not (tmp_path / "checkpoint").exists()


def test_a_parent_with_a_weight_that_is_no_number_is_refused(tmp_path):
    from valor.training.policy import open_policy

    chosen = {"dataset": world().dataset, "output_dir": tmp_path, "projector_only": False}
    assert open_policy("sft", settings(), parent=world().base, **chosen)
    model, processor = load_policy(world().base)
    next(model.model.vision_tower.parameters()).data[:] = float("inf")
    save_policy(model, processor, tmp_path / "broken", stage="sft", parents={}, prompt=PROMPT)
    with pytest.raises(IntegrityError, match=r"/broken: model\.vision_tower\..* holds a NaN or an infinity"):
        open_policy("sft", settings(), parent=tmp_path / "broken", **chosen)


def test_a_report_that_holds_the_image_token_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    from valor.training import policy

    def odd(*args, **kwargs):
        first, *others = training_studies(*args, **kwargs)
        return [dataclasses.replace(first, findings="Private <image> words."), *others]

    chosen = {"parent": world().base, "dataset": world().dataset, "output_dir": tmp_path, "projector_only": True}
    assert policy.open_policy("sft", settings(), **chosen)
    monkeypatch.setattr(policy, "training_studies", odd)
    with pytest.raises(DataError, match="its report holds '<image>'"):
        policy.open_policy("sft", settings(), **chosen)


def test_what_goes_beyond_the_models_context_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    from valor.models import loading
    from valor.training import policy

    load = loading.load_policy

    def built_for(positions, **rotary):
        def loaded(path):
            model, processor = load(path)
            text = model.config.get_text_config()
            text.max_position_embeddings, text.rope_parameters = positions, {**text.rope_parameters, **rotary}
            return model, processor

        return loaded

    chosen = {"parent": world().base, "dataset": world().dataset, "output_dir": tmp_path, "projector_only": True}
    few = settings().model_copy(update={"max_new_tokens": 30})
    model, processor = load(world().base)
    text = processor.apply_chat_template(loading.messages(PROMPT), add_generation_prompt=True)
    question = model.config.image_seq_length - 1 + len(processor.tokenizer(text)["input_ids"])
    for stage, positions, error, words in (
        ("sft", question, UserError, rf"^sft: prompt and image take {question} tokens, .* has {question}; take a base"),
        ("sft", question + 5, DataError, r"^study s\d+: its report has \d+ tokens, .* leaves 5 beside"),
        ("grpo_text", question + 29, UserError, r"^grpo_text\.max_new_tokens is 30, .* leaves 29 beside"),
    ):
        monkeypatch.setattr(policy, "load_policy", built_for(positions))
        with pytest.raises(error, match=words):
            policy.open_policy(stage, few, **chosen)
        # Rotary positions that are stretched reach further.
        monkeypatch.setattr(policy, "load_policy", built_for(positions, factor=4.0))
        assert policy.open_policy(stage, few, **chosen)
    monkeypatch.setattr(policy, "load_policy", built_for(question + 30))
    assert policy.open_policy("grpo_text", few, **chosen)


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_number_of_the_log_that_is_none_stops_the_stage(key):
    from types import SimpleNamespace

    from valor.training.callbacks import StopOnNan

    StopOnNan().on_log(None, SimpleNamespace(global_step=2), None, logs={key: 1e30, "kl": float("nan")})
    with pytest.raises(GuardStop, match=rf"step 2: {key} is inf"):
        StopOnNan().on_log(None, SimpleNamespace(global_step=2), None, logs={key: float("inf")})


def test_contradicting_settings_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^trainer: ") as caught:
        run(tmp_path / "checkpoint", settings(lr_scheduler_type="none such"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_survives_sigkill(tmp_path):
    chosen = settings(max_steps=36)
    survives_a_kill(sft, chosen, tmp_path=tmp_path, seed=1, dataset=world().dataset, base=world().base)
    assert losses(tmp_path / "continued") == losses(tmp_path / "undisturbed")


def losses(path: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in json.loads((path / "valor.json").read_text())["history"]]
