"""The predict stage on a tiny LLaVA: of this run's checkpoint, of the champion, and of what is kept already."""

import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parents[1] / "training"))
from tiny_llava import gate_of, world

from valor import artifacts, storage
from valor.context import Context
from valor.data.manifest import read_studies
from valor.errors import DataError, IntegrityError, UserError
from valor.evaluation.predict import INFO, TABLE, likeliest
from valor.models.expert import Expert
from valor.models.gate_file import GATE_FILE
from valor.models.generate import Generated
from valor.recipe import PredictSettings
from valor.stages import predict as stage
from valor.stages.predict import predict

SETTINGS = PredictSettings(batch_size=2, max_new_tokens=24)


def run(path: Path, *, work: Path, settings: PredictSettings = SETTINGS, **given):
    context = Context(work_root=str(work))
    result = predict(
        settings, dataset=world().dataset, judge=world().expert, predictions=path, context=context, **given
    )
    return dict(result.metrics), pq.read_table(path / TABLE).to_pylist(), artifacts.read_json(path / INFO)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def predicted(work):
    return run(work / "text", work=work, name="text", checkpoint=world().parent)


def champion(uri: Path) -> dict[str, str]:
    storage.put_dir(world().parent, uri)
    return {"name": "champion", "checkpoint_uri": str(uri), "checkpoint_digest": artifacts.digest_dir(world().parent)}


def never(*_, **__):
    raise AssertionError("it was predicted again")


def test_every_study_of_the_split_has_a_row(predicted):
    metrics, rows, info = predicted
    assert [row["study_id"] for row in rows] == ["s0012", "s0013", "s0014"]
    assert metrics["studies"] == 3
    assert metrics["mean_tokens"] == sum(row["hypothesis_tokens"] for row in rows) / 3 > 0
    assert all(-1 <= row["reference_similarity"] <= 1 for row in rows)
    assert info["name"] == "text"
    assert info["checkpoint_digest"] == artifacts.digest_dir(world().parent)
    assert info["dataset_digest"] == artifacts.read_stamp(world().dataset)["digest"]


def test_the_champion_that_was_a_candidate_is_not_predicted_again(predicted, work, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_predict", never)
    metrics, rows, info = run(tmp_path / "out", work=work, **champion(tmp_path / "store"))
    assert (metrics, rows) == predicted[:2]
    assert info == predicted[2] | {"name": "champion"}


def test_other_settings_are_predicted_anew(predicted, work, tmp_path, monkeypatch):
    fewer = PredictSettings(batch_size=2, max_new_tokens=24, max_studies=1)
    assert run(tmp_path / "out", work=work, settings=fewer, name="text", checkpoint=world().parent)[0]["studies"] == 1
    monkeypatch.setattr(stage, "_predict", never)
    with pytest.raises(AssertionError, match="again"):
        run(tmp_path / "other", work=tmp_path / "empty", name="text", checkpoint=world().parent)
    assert not (tmp_path / "other").exists()


def test_without_a_champion_the_table_is_empty(tmp_path):
    metrics, rows, info = run(tmp_path / "out", work=tmp_path, name="champion")
    assert (metrics, rows, info["checkpoint_digest"]) == ({"studies": 0}, [], "")


def test_an_altered_champion_and_an_empty_split_stop_it(tmp_path):
    given = champion(tmp_path / "store")
    with pytest.raises(IntegrityError, match="preflight saw 0000"):
        run(tmp_path / "out", work=tmp_path, **given | {"checkpoint_digest": "0" * 64})
    with pytest.raises(DataError, match="split 'val' holds no study"):
        run(tmp_path / "out", work=tmp_path, settings=PredictSettings(split="val"), **given)


@pytest.fixture(scope="module")
def opinionated(tmp_path_factory) -> Path:
    """An expert that finds a pleural effusion unlikely in every image, and knows nothing else."""
    path = tmp_path_factory.mktemp("opinionated") / "expert"
    shutil.copytree(world().expert, path)
    gate = gate_of(calibration={"Pleural Effusion": {"scale": 0.0, "bias": -3.0}})
    artifacts.write_json(path / GATE_FILE, gate)
    artifacts.stamp(path, kind="expert", stage="fetch_models")
    return path


def test_of_several_reports_the_one_is_kept_that_the_expert_finds_likeliest(opinionated):
    def report(text: str, *, truncated: bool = False) -> Generated:
        return Generated(text=text, tokens=len(text.split()), truncated=truncated)

    studies = read_studies(world().dataset, split="test")[:2]
    with_it, without, cut = (
        report("There is an effusion."),
        report("The lungs are clear."),
        report("Clear", truncated=True),
    )
    kept = likeliest(Expert.load(opinionated), studies, [[cut, with_it, without], [report(""), cut, with_it]])
    assert kept == [without, with_it], "what is empty or cut comes last, whatever it says"


def test_sampled_reports_are_the_same_again_and_others_with_another_seed(work, opinionated):
    sampled = SETTINGS.model_copy(update={"best_of": 4, "batch_size": 8})
    given = {"name": "text", "checkpoint": world().parent, "expert": opinionated}
    texts = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        settings = sampled.model_copy(update={"seed": seed})
        _, rows, _ = run(work / f"sampled-{name}", work=work / name, settings=settings, **given)
        texts.append([row["hypothesis"] for row in rows])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("best_of", "with_expert"), [(4, False), (1, True)])
def test_an_expert_and_something_to_choose_from_belong_together(work, opinionated, best_of, with_expert):
    given = {"expert": opinionated} if with_expert else {}
    settings = SETTINGS.model_copy(update={"best_of": best_of})
    with pytest.raises(UserError, match=f"predict.best_of is {best_of}"):
        run(work / "refused", work=work, settings=settings, name="text", checkpoint=world().parent, **given)
