"""The grpo_vision stage, end to end on a tiny LLaVA and a tiny CLIP."""

import statistics
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1] / "training"))
from killing import survives_a_kill
from tiny_llava import world

from valor import artifacts
from valor.context import Context
from valor.data.manifest import other_subjects
from valor.errors import GuardStop
from valor.models.loading import load_policy
from valor.recipe import GrpoVisionSettings, Guards
from valor.stages.grpo_vision import _normaliser, _tolerance, grpo_vision, trainer
from valor.training.advantages import rank_advantages, standardised_advantages
from valor.training.guards import ABNORMAL, STATED, stated_findings
from valor.training.rows import grpo_rows, training_studies
from valor.training.trainers import VisionGRPOTrainer

SIZE = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "learning_rate": 1e-2,
}


def settings(similarity="statements", **trainer) -> GrpoVisionSettings:
    return GrpoVisionSettings(
        similarity=similarity, tolerance=1e-4, max_new_tokens=24, trainer={"max_steps": 4, **SIZE, **trainer}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("vision") / "checkpoint"
    optimizers = []
    train = VisionGRPOTrainer.train

    def watched(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        optimizers.append(self.optimizer.state_dict())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionGRPOTrainer, "train", watched)
        context = Context(work_root=str(path.with_name("work")))
        grpo_vision(
            settings(), dataset=world().dataset, parent=world().parent, expert=world().expert, checkpoint=path,
            context=context,
        )  # fmt: skip
    return path, optimizers[0]


def test_the_projector_changes_and_no_other_tensor_by_a_bit(trained):
    path, _ = trained
    before, after = load_file(world().parent / "model.safetensors"), load_file(path / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}


def test_the_optimizer_holds_the_projector_and_nothing_else(trained):
    path, optimizer = trained
    weights = load_file(path / "model.safetensors")
    shapes = sorted(tuple(value.shape) for name, value in weights.items() if "multi_modal_projector" in name)
    assert sorted(tuple(state["exp_avg"].shape) for state in optimizer["state"].values()) == shapes
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == len(shapes)


def test_the_checkpoint_names_the_expert_as_a_parent(trained):
    info = artifacts.load_checkpoint_info(trained[0])
    assert info["parents"] == {
        "parent": artifacts.read_stamp(world().parent)["digest"],
        "expert": artifacts.read_stamp(world().expert)["digest"],
    }
    assert {"unusable_ratio", "frac_groups_tied", "rewards/expert_statements_reward/mean"} <= info["history"][0].keys()


def test_a_trainer_checkpoint_holds_the_projector_and_its_optimizer_and_names_the_parent(trained):
    path, _ = trained
    newest = max(path.with_name("work").glob("*/checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    projector = {name for name in load_file(path / "model.safetensors") if "multi_modal_projector" in name}
    saved = load_file(newest / "trained.safetensors")
    assert len(saved) == len(projector)
    assert all("multi_modal_projector" in name for name in saved)
    state = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    assert sorted(tuple(entry["exp_avg"].shape) for entry in state.values()) == sorted(
        tuple(value.shape) for value in saved.values()
    )
    assert artifacts.read_json(newest / "parent.json") == {"parent": artifacts.read_stamp(world().parent)["digest"]}
    weights = sum(value.nbytes for value in saved.values())
    size = sum(file.stat().st_size for file in newest.iterdir())
    # Weights and Adam's two moments; the rest is what every checkpoint has, whatever its model.
    assert 3 * weights < size < 3 * weights + 60_000
    assert size < (path / "model.safetensors").stat().st_size / 2


def test_the_kl_term_compares_with_the_parent(tmp_path):
    path = tmp_path / "checkpoint"
    grpo_vision(
        settings(max_steps=2, beta=0.1), dataset=world().dataset, parent=world().parent, expert=world().expert,
        checkpoint=path, context=Context(work_root=str(tmp_path / "work")),
    )  # fmt: skip
    first, second = (line["kl"] for line in artifacts.load_checkpoint_info(path)["history"])
    assert first == pytest.approx(0, abs=1e-6)
    assert second > 1e-6


def test_group_advantages_are_the_groups_standardised_rewards(tmp_path, monkeypatch):
    found = []

    def watched(*args, **kwargs):
        found.append(standardised_advantages(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr("valor.training.advantages.standardised_advantages", watched)
    changed = settings(max_steps=1).model_copy(update={"advantages": "group"})
    grpo_vision(
        changed, dataset=world().dataset, parent=world().parent, expert=world().expert,
        checkpoint=tmp_path / "checkpoint", context=Context(work_root=str(tmp_path / "work")),
    )  # fmt: skip
    assert len(found) == 1
    assert len(found[0]) == SIZE["per_device_train_batch_size"]
    assert _normaliser(settings(), {}).func is rank_advantages


@pytest.mark.parametrize("similarity", ["statements", "paper"])
def test_the_loss_sees_the_ranks_of_the_experts_rewards_with_the_unusable_last(tmp_path, monkeypatch, similarity):
    """Whatever TRL makes of the rewards: here a cut completion has the best of all."""
    seen = {"loss": []}
    calculate, generate = VisionGRPOTrainer._calculate_rewards, VisionGRPOTrainer._generate_and_score_completions
    compute_loss = VisionGRPOTrainer._compute_loss

    def calculated(self, inputs, prompts, completions, ids):
        rewards = calculate(self, inputs, prompts, completions, ids)
        seen["rewards"] = rewards[:, 0].tolist()
        return rewards

    def generated(self, inputs):
        output = generate(self, inputs)
        seen["advantages"] = output["advantages"].tolist()
        return output

    def lost(self, model, inputs):
        seen["loss"] += inputs["advantages"].tolist()
        return compute_loss(self, model, inputs)

    def cut(texts, cut, *, must_state):
        assert must_state == (similarity == "statements")
        seen["cut"] = [i % 4 == 1 for i in range(len(texts))]
        return seen["cut"]

    monkeypatch.setattr(VisionGRPOTrainer, "_calculate_rewards", calculated)
    monkeypatch.setattr(VisionGRPOTrainer, "_generate_and_score_completions", generated)
    monkeypatch.setattr(VisionGRPOTrainer, "_compute_loss", lost)
    monkeypatch.setattr("valor.training.trainers.unusable", cut)
    _pays(monkeypatch, _fixed(REWARDS))
    grpo_vision(
        settings(similarity, max_steps=1), dataset=world().dataset, parent=world().parent, expert=world().expert,
        checkpoint=tmp_path / "checkpoint", context=Context(work_root=str(tmp_path / "work")),
    )  # fmt: skip
    rewards, advantages = seen["rewards"], seen["advantages"]
    assert rewards == REWARDS
    ranks = rank_advantages(torch.tensor(rewards), group_size=4, tolerance=1e-4, unusable=torch.tensor(seen["cut"]))
    assert advantages == pytest.approx(ranks.tolist())
    assert sorted(seen["loss"]) == pytest.approx(sorted(ranks.tolist()))
    assert advantages[1] == min(advantages[:4]) < 0


REWARDS = [-0.25, 0.5, -0.5, -0.125, -2.0, 0.25, -0.25, -1.0]


def _pays(monkeypatch, reward):
    """Let the stage train on `reward` instead of its expert's."""
    reward.__name__ = "expert_statements_reward"
    monkeypatch.setattr(
        "valor.stages.grpo_vision.trainer", lambda *args, **kwargs: trainer(*args, **{**kwargs, "reward": reward})
    )


def _fixed(rewards):
    def reward(completions, image_embed, **_):
        assert len(image_embed) == len(completions) == len(rewards)
        return rewards

    return reward


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), None])
def test_a_reward_that_is_no_number_stops_the_stage(tmp_path, monkeypatch, broken):
    _pays(monkeypatch, _fixed([*REWARDS[:-1], broken]))
    with pytest.raises(GuardStop, match=r"^step 1: a reward is (nan|inf); .*calibration"):
        grpo_vision(
            settings(), dataset=world().dataset, parent=world().parent, expert=world().expert,
            checkpoint=tmp_path / "checkpoint", context=Context(work_root=str(tmp_path / "work")),
        )  # fmt: skip
    assert not (tmp_path / "checkpoint").exists()


def test_a_reward_that_pays_for_every_word_is_stopped_and_the_last_good_checkpoint_stays(tmp_path, monkeypatch):
    _pays(monkeypatch, lambda completions, **_: [float(len(completion[0]["content"])) for completion in completions])
    changes = {"per_device_train_batch_size": 16, "num_generations": 8, "learning_rate": 0.1, "save_steps": 1}
    wordy = settings(max_steps=40, **changes).model_copy(update={"guards": Guards(window=5), "max_new_tokens": 60})
    with pytest.raises(GuardStop, match=r"tokens per completion: .*guards\.max_length_ratio") as stop:
        grpo_vision(
            wordy, dataset=world().dataset, parent=world().parent, expert=world().expert,
            checkpoint=tmp_path / "checkpoint", context=Context(work_root=str(tmp_path / "work")),
        )  # fmt: skip
    (good,) = (tmp_path / "work").glob("*/checkpoint-*")
    assert str(stop.value).endswith(f"its last good checkpoint is {good}")
    assert int(good.name.split("-")[1]) < int(str(stop.value).split("step ")[1].split(":")[0])
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_rewards_see_no_reference_and_the_guards_do(tmp_path, monkeypatch):
    """That a policy tells one finding for all others shows beside the references alone."""
    reports = {study.study_id: study.text for study in training_studies(world().dataset, studies=0, seed=0)}
    seen = []

    def nosy(completions, **kwargs):
        seen.append(([completion[0]["content"] for completion in completions], kwargs))
        return [float(i) for i in range(len(completions))]

    _pays(monkeypatch, nosy)
    grpo_vision(
        settings(max_steps=1), dataset=world().dataset, parent=world().parent, expert=world().expert,
        checkpoint=tmp_path / "checkpoint", context=Context(work_root=str(tmp_path / "work")),
    )  # fmt: skip
    ((texts, given),) = seen
    assert {"prompts", "study_id", "image_embed"} <= given.keys()
    assert not [report for report in reports.values() if report[:30] in repr(given)]
    due = stated_findings(texts, [reports[study_id] for study_id in given["study_id"]])
    (line,) = artifacts.load_checkpoint_info(tmp_path / "checkpoint")["history"]
    assert line[STATED] == pytest.approx(statistics.mean(due[STATED]))
    assert line[ABNORMAL] == 1


def test_survives_sigkill(tmp_path):
    metrics = survives_a_kill(
        grpo_vision, settings(max_steps=16), tmp_path=tmp_path, seed=3, dataset=world().dataset,
        parent=world().parent, expert=world().expert,
    )  # fmt: skip
    assert metrics["steps"] == 16


def test_the_tolerance_is_the_recipes_or_else_the_noise_that_the_experts_gate_measured(caplog):
    gate = {"paraphrase_noise": {"paper": 0.004, "statements": None}}
    unset = settings("paper").model_copy(update={"tolerance": None})
    assert _tolerance(settings(), gate) == 1e-4
    assert _tolerance(unset, gate) == 0.004
    for similarity, known in (("statements", gate), ("paper", {"measured": False})):
        caplog.clear()
        assert _tolerance(unset.model_copy(update={"similarity": similarity}), known) == 0
        assert f"no noise between paraphrases for similarity: {similarity}" in caplog.text


def test_the_expert_can_be_shown_another_patients_image():
    """An ablation: rows then carry embeddings of other subjects' images, each of another study."""
    studies = training_studies(world().dataset, studies=0, seed=0)
    processor = load_policy(world().parent)[1]
    seen = other_subjects([study.subject_id for study in studies])
    assert all(studies[i].subject_id != studies[j].subject_id for i, j in enumerate(seen))

    def embed(images):
        return torch.tensor([[float(images[0].mean())]])

    own, other = (grpo_rows(studies, processor, prompt="Go.", embed=embed, seen=order) for order in ((), seen))
    assert other[0]["image_embed"] == own[seen[0]]["image_embed"] != own[0]["image_embed"]
    assert other[0]["image"].tobytes() == own[0]["image"].tobytes()
