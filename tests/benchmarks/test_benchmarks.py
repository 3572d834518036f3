"""The benchmarks' own machinery: a race over tiny models that trains alike, results that are kept, a document."""

import argparse
import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import document
import gpu
import lane
import memory
import pytest
import race
import rewards
import step
from lane import Turns, Work

from valor import artifacts
from valor.recipe import GrpoTextSettings
from valor.rewards import text


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """Return the folder that results go to."""
    monkeypatch.setattr(race, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def run_lane(variant: str, **changes) -> list[dict]:
    """Run a tiny lane in this process, whose turn it always is."""
    out = io.StringIO()
    work = Work(**{"variant": variant, "architecture": "tiny", "generations": 4, "tokens": 6, "steps": 2, **changes})
    lane.run(work, Turns(out, io.StringIO("\n" * 9)))
    return [json.loads(line) for line in out.getvalue().splitlines()]


def as_lane(variant: str, **changes) -> race.Lane:
    events = run_lane(variant, **changes)
    work = Work(**{"variant": variant, "steps": 2, **changes})
    seconds = [event["seconds"] for event in events if event["event"] == "step"]
    return race.Lane(work, events[0], events[-1], seconds)


def test_all_variants_train_alike_and_another_work_does_not():
    lanes = {variant: as_lane(variant, prompts=2) for variant in lane.VARIANTS}
    assert {len(found.every) for found in lanes.values()} == {2}
    assert race.require_same_training(lanes)["loss"] < 1e-5
    before_training = {variant for variant, found in lanes.items() if found.ready["rows_cpu"] > 0}
    assert before_training == {"valor"}
    other = as_lane("valor", prompts=2, tokens=7)
    with pytest.raises(AssertionError, match="did not train alike"):
        race.require_same_training({"stock": lanes["stock"], "other": other})


def test_an_expert_embeds_each_image_once_however_many_completions():
    end = run_lane("valor", reward="statements", prompts=2)[-1]
    assert end["images_embedded"] == 4
    assert end["reward_cpu"] > 0
    assert end["embedding_cpu"] > 0


def run_gpu_script(monkeypatch, alone) -> None:
    monkeypatch.setattr(gpu, "alone", alone)
    options = ["--size", "tiny", "--rounds", "1", "--tokens", "4", "--prompts", "1", "--source-px", "64"]
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--peak-tflops", "0.1", *options])
    gpu.main()


def test_the_gpu_script_on_a_cpu(results, monkeypatch, capsys):
    run_gpu_script(monkeypatch, lambda work, **_: as_lane(**dataclasses.asdict(work)))
    result = json.loads((results / "gpu-tiny-cpu.json").read_text())
    assert result["work"]["dtype"] == "bfloat16"
    assert result["differences"]["grad_norm"] < 1e-3
    assert 0 < result["figures"]["valor"]["of_peak"] < 1
    assert "tiny: stock / valor" in capsys.readouterr().out


def fake_lanes(works: dict[str, Work], **_) -> dict[str, race.Lane]:
    """Stand in for a race: stock's steps take 8 s, VALOR's 1 s and another for the images, in both clocks."""
    logged = dict.fromkeys(lane.LOGGED, 1.0)
    end = {"history": [logged], "peak_mb": 30.0, "model_mb": 10.0}
    lanes = {}
    for name, work in works.items():
        rows = float(work.steps) if name == "valor" else 0.0
        seconds = [99.0] + [1.0 if name == "valor" else 8.0] * (work.steps - 1)
        lanes[name] = race.Lane(work, {"rows_cpu": rows, "rows_wall": rows}, end, seconds)
    return lanes


def test_a_step_counts_what_its_images_cost_before_it():
    ready = {"rows_cpu": 6.0, "rows_wall": 12.0}
    work = Work(variant="valor", prompts=2, steps=3)
    assert race.Lane(work, ready, {}, [9.0, 1.0, 2.0]).seconds == [3.0, 4.0]
    on_gpu = dataclasses.replace(work, device="cuda")
    assert race.Lane(on_gpu, ready, {}, [9.0, 1.0, 2.0]).seconds == [5.0, 6.0]
    none = {"rows_cpu": 0.0, "rows_wall": 0.0}
    assert race.Lane(dataclasses.replace(work, variant="stock"), none, {}, [9.0, 1.0, 2.0]).seconds == [1.0, 2.0]


def test_every_comparison_counts_the_images(monkeypatch):
    for script in (step, memory):
        monkeypatch.setattr(script, "race", fake_lanes)
    by_step = step.compare({}, ("stock", "valor"), architecture="tiny", rounds=3)
    by_memory = memory.compare(4, architecture="tiny", rounds=3)
    for result in (by_step, by_memory):
        assert result["ratios"]["stock / valor"] == {"median": 4.0, "low": 4.0, "high": 4.0, "rounds": 3}
        assert result["seconds"] == {"stock": 8.0, "valor": 2.0}
    lanes = fake_lanes({name: Work(variant=name, device="cuda") for name in ("stock", "valor")})
    assert [gpu.summary(found, None)["seconds"] for found in lanes.values()] == [8.0, 2.0]


def test_the_memory_script_measures_three_processes_of_each_kind(monkeypatch):
    raced = []
    monkeypatch.setattr(memory, "race", lambda works: raced.append(works) or fake_lanes(works))
    monkeypatch.setattr(memory, "once", lambda name, measure, options: measure())
    monkeypatch.setattr("sys.argv", ["memory.py", "--only", "4"])
    memory.main()
    assert [work.steps for works in raced for work in works.values()] == [2, 2] * 3


def test_the_gpu_script_times_only_what_is_the_same_step_in_float32(results, monkeypatch):
    ran = []

    def alone(work, **_):
        ran.append(work.dtype)
        found = fake_lanes({work.variant: work})[work.variant]
        (logged,) = found.end["history"]
        norm = logged["grad_norm"] * (off if work.variant == "valor" else 1.0)
        return dataclasses.replace(found, end={**found.end, "history": [{**logged, "grad_norm": norm}]})

    off = 1.01
    with pytest.raises(AssertionError, match="did not train alike"):
        run_gpu_script(monkeypatch, alone)
    assert ran == ["float32", "float32"]
    off = 1.0001
    run_gpu_script(monkeypatch, alone)
    assert ran == ["float32"] * 4 + ["bfloat16"] * 2


def test_each_text_reward_has_a_rate_beside_that_of_all(monkeypatch):
    now = 0.0

    def lasting(name, seconds):
        def reward(completions, references):
            nonlocal now
            assert len(completions) == len(references) == 8
            now += seconds

        reward.__name__ = name
        return reward

    monkeypatch.setattr(text, "build", lambda _: ([lasting("one", 1.0), lasting("other", 3.0)], [1.0, 1.0]))
    monkeypatch.setattr(rewards.time, "process_time", lambda: now)
    found = rewards.text_rate(["Two words."] * 35, batch=8)
    assert found == {
        "median": 2.0, "low": 2.0, "high": 2.0, "words": 2.0,
        "each": {
            "one": {"median": 8.0, "low": 8.0, "high": 8.0},
            "other": {"median": pytest.approx(8 / 3), "low": pytest.approx(8 / 3), "high": pytest.approx(8 / 3)},
        },
    }  # fmt: skip
    with pytest.raises(SystemExit, match="35 reports, a batch takes 40"):
        rewards.text_rate(["Two words."] * 35, batch=40)


def test_the_default_text_rewards_are_the_ones_that_are_timed():
    found = rewards.text_rate([" ".join(report) for report in lane.reports_only(32)], batch=16)
    assert list(found["each"]) == [reward.name for reward in GrpoTextSettings().rewards]
    assert all(0 < found["median"] < each["median"] for each in found["each"].values())
    assert document._RULE_BASED in found["each"]


@pytest.mark.parametrize("key", lane.LOGGED)
def test_what_is_no_number_is_no_agreement(key):
    works = {name: Work(variant=name) for name in ("stock", "valor")}
    logged = dict.fromkeys(lane.LOGGED, 1.0)

    def lanes(*values):
        ends = [{"history": [{**logged, key: value}]} for value in values]
        return {name: race.Lane(works[name], {}, end, []) for name, end in zip(works, ends, strict=True)}

    race.require_same_training(lanes(1.0, 1.0))
    for values in ((1.0, math.nan), (math.nan, 1.0), (math.inf, math.inf)):
        with pytest.raises(AssertionError, match=key):
            race.require_same_training(lanes(*values))


def test_model_flops_of_a_known_model():
    work = Work(variant="valor", architecture="7b", generations=1, tokens=128, projector_only=True)
    # 6.6 billion parameters, 736 tokens, twice forward and once backward, and a tower of 0.3 billion twice.
    assert gpu.model_flops(work) == pytest.approx(3 * 2 * 6.6e9 * 736 + 2 * 2 * 0.3e9 * 577, rel=0.1)


def test_a_ratio_is_of_rounds_and_not_of_sums():
    assert race.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "rounds": 3}


def test_a_result_is_kept_for_one_code_machine_and_options(results, monkeypatch):
    calls = []

    def measured(**options) -> bool:
        before = len(calls)
        given = argparse.Namespace(**{"again": False, "only": None, "rounds": 3, **options})
        race.once("some", lambda: calls.append(1) or {"ratios": {}}, given)
        return len(calls) > before

    assert measured()
    assert not measured()
    assert not measured(only="some")
    assert measured(again=True)
    assert measured(rounds=4)
    assert measured()
    monkeypatch.setattr(race, "machine", lambda: "another")
    assert measured()
    assert not measured()
    monkeypatch.setattr(race, "code_digest", lambda: "another")
    assert measured()
    assert not measured()


def test_a_result_of_an_older_script_is_measured_again(results):
    results.mkdir()
    (results / "some.json").write_text('{"date": "2026-01-02", "ratio": 1.0}')
    assert race.once("some", lambda: {"ratio": 2.0}, argparse.Namespace(again=False))["ratio"] == 2.0


def test_every_module_of_valor_and_of_the_benchmarks_counts_as_code(tmp_path, monkeypatch):
    package, own = tmp_path / "valor", tmp_path / "benchmarks"
    for real, copy in ((Path(artifacts.__file__).parent, package), (race.HERE, own)):
        shutil.copytree(real, copy, ignore=shutil.ignore_patterns("__pycache__"))
    real = race.code_digest()
    monkeypatch.setattr(artifacts, "__file__", str(package / "artifacts.py"))
    monkeypatch.setattr(race, "HERE", own)
    assert race.code_digest() == real
    seen = {real}
    measuring = ("architectures", "gpu", "lane", "memory", "race", "rewards", "step")
    counted = [*package.rglob("*.py"), *(own / f"{name}.py" for name in measuring)]
    for count, path in enumerate(counted, 1):
        path.write_text(path.read_text() + "# another\n")
        seen.add(race.code_digest())
        assert len(seen) == 1 + count, path
    for name in ("document.py", "test_benchmarks.py"):
        (own / name).write_text("# another\n")
        assert race.code_digest() in seen


def step_result(**changes) -> dict:
    """Return a result of the step benchmark as it is kept."""
    spread = {"median": 3.5, "low": 3.4, "high": 3.6, "rounds": 3}
    return {
        "work": dataclasses.asdict(Work(variant="valor")), "machine": "a machine", "date": "2026-01-02T10:00:00Z",
        "ratios": {"stock / valor": spread, "valor / floor": {**spread, "median": 1.3}}, "threads": 1, "took_s": 60,
        "differences": {"loss": 1e-7, "grad_norm": 1e-6}, "seconds": {"stock": 7.0, "valor": 2.0, "floor": 1.5},
        "code": "present", "options": {}, **changes,
    }  # fmt: skip


def memory_result(**changes) -> dict:
    peaks = {"stock": (608.0, 505.0, 811.0), "valor": (219.0, 218.0, 221.0)}
    held = {name: dict(zip(("median", "low", "high"), of, strict=True)) for name, of in peaks.items()}
    result = step_result(above_model_mb=held, **changes)
    spread = result["ratios"]["stock / valor"]
    return {
        **result,
        "ratios": {"stock / valor": spread, "memory, stock / valor": {"median": 2.78, "low": 2.5, "high": 3.1}},
    }


def rate_result(**changes) -> dict:
    """Return a result of the text rewards' rates as it is kept: all miss 5,000 a second, each alone does not."""
    spread = {"median": 4837.0, "low": 2724.0, "high": 5317.0}
    each = {
        name: {**spread, "median": rate} for name, rate in (("clinical_agreement_reward", 13e3), ("gleu_reward", 9e3))
    }
    return {
        "phantom": {**spread, "words": 33.2, "each": each}, "threads": 1, "machine": "a machine", "code": "present",
        "date": "2026-01-02T10:00:00Z", "options": {}, **changes,
    }  # fmt: skip


def share_result(share: float, embedding_share: float = 0.0) -> dict:
    return {
        "share": share, "embedding_share": embedding_share, "images_embedded": 3, "images": 3, "threads": 1,
        "machine": "a machine", "code": "present", "date": "2026-01-02T10:00:00Z", "options": {},
    }  # fmt: skip


def gpu_result(**changes) -> dict:
    figures = {"of_peak": 0.25, "completion_tokens_per_s": 900.0, "peak_mb": 20480.0}
    return {
        "work": dataclasses.asdict(Work(variant="valor")), "ratio": 2.5, "device": "a card", "code": "present",
        "figures": {"stock": {**figures, "of_peak": None}, "valor": figures}, "machine": "a host with a card",
        "date": "2026-01-03T10:00:00Z", **changes,
    }  # fmt: skip


def test_the_document_says_what_was_measured_and_what_was_missed(tmp_path):
    text = document.page({"step-checkpointing": step_result()})
    assert "| 3.50x (3.40 to 3.60) | at least 3 | yes |" in text
    assert "| 1.30x (3.40 to 3.60) | at most 1.15 | **no** |" in text
    assert "have not been measured" in text
    measured = document.page({"gpu-small-cuda": gpu_result(), "step-checkpointing": step_result()})
    assert "| a card | 2.50x | 900 / 900 | unknown / 25.0% | 19.1 / 19.1 |" in measured
    assert "Measured on 2026-01-03: a host with a card. Of each pair" in measured
    assert "have not been measured" not in measured
    document.figure({"step-checkpointing": step_result()}, tmp_path / "figure.svg")
    assert "3.5x faster" in (tmp_path / "figure.svg").read_text()


def test_the_document_says_of_the_rewards_what_was_asked_and_missed():
    results = {
        "rewards-text": rate_result(),
        "rewards-text-share": share_result(0.0009),
        "rewards-statements-share": share_result(0.004, 0.119),
        "rewards-paper-share": share_result(0.004, 0.04),
    }
    rows = document.page(results).splitlines()
    rate, spread = "completions a second and core", "(2,724 to 5,317)"
    for row in (
        f"| All four default text rewards on phantom reports of 33 words, {rate} | 4,837 {spread}"
        " | at least 5,000 | **no** |",
        f"| `clinical_agreement_reward` alone, the rule-based one, on phantom reports, {rate} | 13,000 {spread}"
        " | at least 5,000 | yes |",
        f"| `gleu_reward` alone, on phantom reports, {rate} | 9,000 {spread} |  |  |",
        "| The text rewards' share of a step of stage 1 | 0.09% | under 5% | yes |",
        "| The expert's reward's share of a step of stage 2, `similarity: statements` | 0.4% | under 5% | yes |",
        "| The same with its embeddings of images, all of them new | 12.3% | under 5% | **no** |",
        "| The same with its embeddings of images, all of them new | 4.4% | under 5% | yes |",
    ):
        assert row in rows
    head = rows.index("## Rewards") + 2
    assert rows[head : head + 2] == ["|  | figure | asked | met |", "| --- | --- | --- | --- |"]
    assert "It embedded 3 times for 3 images, all of them new" in "\n".join(rows)
    half = document.page({"rewards-text-share": share_result(0.0009)})
    assert "The expert, a CLIP" not in half
    assert "words that one split" not in half


def test_the_document_shows_what_a_stage_2_step_takes_by_group_size():
    rows = document.page({"memory-g08": memory_result()}).splitlines()
    head = next(row for row in rows if row.startswith("| G |"))
    values = rows[rows.index(head) + 2]
    columns = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, values)]
    assert dict(zip(*columns, strict=True)) == {
        "G": "8", "time, stock / VALOR": "3.50x", "stock, s/step": "7.0", "VALOR, s/step": "2.0",
        "memory, stock / VALOR": "2.78x (2.50 to 3.10)", "stock, MB": "608 (505 to 811)",
        "VALOR, MB": "219 (218 to 221)",
    }  # fmt: skip


def test_the_document_shows_the_newest_code_alone():
    step = step_result(date="2026-01-02T10:00:01Z")
    results = {
        "step-checkpointing": step,
        "step-plain": step_result(code="older"),
        "memory-g04": memory_result(code="older"),
        "gpu-7b-cuda": gpu_result(code="other, later"),
        "gpu-0.5b-cuda": {key: value for key, value in gpu_result().items() if key != "code"},
        "gpu-tiny-cpu": gpu_result(code="other, later"),
    }
    kept, others = document.of_one_code(results)
    assert kept == {"step-checkpointing": step}
    assert others == ["gpu-0.5b-cuda", "gpu-7b-cuda", "memory-g04", "step-plain"]
    same = {name: {**result, "code": "present"} for name, result in results.items()}
    assert document.of_one_code(same) == ({name: same[name] for name in same if name != "gpu-tiny-cpu"}, [])
    with pytest.raises(SystemExit, match="make bench"):
        document.of_one_code({"gpu-7b-cuda": gpu_result()})


def test_results_of_other_code_are_named_and_their_figures_left_out(results, tmp_path, monkeypatch):
    monkeypatch.setattr(document, "RESULTS", results)
    monkeypatch.setattr(document, "DOCS", tmp_path)
    monkeypatch.setattr("sys.argv", ["document.py"])
    results.mkdir()

    def written(code: str) -> str:
        (results / "step-checkpointing.json").write_text(json.dumps(step_result(date="2026-01-04T10:00:00Z")))
        (results / "memory-g08.json").write_text(json.dumps(memory_result(code=code)))
        document.main()
        return (tmp_path / "benchmarks.md").read_text()

    text = written("older")
    assert "2.78x" not in text
    assert "\n\nNot measured with this code: memory-g08.\n\n" in text
    text = written("present")
    assert "2.78x" in text
    assert "Not measured with this code" not in text


def test_sections_measured_apart_say_when_and_where():
    together = document.page({"step-plain": step_result(), "memory-g08": memory_result(date="2026-01-02T23:00:00Z")})
    assert "Written by `make bench` on 2026-01-02: a machine." in together
    assert "Measured on" not in together
    for changes, place in (
        ({"machine": "another"}, "2026-01-02: another"),
        ({"date": "2026-01-05T10:00:00Z"}, "2026-01-05: a machine"),
    ):
        apart = document.page({"step-plain": step_result(), "memory-g08": memory_result(**changes)})
        assert "Written by `make bench`; each section says" in apart
        assert "## A GRPO step\n\nMeasured on 2026-01-02: a machine.\n\n" in apart
        assert f"## The projector alone, by group size\n\nMeasured on {place}.\n\n" in apart
        assert "## Rewards\n\nNot measured yet." in apart
