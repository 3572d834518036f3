"""What `valor.stages.run` does around every stage."""

import contextlib
import json
from pathlib import Path

import pytest

from valor import artifacts, stages
from valor.context import Context
from valor.errors import IntegrityError, UserError


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch, tmp_path):
    monkeypatch.setenv("VALOR_TRACKING", "off")
    monkeypatch.chdir(tmp_path)


def judge(tmp_path):
    return stages.run(
        "gate",
        settings_json=json.dumps({"rules": [{"metric": "m", "against": "sft", "margin": 0.1}], "min_subjects": 0}),
        context=Context(),
        inputs={"evaluation": tmp_path / "evaluation"},
        outputs={"verdict": tmp_path / "verdict"},
        values={"champion_digest": ""},
    )


def test_an_input_that_was_altered_behind_its_stamp_stops_the_stage_and_names_the_file(tmp_path):
    cell = {"value": 0.0, "low": 0.0, "high": 0.0, "defined": 1.0}
    metrics = {
        "checkpoints": {"sft": {}, "vision": {}}, "checkpoint_digests": {"sft": "a", "vision": "b"},
        "differences": {"vision-sft": {"m": cell}}, "dataset_digest": "d", "studies": 9, "subjects": 9,
        "measures": {"m": {"label": "M", "group": "g", "form": "number", "finding": "", "higher_is_better": True}},
        "bootstrap": {"confidence": 0.95},
    }  # fmt: skip
    (tmp_path / "evaluation").mkdir()
    table = tmp_path / "evaluation" / "metrics.json"
    table.write_text(json.dumps(metrics))
    artifacts.stamp(tmp_path / "evaluation", kind="evaluation", stage="evaluate")
    assert judge(tmp_path).values == {"verdict": "pass"}
    table.write_text(table.read_text().replace('"low": 0.0', '"low": 9.0'))  # of the same size
    with pytest.raises(IntegrityError, match=r"metrics\.json: missing or altered since evaluate wrote it"):
        judge(tmp_path)


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ({"dataset": "base", "base": "dataset"}, "sft: dataset is given 'base', which maker made"),
        ({"dataset": "dataset", "base": "expert"}, "sft: base is given 'expert', .* expected an image-text-to-text"),
        ({"dataset": "dataset", "base": "checkpoint"}, ""),
        ({"dataset": "dataset", "base": "something-new"}, ""),
    ],
)
def test_swapped_inputs_are_named_before_the_stage_runs(tmp_path, monkeypatch, kinds, words):
    ran = []

    def sft(settings, *, dataset: Path, base: Path, checkpoint: Path, context: Context):
        ran.append(base)
        checkpoint.mkdir()
        (checkpoint / "weights").touch()
        return stages.StageResult()

    monkeypatch.setattr(stages, "function_of", lambda _stage: sft)
    for name, kind in kinds.items():
        (tmp_path / name).mkdir()
        artifacts.write_json(tmp_path / name / "dataset.json", {"digest": "d"})
        artifacts.stamp(tmp_path / name, kind=kind, stage="maker", digest="d" if kind == "dataset" else "")
    given = {name: tmp_path / name for name in kinds}
    refused = pytest.raises(UserError, match=words) if words else contextlib.nullcontext()
    with refused:
        stages.run("sft", settings_json="{}", context=Context(), inputs=given, outputs={"checkpoint": tmp_path / "c"})
    assert bool(ran) is not bool(words)
