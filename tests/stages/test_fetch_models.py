import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from valor import artifacts
from valor.context import Context
from valor.errors import IntegrityError, UserError
from valor.models.expert import Expert
from valor.models.loading import load_policy, prompt_of
from valor.models.tiny import build_clip, build_llava
from valor.recipe import ModelSettings, PhantomBase, PhantomExpert, PhantomStudies, ReportNoise
from valor.stages.fetch_models import fetch_models, phantom_key

stage = sys.modules[fetch_models.__module__]

SMALL = {
    "image_px": 24,
    "patch_px": 12,
    "vision_width": 32,
    "vision_layers": 1,
    "text_width": 32,
    "text_layers": 1,
    "vocab": 300,
}
TEXTS = ["There is a left pleural effusion.", "No pneumothorax."]


@pytest.fixture
def outside(tmp_path):
    """A base and an expert as save_pretrained writes them, without valor.json."""
    model, processor = build_llava(PhantomBase(**SMALL), TEXTS, seed=0)
    base, expert = tmp_path / "outside" / "base", tmp_path / "outside" / "expert"
    model.save_pretrained(base)
    processor.save_pretrained(base)
    for part in build_clip(PhantomExpert(**SMALL), TEXTS, seed=0):
        part.save_pretrained(expert)
    return {"base": str(base), "expert": str(expert)}


def _fetch(settings, tmp_path, name="out"):
    paths = {kind: tmp_path / name / kind for kind in ("base", "expert", "judge")}
    result = fetch_models(settings, **paths, models_digest="", context=Context(work_root=str(tmp_path / "work")))
    return paths, result


def test_models_from_outside_become_verified_checkpoints(outside, tmp_path):
    paths, result = _fetch(ModelSettings(**outside, prompt="Say."), tmp_path)
    load_policy(paths["base"])
    assert prompt_of(paths["base"]) == "Say."
    assert Expert.load(paths["expert"]).gate == {"measured": False}
    assert not result.metrics
    assert artifacts.load_checkpoint_info(paths["expert"])["origin"] == outside["expert"]
    # Without a judge the expert scores its own pupil.
    assert artifacts.digest_dir(paths["judge"]) == artifacts.digest_dir(paths["expert"])


def test_the_prompt_is_in_the_bases_digest_and_in_no_other(outside, tmp_path):
    digests = []
    for name, prompt in (("one", "Say."), ("two", "Describe."), ("three", "Say.")):
        paths, _ = _fetch(ModelSettings(**outside, prompt=prompt), tmp_path, name=name)
        digests.append({kind: artifacts.digest_dir(path) for kind, path in paths.items()})
        assert "prompt" not in artifacts.load_checkpoint_info(paths["base"])
    assert digests[0] != digests[1]
    assert digests[0] == digests[2]
    assert digests[0]["expert"] == digests[1]["expert"]


def test_a_base_from_outside_that_brings_a_prompt_gets_the_recipes(outside, tmp_path):
    paths, _ = _fetch(ModelSettings(**outside, prompt="Say."), tmp_path)
    paths, _ = _fetch(ModelSettings(**outside | {"base": str(paths["base"])}, prompt="Describe."), tmp_path, name="two")
    assert prompt_of(paths["base"]) == "Describe."


def test_a_prompt_or_template_that_asks_about_no_one_image_is_refused_before_anything_is_trained(outside, tmp_path):
    for base in ("phantom", outside["base"]):
        with pytest.raises(UserError, match=r"models\.(prompt holds|base .*set a models\.prompt without) '<image>'"):
            _fetch(ModelSettings(**outside | {"base": base}, prompt="<image> Describe."), tmp_path)
    (Path(outside["base"]) / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"^models\.base '.*base': has no chat template"):
        _fetch(ModelSettings(**outside), tmp_path)


def test_a_language_model_as_expert_is_refused_in_one_line(outside, tmp_path):
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match=r"^models\.expert '.*llama': model_type is 'llama', which lacks") as error:
        _fetch(ModelSettings(base=outside["base"], expert=str(tmp_path / "llama")), tmp_path)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_dual_encoder_as_base_is_refused(outside, tmp_path):
    with pytest.raises(UserError, match=r"models\.base .*reads no image"):
        _fetch(ModelSettings(base=outside["expert"], expert=outside["expert"]), tmp_path)


def test_weights_that_do_not_match_their_own_record_are_refused(outside, tmp_path):
    from pathlib import Path

    base = Path(outside["base"])
    artifacts.write_checkpoint_info(base, stage="sft", parents={})
    _fetch(ModelSettings(**outside), tmp_path)
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "model.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match="weights were altered"):
        _fetch(ModelSettings(**outside), tmp_path)


def test_the_key_follows_what_the_weights_depend_on_and_nothing_else():
    plain = ModelSettings()
    other_base = ModelSettings(phantom_base=PhantomBase(tower_steps=1))
    assert phantom_key("base", plain) != phantom_key("base", other_base)
    assert phantom_key("expert", plain) == phantom_key("expert", other_base)
    assert phantom_key("base", plain) == phantom_key("base", ModelSettings(expert="x", expert_revision="y"))
    assert phantom_key("expert", plain) != phantom_key("expert", ModelSettings(seed=1))


@pytest.mark.parametrize("name", ["numpy", "pillow", "scipy", "scikit-learn", "tokenizers", "torch", "transformers"])
def test_the_key_follows_the_libraries_that_draw_and_train(monkeypatch, name):
    before, versions = phantom_key("base", ModelSettings()), metadata.version
    monkeypatch.setattr(metadata, "version", lambda asked: "other" if asked == name else versions(asked))
    assert phantom_key("base", ModelSettings()) != before
    monkeypatch.setattr(metadata, "version", lambda asked: "other" if asked == "mlflow" else versions(asked))
    assert phantom_key("base", ModelSettings()) == before


def test_the_key_follows_the_noise_of_the_subjects_and_the_manifests_code(monkeypatch):
    before = phantom_key("expert", ModelSettings())
    noise = {name: 0.0 for name in ReportNoise.model_fields}
    for studies, follows in ((PhantomStudies(noise=noise), True), (PhantomStudies(test=7), False)):
        with monkeypatch.context() as patch:
            patch.setattr(stage, "PhantomStudies", lambda chosen=studies: chosen)
            assert (phantom_key("expert", ModelSettings()) != before) is follows
    digest = artifacts.digest_file
    for module, follows in (("data/manifest.py", True), ("recipe/values.py", True), ("data/dicom.py", False)):
        with monkeypatch.context() as patch:
            patch.setattr(
                artifacts,
                "digest_file",
                lambda path, end=module: "x" if path.as_posix().endswith(end) else digest(path),
            )
            assert (phantom_key("expert", ModelSettings()) != before) is follows


@pytest.mark.slow
def test_phantom_models_are_trained_once_and_kept(tmp_path, monkeypatch):
    settings = ModelSettings(
        phantom_base=PhantomBase(**SMALL, subjects=24, tower_steps=2, language_steps=2),
        phantom_expert=PhantomExpert(**SMALL, subjects=24, steps=4, held_out_subjects=60),
        judge="phantom",
        phantom_judge=PhantomExpert(**SMALL, seed=9001, subjects=16, steps=2, held_out_subjects=20),
    )
    monkeypatch.setenv("VALOR_RUN_DIR", str(tmp_path))
    paths, result = _fetch(settings, tmp_path)
    model, processor = load_policy(paths["base"])
    assert processor.tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    gate = Expert.load(paths["expert"]).gate
    assert gate["measured"]
    assert gate["studies"] == 60
    assert Expert.load(paths["judge"]).gate["studies"] == 20
    assert artifacts.digest_dir(paths["judge"]) != artifacts.digest_dir(paths["expert"])
    assert result.metrics["expert_masked_findings"] == len(gate["masked"])
    trained = [json.loads(line)["unit"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert trained
    (tmp_path / "events.jsonl").unlink()
    again, _ = _fetch(settings, tmp_path, name="again")
    assert not (tmp_path / "events.jsonl").exists()
    for kind in paths:
        assert artifacts.digest_dir(again[kind]) == artifacts.digest_dir(paths[kind])
    assert torch.isfinite(next(model.parameters())).all()


def test_an_expert_without_its_tokenizer_is_refused(outside, tmp_path):
    from pathlib import Path

    for file in Path(outside["expert"]).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"^models\.expert .*no tokenizer"):
        _fetch(ModelSettings(**outside), tmp_path)


@pytest.mark.parametrize("kind", ["expert", "judge"])
def test_an_expert_whose_parts_do_not_belong_together_is_refused_before_anything_is_trained(outside, tmp_path, kind):
    path = tmp_path / "mixed"
    shutil.copytree(outside["expert"], path)
    processor = artifacts.read_json(path / "preprocessor_config.json")
    processor["size"] = processor["crop_size"] = {"height": 36, "width": 36}
    artifacts.write_json(path / "preprocessor_config.json", processor)
    with pytest.raises(UserError, match=rf"^models\.{kind} .*image processor does not fit its weights"):
        _fetch(ModelSettings(**outside | {"base": "phantom", kind: str(path)}), tmp_path)
