import errno
import json
import re
import socket
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines.cli import main
from valor import recipe
from valor.errors import UserError
from valor.recipe import builtin_names, load


def invoke(*arguments):
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("name", ["", *main.commands])
def test_help_of_each_command_has_examples(name):
    result = invoke(*([name] if name else []), "--help")
    assert result.exit_code == 0
    assert not name or "Example" in result.output


def test_help_is_quick_and_loads_nothing_heavy(valor):
    start = time.monotonic()
    assert valor("--help").returncode == 0
    assert time.monotonic() - start < 3.0  # under 0.1 s alone; the tests' workers share the cores


def test_unknown_recipe_key_is_one_line_and_exit_code_2(valor):
    result = valor("check", "phantom", "--set", "sft.lerning_rate=1")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "lerning_rate" in result.stderr


def test_unknown_trainer_field_is_named_with_its_neighbour():
    result = invoke("check", "phantom", "--set", "sft.trainer.learning_rat=1e-4")
    assert result.exit_code == 2
    assert "learning_rate" in result.output


@pytest.mark.parametrize(
    ("wrong", "lawful"),
    [
        ("predict.max_studies=-1", "predict.max_studies=0"),
        ("predict.batch_size=0", "predict.batch_size=1"),
        ("predict.max_new_tokens=0", "predict.max_new_tokens=120"),
        ("sft.max_new_tokens=-5", "sft.max_new_tokens=1"),
        ("grpo_text.rewards=[]", "grpo_text.rewards=[{name: gleu_reward}]"),
        ("grpo_vision.tolerance=-0.01", "grpo_vision.tolerance=0"),
        ("evaluation.confidence=1", "evaluation.confidence=0.9"),
        ("evaluation.confidence=0", "evaluation.confidence=0.5"),
        ("evaluation.bootstrap_samples=0", "evaluation.bootstrap_samples=1"),
        ("evaluation.page_studies=-1", "evaluation.page_studies=0"),
        ("data.split_fractions=[0.9, 0.2, 0.1]", "data.split_fractions=[0.6, 0.3, 0.1]"),
        ("data.split_fractions=[1.1, -0.2, 0.1]", "data.split_fractions=[1, 0, 0]"),
        ("data.split_fractions=[.nan, 0.5, 0.5]", "data.split_fractions=[0.3333333, 0.3333333, 0.3333333]"),
        ("data.phantom.noise.omission=1.5", "data.phantom.noise.omission=1"),
        ("data.phantom.image_px=0", "data.phantom.image_px=64"),
        ("data.checks.max_quarantined_fraction=-0.1", "data.checks.max_quarantined_fraction=0"),
        ("data.checks.min_studies=-1", "data.checks.min_studies=0"),
        ("seed=2147483648", "seed=2147483647"),
        ("data.phantom.seed=-1", "data.phantom.seed=0"),
        ("models.phantom_base.seed=100000000", "models.phantom_base.seed=99999999"),
        ("grpo_text.trainer.num_generations=7", "grpo_text.trainer.num_generations=16"),
        ("grpo_vision.trainer.num_generations=1", "grpo_vision.trainer.num_generations=2"),
        ("grpo_text.trainer.steps_per_generation=x", "grpo_text.trainer.steps_per_generation=2"),
        ("models.phantom_base.tower_steps=0", "models.phantom_base.tower_steps=1"),
        ("models.phantom_expert.steps=1", "models.phantom_expert.steps=2"),
        ("models.phantom_expert.text_width=-32", "models.phantom_expert.text_width=32"),
        ("models.expert_gate.min_auc=1.2", "models.expert_gate.min_auc=1"),
        ("models.phantom_base.vocab=1", "models.phantom_base.vocab=300"),
        ("models.phantom_expert.vision_width=98", "models.phantom_expert.vision_width=96"),
        ("sft.lora={r: 10000000}", "sft.lora={r: 8}"),
        ("seed=true", "seed=1"),
        ("data.shards=2.0", "data.shards=2"),
        ("resources.sft.memory=0G", "resources.sft.memory=1.5Gi"),
        ("resources.sft.cpu='0.0'", "resources.sft.cpu='0.5'"),
        ("registry.model_name=a/b", "registry.model_name=chest report.v2"),
        ("models.prompt=''", "models.prompt=Go."),
        (r'models.prompt="\ud800"', r'models.prompt="\u00e9"'),
    ],
)
def test_an_impossible_number_is_one_line_that_names_it_and_its_neighbour_passes(wrong, lawful):
    assert load("phantom", [lawful])
    with pytest.raises(UserError, match=wrong.partition("=")[0].replace(".", r"\.")) as caught:
        load("phantom", [wrong])
    assert "\n" not in str(caught.value)
    assert "phantom: " in str(caught.value)


def test_what_sections_inherit_is_told_once():
    with pytest.raises(UserError, match=r"^phantom: seed: [^(]*$"):
        load("phantom", ["seed=-1"])
    with pytest.raises(UserError, match=r"seed: .*\(and 1 more\)$"):
        load("phantom", ["seed=-1", "sft.seed=-2"])


def test_every_builtin_recipe_is_listed_and_valid():
    listed = invoke("recipes").output
    for name in builtin_names():
        assert name in listed
        assert invoke("check", name).exit_code == 0


def test_check_shows_the_resolved_recipe():
    shown = invoke("check", "phantom", "--set", "seed=7", "--show").output
    assert "seed: 7" in shown


@pytest.mark.parametrize("key", ["publish_text", "evaluation.publish_text", "registry.publish_text"])
def test_text_of_a_source_is_published_only_where_its_owner_allows_it(key):
    nothing = ["--set", "publish_text=false", "--set", "evaluation.publish_text=false"]
    place = ["--set", "data.root=/data/x"]
    refused = invoke("check", "phantom", *nothing, *place, "--set", f"{key}=true")
    assert refused.exit_code == 2
    assert key in refused.stderr
    assert "data.public: true" in refused.stderr
    assert (
        invoke("check", "phantom", *nothing, *place, "--set", f"{key}=true", "--set", "data.public=true").exit_code == 0
    )
    assert invoke("check", "phantom", *nothing, *place).exit_code == 0
    assert invoke("check", "phantom", *nothing, "--set", f"{key}=true").exit_code == 0, "phantoms are nobody's"


@pytest.mark.parametrize(
    ("error", "exit_code", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 6, "/x/y: no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x/y"), 6, "/x/y: no space left"),
        (OSError(errno.EACCES, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
        (OSError(errno.ENOENT, "No such file or directory", "/x/y"), 2, "/x/y: No such file"),
        (OSError(errno.EISDIR, "Is a directory", "/x/y"), 2, "/x/y: Is a directory"),
    ],
)
def test_what_the_system_says_of_a_path_is_one_line(monkeypatch, error, exit_code, says):
    def refuse():
        raise error

    monkeypatch.setattr(recipe, "builtin_names", refuse)
    result = invoke("recipes")
    assert result.exit_code == exit_code
    assert result.stderr.startswith(f"valor: error: {says}")
    assert result.stderr.count("\n") == 1


def test_another_error_of_the_system_is_not_explained_away(monkeypatch):
    monkeypatch.setattr(recipe, "builtin_names", lambda: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error", "/x")))
    assert isinstance(invoke("recipes").exception, OSError)


def test_output_that_is_no_yaml_is_a_usage_error(tmp_path):
    result = invoke("compile", "phantom", "--target", "kfp", "-o", str(tmp_path / "x.json"))
    assert result.exit_code == 2
    assert ".yaml" in result.output


@pytest.mark.parametrize(
    "version", ["valor-phantom", "valor-phantom/", "/1", "valor-phantom/x", f"x/{'9' * 30}", "x/champion/"]
)
def test_lineage_of_a_malformed_version_is_exit_code_2(version):
    result = invoke("lineage", version)
    assert result.exit_code == 2
    assert "NAME/VERSION" in result.output


def test_a_port_in_use_is_told_before_mlflow_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = invoke("ui", "--port", str(port))
    assert result.exit_code == 2
    assert f"port {port}: Address already in use; give another one: valor ui --port {port + 1}" in result.output


@pytest.mark.parametrize("port", ["0", "70000", "-1"])
def test_a_port_that_is_none_is_a_usage_error(port):
    assert invoke("ui", f"--port={port}").exit_code == 2


def test_a_digest_that_is_none_is_refused(tmp_path):
    arguments = ("compile", "phantom", "--target", "kfp", "-o", str(tmp_path / "p.yaml"), "--image")
    assert invoke(*arguments, "REGISTRY/valor@sha256:...").exit_code == 2
    assert invoke(*arguments, "REGISTRY/valor@sha256:" + 64 * "a").exit_code == 0


def test_phantom_writes_a_root_that_the_adapter_reads(tmp_path):
    result = invoke("phantom", str(tmp_path / "p"), "-n", "3")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "p" / "data").rglob("*.dcm"))) >= 3
    assert (tmp_path / "p" / "annotations" / "truth.parquet").exists()
    assert invoke("phantom", str(tmp_path / "p"), "-n", "3").exit_code == 2, "a folder in use is refused"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"name: x\nseed: \xff\xfe", "no UTF-8 text (byte 14)"),
        (b"name: x\nseed: 1\nseed: 2\n", ":3: not valid YAML: 'seed' is there twice"),
        (b"name: x\nseed: 2020-99-99", "not valid YAML: month must be in 1..12"),
        (b"name: x\nseed: " + b"9" * 5000, "not valid YAML: Exceeds the limit"),
        (b"name: x\nseed: " + b"[" * 3000, "not valid YAML"),
        (b"name: x\nseed: {[1, 2]: 3}", ":2: not valid YAML: found unhashable key"),
        (b"name: x\nseed: !!bool x", ":2: not valid YAML: this is no bool"),
        (b"name: x\nseed: !!timestamp x", ":2: not valid YAML: this is no timestamp"),
        (b"name: x\nseed: !!int ''", ":2: not valid YAML: this is no int"),
        (b"name: x\nseed: &x [*x]", ":2: not valid YAML: found unconstructable recursive node"),
        (b"name: x\nseed: !!set [1]", ":2: not valid YAML: this is no set"),
        (b"name: x\nsft: &x {trainer: {a: *x}}", ":2: not valid YAML: found unconstructable recursive node"),
        (b"name: x\nsft: {[1, 2]: 3}", ":2: not valid YAML: found unhashable key"),
        (b"name: x\ndescription: [" + b"a, " * 5000 + b"]", "description: Input should be a valid string, got"),
        (b"name: x\nsft: false", "sft is False, expected a mapping"),
        (b"name: x\nsft: {trainer: {learning_rate: .nan}}", "learning_rate: is nan, expected a finite number"),
        (b"name: x\nsft: {trainer: {learning_rate: abc}}", "sft.trainer.learning_rate: is 'abc', expected a number"),
        (b"name: x\ngrpo_text: {rewards: [{name: gleu_reward, weight: .nan}]}", "Input should be a finite number"),
        (b"name: x\nresources: {sft: {memory: lots}}", "resources.sft.memory: String should match pattern"),
        (b"name: x\nresources: {sft: {gpus: -3}}", "resources.sft.gpus: Input should be greater than or equal to 0"),
        (b"name: x\nmodels: {phantom_base: {patch_px: 97}}", "image_px is 96, expected a multiple of patch_px, 97"),
    ],
)  # fmt: skip
def test_an_odd_recipe_is_one_short_line(text, says, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_bytes(text)
    result = invoke("check", str(path))
    assert result.exit_code == 2
    assert says in result.output
    assert result.output.count("\n") == 1
    assert len(result.output) < 500


def test_anchors_and_tags_that_fit_are_read(tmp_path):
    path = tmp_path / "fine.yaml"
    path.write_text("name: x\nseed: !!int '3'\nsft: &t {trainer: {learning_rate: 1e-4}}\ngrpo_text: {<<: *t}\n")
    recipe = load(path)
    assert recipe.seed == 3
    assert recipe.grpo_text.trainer == recipe.sft.trainer == {"learning_rate": 1e-4}


@pytest.mark.parametrize("override", [".sft=1", ".=1", "sft..studies=1", "\x1b[31m=1", "=1", "seed"])
def test_a_key_is_words_and_points(override):
    result = invoke("check", "phantom", "--set", override)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "expected key=value, such as" in result.output
    assert result.output.strip().isprintable()


@pytest.mark.parametrize("recipe", ["n" * 300, "/dev/null/x", "/proc/self/mem"])
def test_an_odd_path_is_one_short_line(recipe):
    result = invoke("check", recipe)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert len(result.output) < 500


def test_a_rate_without_a_dot_is_a_number(tmp_path):
    assert load("phantom", ["sft.trainer.learning_rate=1e-4"]).sft.trainer["learning_rate"] == 1e-4
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nsft: {trainer: {learning_rate: 3e-05, warmup_steps: 20}}")
    assert load(path).sft.trainer == {"learning_rate": 3e-5, "warmup_steps": 20}


def test_a_limit_that_the_served_model_would_not_use_is_refused():
    with pytest.raises(UserError, match=r"predict.max_new_tokens is 64 and grpo_vision.max_new_tokens 120"):
        load("phantom", ["predict.max_new_tokens=64"])
    assert load("phantom", ["predict.max_new_tokens=64", "grpo_vision.max_new_tokens=64"])


def test_compile_says_what_a_cluster_still_needs(tmp_path):
    result = invoke("compile", "phantom", "--target", "kfp", "-o", str(tmp_path / "p.yaml"))
    assert "every task needs VALOR_WORK_ROOT, VALOR_MODELS_ROOT, MLFLOW_TRACKING_URI" in result.output
    assert "caching is off" in result.output
    env = [
        f for name in ("VALOR_WORK_ROOT", "VALOR_MODELS_ROOT", "MLFLOW_TRACKING_URI") for f in ("--env", f"{name}=x")
    ]
    image = ("--image", "valor@sha256:" + 64 * "0")
    result = invoke("compile", "phantom", "--target", "kfp", "-o", str(tmp_path / "p.yaml"), *image, *env)
    assert "note:" not in result.output


def test_stage_by_hand_prints_its_values_and_fails_with_its_code(tmp_path, capfd, monkeypatch):
    from valor.__main__ import main as stage

    monkeypatch.setenv("VALOR_HOME", str(tmp_path))
    monkeypatch.setenv("VALOR_TRACKING", "off")
    settings = json.dumps({"phantom": {"train": 3, "val": 1, "test": 1}, "shards": 1})
    gate = json.dumps({"rules": [{"metric": "report_f1_micro", "against": "sft", "margin": 0.1}]})
    models = json.dumps({"base": "phantom", "expert": "phantom"})
    given = {
        "gate": gate,
        "vision": "{}",
        "models": models,
        "annotations_root": "",
        "public": "false",
        "publish_text": "true",
        "model_name": "m",
    }
    values = [f"{name}={value}" for name, value in given.items()]
    places = [argument for value in values for argument in ("--value", value)]
    assert stage(["preflight", "--settings", settings, "--value", "root=phantom", *places]) == 0
    assert '"count"' in capfd.readouterr().out
    assert stage(["preflight", "--settings", settings, "--value", f"root={tmp_path}/none", *places]) == 2
    assert "valor: error: preflight: publish_text is true" in capfd.readouterr().err


GATE = ["gate", "--input", "evaluation=e", "--output", "verdict=x", "--value", "champion_digest="]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gate", "--output", "verdict=x"], "gate: lacks evaluation, champion_digest; it takes evaluation, verdict"),
        ([*GATE, "--value", "v=1"], "gate: does not take v; it takes"),
        ([*GATE, "--input", "context=c"], "gate: does not take context; it takes"),
        ([*GATE, "--value", "verdict=y"], "gate: takes only once verdict; it takes"),
        (["finalize", "--input", "anything=e"], "finalize: lacks summary; it takes summary"),
    ],
)
def test_a_stage_by_hand_with_wrong_names_ends_before_it_starts(arguments, words, tmp_path, capfd, monkeypatch):
    from valor.__main__ import main as stage

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALOR_HOME", str(tmp_path / "home"))
    assert stage(arguments) == 2
    assert f"valor: error: {words}" in capfd.readouterr().err
    assert not (tmp_path / "home" / "mlflow.db").exists()
    assert not (tmp_path / "x").exists()


@pytest.fixture
def by_hand(tmp_path, monkeypatch):
    from valor.__main__ import main as stage

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VALOR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VALOR_TRACKING", "off")
    return stage


def made(name, *, file="artifact.json"):
    """Make a folder with one file in the working directory."""
    Path(name).mkdir()
    (Path(name) / file).write_text("{}")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("papers", "holds files and no artifact.json"),
        ("e", "gate: verdict=.*/e and evaluation=.*/e overlap"),
        ("e/verdict", "overlap; choose another place for verdict"),
        (".", "holds files and no artifact.json"),
        ("file", "gate: verdict=.*file: cannot be made .a file is there.; choose another place"),
        ("file/below", "cannot be made .*/file: File exists.; choose another place"),
        ("/proc/x/verdict", "cannot be made .*No such file or directory.; choose another place"),
    ],
)
def test_an_output_that_would_replace_something_else_or_cannot_be_made_is_refused(place, words, by_hand, capfd):
    made("papers", file="thesis.txt")
    made("e")
    Path("file").write_text("text")
    assert by_hand([f"verdict={place}" if word == "verdict=x" else word for word in GATE]) == 2
    assert re.search(f"valor: error: .*{words}", capfd.readouterr().err)
    left = sorted(str(path) for path in Path().rglob("*"))
    assert left == ["e", "e/artifact.json", "file", "papers", "papers/thesis.txt"]


@pytest.mark.parametrize("file", ["", "artifact.json", "valor.json"])
def test_an_output_may_take_the_place_of_nothing_or_of_an_artifact(file, by_hand, capfd):
    """A training killed before its stamp leaves a checkpoint; its next try goes to the same place."""
    Path("x").mkdir()
    if file:
        (Path("x") / file).write_text("{}")
    assert by_hand(GATE) == 2
    assert "e: no such artifact directory" in capfd.readouterr().err


VALIDATE = ["validate_data", "--output", "dataset=d", "--output", "evidence=v", "--output", "data_docs=o"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*GATE, "--input", "evaluation=e"], "gate: evaluation is given 2 times, and it takes one"),
        ([*VALIDATE, "--input", "shards=a"], "validate_data: shards is a list, .* give it as --input-list"),
        ([*GATE, "--output", "verdict=y"], "--output verdict: given twice"),
        ([*GATE, "--settings", "@binary"], "--settings @binary: not UTF-8 text"),
        ([*GATE, "--settings", "@/tmp"], "--settings @/tmp: no file; expected one of JSON"),
        ([*GATE, "--settings", "@/proc/self/mem"], "--settings @/proc/self/mem: cannot be read"),
        ([*GATE, "--settings", "[]"], "settings of gate: Input should be"),
    ],
)
def test_words_of_a_stage_by_hand_that_make_no_sense_are_one_line(arguments, words, by_hand, tmp_path, capfd):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert by_hand(arguments) == 2
    assert re.search(f"valor: error: .*{words}", capfd.readouterr().err)


def test_a_stage_by_hand_that_is_interrupted_ends_in_one_line(by_hand, capfd, monkeypatch):
    from valor import stages

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "run", interrupted)
    assert by_hand(GATE) == 143
    assert capfd.readouterr().err == "valor: error: gate: interrupted; run again\n"
