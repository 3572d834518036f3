"""Checkpoints whose small files are damaged: whoever loads one is told which part."""

import json

import pytest

from valor.errors import IntegrityError, UserError
from valor.models.loading import PROMPT_FILE, load_policy, save_policy


@pytest.fixture
def checkpoint(llava, tmp_path):
    save_policy(*llava, tmp_path, stage="fetch_models", parents={}, prompt="Describe.")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.json", "", "configuration"),
        ("config.json", "[]", "configuration"),
        ("config.json", "{}", "configuration"),
        ("config.json", '{"model_type": "zzz"}', "configuration"),
        ("config.json", None, "configuration"),
        ("tokenizer.json", "{}", "processor"),
        ("tokenizer.json", "x", "processor"),
        ("tokenizer_config.json", "[]", "processor"),
        ("processor_config.json", "[]", "processor"),
        ("chat_template.jinja", "{% for %}", "chat template"),
        ("chat_template.jinja", "{{ 1/0 }}", "chat template"),
        (PROMPT_FILE, '{"prompt": 3}', r"prompt\.json: prompt is 3"),
        (PROMPT_FILE, "{}", r"prompt\.json: prompt is None"),
        ("generation_config.json", "[]", "weights"),
    ],
)
def test_a_damaged_file_is_told_by_its_part(checkpoint, name, content, part):
    load_policy(checkpoint)
    if content is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_text(content)
    with pytest.raises(IntegrityError, match=rf"^{checkpoint}.*{part}") as caught:
        load_policy(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat_template.jinja", None, "has no chat template; save one"),
        ("chat_template.jinja", "hello", "make a question on 0 images, expected 1: set a models.prompt"),
        (PROMPT_FILE, '{"prompt": "<image> and again"}', "make a question on 2 images"),
    ],
)
def test_a_question_that_is_not_on_one_image_is_the_users_to_change(checkpoint, name, content, words):
    if content is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_text(content)
    with pytest.raises(UserError, match=words):
        load_policy(checkpoint)


def test_a_missing_package_is_no_damage(checkpoint, monkeypatch):
    import transformers

    def wants(*args, **kwargs):
        raise ImportError("requires the Torchvision library", name="torchvision")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", wants)
    with pytest.raises(UserError, match=r"its processor needs a package that is not installed \(torchvision\)"):
        load_policy(checkpoint)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("CUDA error: out of memory")])
def test_what_the_system_or_the_device_says_is_no_damage(checkpoint, monkeypatch, error):
    import transformers

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", fails)
    with pytest.raises(type(error)):
        load_policy(checkpoint)


def test_weights_of_another_shape_are_refused(checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["intermediate_size"] *= 2
    path.write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match="its weights cannot be loaded"):
        load_policy(checkpoint)


def test_code_that_comes_with_a_model_is_not_run(checkpoint):
    path = checkpoint / "config.json"
    (checkpoint / "evil.py").write_text("raise SystemExit(99)")
    config = {**json.loads(path.read_text()), "model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    path.write_text(json.dumps(config))
    with pytest.raises((IntegrityError, UserError)):
        load_policy(checkpoint)
