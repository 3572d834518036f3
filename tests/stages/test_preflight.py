import json
import re

import pytest
from study_trees import mimic_tree
from tiny_llava import gate_of

from valor.context import Context
from valor.errors import UserError
from valor.recipe import DataSettings
from valor.stages.preflight import preflight


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def gate(metric="report_f1_micro", **settings):
    rule = {"metric": metric, "against": "sft", "margin": 0.1, "higher_is_better": "omission" not in metric}
    return json.dumps({"rules": [rule], **settings})


GATE = gate()


def look(
    root, *, base="phantom", public="false", publish_text="false", annotations_root="", gate=GATE,
    expert="org/expert", expert_revision=40 * "a", vision="{}", **settings,
):  # fmt: skip
    places = {"root": str(root), "annotations_root": annotations_root, "public": public, "publish_text": publish_text}
    models = {"base": str(base), "expert": str(expert), "expert_revision": expert_revision}
    places |= {"models": json.dumps(models), "gate": gate, "vision": vision}
    return preflight(DataSettings(**settings), **places, model_name="valor-test", context=Context())


def test_shards_and_source_digest_follow_the_data(tmp_path):
    tree = mimic_tree(tmp_path / "root")
    first = look(tree.root, shards=3)
    shards = json.loads(first.values["shards"])
    assert [set(shard) for shard in shards] == [{"index", "count", "digest"}] * len(shards)
    assert (first.values["champion_uri"], first.values["champion_digest"]) == ("", "")
    assert look(tree.root, shards=3).values == first.values
    assert look(tree.root, shards=50).metrics["shards"] < 14, "shards without studies are left out"
    tree.add(99)
    second = look(tree.root, shards=3)
    assert second.values["source_digest"] != first.values["source_digest"]
    assert second.metrics["source_studies"] == first.metrics["source_studies"] + 1


def test_a_missing_root_is_a_user_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such data root"):
        look(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no such data root, or it is empty"):
        look(tmp_path / "empty")


def test_other_weights_at_the_same_address_are_another_identity(tmp_path):
    tree, base = mimic_tree(tmp_path / "root"), tmp_path / "base"
    phantom = look(tree.root).values["models_digest"]
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"one")
    first = look(tree.root, base=base).values["models_digest"]
    assert first != phantom
    assert look(tree.root, base=base).values["models_digest"] == first
    (base / "model.safetensors").write_bytes(b"two!")
    assert look(tree.root, base=base).values["models_digest"] != first


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"base": "/no/model"}, "models.base is '/no/model': no such directory"),
        ({"base": "org/model"}, "models.base_revision is '' for the hub id 'org/model'"),
        ({"expert_revision": "main"}, "models.expert_revision is 'main' for the hub id 'org/expert'"),
    ],
)
def test_a_model_that_could_not_be_fetched_is_told_before_the_data_is_read(tmp_path, wrong, words):
    with pytest.raises(UserError, match=re.escape(words)):
        look(mimic_tree(tmp_path / "root").root, **wrong)


def test_text_of_data_that_is_not_public_is_not_shown(tmp_path):
    tree = mimic_tree(tmp_path / "root")
    with pytest.raises(UserError, match="publish_text is true"):
        look(tree.root, publish_text="true")
    assert look(tree.root, publish_text="true", public="true").values == look(tree.root).values
    assert look("phantom", publish_text="true", shards=1, phantom={"train": 2, "val": 1, "test": 1}).values


def test_a_cluster_needs_places_that_outlive_its_pods(tmp_path, monkeypatch):
    tree = mimic_tree(tmp_path / "root")
    monkeypatch.setenv("VALOR_TARGET", "kfp")
    monkeypatch.setenv("VALOR_WORK_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="VALOR_MODELS_ROOT, MLFLOW_TRACKING_URI: not set"):
        look(tree.root)
    monkeypatch.delenv("VALOR_TARGET")
    assert look(tree.root).values


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ('{"rules": []}', "gate.rules is empty"),
        (gate("report_f1_mikro"), "no metric 'report_f1_mikro'; did you mean 'report_f1_micro'?"),
        (gate("truth_f1_micro"), "no metric 'truth_f1_micro'; it needs masks and truth"),
        (gate("grounding_ratio"), "no metric 'grounding_ratio'; it needs masks and truth"),
        (gate("report_omission").replace("false", "true"), "set higher_is_better: false"),
        (gate(candidate="sft"), "'sft' is compared with itself"),
    ],
)
def test_a_gate_that_could_not_judge_is_told_before_anything_is_trained(tmp_path, rules, words):
    tree = mimic_tree(tmp_path / "root")
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        look(tree.root, gate=rules)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metric", ["report_omission", "report_f1_edema", "similarity", "length"])
def test_a_gate_on_reports_needs_no_truth(tmp_path, metric):
    assert look(mimic_tree(tmp_path / "root").root, gate=gate(metric)).values


@pytest.mark.parametrize("metric", ["truth_omission", "grounding_ratio"])
def test_a_gate_on_truth_needs_annotations_or_a_phantom(tmp_path, metric):
    tree = mimic_tree(tmp_path / "root")
    (tmp_path / "truth").mkdir()
    assert look(tree.root, gate=gate(metric), annotations_root=str(tmp_path / "truth")).values
    assert look("phantom", gate=gate(metric), shards=1, phantom={"train": 2, "val": 1, "test": 1}).values


def test_a_broken_table_of_annotations_is_told_by_its_name(tmp_path):
    tree = mimic_tree(tmp_path / "root")
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "annotations.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"annotations\.parquet: no whole Parquet file"):
        look(tree.root, annotations_root=str(tmp_path / "truth"))


PASSED = gate_of(calibration={"Edema": {"scale": 1.0, "bias": 0.0}})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "the expert's gate is not measured"),
        ({"measured": False}, "the expert's gate is not measured"),
        ({**PASSED, "masked": ["Edema"]}, "the expert passed its gate for no finding"),
        (PASSED, ""),
    ],
)
def test_an_expert_that_stage_2_could_not_reward_is_told_before_anything_is_trained(tmp_path, content, words):
    tree, expert = mimic_tree(tmp_path / "root"), tmp_path / "expert"
    expert.mkdir()
    if content is not None:
        (expert / "expert_gate.json").write_text(json.dumps(content))
    assert look(tree.root, expert=expert, vision='{"similarity": "paper"}').values
    if not words:
        assert look(tree.root, expert=expert).values
        return
    with pytest.raises(UserError, match=rf"models\.expert '{expert}': {words}.*grpo_vision\.similarity: paper"):
        look(tree.root, expert=expert)
