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
        ("chat_template.jinja", None, "chat template"),
        ("chat_template.jinja", "hello", "chat template and prompt make a question of 0 images"),
        (PROMPT_FILE, '{"prompt": 3}', r"prompt\.json: prompt is 3"),
        (PROMPT_FILE, "{}", r"prompt\.json: prompt is None"),
        (PROMPT_FILE, '{"prompt": "<image> and again"}', "make a question of 2 images"),
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
