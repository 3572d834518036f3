"""`valor expert-gate` on a real dual encoder with random weights and a dataset of sixty studies in each split."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch
from click.testing import CliRunner
from tiny_llava import write_dataset, write_expert, write_policy

from pipelines.cli import main
from valor import artifacts
from valor.data.manifest import first_pixels, read_studies
from valor.models import expert_gate
from valor.models.expert import Expert
from valor.models.gate_file import GATE_FILE
from valor.models.statements import require_rewarded
from valor.recipe import ExpertGate

UPWARDS = ("new/..", "new/../..")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset", train=60, val=60, test=60)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """An expert as a hub has it: no gate, no valor.json."""
    path = write_expert(tmp_path_factory.mktemp("models") / "outside")
    for name in (GATE_FILE, artifacts.CHECKPOINT_INFO, artifacts.STAMP):
        (path / name).unlink()
    return path


def _invoke(*arguments):
    return CliRunner().invoke(main, ["expert-gate", *map(str, arguments)])


def test_an_outside_expert_gets_the_gate_of_each_image_with_its_own_report(dataset, outside, tmp_path):
    out = tmp_path / "new" / "gated"
    result = _invoke(outside, "--dataset", dataset, "--threshold", "0", "-o", out)
    assert result.exit_code == 0, result.output
    assert "held-out studies" in result.output
    assert f"models.expert={out}" in result.output
    expert, studies = Expert.load(out), read_studies(dataset, split="val")
    embeds = expert.embed_images([first_pixels(study) for study in studies])
    thresholds = ExpertGate(min_auc=0, min_side_swap=0, min_negation=0, min_deletion=0)
    for images, equal in ((embeds, True), (embeds.roll(1, 0), False)):
        again = expert_gate.measure(expert, images, [study.text for study in studies], thresholds)
        assert (again["findings"]["Pleural Effusion"] == expert.gate["findings"]["Pleural Effusion"]) is equal
    assert expert.gate["dataset"] == artifacts.read_stamp(dataset)["digest"]
    assert expert.gate["split"] == "val"
    require_rewarded(expert.gate)


def test_studies_are_drawn_by_seed_and_at_most_as_many_as_asked_for(dataset, outside, tmp_path):
    gates = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ("--dataset", dataset, "-n", 50, "--seed", seed, "-o", tmp_path / name)
        assert _invoke(outside, *arguments).exit_code == 0
        gates.append(json.loads((tmp_path / name / GATE_FILE).read_text()))
    assert gates[0] == gates[1] != gates[2]
    assert gates[0]["studies"] == 50


@pytest.mark.parametrize(
    ("expert", "more", "exit_code", "says"),
    [
        ("phantom", (), 2, "gets its gate when it is trained"),
        (" ", (), 2, "EXPERT is ''"),
        ("/no/such", (), 2, "no such directory"),
        ("org/model", (), 2, "40 hex digits"),
        ("outside", ("-n", 10), 2, "10 studies of split 'val' are too few"),
        ("outside", ("-o", "full"), 2, "is there already"),
        ("outside", ("-o", "full/new/.."), 2, "is there already"),
        ("outside", ("-o", "full/new/../.."), 2, "is there already"),
        ("outside", ("-o", ""), 2, "is there already"),
        ("outside", ("-o", "gs://bucket/gated"), 2, "give a model and a new directory"),
        ("outside", ("-o", "base/gated"), 2, "which it would alter"),
        ("outside", ("--threshold", "nan"), 2, "--threshold is nan"),
        ("outside", ("--dataset", "outside"), 2, "holds no artifact"),
        ("outside", ("--dataset", "base"), 2, "is the artifact 'base'"),
        ("outside", ("--dataset", "altered"), 7, "missing or altered"),
        ("base", (), 2, "dual encoder"),
        ("damaged", (), 7, "altered or cut"),
        ("mixed", (), 2, "image processor does not fit its weights"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_leaves_nothing(
    dataset, outside, tmp_path, expert, more, exit_code, says
):
    places = {name: tmp_path / name for name in ("damaged", "mixed", "base", "full", "altered")} | {"outside": outside}
    write_expert(places["damaged"])
    weights = places["damaged"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    write_policy(places["base"])
    write_expert(places["mixed"])
    processor = json.loads((places["mixed"] / "preprocessor_config.json").read_text())
    processor["size"] = processor["crop_size"] = {"height": 20, "width": 20}
    artifacts.write_json(places["mixed"] / "preprocessor_config.json", processor)
    places["full"].mkdir()
    (places["full"] / "x").touch()
    shutil.copytree(dataset, places["altered"])
    (places["altered"] / "shard-0.parquet").write_bytes(b"")
    before = sorted(tmp_path.iterdir())
    inputs = {**places, "base/gated": dataset / "gated", **{f"full/{end}": tmp_path / "full" / end for end in UPWARDS}}
    more = [inputs.get(part, part) for part in more]
    result = _invoke(places.get(expert, expert), "--dataset", dataset, "-o", tmp_path / "out", *more)
    assert result.exit_code == exit_code, result.output
    assert says in result.stderr
    assert str(tmp_path / ".out") not in result.stderr, "it names a copy that is gone"
    assert sorted(tmp_path.iterdir()) == before
    assert (places["full"] / "x").exists()


def test_what_somebody_puts_in_its_place_meanwhile_stays(dataset, outside, tmp_path, monkeypatch):
    out, measure = tmp_path / "out", expert_gate.measure

    def slowly(*arguments):
        out.mkdir()
        (out / "notes.txt").touch()
        return measure(*arguments)

    monkeypatch.setattr(expert_gate, "measure", slowly)
    result = _invoke(outside, "--dataset", dataset, "-o", out)
    assert result.exit_code == 2
    assert "made by somebody else meanwhile" in result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_an_expert_that_passes_for_nothing_is_not_recommended(dataset, outside, tmp_path):
    result = _invoke(outside, "--dataset", dataset, "--threshold", "1", "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "only grpo_vision.similarity: paper can use it" in result.output
    assert "similarity=statements" not in result.output


def test_a_gate_that_the_expert_brought_along_is_measured_anew_however_damaged(dataset, tmp_path):
    brought = write_expert(tmp_path / "brought")
    (brought / GATE_FILE).write_text("[")
    assert _invoke(brought, "--dataset", dataset, "-o", tmp_path / "out").exit_code == 0
    assert Expert.load(tmp_path / "out").gate["studies"] == 60
    assert artifacts.read_stamp(tmp_path / "out")["kind"] == "expert"


@pytest.mark.parametrize(
    ("error", "exit_code", "says"),
    [
        (RuntimeError("FINDINGS: effusion."), 1, "expert-gate: RuntimeError; see the traceback"),
        (MemoryError(), 6, "lower --studies"),
        (torch.OutOfMemoryError("CUDA out of memory"), 6, "lower --studies"),
        (KeyboardInterrupt(), 143, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 6, "no space left"),
        (signal.SIGTERM, 143, "told to end"),
    ],
)
def test_what_goes_wrong_quotes_no_report(dataset, outside, tmp_path, monkeypatch, capfd, error, exit_code, says):
    def fail(*_):
        if isinstance(error, signal.Signals):
            os.kill(os.getpid(), error)
        raise error

    monkeypatch.setattr(expert_gate, "measure", fail)
    result = _invoke(outside, "--dataset", dataset, "-o", tmp_path / "out")
    assert result.exit_code == exit_code
    assert says in result.stderr
    assert "effusion" not in result.output + result.stderr + "".join(capfd.readouterr())
    assert not list(tmp_path.iterdir())
