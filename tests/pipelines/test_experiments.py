"""The experiments' machinery: jobs that are shared, intervals that are paired, a page from tables alone."""

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import orphans
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from tiny_llava import gate_of

from pipelines.experiments import (
    analysis,
    arms,
    collect,
    command,
    document,
    groups,
    headline,
    ledger,
    results,
    run,
    wording,
)
from pipelines.experiments.analysis import Table
from pipelines.experiments.arms import ARMS, REWARDED, SUPERVISED, Schedule, Seed
from pipelines.experiments.curve import BIASES, leanings
from pipelines.experiments.execute import code_digest, execute
from pipelines.experiments.jobs import Job, with_ancestors
from pipelines.experiments.signal import summary
from pipelines.experiments.truth import truth_reward
from valor import artifacts
from valor.data.manifest import read_studies
from valor.errors import IntegrityError, ResourceError, UserError, ValorError
from valor.evaluation.predict import TABLE
from valor.evaluation.scores import COLUMNS
from valor.recipe import parse_section
from valor.stages import STAGES
from valor.training.rows import training_studies

LENIENT = {"min_image_std": 0.0, "min_studies": 0}
FINDINGS = ("Edema", "Pneumothorax", "Pleural Effusion")


@pytest.fixture(autouse=True)
def the_environment_is_as_it_was():
    """Experiments and their jobs set it for processes of their own, which in some tests are this one."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def job(name="a", **changes):
    return Job(**{"name": name, "stage": "sft", "settings": {"seed": 1}, "outputs": ("checkpoint",), **changes})


def test_a_job_is_what_it_was_asked_for_and_not_how_it_is_called():
    assert job("a").key == job("b", cores=2).key
    assert job(settings={"seed": 2}).key != job().key
    assert job(inputs={"base": job().output("checkpoint")}).key != job().key
    with pytest.raises(KeyError, match="has no output"):
        job().output("expert")


def test_what_is_needed_comes_first_and_once():
    first = job("first")
    left, right = (job(n, settings={"seed": n}, inputs={"base": first.output("checkpoint")}) for n in (5, 6))
    assert with_ancestors([left, right]) == [first, left, right]


def test_every_job_of_every_arm_is_one_that_its_stage_accepts():
    jobs = with_ancestors([arm.reports(Seed(7)) for arm in ARMS.values()])
    for one in jobs:
        if one.stage in STAGES:
            parse_section(one.stage, json.dumps(dict(one.settings)))
    assert {one.stage for one in jobs} >= {"sft", "grpo_text", "grpo_vision", "predict", "fetch_models"}


def test_arms_of_a_seed_share_what_they_can_and_seeds_share_nothing():
    jobs = with_ancestors([arm.reports(Seed(7)) for arm in ARMS.values()])
    stages = [one.stage for one in jobs]
    assert stages.count("data") == 1
    assert stages.count("grpo_text") == 3  # the recipe's, clinical only, lexical only
    assert stages.count("sft") == 3  # the first, continued, on pseudo-labels
    others = with_ancestors([arm.reports(Seed(8)) for arm in ARMS.values()])
    assert not {one.key for one in jobs} & {one.key for one in others}
    assert Seed(7).vision().job.key != Seed(7, dataclasses.replace(Schedule(), vision_lr=1.0)).vision().job.key


def test_base_expert_judge_and_studies_are_drawn_from_seeds_of_their_own():
    drawn = []
    for number in command.TEST_SEEDS:
        seed = Seed(number)
        models = seed.models().settings
        drawn += [seed.data.settings["phantom"]["seed"]]
        drawn += [models[f"phantom_{name}"]["seed"] for name in ("base", "expert", "judge")]
    assert len(set(drawn)) == len(drawn) == 20


def test_headroom_and_the_operating_curve_come_before_reinforcement(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("VALOR_HOME", str(tmp_path))
    monkeypatch.setattr(run, "run", lambda jobs, **_: asked.extend(jobs))
    monkeypatch.setattr(command, "collect_all", lambda *_, **__: tmp_path)
    command.run_all([], seeds=[5], cores=1, folder=tmp_path / "page")
    first = next(place for place, one in enumerate(asked) if one.stage in ("grpo_text", "grpo_vision", "truth"))
    assert {"probe", "curve"} <= {one.stage for one in asked[:first]}


def test_rewards_never_see_the_supervised_share():
    assert SUPERVISED[1] == REWARDED[0]
    assert Seed(7).sft.job.settings["share"] == SUPERVISED
    assert Seed(7).text().job.settings["share"] == Seed(7).vision().job.settings["share"] == REWARDED


def table(skill: float, *, seed: int, studies: int = 120, invented: float | None = None) -> Table:
    """Findings named with probability `skill` where they are, and `invented` (a tenth of that) where they are not."""
    rng = np.random.default_rng(seed)
    values = np.zeros((studies, len(COLUMNS)))
    index = {name: i for i, name in enumerate(COLUMNS)}
    present = rng.random((studies, len(FINDINGS))) < 0.3
    draws = np.random.default_rng(seed + 1).random((studies, len(FINDINGS)))
    stated = draws < np.where(present, skill, skill / 10 if invented is None else invented)
    for j, finding in enumerate(FINDINGS):
        for source in ("truth", "report"):
            values[:, index[f"{source}/tp/{finding}"]] = stated[:, j] & present[:, j]
            values[:, index[f"{source}/fp/{finding}"]] = stated[:, j] & ~present[:, j]
            values[:, index[f"{source}/fn/{finding}"]] = ~stated[:, j] & present[:, j]
    values[:, index["studies"]] = 1
    values[:, index["pairs/count"]] = 1
    values[:, index["pairs/flipped"]] = stated[:, 0] & present[:, 0]
    values[:, index["similarity/sum"]], values[:, index["similarity/count"]] = 0.3, 1
    values[:, index["truth/abnormal"]], values[:, index["truth/abnormal_found"]] = 1, stated.any(axis=1)
    values[:, index["truth/side"]], values[:, index["truth/side_right"]] = 1, stated[:, 0]
    return Table(np.arange(studies) // 2, COLUMNS, values, f"studies of {seed}")


def test_a_difference_is_paired_and_its_interval_holds_the_seeds_mean():
    better, worse = ({s: table(skill, seed=s) for s in (1, 5, 9)} for skill in (0.9, 0.6))
    measure = analysis.measured(worse)["truth_f1_micro"]
    found = analysis.compare(measure, better, worse)
    assert found.low > 0
    assert found.is_sure
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(np.mean(list(found.seeds.values())))
    same = analysis.compare(measure, worse, worse)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert same.within == (0, 0)
    swapped = analysis.compare(measure, worse, better)
    assert swapped.value == pytest.approx(-found.value)
    assert swapped.high < 0


def test_the_interval_is_students_of_the_seeds_and_the_other_one_holds_them():
    base = {s: table(0.6, seed=s) for s in (1, 5, 9)}
    steady = {s: table(0.75, seed=s) for s in base}
    unsteady = {1: table(0.95, seed=1), 5: table(0.75, seed=5), 9: table(0.45, seed=9)}
    measure = analysis.measured(base)["truth_f1_micro"]
    narrow, wide = (analysis.compare(measure, arm, base) for arm in (steady, unsteady))
    for found in (narrow, wide):
        low, high = stats.t.interval(0.95, 2, found.value, stats.sem(list(found.seeds.values())))
        assert (found.low, found.high) == pytest.approx((low, high))
        assert found.within[0] < found.value < found.within[1]
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)
    # What the seeds' own subjects allow is about as wide for both.
    assert np.diff(wide.within) < 1.5 * np.diff(narrow.within)
    assert not wide.is_sure
    one = analysis.compare(measure, {1: steady[1]}, base)
    assert (one.low, one.high, one.is_sure) == (-np.inf, np.inf, False)
    assert np.isfinite(one.within).all()


def test_tables_of_other_studies_are_not_compared():
    base = table(0.6, seed=1)
    measure = analysis.measured({1: base})["truth_f1_micro"]
    with pytest.raises(UserError, match="hold different studies"):
        analysis.compare(measure, {1: dataclasses.replace(table(0.9, seed=1), studies="others")}, {1: base})


def test_only_seeds_of_both_arms_are_compared():
    base = {s: table(0.6, seed=s) for s in (1, 5)}
    measure = analysis.measured(base)["truth_f1_micro"]
    assert set(analysis.compare(measure, {1: table(0.9, seed=1)}, base).seeds) == {1}


@pytest.fixture
def collected(tmp_path, monkeypatch):
    """Results of a few arms on two seeds, as `collect` leaves them."""
    monkeypatch.setattr(analysis, "SAMPLES", 100)
    skills = {"sft": 0.55, "continued": 0.6, "text": 0.7, "valor": 0.8, "other_image": 0.64}
    for seed in (1, 5):
        for name, skill in skills.items():
            one = table(skill, seed=seed)
            results.save(tmp_path / f"{name}-{seed}.npz", one)
        for name in arms.CURVES:
            for bias in (-1.0, 0.0, 1.0):
                results.save(
                    tmp_path / f"curve-{name}-{seed}_{bias:g}.npz", table(skills[name] + 0.1 * bias, seed=seed)
                )
        cost = {"took": ["text", "vision"], "processor_seconds": 61, "resumed": False}
        facts = {"seed": seed, "scored_by": "abc", "arms": dict.fromkeys(skills, cost)}
        facts |= {"models": {"processor_seconds": 900, "expert_subjects": 70, "train_subjects": 80}}
        job_facts = {"name": "sft", "settings": {}, "commit": "c", "code": "abc"}
        job_facts |= {"processor_seconds": 3600 * seed, "resumed": False}
        facts |= {"jobs": {f"sft-{seed}": job_facts}}
        for name in ("models", "models, weak expert"):
            models = {**job_facts, "name": f"{name}, seed {seed}", "processor_seconds": 900}
            facts["jobs"] |= {f"{name}-{seed}": models}
        bounds = {"signal_to_noise": [0.0004, 0.002], "cosine": None}
        row = {"signal_to_noise": 0.0012, "cosine": None, "bounds": bounds}
        facts |= {"signal": {"truth": row, "paper": row}}
        facts |= {"probe": {"f1_macro": 0.9, "f1_micro": 0.9, "auc_macro": 0.9, "auc": {}}, "stopped": {}}
        rated = {"auc": 0.91, "side_swap": None, "negation": 0.88, "deletion": 0.95}
        found = {"Edema": rated, "Fracture": {**rated, "auc": 0.5}}
        overall = {"macro_auc": 0.7, "deletion": 0.95}
        expert = {
            "masked": ["Fracture"],
            "masked_sides": [],
            "overall": overall,
            "findings": found,
            "tolerance": 0.0123,
        }
        weak = {**expert, "masked": ["Edema", "Fracture"], "overall": {"macro_auc": 0.6, "deletion": None}}
        facts |= {"expert": expert, "other_experts": {"weak": weak}}
        (tmp_path / f"facts-{seed}.json").write_text(json.dumps(facts))
        opened = {"seed": seed, "date": "2026-01-02", "code": "abc", "plan": "p", "commit": "c"}
        with (tmp_path / "opened.jsonl").open("a") as file:
            file.write(json.dumps(opened) + "\n")
    seal(tmp_path)
    return tmp_path


def seal(folder):
    """Let the facts tell of the tables as they are now, as `collect` does."""
    for seed, path in collect.facts_paths(folder).items():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tables": collect.digests(folder, seed)}))


@pytest.fixture
def two_seeds_are_all(monkeypatch):
    """Let the arms ask for two seeds, which `collected` has."""
    for name, arm in ARMS.items():
        monkeypatch.setitem(ARMS, name, dataclasses.replace(arm, seeds=2))


def test_the_page_shows_what_the_tables_say(collected, two_seeds_are_all):
    page = document.write(collected).read_text()
    ours, theirs = ({s: table(skill, seed=s) for s in (1, 5)} for skill in (0.8, 0.6))
    found = analysis.compare(analysis.measured(theirs)["truth_f1_micro"], ours, theirs)
    assert f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]" in page
    assert re.search(r"\| F1 rises: its interval is above zero \| [+-]\d+\.\d at least \|", page)
    assert re.search(r"\| before RL a probe's macro F1 is 8 points above SFT's \| [+]\d+\.\d \| yes \|", page)
    assert "| SFT continued for the same time: at least 0.95 of it | 1.00 (by seed 1.00, 1.00) | yes |" in page
    assert "F1 above the operating curve of SFT continued" in page
    assert "seeds 1, 5 |" in page
    assert "| minus Stages 1 and 2 | seeds |" in page
    assert re.search(r"\| Another image \| 2 \| -\d", page)
    assert "Arms that stopped" not in page
    assert "| Stages 1 and 2 | 2 |" in page
    assert "Is it the image?" in page
    assert "Which text rewards?" not in page  # none of its arms has run
    assert re.search(r"\| 1 \| 90\.0 \| \d+\.\d \| [+-]\d+\.\d \| \d+\.\d \| Fracture \|", page)
    assert "| 1 | 1 | 91 (Edema) | - | 88 (Edema) | 95 (Edema) | none | none | 0.012 |" in page
    assert "| 1 | strong | 70.0 | 95.0 | 1 |\n| 1 | weak | 60.0 | - | 0 |" in page
    pictures = re.findall(r"!\[([^]]*)\]\((\S+)\)", page)
    assert [figure for _, figure in pictures] == ["headline.svg", "curve.svg", "start.svg", "other_image.svg"]
    for words, figure in pictures:
        assert words, "a picture says what it shows to who cannot see it"
        assert ElementTree.parse(collected / figure).getroot().tag.endswith("svg")
    assert document.write(collected).read_text() == page
    assert "## Stages 1 and 2 against SFT continued" in page
    assert "| 1 | 2026-01-02 (code abc, plan p) | sft, continued, text, valor, other_image |" in page
    assert "in processor seconds by seed: models, 900, 900; models, weak expert, 900, 900 (base," in page
    assert "The expert learned from 70 image-report pairs" in page
    assert "| paper | 1.20 [0.40, 2.00], 1.20 [0.40, 2.00] | -, - |" in page
    assert "| Stages 1 and 2 | text + vision | 61, 61 |" in page
    assert "| an arm of a seed takes at most 900 s of one core | 61 s | yes |" in page
    assert "| all of the above take at most 5 h of two cores | 3.5 h | yes |" in page
    assert re.search(r"\| SFT continued \| 1, 1 \| \d+\.\d \| Stages 1 and 2 \| [+-]\d", page)


def change_facts(folder, seed, change):
    path = folder / f"facts-{seed}.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def test_what_was_asked_and_not_reached_is_told(collected, two_seeds_are_all):
    for seed in (1, 5):
        baseline = results.load(collected / f"continued-{seed}.npz")
        worse = table(0.5, seed=seed, invented=0.2)
        results.save(collected / f"valor-{seed}.npz", worse)
        results.save(collected / f"curve-continued-{seed}_0.npz", baseline)
        ours = analysis.value(
            analysis.measured({1: worse})["truth_f1_macro"], results.load(collected / f"sft-{seed}.npz")
        )
        change_facts(collected, seed, lambda facts, ours=ours: facts["probe"].update(f1_macro=ours + 0.05))
        change_facts(collected, seed, lambda facts: facts["arms"]["valor"].update(processor_seconds=901))
        change_facts(collected, seed, lambda facts: facts["jobs"].update(more=facts["jobs"][f"sft-{facts['seed']}"]))
    seal(collected)
    page = document.write(collected).read_text()
    asked = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| (yes|\*\*no\*\*) \|$", page, re.M))
    assert len(asked) == 16
    assert [name for name, met in asked.items() if met == "yes"] == []


def test_every_ablation_has_its_figure(collected, two_seeds_are_all):
    """And an arm that belongs to none would be run for a row of a table."""
    for seed in (1, 5):
        cost = {"took": ["vision"], "processor_seconds": 61, "resumed": False}
        for place, name in enumerate(ARMS):
            results.save(collected / f"{name}-{seed}.npz", table(0.5 + 0.02 * place, seed=seed))
        change_facts(collected, seed, lambda facts, cost=cost: facts.update(arms=dict.fromkeys(ARMS, cost)))
    seal(collected)
    (collected / "similarity.svg").write_text("of an older page")
    page = document.write(collected).read_text()
    for group in groups.GROUPS:
        drawn = (collected / f"{group.file}.svg").read_text()
        part = page.partition(f"## {group.title}\n")[2].partition("\n## ")[0]
        assert all(f"{ARMS[name].title} (2 seeds)" in drawn for name in (*group.ground, *group.own))
        assert drawn.count("is better)") == 2
        references = re.findall(r"^\| minus (.*?) \|", part, re.MULTILINE)
        assert references == [ARMS[name].title for name in (group.ground[0], group.also) if name]
        second = part.rpartition("| minus ")[2]
        assert all(f"\n| {ARMS[name].title} | 2 |" in second for name in group.own if name != group.also)
    assert {name for group in groups.GROUPS for name in (*group.ground, *group.own)} == set(ARMS)
    for seed in (1, 5):
        (collected / f"paper-{seed}.npz").unlink()
        change_facts(collected, seed, lambda facts: facts["arms"].pop("paper"))
    seal(collected)
    assert "Which similarity?" not in document.write(collected).read_text()
    assert not (collected / "similarity.svg").exists(), "a figure of arms that are gone"


def test_a_bound_that_rounds_to_zero_shows_its_side():
    assert [wording.points(v) for v in (-0.00049, 0.00049, 0.0, 0.013, -1e-9)] == [
        "-0.05",
        "+0.05",
        "+0.0",
        "+1.3",
        "+0.0",
    ]
    assert wording.bounded(-0.018, -0.036, -0.00049) == "-1.8 [-3.6, -0.05]"
    assert wording.bounded(0.01, -np.inf, np.inf) == "+1.0"


HELD = {
    "F1 rises: its interval is above zero": ("truth_f1_micro", "low", 0.0),
    "F1, aim: 3 points": ("truth_f1_micro", "value", 0.03),
    "F1, stretch: 15% relative": ("truth_f1_micro", "relative", 0.15),
    "hallucination falls: its interval is below zero": ("truth_hallucination", "high", 0.0),
    "hallucination, aim: -15% relative": ("truth_hallucination", "relative", -0.15),
    "hallucination, stretch: -25% relative": ("truth_hallucination", "relative", -0.25),
    "omission rises by less than 2 points, by its upper bound": ("truth_omission", "high", 0.02),
    "more counterfactual pairs are told apart: the interval is above zero": ("flip_rate", "low", 0.0),
}
"""What was asked before the seeds were opened: metric, number and bound."""


@pytest.mark.parametrize("asked", HELD)
@pytest.mark.parametrize("beyond", [True, False])
def test_a_verdict_is_yes_just_beyond_its_bound_and_no_just_within(asked, beyond):
    key, number, bound = HELD[asked]
    rises = key in ("truth_f1_micro", "flip_rate")
    value = bound + 1e-4 * (1 if rises == beyond else -1)
    changes = {
        name: analysis.Difference(value=0.0, low=-1.0, high=1.0, within=(-1.0, 1.0), seeds={1: 0.0, 5: 0.0})
        for name, *_ in HELD.values()
    }
    if number != "relative":
        changes[key] = dataclasses.replace(changes[key], **{number: value})
    found = SimpleNamespace(
        shared=lambda *_: [1, 2, 3, 4, 5], relative=lambda name: value if number == "relative" and name == key else 0.0,
        above_best=lambda *_: None, probed=list, facts=[],
    )  # fmt: skip
    told = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| (yes|\*\*no\*\*) \|$", headline._verdicts(found, changes), re.M))
    assert HELD.keys() <= told.keys()
    assert (told[asked] == "yes") == beyond


def test_a_method_that_only_slides_along_the_curve_is_not_above_it(collected, two_seeds_are_all):
    for seed in (1, 5):
        best = results.load(collected / f"curve-sft-{seed}_1.npz")
        results.save(collected / f"valor-{seed}.npz", best)
    seal(collected)
    page = document.write(collected).read_text()
    assert (
        "F1 above the operating curve of SFT: the interval of the difference is above zero | +0.0 at least | **no**"
        in page
    )
    assert "SFT's curve misses more: the interval is below zero | +0.0 at most | **no**" in page


def test_the_page_compares_each_with_its_best_bias(collected, two_seeds_are_all):
    page = document.write(collected).read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| SFT")]
    gains = {(row[0], row[3]): float(row[4].split()[0]) for row in rows if row[1] == "1, 1"}
    # The skill of the arms is 0.55, 0.6 and 0.8, and a bias of 1 adds 0.1.
    for curve in ("SFT", "SFT continued"):
        assert gains[curve, "Stages 1 and 2, at its own best bias"] > gains[curve, "Stages 1 and 2"] > 0


def test_what_a_curve_misses_is_taken_where_it_invents_no_more_and_in_its_favour():
    points = [(0.5, 0.02), (0.3, 0.06), (0.2, 0.10), (0.25, 0.20)]
    # The chord is at 0.25, the line through the two points before at 0.2.
    assert analysis.least_missed(points, invented=0.08) == pytest.approx(0.2)
    assert analysis.least_missed(points, invented=0.06) == 0.3
    # What invents more and misses more is no reason to miss more.
    assert analysis.least_missed(points, invented=0.15) == 0.2
    # Nothing is known of less than the curve's least but that it misses more there.
    assert analysis.least_missed(points, invented=0.01) == 0.5
    assert analysis.least_missed(points[::-1], invented=0.08) == pytest.approx(0.2)


@pytest.mark.parametrize("bend", [0.5, 1.0, 2.0])
def test_no_slide_along_a_convex_curve_looks_like_a_rise(bend):
    def missed(invented):
        return 0.002 / invented**bend

    points = [(missed(said), said) for said in (0.02, 0.03, 0.05, 0.07, 0.1, 0.2)]
    for invented in np.linspace(0.02, 0.2, 50):
        least = analysis.least_missed(points, invented=invented)
        assert least <= missed(invented) + 1e-12
        # And a rise of a fifth is one, where points are near enough.
        if bend <= 1 and 0.03 < invented < 0.1:
            assert 0.8 * missed(invented) < least


def test_what_slides_along_the_curve_misses_as_much_and_what_rises_misses_less(collected, two_seeds_are_all):
    def row(page):
        return re.search(r"^\| SFT \| Stages 1 and 2 \| ([+-]\d+\.\d) .*\| 1: ([+-]\d+\.\d), 5: \S+ \|$", page, re.M)

    for seed in (1, 5):
        results.save(collected / f"valor-{seed}.npz", table(0.8, seed=seed, invented=0.2))
    seal(collected)
    page = document.write(collected).read_text()
    assert re.search(r"SFT's curve misses more: the interval is below zero \| -\d.* at most \| yes", page)
    rises = row(page)
    assert float(rises[1]) < 0
    assert float(rises[2]) < 0
    for seed in (1, 5):
        results.save(collected / f"valor-{seed}.npz", results.load(collected / f"curve-sft-{seed}_1.npz"))
    seal(collected)
    slides = row(document.write(collected).read_text())
    assert slides[1] == slides[2] == "+0.0"


def test_a_curve_of_some_seeds_alone_gives_no_verdict(collected, two_seeds_are_all):
    for path in collected.glob("curve-sft-5_*.npz"):
        path.unlink()
    seal(collected)
    page = document.write(collected).read_text()
    asked = "F1 above the operating curve of {}: the interval of the difference is above zero | {}"
    assert asked.format("SFT", "not known: 1 of 2 seeds have the curve | **no**") in page
    assert asked.format("SFT continued", "+") in page


def test_a_resumed_job_leaves_the_time_unknown(collected, two_seeds_are_all):
    change_facts(collected, 5, lambda facts: facts["arms"]["valor"].update(resumed=True))
    change_facts(collected, 5, lambda facts: facts["jobs"]["sft-5"].update(resumed=True))
    page = document.write(collected).read_text()
    assert "at least 0.95 of it | not known: a job was resumed | **no** |" in page
    assert "| Stages 1 and 2 | text + vision | 61, ≥ 61 |" in page
    assert "two cores | ≥ 3.5 h | **no** |" in page


def test_what_a_stopped_arm_cost_is_not_known(collected, two_seeds_are_all):
    change_facts(collected, 5, lambda facts: facts.update(stopped={"paper": "collapsed"}))
    assert "two cores | ≥ 3.5 h | **no** |" in document.write(collected).read_text()


def test_a_job_that_began_anew_has_spent_all_in_its_last_try():
    for metrics, tries, resumed in (
        ({}, 1, False), ({}, 2, True), ({"resumed_from_step": 0}, 2, False), ({"resumed_from_step": 500}, 1, True),
    ):  # fmt: skip
        assert collect._is_resumed({"metrics": metrics, "tries": tries}) is resumed


def test_results_of_two_versions_of_the_code_are_not_compared(collected):
    path = collected / "facts-5.json"
    facts = json.loads(path.read_text())
    facts["jobs"]["sft-5"]["code"] = "def"
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"2 versions of the code, abc \(seed 5\), def \(seed 5\)"):
        document.write(collected)
    facts["jobs"]["sft-5"]["code"], facts["scored_by"] = "abc", "ghi"
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"2 versions of the code.* ghi \(seed 5\)"):
        document.write(collected)


@pytest.mark.parametrize(
    "left_out", ["sft", "continued", "text", "valor", "other_image", "text valor", "sft continued"]
)
def test_a_page_can_be_written_before_all_arms_are_there(collected, left_out):
    for seed in (1, 5):
        facts = json.loads((collected / f"facts-{seed}.json").read_text())
        for name in left_out.split():
            (collected / f"{name}-{seed}.npz").unlink()
            facts["arms"].pop(name)
        (collected / f"facts-{seed}.json").write_text(json.dumps(facts))
    seal(collected)
    page = document.write(collected).read_text()
    assert "F1 rises" not in page
    assert "## All arms" in page


def test_there_is_no_verdict_before_all_seeds_are_there(collected):
    assert "2 of 5 seeds have both: no verdict." in document.write(collected).read_text()
    (collected / "valor-5.npz").unlink()
    change_facts(collected, 5, lambda facts: facts["arms"].pop("valor"))
    seal(collected)
    page = document.write(collected).read_text()
    assert "1 of 5 seeds have both: no verdict." in page
    assert "nan" not in page
    assert "inf" not in page


def test_the_ledger_has_a_line_for_each_time_that_other_code_begins(tmp_path, monkeypatch):
    ledger.append(tmp_path, [7, 8])
    ledger.append(tmp_path, [8, 9])
    assert [row["seed"] for row in ledger.read(tmp_path)] == [7, 8, 9]
    monkeypatch.setattr(ledger, "code_digest", lambda: "another")
    ledger.append(tmp_path, [7])
    assert [(row["seed"], row["code"]) for row in ledger.read(tmp_path)][3:] == [(7, "another")]


def test_the_ledger_has_a_line_for_each_time_that_other_settings_begin(tmp_path, monkeypatch):
    ledger.append(tmp_path, [7])
    monkeypatch.setattr(Schedule, "__init__", functools.partialmethod(Schedule.__init__, text_lr=2.0e-4))
    ledger.append(tmp_path, [7])
    first, second = ledger.read(tmp_path)
    assert first["code"] == second["code"]
    assert first["plan"] != second["plan"]


@pytest.mark.parametrize("line", [b'{"seed": 8, "da', b"[]", b'{"seed": 8}', b"\xff"])
def test_a_line_of_the_ledger_that_is_none_is_named(tmp_path, line):
    ledger.append(tmp_path, [7])
    with (tmp_path / "opened.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(UserError, match=r"opened\.jsonl:2: .* is no JSON object of seed, date, code, plan, commit"):
        ledger.append(tmp_path, [8])


def test_a_test_seed_is_opened_where_its_ledger_is(tmp_path):
    for action in (functools.partial(command.run_all, cores=1), command.collect_all):
        with pytest.raises(UserError, match=r"test seeds are opened in .*docs/experiments alone"):
            action(["sft"], seeds=command.TEST_SEEDS[:1], folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_table_that_nothing_is_known_of_is_refused(collected):
    results.save(collected / "paper-1.npz", table(0.9, seed=1))
    with pytest.raises(UserError, match=r"paper-1\.npz: no facts file says what made it"):
        document.write(collected)


@pytest.mark.parametrize("name", ["valor-1.npz", "curve-sft-5_-1.npz"])
@pytest.mark.parametrize("damage", ["forged", "copied", "deleted", "cut", "empty"])
def test_a_table_that_is_not_as_it_was_collected_is_refused(collected, two_seeds_are_all, name, damage):
    path = collected / name
    if damage == "forged":
        results.save(path, table(1.0, seed=1))
    elif damage == "copied":
        path.write_bytes((collected / "sft-1.npz").read_bytes())
    elif damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else b"")
    with pytest.raises(IntegrityError, match=rf"{name}: sha256 is .*, its facts file says .*; restore it"):
        document.write(collected)


@pytest.mark.parametrize("content", ["cut", "empty", "not finite"])
def test_a_table_that_was_collected_broken_is_named(collected, content):
    path = collected / "valor-1.npz"
    if content == "not finite":
        results.save(path, dataclasses.replace(one := table(0.8, seed=1), values=one.values * np.nan))
    else:
        path.write_bytes(path.read_bytes()[:-100] if content == "cut" else b"")
    seal(collected)
    with pytest.raises(IntegrityError, match=r"valor-1\.npz: .*; run valor experiments again"):
        document.write(collected)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda _: [], "holds a JSON list, expected an object"),
        (lambda _: {}, "seed is {}: Field required"),
        (lambda facts: {**facts, "tables": None}, "tables is None: Input should be"),
        (lambda facts: {**facts, "jobs": {"sft-1": {}}}, r"jobs\.sft-1\.name is {}: Field required"),
        (lambda facts: {**facts, "jobs": {}}, "has arms and no job that made them"),
        (lambda facts: {**facts, "arms": {}}, "has tables of continued, .* and arms ; restore"),
        (lambda facts: {**facts, "arms": {"sft": 3}}, "arms.sft is 3: "),
        (lambda facts: {**facts, "arms": {"sft": {"took": []}}}, "arms.sft.processor_seconds is "),
        (
            lambda facts: {**facts, "arms": {"sft": {"took": [], "processor_seconds": math.nan}}},
            "arms.sft.processor_seconds is nan",
        ),
        (lambda facts: {**facts, "probe": {**facts["probe"], "f1_macro": math.nan}}, r"probe\.f1_macro is nan"),
        (lambda facts: {**facts, "probe": 3}, "probe is 3"),
        (lambda facts: {**facts, "expert": {"masked": [1]}}, r"expert\.masked\.0 is 1"),
        (lambda facts: {**facts, "models": {}}, r"models\.processor_seconds is {}: Field required"),
        (lambda facts: {**facts, "expert": facts["expert"] | {"tolerance": -1.0}}, r"expert\.tolerance is -1.0"),
        (lambda facts: {**facts, "expert": facts["expert"] | {"overall": {"macro_auc": 50.0}}}, r"expert\.overall\."),
        (lambda facts: {**facts, "expert": facts["expert"] | {"masked": ["x"]}}, "expert is .*masks 'x'"),
        (lambda facts: {**facts, "signal": {}}, "signal is {}: Dictionary should have at least 1 item"),
        (lambda facts: {**facts, "signal": []}, "signal is .*: Input should be"),
        (lambda facts: {**facts, "stopped": ["sft"]}, "stopped is .*: Input should be"),
        (lambda facts: {**facts, "stopped": {"sft": {}}}, r"stopped\.sft is {}: "),
        (lambda facts: {**facts, "seed": 5}, "holds the facts of seed 5"),
        (lambda facts: {**facts, "stopped": {"nope": "collapsed"}}, "names the arm nope; there are sft, "),
    ],
)
def test_facts_that_are_none_are_named(collected, change, told):
    path = collected / "facts-1.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(IntegrityError, match=rf"facts-1\.json: {told}"):
        document.write(collected)


@pytest.mark.parametrize("name", ["abc", "01", "²", "-1"])
def test_a_facts_file_of_no_seed_is_the_users_mistake(collected, name):
    (collected / f"facts-{name}.json").write_text("{}")
    for action in (
        lambda: document.write(collected),
        lambda: command.run_all([], seeds=[5], cores=1, folder=collected),
    ):
        with pytest.raises(UserError, match=rf"facts-{name}\.json: .* expected facts-SEED\.json"):
            action()


def test_tables_of_a_seed_are_its_own(collected):
    assert set(collect.digests(collected, 1)) == {path.name for path in collected.glob("*-1[._]*npz")} - {
        "curve-sft-5_-1.npz", "curve-continued-5_-1.npz", "curve-valor-5_-1.npz",
    }  # fmt: skip


def finish(root, jobs, **changes):
    """Make jobs look done, an hour of processor time each."""
    for one in with_ancestors(jobs):
        record = {"name": one.name, "settings": {}, "commit": "c", "code": "abc", "processor_seconds": 3600}
        record |= {"metrics": {}, "tries": 1, "finished": "2026-01-02T03:04:05+00:00", **changes}
        one.folder(root).mkdir(parents=True, exist_ok=True)
        (one.folder(root) / "job.json").write_text(json.dumps(record))


def test_what_is_collected_is_what_is_done_and_nothing_that_was(tmp_path, monkeypatch):
    one = table(0.7, seed=1)
    read = {"overall": {}, "findings": {}, "masked": [], "masked_sides": []}
    read |= {"paraphrase_noise": {"statements": 0.25}}
    monkeypatch.setattr(results, "study_table", lambda **_: one)
    monkeypatch.setattr(collect.gate_file, "read", lambda path: read)
    root, folder, seed = tmp_path / "root", tmp_path / "page", Seed(7)
    folder.mkdir()
    for name in ("paper-7.npz", "curve-sft-7_1.npz", "paper-8.npz"):
        (folder / name).write_bytes(b"of before")
    collect.collect(root, folder, asked={7: ["paper"]})
    assert (folder / "paper-7.npz").exists(), "nothing was run here"
    done = [ARMS[name].reports(seed) for name in ("sft", "valor", "pseudo_labels", "best_of_8")]
    finish(root, done, code=code_digest())
    run._write_verdict(seed.text().job, root, "collapsed")
    run._write_verdict(ARMS["paper"].reports(seed), root, "no room")
    collect.collect(root, folder, asked={7: ["sft", "valor", "paper"]})
    facts = json.loads((folder / "facts-7.json").read_text())
    assert sorted(path.name for path in folder.glob("*.npz")) == [
        "best_of_8-7.npz", "paper-8.npz", "pseudo_labels-7.npz", "sft-7.npz", "valor-7.npz",
    ]  # fmt: skip
    assert facts["stopped"] == {"paper": "reports of vision, paper's similarity, seed 7: no room"}
    assert facts["scored_by"] == code_digest()
    assert facts["tables"] == collect.digests(folder, 7)
    assert set(facts["tables"]) == {f"{name}-7.npz" for name in ("best_of_8", "pseudo_labels", "sft", "valor")}
    assert facts["models"]["processor_seconds"] == 3600
    assert facts["expert"]["tolerance"] == 0.25
    assert facts["arms"]["best_of_8"]["took"] == ["reports of sft, best of 8"]
    assert facts["arms"]["sft"] == {"took": [], "processor_seconds": 0, "resumed": False}
    assert facts["arms"]["valor"]["took"] == ["text", "vision"]
    assert facts["arms"]["valor"]["processor_seconds"] == 7200
    assert facts["arms"]["pseudo_labels"]["took"] == ["reports of sft, best of 8", "sft on pseudo-labels"]
    assert {record["code"] for record in facts["jobs"].values()} == {code_digest()}


@pytest.mark.parametrize("damage", [pa.ArrowInvalid("no Parquet"), FileNotFoundError("predictions.parquet")])
def test_a_damaged_result_costs_nothing_that_was_collected(tmp_path, monkeypatch, damage):
    def damaged(**_):
        raise damage

    monkeypatch.setattr(results, "study_table", damaged)
    (tmp_path / "paper-7.npz").write_bytes(b"of before")
    finish(tmp_path / "root", [ARMS["sft"].reports(Seed(7))], code=code_digest())
    with pytest.raises(IntegrityError, match=r"predictions.* is damaged .*delete the job's folder"):
        collect.collect(tmp_path / "root", tmp_path, asked={7: ["sft"]})
    assert (tmp_path / "paper-7.npz").read_bytes() == b"of before"


def test_results_of_other_code_take_no_place_of_what_was_collected(tmp_path):
    (tmp_path / "paper-7.npz").write_bytes(b"of before")
    (tmp_path / "facts-7.json").write_text("{}")
    finish(tmp_path / "root", [ARMS["sft"].reports(Seed(7))], code="other")
    with pytest.raises(UserError, match="was made by code other, and this is code"):
        collect.collect(tmp_path / "root", tmp_path, asked={7: ["sft"]})
    assert (tmp_path / "paper-7.npz").read_bytes() == b"of before"
    assert (tmp_path / "facts-7.json").read_text() == "{}"


def test_results_of_other_code_keep_their_folder_to_themselves(collected, tmp_path, monkeypatch):
    """Else a single arm of today's code would replace a seed's whole evidence of yesterday's."""
    monkeypatch.setenv("VALOR_HOME", str(tmp_path / "home"))
    before = {path: path.read_bytes() for path in collected.iterdir()}
    for action in (functools.partial(command.run_all, cores=1), command.collect_all):
        with pytest.raises(UserError, match=r"facts-1\.json: holds results of code .* this is code .*--results"):
            action(["sft"], seeds=[1], folder=collected)
    assert {path: path.read_bytes() for path in collected.iterdir()} == before
    assert not (tmp_path / "home").exists()
    for seed in (1, 5):
        change_facts(
            collected,
            seed,
            lambda facts: facts.update(
                scored_by=code_digest(), jobs={key: job | {"code": code_digest()} for key, job in facts["jobs"].items()}
            ),
        )
    collect.require_own(collected)


def test_what_is_finished_so_far_can_be_collected_while_the_rest_runs(tmp_path, monkeypatch):
    one, seed = table(0.7, seed=1), Seed(7)
    monkeypatch.setattr(results, "study_table", lambda **_: one)
    monkeypatch.setattr(analysis, "SAMPLES", 50)
    monkeypatch.setenv("VALOR_HOME", str(tmp_path))
    with pytest.raises(UserError, match="holds no results"):
        command.collect_all([], seeds=[7], folder=tmp_path / "page")
    reports = ARMS["sft"].reports(seed)
    models = seed.models().output("expert").path(tmp_path / "experiments")
    models.mkdir(parents=True)
    (models / "expert_gate.json").write_text(json.dumps(gate_of()))
    finish(tmp_path / "experiments", [reports], code=code_digest())
    page = command.collect_all([], seeds=[7], folder=tmp_path / "page").read_text()
    assert "| 7 | not known | sft |" in page
    assert "Arms that stopped" not in page


def test_test_seeds_and_others_do_not_share_a_page(collected):
    with pytest.raises(UserError, match="test seeds and seed 1, 5 would stand on one page"):
        command.run_all(["sft"], seeds=command.TEST_SEEDS[:1], cores=1, folder=collected)


def test_the_page_shows_a_loss_as_a_loss_and_an_arm_that_stopped(collected, two_seeds_are_all):
    for seed in (1, 5):
        (collected / f"continued-{seed}.npz").rename(collected / "kept.npz")
        (collected / f"valor-{seed}.npz").rename(collected / f"continued-{seed}.npz")
        (collected / "kept.npz").rename(collected / f"valor-{seed}.npz")
        facts = json.loads((collected / f"facts-{seed}.json").read_text()) | {"stopped": {"paper": "vision: collapsed"}}
        (collected / f"facts-{seed}.json").write_text(json.dumps(facts))
    seal(collected)
    page = document.write(collected).read_text()
    assert re.search(r"F1 rises: its interval is above zero \| -\d+\.\d at least \| \*\*no\*\*", page)
    assert "**worse**" in page
    assert "| Paper's similarity | 5 | vision: collapsed |" in page
    assert "#cf222e" in (collected / "headline.svg").read_text()


def test_a_saved_table_comes_back_without_ids(collected):
    loaded = results.load(collected / "valor-1.npz")
    measure = analysis.measured({1: loaded})["truth_f1_micro"]
    assert analysis.value(measure, loaded) == pytest.approx(analysis.value(measure, table(0.8, seed=1)))
    assert loaded.subjects.tolist() == table(0.8, seed=1).subjects.tolist()


def test_tokens_lean_towards_where_they_are_used():
    class Words:
        words = ("no", "there", "is", "effusion", "mass", "a", "disease", "normal")

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [self.words.index(w) for w in text.lower().strip(". ").split() if w in self.words]}

    class Model:
        def get_output_embeddings(self):
            return type("Head", (), {"weight": np.zeros((8, 2))})

    reports = [
        "FINDINGS: There is a pleural effusion. No mass.", "FINDINGS: There is a mass. No pleural effusion.",
        "FINDINGS: No effusion. IMPRESSION: No acute disease.", "IMPRESSION: Normal chest radiograph.",
    ] * 6  # fmt: skip
    lean = dict(zip(Words.words, leanings(reports, Words(), Model()), strict=True))
    assert lean["no"] < -0.9
    assert lean["there"] > 0.9
    # A report that finds nothing asserts nothing, however it says so.
    assert lean["disease"] < -0.9
    assert lean["normal"] < -0.9
    assert abs(lean["effusion"]) < 0.5
    assert set(BIASES) >= {0.0}


def test_noise_does_not_pass_for_signal_and_a_clear_one_is_measured():
    generator = torch.Generator().manual_seed(0)
    noise, other = torch.randn(2, 300, 400, generator=generator)
    direction, across = torch.zeros(400), torch.zeros(400)
    # A hundredth of signal to noise, as rewards have about a thousandth.
    direction[0], across[1] = 2.0, 2.0
    found = summary({"truth": noise + direction, "same": other + direction, "across": other + across, "none": other})
    for name in ("truth", "same", "across"):
        low, high = found[name]["bounds"]["signal_to_noise"]
        assert 0 < low < found[name]["signal_to_noise"] < high
        assert found[name]["signal_to_noise"] == pytest.approx(4 / 404, rel=0.3)
    low, high = found["same"]["bounds"]["cosine"]
    assert low < found["same"]["cosine"] < high
    assert low > 0.6
    low, high = found["across"]["bounds"]["cosine"]
    assert low < found["across"]["cosine"] < high
    assert abs(found["across"]["cosine"]) < 0.2
    low, high = found["none"]["bounds"]["signal_to_noise"]
    assert low < 0 < high
    assert found["none"]["bounds"]["cosine"] is None


def test_an_unknown_arm_and_a_page_of_nothing_are_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such arm; there are sft"):
        command.run_all(["nope"], seeds=(), cores=1, folder=tmp_path)
    with pytest.raises(UserError, match="holds no results"):
        command.document(tmp_path)
    assert "continued" in command.listing()


def test_a_job_whose_ancestor_is_missing_is_told_before_anything_runs(tmp_path):
    needs = job("needs", inputs={"base": job("first").output("checkpoint")}, settings={"seed": 5})
    with pytest.raises(ValueError, match="needs: needs first, which is neither done"):
        run.run([needs], root=tmp_path, cores=1)
    assert not list(tmp_path.iterdir())


def test_a_job_that_other_experiments_are_at_is_waited_for_and_not_run_again(tmp_path, monkeypatch):
    one, other, ran, told = job("one"), job("other", settings={"seed": 2}), [], queue.Queue()

    def do(job, root, *, code):
        ran.append(job)
        finish(root, [job], code=code)

    monkeypatch.setattr(run, "execute", do)
    # A captured stream that is read while another thread writes to it may lose what that thread said.
    monkeypatch.setattr(run, "print", lambda line, **_: told.put(line), raising=False)
    for code, done in (("abc", [other]), ("def", [])):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            with run._alone(one, tmp_path):
                second = pool.submit(run._run_once, one, tmp_path, code)
                assert told.get(timeout=60) == "one: other experiments are at it; waiting for them"
                assert not second.done()
                run._run_once(other, tmp_path, "abc")
                finish(tmp_path, [one], code="abc")
            if code == "abc":
                second.result()
            else:
                with pytest.raises(UserError, match="one: was made by code abc, and this is code def"):
                    second.result()
        assert ran == done
        ran.clear()
    (one.folder(tmp_path) / "job.json").unlink()
    run._run_once(one, tmp_path, "abc")
    assert ran == [one]


def test_a_job_ends_with_the_experiments_that_were_killed():
    theirs, ours = multiprocessing.Pipe()
    killed = multiprocessing.get_context("spawn").Process(target=orphans.experiments, args=(ours,))
    killed.start()
    assert theirs.poll(60)
    left = psutil.Process(theirs.recv())
    try:
        assert left.is_running()
        killed.kill()
        killed.join()
        left.wait(timeout=10)
    finally:
        if left.is_running():
            left.kill()


def test_a_record_that_is_none_is_named_and_not_taken_for_a_result(tmp_path):
    finish(tmp_path, [job()])
    path = job().folder(tmp_path) / "job.json"
    whole = json.loads(path.read_text())
    assert job().record(tmp_path) == whole
    for content in ("{}", "[]", ""):
        path.write_text(content)
        with pytest.raises(IntegrityError, match=r"job\.json: "):
            run.run([job()], root=tmp_path, cores=1)


@pytest.mark.slow
def test_jobs_run_once_and_a_failed_one_is_named_and_run_again(tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_TRACKING", "off")
    phantom = {"seed": 5, "train": 14, "val": 2, "test": 4, "pairs": 2, "image_px": 48}
    data = Job("data", "data", {"phantom": phantom, "image_px": 48, "checks": LENIENT}, ("dataset", "evidence"))
    missing = tmp_path / "nowhere"
    models = {"base": str(missing), "expert": str(missing)}
    broken = Job("models", "fetch_models", models, ("base", "expert", "judge"), values={"models_digest": ""})
    lines: list[str] = []
    with pytest.raises(UserError, match=r"models: .*nowhere.*folder"):
        run.run([data, broken], root=tmp_path, cores=1, say=lines.append)
    assert data.is_done(tmp_path)
    assert not broken.is_done(tmp_path)
    assert data.record(tmp_path)["metrics"]["studies"] == 22
    assert data.record(tmp_path)["code"] == code_digest()
    assert data.record(tmp_path)["tries"] == 1
    assert run.verdict_on(data, tmp_path) is None
    studies = training_studies(data.output("dataset").path(tmp_path), studies=0, seed=0)
    reward = truth_reward(data.output("evidence").path(tmp_path), studies)
    own = reward([study.text for study in studies], [study.study_id for study in studies])
    others = reward([studies[i - 1].text for i in range(len(studies))], [study.study_id for study in studies])
    silent = reward(["No acute disease."] * len(studies), [study.study_id for study in studies])
    assert sum(own) > sum(silent) == 0
    assert sum(own) > sum(others)
    record = artifacts.read_json(data.folder(tmp_path) / "job.json")
    (data.folder(tmp_path) / "job.json").write_text(json.dumps(record | {"code": "of before"}))
    with pytest.raises(UserError, match=r"data: was made by code of before, .* delete .*data-"):
        run.run([data], root=tmp_path, cores=1, say=lines.append)
    (data.folder(tmp_path) / "job.json").write_text(json.dumps(record))
    lines.clear()
    needs = Job("probe", "probe", {}, ("probe",), {"base": broken.output("base")})
    with pytest.raises(UserError):
        run.run([broken, needs, data], root=tmp_path, cores=1, say=lines.append)
    assert lines[0].startswith("3 jobs, 1 of them done")
    assert int((broken.folder(tmp_path) / "tries.json").read_text()) == 2
    assert lines[-1] == "probe: not run, it needs what failed"
    assert "nowhere" in run.verdict_on(needs, tmp_path)
    unknown = Job("unknown", "no such stage", {}, ("x",))
    with pytest.raises(ValorError, match="unknown: ended with status 1, so it was killed or broke") as broke:
        run.run([unknown], root=tmp_path, cores=1, say=lines.append)
    assert broke.value.exit_code == 1
    assert run.verdict_on(unknown, tmp_path).startswith("unknown: ended with status 1")
    with pytest.raises(UserError, match="the code has changed since the experiments began"):
        execute(needs, tmp_path, code="another")


def test_pseudo_labels_take_the_place_of_reports_and_never_mix_with_them(tmp_path):
    phantom = {"seed": 5, "train": 14, "val": 2, "test": 4, "pairs": 0, "image_px": 48}
    data = Job("data", "data", {"phantom": phantom, "image_px": 48, "checks": LENIENT}, ("dataset", "evidence"))
    execute(data, tmp_path, code=code_digest())
    before = {study.study_id: study for study in read_studies(data.output("dataset").path(tmp_path), split="train")}
    kept, cut, silent, *_ = before
    rows = [
        {"study_id": kept, "hypothesis": "FINDINGS: Left effusion. IMPRESSION: Effusion.", "truncated": False},
        {"study_id": cut, "hypothesis": "FINDINGS: Left", "truncated": True},
        {"study_id": silent, "hypothesis": "", "truncated": False},
    ]
    predictions = Job("predictions", "predict", {}, ("predictions",))
    folder = predictions.output("predictions").path(tmp_path)
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / TABLE)
    inputs = {"dataset": data.output("dataset"), "predictions": predictions.output("predictions")}
    relabel = Job("relabel", "relabel", {}, ("dataset",), inputs)
    execute(relabel, tmp_path, code=code_digest())
    assert relabel.record(tmp_path)["metrics"] == {"replaced": 1, "left_out": 2}
    after = {study.study_id: study for study in read_studies(relabel.output("dataset").path(tmp_path), split="train")}
    assert (after[kept].findings, after[kept].impression) == ("Left effusion.", "Effusion.")
    assert before.keys() - after.keys() == {cut, silent}
    assert all(after[name].text == before[name].text for name in after.keys() - {kept})


def tiny_seed() -> Seed:
    """A seed whose data, models and trainings take seconds; its jobs are those of every seed."""
    small = {
        "image_px": 48, "vision_width": 32, "vision_layers": 1, "text_width": 32, "text_layers": 1, "vocab": 400,
    }  # fmt: skip

    class Tiny(Seed):
        @functools.cached_property
        def data(self):
            own = super().data
            phantom = {**own.settings["phantom"], "val": 4, "image_px": 48}
            return dataclasses.replace(own, settings={"phantom": phantom, "image_px": 48, "checks": LENIENT})

        @functools.cache  # noqa: B019
        def models(self, *, expert="strong"):
            own = super().models(expert=expert)
            base = {"subjects": 60, "tower_steps": 4, "language_steps": 4, **small}
            expert = {"subjects": 60, "steps": 8, "held_out_subjects": 120, **small}
            settings = {
                "phantom_base": base, "phantom_expert": expert, "phantom_judge": {**expert, "seed": 3},
                "expert_gate": dict.fromkeys(("min_auc", "min_side_swap", "min_negation", "min_deletion"), 0.0),
            }  # fmt: skip
            return dataclasses.replace(own, settings=settings, cores=1)

        def signal(self):
            own = super().signal()
            return dataclasses.replace(own, settings={**own.settings, "groups": 8})

    return Tiny(5, Schedule(train=80, test=6, pairs=2, sft_steps=60, text_steps=1, vision_steps=5, vision_lr=1e-2))


@pytest.mark.slow
def test_experiments_on_real_models_end_in_a_page(tmp_path, monkeypatch, capfd):
    seed, folder = tiny_seed(), tmp_path / "results"
    for module in (arms, collect, ledger):
        monkeypatch.setattr(module, "Seed", lambda number: seed)
    monkeypatch.setenv("VALOR_TRACKING", "off")
    monkeypatch.setenv("VALOR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    page = command.run_all(["sft", "truth"], seeds=[5], cores=2, folder=folder)
    assert os.environ["VALOR_HOME"] == str(tmp_path / "home")
    assert "Loading weights" not in "".join(capfd.readouterr())
    assert "HF_HUB_OFFLINE" not in os.environ
    assert "| Stage 2 on truth | 1 |" in page.read_text()
    assert set(artifacts.read_json(folder / "facts-5.json")["arms"]) == {"sft", "truth"}
    root = tmp_path / "home" / "experiments"
    truth, signal, probe, curve = seed.vision_on_truth().job, seed.signal(), seed.probe(), seed.curve(seed.sft)
    before, after = (
        load_file(output.path(root) / "model.safetensors") for output in (seed.text(), seed.vision_on_truth())
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    assert "rewards/truth_reward_last" in truth.record(root)["metrics"]
    found = artifacts.read_json(signal.output("signal").path(root) / "signal.json")
    assert set(found) == {"truth", "clinical agreement", "statements", "paper"}
    for row in found.values():
        low, high = row["bounds"]["signal_to_noise"]
        assert low <= high
        assert abs(row["signal_to_noise"]) < 1
    assert 0 <= probe.record(root)["metrics"]["f1_macro"] <= 1
    tables = [results.load(path) for path in curve.output("curve").path(root).glob("*.npz")]
    assert [len(table.subjects) for table in tables] == [6] * len(BIASES)
    _a_job_that_was_cut_off_continues(seed.sft.job, root, other=tmp_path / "other")


def _a_job_that_was_cut_off_continues(job, root, *, other):
    """Told to end in training and run again, it ends in what it ends in when nobody disturbs it."""
    needed = [output.job for output in job.inputs.values()]
    for one in needed:
        shutil.copytree(one.folder(root), one.folder(other))

    def end():
        events = job.folder(other) / "events.jsonl"
        while not (events.is_file() and re.search(r'"step": ([5-9]|[1-4]\d)', events.read_text())):
            time.sleep(0.02)
        for process in multiprocessing.active_children():
            process.terminate()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        ended = pool.submit(end)
        with pytest.raises(ResourceError, match="sft, seed 5"):
            run.run([job], root=other, cores=1)
        ended.result()
    assert not job.is_done(other)
    run.run([job], root=other, cores=1)
    record = job.record(other)
    assert record["tries"] == 2
    assert 0 < record["metrics"]["resumed_from_step"] < job.settings["trainer"]["max_steps"]
    digests = [artifacts.read_stamp(job.output("checkpoint").path(where))["digest"] for where in (root, other)]
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_leaves_no_process_and_says_how_to_go_on(tmp_path, number):
    command = [sys.executable, "-m", "pipelines.cli", "experiments", "--seed", "5", "--arm", "sft"]
    environment = os.environ | {"VALOR_HOME": str(tmp_path), "VALOR_TRACKING": "off"}
    process = subprocess.Popen(
        [*command, "--results", str(tmp_path / "page")], env=environment, text=True, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    jobs = tmp_path / "experiments" / "jobs"
    while not any(jobs.glob("*/logs/*")):
        assert process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert (
        said.strip()
        .splitlines()[-1]
        .endswith("experiments: told to end; what is finished is kept, run again to continue")
    )
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running()]
