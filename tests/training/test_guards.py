"""Collapse guards: each limit fires at its own number, healthy runs pass, the last good checkpoint stays."""

import contextlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_llava import world

from valor.__main__ import main
from valor.context import Context
from valor.errors import GuardStop, Interrupted, UserError
from valor.models.loading import load_policy
from valor.recipe import GrpoTextSettings, Guards, TextReward, load
from valor.stages.grpo_text import grpo_text
from valor.training import callbacks
from valor.training.guards import (
    ABNORMAL,
    CALLED,
    STATED,
    blind_spots,
    collapse,
    healthy,
    missed_silence,
    stated_findings,
)

HEALTHY = {
    STATED: 0.8, CALLED: 0.2, "completions/mean_length": 40.0, "completions/clipped_ratio": 0.1, "entropy": 0.4,
    "kl": 0.05,
}  # fmt: skip
WINDOW = Guards().window


def log(*, then: int = 0, **changed: float) -> list[dict[str, float]]:
    """Return a healthy log of two windows, then `then` lines with some numbers changed."""
    lines = [HEALTHY] * (2 * WINDOW) + [HEALTHY | changed] * then
    return [{"loss": 0.0, "step": step, **line} for step, line in enumerate(lines, start=1)]


LIMITS = [
    ("min_findings_ratio", STATED, 0.39, 0.41),
    ("max_called_rise", CALLED, 0.69, 0.67),
    ("min_length_ratio", "completions/mean_length", 19.0, 21.0),
    ("max_length_ratio", "completions/mean_length", 81.0, 79.0),
    ("max_cut_rise", "completions/clipped_ratio", 0.56, 0.54),
    ("min_entropy_ratio", "entropy", 0.039, 0.041),
    ("max_entropy_ratio", "entropy", 1.61, 1.59),
    ("max_kl", "kl", 1.01, 0.99),
]


@pytest.mark.parametrize(("setting", "key", "beyond", "within"), LIMITS)
def test_each_guard_stops_at_its_own_limit_and_can_be_set_or_turned_off(setting, key, beyond, within):
    stopped = log(then=WINDOW, **{key: beyond})
    verdict = collapse(stopped, Guards())
    assert f"guards.{setting} " in verdict
    assert f"{beyond:.3g} on average" in verdict
    assert "lower trainer.learning_rate" in verdict
    assert "\n" not in verdict
    assert collapse(log(then=WINDOW, **{key: within}), Guards()) is None
    assert collapse(stopped, Guards(**{setting: None})) is None
    assert collapse(stopped, None) is None
    tighter = {"max_called_rise": 0.1, "max_cut_rise": 0.1, "max_kl": 0.5}.get(setting, 1.0)
    assert f"guards.{setting} " in collapse(log(then=WINDOW, **{key: within}), Guards(**{setting: tighter}))


def test_a_fall_is_judged_by_the_windows_mean_not_by_one_line():
    assert collapse(log(then=1, **{STATED: 0.0}), Guards()) is None
    assert collapse(log(then=WINDOW // 2, **{STATED: 0.0}), Guards()) is None
    assert collapse(log(then=WINDOW // 2 + 1, **{STATED: 0.0}), Guards()) is not None


def test_nothing_is_judged_before_there_is_a_reference():
    falling = [{"loss": 0.0, "step": step, STATED: 0.8 if step < 3 else 0.0} for step in range(1, WINDOW + 3)]
    assert collapse(falling[:WINDOW], Guards()) is None
    assert collapse(falling, Guards()) is not None


@pytest.mark.parametrize("steps_per_line", [5, 2 * WINDOW])
def test_a_window_is_steps_however_often_they_are_logged(steps_per_line):
    steps = range(steps_per_line, 100 + 1, steps_per_line)
    lines = [{"loss": 0.0, "step": step, STATED: 0.8 if step <= 60 else 0.0} for step in steps]
    verdicts = [line["step"] for n, line in enumerate(lines, start=1) if collapse(lines[:n], Guards())]
    assert verdicts[0] == (70 if steps_per_line == 5 else 80)
    assert collapse([line for line in lines if line["step"] <= 60], Guards()) is None


def test_a_line_counts_by_the_steps_that_it_averages_over():
    def logged(*lines: tuple[int, float]) -> list[dict[str, float]]:
        return [{"loss": 0.0, "step": step, STATED: value} for step, value in lines]

    # A line of step 1, then one in five steps: over the first ten the share was (0 + 9 * 0.8) / 10.
    start = logged((1, 0.0), (5, 0.8), (10, 0.8))
    fallen = [*start, *logged((15, 0.35), (20, 0.35))]
    assert "0.35 on average of the last 10 steps, 0.72 of the first" in (collapse(fallen, Guards()) or "")
    assert collapse([*start[1:], *logged((15, 0.41), (20, 0.41))], Guards()) is None
    # An interval in two lines is judged as in one.
    late = [*logged((5, 0.8), (10, 0.8), (15, 0.8)), *logged((19, 0.02), (20, 0.8))]
    whole = [*logged((5, 0.8), (10, 0.8), (15, 0.8)), *logged((20, 0.176))]
    judged = [collapse(lines, Guards(min_findings_ratio=0.62)) for lines in (late, whole)]
    assert judged[0] == judged[1] is not None


def test_lines_without_the_number_and_the_trainers_summary_do_not_count():
    gaps = [{"loss": 0.0, "step": 99, STATED: None}, {"train_runtime": 1.0, "step": 99, STATED: 0.0}] * (2 * WINDOW)
    assert collapse(log() + gaps, Guards()) is None
    assert healthy(log() + gaps, Guards())


def test_what_was_never_there_cannot_be_lost():
    silent = [{"loss": 0.0, "step": n, STATED: 0.0, "completions/clipped_ratio": 1.0} for n in range(1, 3 * WINDOW)]
    assert collapse(silent, Guards()) is None


@pytest.mark.parametrize(("setting", "key", "beyond", "within"), LIMITS)
def test_a_checkpoint_is_good_only_far_from_every_limit(setting, key, beyond, within):
    assert healthy(log(), Guards())
    assert not healthy(log(then=1, **{key: beyond}), Guards()), "a sudden collapse shows in the last line"
    assert not healthy(log(then=WINDOW, **{key: within}), Guards()), "a slow one in the mean"
    assert healthy(log(then=WINDOW, **{key: HEALTHY[key] * 1.02}), Guards())
    assert healthy(log(then=1, **{key: beyond}), Guards(**{setting: None}))


def test_recall_is_of_abnormal_references_and_false_alarms_of_normal_ones():
    normal, abnormal = "No pleural effusion. Support devices in place.", "Small left pleural effusion."
    doubtful, both = "Possible pneumonia.", "Small left pleural effusion. Cardiomegaly. No acute disease."
    found = stated_findings([normal, abnormal, doubtful, both], [abnormal] * 4)
    assert found == {STATED: [0, 1, 0, 1], CALLED: [], ABNORMAL: [1] * 4}
    assert stated_findings([normal, doubtful], [normal] * 2) == {STATED: [], CALLED: [0, 1], ABNORMAL: [0, 0]}
    assert stated_findings(["", ""], [abnormal, normal]) == {STATED: [0], CALLED: [0], ABNORMAL: [1, 0]}


def test_one_finding_for_all_others_is_silence_about_them():
    references = ["Left pneumothorax. Left rib fracture.", "Right lower lobe consolidation.", "Small left effusion."]
    assert stated_findings(references, references)[STATED] == [1, 1, 1]
    assert stated_findings(["Cardiomegaly."] * 3, references)[STATED] == [0, 0, 0]
    # A consolidation is an opacity; who suspects a pneumonia has named both.
    named = stated_findings(["There is an opacity.", "Possible pneumonia."], [references[1]] * 2)[STATED]
    assert named == [0.5, 1]


@pytest.mark.parametrize(("prompts", "steps"), [(8, 100), (8, 300), (2, 300)])
def test_chance_does_not_stop_a_stage_and_silence_does(prompts, steps):
    """Each prompt's completions agree nearly always, which is the worst that a group can do to a mean."""
    rng = np.random.default_rng(0)

    def logged(share: np.ndarray) -> list[dict[str, float]]:
        said = rng.random((len(share), prompts)) < share[:, None]
        by_line = said.mean(axis=1).reshape(-1, 5).mean(axis=1)
        return [{"loss": 0.0, "step": 5 * n, STATED: float(value)} for n, value in enumerate(by_line, start=1)]

    def stopped(lines: list[dict[str, float]], prompts: float) -> int | None:
        ends = range(1, len(lines) + 1)
        return next((lines[n - 1]["step"] for n in ends if collapse(lines[:n], Guards(), prompts=prompts)), None)

    steady = [logged(np.full(steps, 0.28)) for _ in range(60)]
    assert [stopped(lines, prompts) for lines in steady] == [None] * 60
    assert any(stopped(lines, math.inf) for lines in steady), "without their noise the same windows would stop it"
    if prompts == 8:
        silent = [logged(np.where(np.arange(steps) < 50, 0.5, 0.02)) for _ in range(20)]
        assert all(50 < (stopped(lines, prompts) or 0) <= 70 for lines in silent)


def test_silence_that_a_window_could_not_show_is_told_once_it_is_known():
    def first(share: float, **more: float) -> list[dict[str, float]]:
        return [{"loss": 0.0, "step": n, STATED: share, **more} for n in range(1, WINDOW + 1)]

    told = missed_silence(first(0.15), Guards(), prompts=8, every=1)
    assert told is not None
    assert "a share of 0.15, and 80 prompts in a window" in told
    assert missed_silence(first(0.25), Guards(), prompts=8, every=1) is None
    assert missed_silence(first(0.6, **{ABNORMAL: 0.25}), Guards(), prompts=4, every=1) is not None
    assert missed_silence(first(0.6, **{ABNORMAL: 1.0}), Guards(), prompts=4, every=1) is None
    assert missed_silence(first(0.15), Guards(min_findings_ratio=None), prompts=8, every=1) is None
    assert missed_silence([], Guards(), prompts=8, every=1) is None
    # What is told cannot be stopped, and what is not can.
    for share, prompts in ((0.15, 8), (0.25, 8), (0.6, 1), (0.6, 4)):
        silent = [{"loss": 0.0, "step": WINDOW + n, STATED: 0.0} for n in range(1, WINDOW + 1)]
        verdict = collapse(first(share) + silent, Guards(), prompts=prompts)
        assert (verdict is None) == (missed_silence(first(share), Guards(), prompts=prompts, every=1) is not None)


def test_a_generation_that_several_steps_learn_from_counts_in_full():
    """TRL logs what its completions say in one line of ten, and their prompts are those of all ten steps."""
    lines = [{"loss": 0.0, "step": n} | ({STATED: 0.8 if n < 25 else 0.0} if n % 10 == 1 else {}) for n in range(1, 60)]
    assert collapse(lines, Guards(), prompts=2, every=10) is not None
    assert collapse(lines, Guards(), prompts=2, every=1) is None, "two prompts in a window tell nothing"


def test_a_share_of_few_studies_is_not_judged_as_one_of_many():
    def logged(normal: float, called: float) -> list[dict[str, float]]:
        steps = range(1, 2 * WINDOW + 1)
        return [{"loss": 0.0, "step": n, ABNORMAL: 1 - normal, CALLED: called if n > WINDOW else 0.0} for n in steps]

    assert collapse(logged(normal=0.5, called=0.9), Guards(), prompts=8) is not None
    assert collapse(logged(normal=0.0125, called=0.9), Guards(), prompts=8) is None, "one study in a window"


def test_findings_everywhere_are_seen_where_most_studies_have_some():
    def calling(share):
        return [{"loss": 0.0, "step": n, STATED: share(n), CALLED: share(n)} for n in range(1, 3 * WINDOW + 1)]

    assert collapse(calling(lambda n: 0.7), Guards()) is None
    verdict = collapse(calling(lambda n: 0.7 if n <= WINDOW else 0.95), Guards())
    assert "guards.max_called_rise" in verdict


def test_a_guard_that_cannot_see_says_so():
    assert blind_spots(Guards(), beta=0.1, logging_steps=1, max_steps=100) == []
    (kl,) = blind_spots(Guards(), beta=0.0, logging_steps=1, max_steps=100)
    assert "max_kl" in kl
    assert blind_spots(Guards(max_kl=None), beta=0.0, logging_steps=1, max_steps=100) == []
    (rare,) = blind_spots(Guards(), beta=0.1, logging_steps=60, max_steps=100)
    assert "logging_steps" in rare
    (short,) = blind_spots(Guards(), beta=0.1, logging_steps=1, max_steps=10)
    assert "window" in short
    assert blind_spots(Guards(), beta=0.1, logging_steps=5, max_steps=14) != []
    assert blind_spots(Guards(), beta=0.1, logging_steps=5, max_steps=15) == []
    assert blind_spots(None, beta=0.0, logging_steps=60, max_steps=10) == []


@pytest.mark.parametrize(("epochs", "told"), [(1, True), (8, False)])
def test_a_stage_that_epochs_end_is_told_too_what_no_guard_will_judge(tmp_path, caplog, epochs, told):
    caplog.set_level("INFO")
    trainer = {**settings(steps=1, learning_rate=1e-4).trainer, "max_steps": -1, "num_train_epochs": epochs}
    chosen = settings(steps=1, learning_rate=1e-4).model_copy(update={"trainer": trainer, "max_new_tokens": 4})
    grpo_text(
        chosen, dataset=world().dataset, parent=world().parent, checkpoint=tmp_path / "checkpoint",
        context=Context(work_root=str(tmp_path / "work")),
    )  # fmt: skip
    assert ("no guard will judge" in caplog.text) == told


def test_the_recipe_sets_guards_or_turns_them_off():
    guards = load("phantom", ["grpo_text.guards.min_findings_ratio=null", "grpo_vision.guards.window=4"])
    assert guards.grpo_text.guards == Guards(min_findings_ratio=None)
    assert guards.grpo_vision.guards == Guards(window=4)
    assert load("phantom", ["grpo_text.guards=null"]).grpo_text.guards is None
    with pytest.raises(UserError, match=r"grpo_text\.guards\.max_length_ratio"):
        load("phantom", ["grpo_text.guards.max_length_ratio=0.5"])
    with pytest.raises(UserError, match=r"sft\.guards: unknown key"):
        load("phantom", ["sft.guards.window=3"])


def settings(*rewards: TextReward, steps: int, learning_rate: float) -> GrpoTextSettings:
    trainer = {
        "max_steps": steps, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "num_generations": 2,
        "learning_rate": learning_rate, "save_steps": 1,
    }  # fmt: skip
    chosen = {"rewards": rewards} if rewards else {}
    return GrpoTextSettings(max_new_tokens=24, guards=Guards(window=5), trainer=trainer, **chosen)


def run_by_hand(chosen: GrpoTextSettings, output: Path, *, pipeline_run: str) -> int:
    paths = {"--input": {"dataset": world().dataset, "parent": world().parent}, "--output": {"checkpoint": output}}
    named = [word for flag, given in paths.items() for name, path in given.items() for word in (flag, f"{name}={path}")]
    return main(["grpo_text", "--settings", chosen.model_dump_json(), *named, "--run", pipeline_run])


def test_a_reward_that_pays_for_silence_is_stopped_and_the_last_good_checkpoint_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VALOR_TRACKING", "off")
    monkeypatch.setenv("VALOR_WORK_ROOT", str(tmp_path / "work"))
    for_silence = TextReward(name="length_reward", options={"low": 0.01, "high": 0.3})
    hopeless = settings(for_silence, steps=40, learning_rate=1.5e-3)
    world()
    capsys.readouterr()

    def verdict(pipeline_run: str) -> str:
        assert run_by_hand(hopeless, tmp_path / "checkpoint", pipeline_run=pipeline_run) == 8
        return capsys.readouterr().err.strip().splitlines()[-1]

    first = verdict("run-1")
    assert "the share of findings that completions state" in first
    assert "guards.min_findings_ratio" in first
    (work,) = (path for path in (tmp_path / "work").iterdir() if path.is_dir())
    (good,) = work.glob("checkpoint-*")
    assert first.endswith(f"its last good checkpoint is {good}")
    step, stopped = int(good.name.split("-")[1]), int(first.split("step ")[1].split(":")[0])
    assert 1 < step < stopped - 1, "good is from before the fall"
    state = json.loads((good / "trainer_state.json").read_text())
    assert [line[STATED] for line in state["log_history"]][-1] > 0.5
    assert not (tmp_path / "checkpoint").exists()

    assert "failed for good in this run" in verdict("run-1")
    assert f"change a setting, or delete {work}" in verdict("run-2")
    assert good.exists()

    # Fewer steps make an artifact of it.
    shorter = hopeless.model_copy(update={"trainer": {**hopeless.trainer, "max_steps": step}})
    assert run_by_hand(shorter, tmp_path / "shorter", pipeline_run="run-3") == 0
    weights = dict(load_policy(tmp_path / "shorter")[0].named_parameters())
    kept = load_file(good / "trained.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in kept.items())

    # Only by hand is it continued; it loads, and falls as it did.
    shutil.rmtree(work / "failed")
    again = verdict("run-2")
    assert again.split(";")[0] == first.split(";")[0]


def test_the_line_that_stops_a_stage_is_recorded_too(tmp_path, monkeypatch):
    recorded = []
    monkeypatch.setattr("valor.tracking.runs.log_metrics", lambda metrics, step: recorded.append((step, metrics)))
    for_silence = TextReward(name="length_reward", options={"low": 0.01, "high": 0.3})
    verdict = ended(settings(for_silence, steps=40, learning_rate=3e-3), tmp_path, monkeypatch)
    step, metrics = recorded[-1]
    assert verdict.startswith(f"step {step}: ")
    assert f"train/{STATED}" in metrics


@pytest.mark.parametrize(
    ("limit", "told", "trainer"),
    [
        ({"min_length_ratio": 0.5}, "tokens per completion", {}),
        ({"max_kl": 0.3}, "KL divergence per token from the parent", {"beta": 0.001}),
    ],
)
def test_other_guards_stop_a_real_training_too(tmp_path, monkeypatch, limit, told, trainer):
    for_silence = TextReward(name="length_reward", options={"low": 0.01, "high": 0.3})
    chosen = settings(for_silence, steps=40, learning_rate=1.5e-3)
    limits = {name: None for name in Guards.model_fields if name != "window"} | limit
    chosen = chosen.model_copy(
        update={"guards": Guards(window=5, **limits), "trainer": {**chosen.trainer, "save_strategy": "no", **trainer}}
    )
    verdict = ended(chosen, tmp_path, monkeypatch)
    assert isinstance(verdict, str), "the stage was not stopped"
    assert f": {told}: " in verdict


@pytest.mark.parametrize(
    ("pays", "limit", "told"),
    [
        (lambda text: len(set(text)), {"max_entropy_ratio": 1.5}, "entropy per token"),
        (len, {"max_cut_rise": 0.5}, "the share of completions cut at max_new_tokens"),
    ],
    ids=["noise", "no end"],
)
def test_collapses_that_text_rewards_would_not_pay_for_are_stopped_too(tmp_path, monkeypatch, pays, limit, told):
    def reward(completions, **_):
        return [float(pays(completion[0]["content"])) for completion in completions]

    monkeypatch.setattr("valor.rewards.text.build", lambda *args, **kwargs: ([reward], [1.0]))
    limits = {name: None for name in Guards.model_fields if name != "window"} | limit
    chosen = settings(steps=60, learning_rate=1.5e-3)
    chosen = chosen.model_copy(
        update={"guards": Guards(window=5, **limits), "trainer": {**chosen.trainer, "num_generations": 4}}
    )
    verdict = ended(chosen, tmp_path, monkeypatch)
    assert isinstance(verdict, str), "the stage was not stopped"
    assert f": {told}: " in verdict


def test_a_healthy_run_is_not_stopped(tmp_path):
    result = grpo_text(
        settings(steps=12, learning_rate=3e-4), dataset=world().dataset, parent=world().parent,
        checkpoint=tmp_path / "checkpoint", context=Context(work_root=str(tmp_path / "work")),
    )  # fmt: skip
    assert result.metrics["steps"] == 12
    history = json.loads((tmp_path / "checkpoint" / "valor.json").read_text())["history"]
    assert min(line[STATED] for line in history) > 0.6


def test_guards_turned_off_let_it_fall(tmp_path):
    for_silence = TextReward(name="length_reward", options={"low": 0.01, "high": 0.3})
    chosen = settings(for_silence, steps=20, learning_rate=1.5e-3).model_copy(update={"guards": None})
    result = grpo_text(
        chosen, dataset=world().dataset, parent=world().parent, checkpoint=tmp_path / "checkpoint",
        context=Context(work_root=str(tmp_path / "work")),
    )  # fmt: skip
    assert result.metrics["steps"] == 20
    history = json.loads((tmp_path / "checkpoint" / "valor.json").read_text())["history"]
    assert history[-1][STATED] < history[0][STATED] / 2
    assert "guards.min_findings_ratio" in collapse(history, Guards(window=5), prompts=8)


class ToldAt:
    """Stands for SIGTERM: the question is asked once a step until something is saved."""

    def __init__(self, step: int):
        self._step, self._asked = step, 0

    def is_set(self) -> bool:
        self._asked += 1
        return self._asked >= self._step


def ended(chosen: GrpoTextSettings, root: Path, monkeypatch, *, told_at: int | None = None):
    """Return a stage's log, or the verdict that ended it; with `told_at` it is told to end there, and continued."""

    def run():
        return grpo_text(
            chosen, dataset=world().dataset, parent=world().parent, checkpoint=root / "checkpoint",
            context=Context(work_root=str(root / "work")),
        )  # fmt: skip

    if told_at is not None:
        with monkeypatch.context() as patch:
            patch.setattr(callbacks, "sigterm", lambda: contextlib.nullcontext(ToldAt(told_at)))
            with pytest.raises(Interrupted, match=f"told to end at step {told_at} "):
                run()
    try:
        run()
    except GuardStop as stop:
        return str(stop).split(";")[0]
    history = json.loads((root / "checkpoint" / "valor.json").read_text())["history"]
    return [(line["step"], *(line.get(key) for key in HEALTHY)) for line in history]


@pytest.mark.parametrize("told_at", [3, 7])
def test_a_stage_continued_between_two_log_lines_is_judged_as_if_it_had_not_stopped(tmp_path, monkeypatch, told_at):
    def rarely_logged(chosen: GrpoTextSettings) -> GrpoTextSettings:
        trainer = {**chosen.trainer, "logging_steps": 5, "save_strategy": "no"}
        return chosen.model_copy(update={"trainer": trainer})

    for_silence = TextReward(name="length_reward", options={"low": 0.01, "high": 0.3})
    falling = rarely_logged(settings(for_silence, steps=40, learning_rate=1.5e-3))
    undisturbed = ended(falling, tmp_path / "falls", monkeypatch)
    assert "the share of findings that completions state" in undisturbed
    assert ended(falling, tmp_path / "falls, continued", monkeypatch, told_at=told_at) == undisturbed
    healthy_one = rarely_logged(settings(steps=10, learning_rate=3e-4))
    undisturbed = ended(healthy_one, tmp_path / "lives", monkeypatch)
    assert [line[0] for line in undisturbed] == [5, 10]
    assert ended(healthy_one, tmp_path / "lives, continued", monkeypatch, told_at=told_at) == undisturbed
