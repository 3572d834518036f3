"""`valor expert-gate` on a real dual encoder with random weights and a dataset of sixty test studies."""

import json

import pytest
from click.testing import CliRunner
from tiny_llava import write_dataset, write_expert

from pipelines.cli import main
from valor import artifacts
from valor.data.manifest import first_pixels, read_studies
from valor.models import expert_gate
from valor.models.expert import GATE_FILE, Expert
from valor.models.statements import require_rewarded
from valor.recipe import ExpertGate


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset", train=2, test=60)


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
    result = _invoke(outside, "--dataset", dataset, "--split", "test", "--threshold", "0", "-o", out)
    assert result.exit_code == 0, result.output
    assert "held-out studies" in result.output
    assert f"models.expert={out}" in result.output
    expert, studies = Expert.load(out), read_studies(dataset, split="test")
    embeds = expert.embed_images([first_pixels(study) for study in studies])
    thresholds = ExpertGate(min_auc=0, min_side_swap=0, min_negation=0, min_deletion=0)
    for images, equal in ((embeds, True), (embeds.roll(1, 0), False)):
        again = expert_gate.measure(expert, images, [study.text for study in studies], thresholds)
        assert (again["findings"]["Pleural Effusion"] == expert.gate["findings"]["Pleural Effusion"]) is equal
    assert expert.gate["dataset"] == artifacts.read_stamp(dataset)["digest"]
    assert expert.gate["split"] == "test"
    require_rewarded(expert.gate)


def test_studies_are_drawn_by_seed_and_at_most_as_many_as_asked_for(dataset, outside, tmp_path):
    gates = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ("--dataset", dataset, "--split", "test", "-n", 50, "--seed", seed, "-o", tmp_path / name)
        assert _invoke(outside, *arguments).exit_code == 0
        gates.append(json.loads((tmp_path / name / GATE_FILE).read_text()))
    assert gates[0] == gates[1] != gates[2]
    assert gates[0]["studies"] == 50


@pytest.mark.parametrize(
    ("expert", "more", "exit_code", "says"),
    [
        ("phantom", (), 2, "gets its gate when it is trained"),
        ("/no/such", ("--split", "test"), 2, "no such directory"),
        ("org/model", ("--split", "test"), 2, "40 hex digits"),
        ("outside", (), 2, "0 studies of split 'val'"),
        ("outside", ("--split", "test", "-n", 10), 2, "at least 50"),
        ("outside", ("--split", "test", "-o", "full"), 2, "not an empty directory"),
        ("base", ("--split", "test"), 2, "dual encoder"),
        ("damaged", ("--split", "test"), 7, "altered or cut"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_leaves_nothing(
    dataset, outside, tmp_path, expert, more, exit_code, says
):
    places = {"outside": outside, "damaged": tmp_path / "damaged", "base": tmp_path / "base"}
    if expert == "damaged":
        write_expert(places["damaged"])
        weights = places["damaged"] / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    if expert == "base":
        from tiny_llava import write_policy

        write_policy(places["base"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    more = [tmp_path / "full" if part == "full" else part for part in more]
    result = _invoke(places.get(expert, expert), "--dataset", dataset, "-o", tmp_path / "out", *more)
    assert result.exit_code == exit_code, result.output
    assert says in result.stderr
    assert not (tmp_path / "out").exists()
