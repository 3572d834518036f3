"""Register, finalize and the lineage that ties them, on a real SQLite store and a pipeline of small files."""

import dataclasses
import importlib.metadata
import json
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

import mlflow
import pytest
from packaging.requirements import Requirement

from valor import artifacts, storage
from valor.context import Context
from valor.errors import GateRefused, IntegrityError, UserError
from valor.recipe import RegistrySettings
from valor.stages import finalize
from valor.tracking import lineage, pipeline_runs, registry, runs, store

from small_pipeline import SmallPipeline  # isort: skip


@pytest.fixture
def pipeline(home, tmp_path, monkeypatch):
    def start(run: str, **options) -> SmallPipeline:
        return SmallPipeline(tmp_path, run, monkeypatch, **options)

    return start


def test_a_version_leads_back_to_data_and_source(pipeline):
    run = pipeline("l-chain")
    made = run.judged(run.until_checkpoint())
    version = run.register(made)
    found = lineage.chain(run.model_name, version)
    found.require_agreement()
    checkpoint = found.trace.nodes["checkpoint"]
    assert checkpoint.digest == artifacts.read_stamp(made["checkpoint"])["digest"]
    assert {node.task for node in checkpoint.walk()} == {
        "grpo_text", "sft", "fetch_models", "validate_data", "ingest-0", "ingest-1",
    }  # fmt: skip
    assert found.tags["valor.dataset_digest"] == artifacts.read_stamp(made["dataset"])["digest"]
    assert found.tags["valor.source_digest"] == "5" * 64
    assert {node.pipeline_run for node in checkpoint.walk()} == {"l-chain"}
    text = lineage.render(found)
    assert text.startswith(f"{run.model_name}/{version}\n")
    assert text.endswith("agree.")
    assert "5" * 64 in text
    assert text.count("made by validate_data, run") == 2  # the dataset and the evidence, each told once


def test_reused_tasks_are_found_under_the_run_that_executed_them(pipeline):
    first = pipeline("l-first")
    made = first.until_checkpoint()
    second = pipeline("l-second")
    second.model_name = first.model_name
    version = second.register(second.judged(made))
    found = lineage.chain(first.model_name, version)
    found.require_agreement()
    runs = {node.task: node.pipeline_run for root in found.trace.nodes.values() for node in root.walk()}
    assert runs["sft"] == runs["ingest-0"] == "l-first"
    assert runs["evaluate"] == runs["gate"] == "l-second"


def test_a_changed_tag_run_or_file_is_a_disagreement(pipeline, monkeypatch):
    run = pipeline("l-forged")
    made = run.judged(run.until_checkpoint())
    version = run.register(made)
    client = store.client()

    def problem() -> str:
        found = lineage.chain(run.model_name, version)
        assert not found.agrees
        assert "DISAGREE" in lineage.render(found)
        with pytest.raises(IntegrityError) as caught:
            found.require_agreement()
        return str(caught.value)

    true = client.get_model_version(run.model_name, version).tags["valor.dataset_digest"]
    client.set_model_version_tag(run.model_name, version, "valor.dataset_digest", "f" * 64)
    assert "valor.dataset_digest" in problem()
    client.set_model_version_tag(run.model_name, version, "valor.dataset_digest", true)
    lineage.chain(run.model_name, version).require_agreement()

    sft_run = artifacts.read_stamp(made["sft"])["producer_run"]
    tag = client.get_run(sft_run).data.tags["valor.input.dataset"]
    client.set_tag(sft_run, "valor.input.dataset", tag.replace(true, "e" * 64))
    assert "no such input" in problem()
    client.set_tag(sft_run, "valor.input.dataset", tag)

    weights = run.root / "models" / artifacts.read_stamp(made["checkpoint"])["digest"] / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"?")
    assert "model.safetensors" in problem()
    weights.write_bytes(content)
    lineage.chain(run.model_name, version).require_agreement()

    client.delete_logged_model(client.get_run(sft_run).outputs.model_outputs[0].model_id)
    assert "no such input (and 1 more)" in problem()


def test_a_model_that_loads_something_else_is_a_disagreement(pipeline):
    run = pipeline("l-loads")
    version = run.register(run.judged(run.until_checkpoint()))
    registered = store.client().get_model_version(run.model_name, version)
    place = store.client().get_logged_model(registered.source.removeprefix("models:/")).artifact_location
    path = Path(unquote(urlparse(place).path)) / "MLmodel"
    text = path.read_text()
    digest = registered.tags["valor.checkpoint_digest"]
    for true, forged in ((f"sha256: {digest}", f"sha256: {'f' * 64}"), ("checkpoint_uri: ", "checkpoint_uri: /other")):
        assert true in text
        path.write_text(text.replace(true, forged))
        (problem,) = lineage.chain(run.model_name, version).problems
        assert forged.partition(":")[0] in problem
    path.unlink()
    assert not lineage.chain(run.model_name, version).agrees
    path.write_text(text)
    lineage.chain(run.model_name, version).require_agreement()


FORGED_INFO = {
    "commit": lambda info: info["code"].update(commit="0" * 40),
    "image": lambda info: info["code"].update(image="valor:other"),
    "producer_run": lambda info: info.update(producer_run="f" * 32),
    "pipeline_run": lambda info: info.pop("pipeline_run"),
    "parent parent": lambda info: info["parents"].update(parent="f" * 64),
    "parent expert": lambda info: info["parents"].update(expert="f" * 64),  # no run was given one
    "parent dataset": lambda info: info.pop("dataset_digest"),  # the run was given one
}


def test_what_valor_json_says_of_its_making_is_compared_with_the_runs_both_ways(pipeline, tmp_path):
    run = pipeline("l-info")
    made = run.judged(run.until_checkpoint())
    version = run.register(made)
    place = run.root / "models" / artifacts.read_stamp(made["checkpoint"])["digest"]
    for name, forge in FORGED_INFO.items():
        info = artifacts.read_json(made["checkpoint"] / artifacts.CHECKPOINT_INFO)
        forge(info)
        folder = tmp_path / "forged" / name
        shutil.copytree(made["checkpoint"], folder)
        artifacts.write_json(folder / artifacts.CHECKPOINT_INFO, info)
        shutil.rmtree(place)
        storage.put_dir(folder, place)
        problems = "\n".join(lineage.chain(run.model_name, version).problems)
        assert (name if name != "producer_run" else f"run {'f' * 32}") in problems, name
    shutil.rmtree(place)
    storage.put_dir(made["checkpoint"], place)
    lineage.chain(run.model_name, version).require_agreement()


def test_the_same_weights_made_by_two_runs_are_told_of_the_first_and_agree(pipeline):
    first = pipeline("l-twice")
    made = first.judged(first.until_checkpoint())
    first.register(made)
    again = pipeline("l-twice+again")
    twin = again.until_checkpoint()
    assert artifacts.digest_dir(twin["checkpoint"]) == artifacts.digest_dir(made["checkpoint"])
    better = pipeline("l-twice+better", seed=6)
    digest = artifacts.read_stamp(made["checkpoint"])["digest"]
    better.register(better.judged(better.until_checkpoint(), champion=digest), champion=digest)
    champion = registry.champion(first.model_name)[1]
    again.seed = 7  # another evaluation, so another version
    version = again.register(again.judged(twin, champion=champion), champion=champion)
    found = lineage.chain(first.model_name, version)
    found.require_agreement()
    told = json.loads(storage.read_bytes(storage.join(found.tags["valor.checkpoint_uri"], artifacts.CHECKPOINT_INFO)))
    assert told["pipeline_run"] == "l-twice"
    assert found.trace.nodes["checkpoint"].pipeline_run == "l-twice+again"


def test_code_that_nobody_knows_is_not_registered(pipeline, monkeypatch):
    run = pipeline("l-code")
    for known in ({"commit": "", "image": "valor:1"}, {"commit": "", "image": ""}):
        monkeypatch.setattr(runs, "code_identity", lambda known=known: {"dirty": False, **known})
        run.run = "l-code+" + known["image"]
        made = run.judged(run.until_checkpoint())
        if known["image"]:
            lineage.chain(run.model_name, run.register(made)).require_agreement()
    with pytest.raises(IntegrityError, match="neither commit nor image"):
        run.register(made, champion=registry.champion(run.model_name)[1])


def test_a_remote_store_is_said_to_be_compared_by_manifest_only(pipeline):
    run = pipeline("l-remote")
    found = lineage.chain(run.model_name, run.register(run.judged(run.until_checkpoint())))
    assert "manifest only" not in lineage.render(found)
    remote = dataclasses.replace(found, tags={**found.tags, "valor.checkpoint_uri": "gs://models/abc"})
    assert "gs://models/abc were compared by their manifest only" in lineage.render(remote)


def test_a_version_asks_for_the_release_that_registered_it(pipeline):
    run = pipeline("l-release")
    version = run.register(run.judged(run.until_checkpoint()))
    place = store.client().get_model_version_download_uri(run.model_name, version)
    wanted = Path(mlflow.artifacts.download_artifacts(f"{place}/requirements.txt")).read_text().split()
    release = importlib.metadata.version("valor-rrg")
    (line,) = [line for line in wanted if line.startswith("valor-rrg")]
    assert Requirement(line) == Requirement(f"valor-rrg[train,gcp]=={release}")


def test_an_unknown_version_is_a_users_mistake(home):
    with pytest.raises(UserError, match="l-none/7: no such registered version"):
        lineage.chain("l-none", "7")
    with pytest.raises(UserError, match="l-none/champion: no such registered version"):
        lineage.chain("l-none", "champion")


def test_the_champion_is_a_version_and_an_unknown_one_names_those_that_are_there(pipeline):
    run = pipeline("l-named")
    version = run.register(run.judged(run.until_checkpoint()))
    assert lineage.chain(run.model_name, "champion").version == version == "1"
    with pytest.raises(UserError, match=f"{run.model_name}/7: no such .*; there are {run.model_name}/1$"):
        lineage.chain(run.model_name, "7")


def test_registering_again_gives_the_same_version_and_new_weights_another(pipeline):
    assert registry.champion("m-l-again") == ("", "")
    run = pipeline("l-again")
    made = run.judged(run.until_checkpoint())
    assert run.register(made) == "1"
    uri, digest = registry.champion(run.model_name)
    assert uri == storage.join(run.root / "models", digest)
    assert digest == artifacts.read_stamp(made["checkpoint"])["digest"]
    assert run.register(made, task="register-again") == "1"
    assert run.register(made, champion=digest, task="register-champion") == "1"
    other = pipeline("l-again+new", seed=3)
    better = other.judged(other.until_checkpoint(), champion=digest)
    assert other.register(better, champion=digest) == "2"
    assert registry.champion(run.model_name)[1] == artifacts.read_stamp(better["checkpoint"])["digest"]
    assert lineage.chain(run.model_name, "1").agrees
    named = {name: pipeline_runs.find_parent(name).data.tags["valor.version"] for name in ("l-again", "l-again+new")}
    assert named == {"l-again": f"{run.model_name}/1", "l-again+new": f"{run.model_name}/2"}
    # The version does not die with the run's scratch space.
    shutil.rmtree(made["checkpoint"])
    lineage.chain(run.model_name, "1").require_agreement()


def test_a_champion_made_since_the_gate_compared_stops_the_promotion(pipeline):
    run = pipeline("l-lost")
    run.register(run.judged(run.until_checkpoint()))
    late = pipeline("l-lost+late", seed=4)
    made = late.judged(late.until_checkpoint())
    with pytest.raises(GateRefused, match="run the pipeline again"):
        late.register(made, champion="")
    assert registry.champion(run.model_name)[1] != artifacts.read_stamp(made["checkpoint"])["digest"]
    assert len(store.client().search_model_versions(f"name = '{run.model_name}'")) == 1


def test_a_refused_candidate_is_not_registered(pipeline):
    run = pipeline("l-refused")
    made = run.judged(run.until_checkpoint(), verdict="refuse")
    with pytest.raises(GateRefused, match="'refuse'"):
        run.register(made)
    assert registry.champion(run.model_name) == ("", "")


@pytest.mark.parametrize("what", ["weights", "another checkpoint", "another evaluation", "no run"])
def test_what_does_not_belong_together_is_not_registered(pipeline, what, monkeypatch):
    run = pipeline("l-mixed" + what.replace(" ", "-"))
    made = run.judged(run.until_checkpoint())
    if what == "weights":
        path = made["checkpoint"] / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif what == "another checkpoint":
        made["checkpoint"] = made["sft"]
    elif what == "another evaluation":
        stamp = artifacts.read_stamp(made["evaluation"])
        artifacts.write_json(made["evaluation"] / artifacts.STAMP, stamp | {"digest": "d" * 64})
    else:
        stamp = artifacts.read_stamp(made["checkpoint"])
        artifacts.write_json(made["checkpoint"] / artifacts.STAMP, stamp | {"producer_run": ""})
    with pytest.raises(IntegrityError):
        run.register(made)
    assert registry.champion(run.model_name) == ("", "")


def test_a_model_store_that_was_altered_is_not_pointed_to(pipeline):
    run = pipeline("l-store")
    made = run.judged(run.until_checkpoint())
    place = run.root / "models" / artifacts.read_stamp(made["checkpoint"])["digest"]
    storage.put_dir(made["sft"], place)
    with pytest.raises(IntegrityError, match="model store was altered"):
        run.register(made)


def test_register_needs_tracking(pipeline, monkeypatch):
    run = pipeline("l-off")
    made = run.judged(run.until_checkpoint())
    monkeypatch.setenv("VALOR_TRACKING", "off")
    with pytest.raises(UserError, match="VALOR_TRACKING"):
        run.register(made)


def test_finalize_links_executed_and_reused_runs_to_the_parent(pipeline):
    first = pipeline("l-fin1")
    made = first.until_checkpoint()
    second = pipeline("l-fin2")
    made = second.judged(made)
    given = {name: made[name] for name in ("shards", "dataset", "base", "checkpoint", "evaluation", "verdict")}
    summary = second.task("finalize", **given)["summary"]
    facts = artifacts.read_json(summary / "summary.json")
    assert {name: task["reused"] for name, task in facts["tasks"].items()} == {
        "ingest-0": True, "ingest-1": True, "validate_data": True, "fetch_models": True, "grpo_text": True,
        "evaluate": False, "gate": False,
    }  # fmt: skip
    assert second.result.metrics == {"tasks_executed": 2, "tasks_reused": 5}
    parent = pipeline_runs.find_parent("l-fin2")
    first_tags = store.client().get_run(artifacts.read_stamp(made["base"])["producer_run"]).data.tags
    assert json.loads(parent.data.tags["valor.task.grpo_text"])["reused"] is True
    assert parent.data.metrics["evaluate/loss"] == 0.25
    assert parent.data.tags["valor.evaluation_uri"] == str(made["evaluation"])
    assert parent.data.tags["valor.verdict"] == artifacts.read_json(made["verdict"] / "verdict.json")["verdict"]
    assert parent.data.tags["valor.commit"] == first_tags["valor.commit"] != ""
    assert (made["evaluation"] / "evaluation.html").is_file()
    assert "valor.restricted_uri" not in parent.data.tags  # none was given
    assert len(store.client().get_run(parent.info.run_id).inputs.model_inputs) == 2
    used = pipeline_runs.search("tags.`valor.used_by.l-fin2` LIKE '%'")
    assert artifacts.read_stamp(made["checkpoint"])["producer_run"] in {run.info.run_id for run in used}


@pytest.mark.parametrize(
    ("folder", "told"),
    [("/gcs/bucket/root/e", "gs://bucket/root/e"), ("/minio/b/e", "minio://b/e"), ("/gcsx/b/e", "/gcsx/b/e")],
)
def test_a_mounted_bucket_is_named_as_people_reach_it(folder, told):
    assert finalize._shown_place(Path(folder)) == told


def test_the_restricted_place_is_the_pipeline_root_unless_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_HOME", str(tmp_path))
    monkeypatch.delenv("VALOR_RESTRICTED_URI", raising=False)
    unnamed = Context.from_environment()
    assert unnamed.restricted_uri == str(tmp_path / "pipeline")
    monkeypatch.setenv("VALOR_RESTRICTED_URI", "gs://restricted/root")
    named = Context.from_environment()
    told = [
        finalize._tags(RegistrySettings(), context, None).get("valor.restricted_uri") for context in (unnamed, named)
    ]
    assert told == [None, "gs://restricted/root"]  # a folder that does not exist is no link
    (tmp_path / "pipeline").mkdir()
    assert finalize._tags(RegistrySettings(), unnamed, None)["valor.restricted_uri"] == unnamed.restricted_uri


def test_finalize_without_tracking_still_summarises(pipeline, monkeypatch):
    monkeypatch.setenv("VALOR_TRACKING", "off")
    run = pipeline("l-fin-off")
    made = run.until_checkpoint()
    summary = run.task("finalize", dataset=made["dataset"], checkpoint=made["checkpoint"])["summary"]
    assert set(artifacts.read_json(summary / "summary.json")["tasks"]) == {"validate_data", "grpo_text"}
