import subprocess
import sys
import textwrap

import pytest
import yaml
from kfp import components

from pipelines.compiling import compile_recipe
from valor.errors import UserError
from valor.recipe import SECTION_OF_STAGE, builtin_names, load

GPU = ["sft.processes=2", "resources.sft={gpus: 2, gpu_type: NVIDIA_H100_80GB, cpu: '8', memory: 64G}"]


def compiled(tmp_path, recipe, target, name="pipeline.yaml", **options):
    path = tmp_path / name
    compile_recipe(recipe, target=target, output=path, image="valor@sha256:" + 64 * "0", **options)
    return path


@pytest.mark.parametrize("target", ["local", "kfp", "vertex"])
@pytest.mark.parametrize("name", builtin_names())
def test_every_builtin_recipe_compiles_and_loads_back(tmp_path, name, target):
    path = compiled(tmp_path, load(name), target)
    component = components.load_component_from_file(str(path))
    assert component.pipeline_spec.pipeline_info.name == f"valor-{name.replace('_', '-')}"
    assert "sft_settings" in component.component_spec.inputs


@pytest.mark.parametrize("name", builtin_names())
def test_recipes_for_patients_publish_no_text_and_are_judged_by_reports(name):
    recipe, patients = load(name), name != "phantom"
    assert recipe.publish_text == (not patients)
    assert recipe.evaluation.publish_text == (not patients)
    kinds = {rule.metric.partition("_")[0] for rule in recipe.gate.rules}
    assert kinds == ({"report"} if patients else {"report", "truth"})  # only drawn studies come with their truth


@pytest.mark.parametrize("target", ["kfp", "vertex"])
def test_the_same_recipe_gives_the_same_bytes_and_another_one_others(tmp_path, target):
    first = compiled(tmp_path, load("phantom"), target, "a.yaml").read_bytes()
    assert compiled(tmp_path, load("phantom"), target, "b.yaml").read_bytes() == first
    assert compiled(tmp_path, load("phantom", ["seed=5"]), target, "c.yaml").read_bytes() != first


def test_each_stage_has_a_task_with_the_image_and_no_installation(tmp_path):
    spec = yaml.safe_load(compiled(tmp_path, load("phantom"), "vertex").read_text())
    executors = spec["deploymentSpec"]["executors"]
    for stage in SECTION_OF_STAGE:
        container = executors[f"exec-{stage.replace('_', '-')}"]["container"]
        assert container["image"] == "valor@sha256:" + 64 * "0"
        assert "pip install" not in str(container["command"])


def test_places_and_settings_are_parameters_but_not_of_each_other(tmp_path):
    recipe = load("phantom", ["data.root=/data/x", "data.public=true"])
    parameters = yaml.safe_load(compiled(tmp_path, recipe, "vertex").read_text())["root"]["inputDefinitions"]
    values = {name: p["defaultValue"] for name, p in parameters["parameters"].items()}
    assert values["data_root"] == "/data/x"
    assert "/data/x" not in values["data"]
    assert values["data"] == load("phantom").section_json("data"), "neither a place nor its leave is an identity"


def test_only_what_may_be_reused_is_cached(tmp_path):
    spec = yaml.safe_load(compiled(tmp_path, load("phantom"), "vertex").read_text())
    tasks = dict(spec["root"]["dag"]["tasks"])
    for part in spec["components"].values():
        tasks |= part.get("dag", {}).get("tasks", {})
    cached = {name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")}
    assert {"sft", "ingest", "predict", "predict-champion", "gate"} <= cached
    assert not {"preflight", "finalize", "finish"} & cached


def test_under_a_tag_nothing_is_cached_since_the_code_behind_it_may_change(tmp_path):
    path = tmp_path / "tag.yaml"
    compile_recipe(load("phantom"), target="kfp", output=path, image="valor:latest")
    assert "enableCache: true" not in path.read_text()
    assert "enableCache: true" in compiled(tmp_path, load("phantom"), "kfp").read_text()


def test_kfp_asks_for_a_gpu_pool_in_a_second_document(tmp_path):
    main, platform = yaml.safe_load_all(compiled(tmp_path, load("phantom", GPU), "kfp").read_text())
    limits = main["deploymentSpec"]["executors"]["exec-sft"]["container"]["resources"]
    assert limits["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert limits["accelerator"]["resourceCount"] == "2"
    sft = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-sft"]
    assert sft["nodeSelector"]["labels"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}


def test_vertex_gets_one_document_and_its_own_gpu_names(tmp_path):
    (main,) = yaml.safe_load_all(compiled(tmp_path, load("phantom", GPU), "vertex").read_text())
    limits = main["deploymentSpec"]["executors"]["exec-sft"]["container"]["resources"]
    assert limits["accelerator"]["type"] == "NVIDIA_H100_80GB"
    with pytest.raises(UserError, match="NVIDIA_"):
        compiled(tmp_path, load("phantom", ["resources.sft={gpus: 1, gpu_type: h100}"]), "vertex")


def test_environment_reaches_every_task(tmp_path):
    env = {"MLFLOW_TRACKING_URI": "https://mlflow.example"}
    spec = yaml.safe_load(compiled(tmp_path, load("phantom"), "vertex", env=env).read_text())
    for executor in spec["deploymentSpec"]["executors"].values():
        assert {"name": "MLFLOW_TRACKING_URI", "value": "https://mlflow.example"} in executor["container"]["env"]


@pytest.mark.parametrize("target", ["local", "kfp", "vertex"])
def test_every_task_is_told_the_image_that_it_runs_in(tmp_path, target):
    path = compiled(tmp_path, load("phantom"), target, env={"VALOR_IMAGE": "valor:of-somebody-else"})
    spec = next(yaml.safe_load_all(path.read_text()))
    containers = [executor["container"] for executor in spec["deploymentSpec"]["executors"].values()]
    told = [{e["name"]: e["value"] for e in container["env"]}["VALOR_IMAGE"] for container in containers]
    assert told == [container["image"] for container in containers]
    assert (len(set(told)) > 1) == (target == "local")  # locally each stage has its own code digest


@pytest.mark.slow
def test_vertex_accepts_the_file(tmp_path):
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import aiplatform

    path = compiled(tmp_path, load("phantom"), "vertex")
    job = aiplatform.PipelineJob(
        display_name="valor",
        template_path=str(path),
        pipeline_root="gs://bucket/root",
        project="p",
        location="us-central1",
        credentials=AnonymousCredentials(),
        parameter_values={"data_root": "gs://bucket/data"},
    )
    assert job.pipeline_spec["pipelineInfo"]["name"] == "valor-phantom"


WITHOUT_TRAINING_LIBRARIES = """
    import importlib.abc, sys

    class Forbid(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {"torch", "transformers", "trl", "mlflow", "numpy", "pandas", "pydicom"}:
                raise ImportError(f"{name} must not be needed to compile")

    sys.meta_path.insert(0, Forbid())
    from pipelines.cli import main
    main(sys.argv[1:], standalone_mode=False)
"""


@pytest.mark.parametrize("target", ["kfp", "vertex"])
def test_compile_imports_no_training_library(tmp_path, target):
    out = tmp_path / "out.yaml"
    script = textwrap.dedent(WITHOUT_TRAINING_LIBRARIES)
    arguments = ["compile", "phantom", "--target", target, "-o", str(out)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 10_000


def test_the_image_holds_every_package_and_runs_as_nobody_special(request):
    """Docker is not asked: the instructions are read."""
    checkout = request.config.rootpath
    lines = (checkout / "components/images/valor.Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split() for line in lines if line and not line.startswith("#")]
    base = next(words[1] for words in steps if words[0] == "FROM")
    assert base.partition(":")[2] not in ("", "latest")
    assert [words[1] for words in steps if words[0] == "USER"][-1] != "root"
    copied = {name for words in steps if words[0] == "COPY" for name in words[1:-1]}
    assert {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "valor", "components", "pipelines"} == copied
    assert all((checkout / name).exists() for name in copied)
    torch = next(line for line in (checkout / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert f"ARG TORCH={torch}" in lines


@pytest.mark.slow
def test_compile_from_a_wheel_outside_the_checkout_gives_the_same_bytes(tmp_path, request):
    """Built offline from a copy of the source, and unpacked to a folder of its own: nothing comes from here."""
    import shutil
    import zipfile

    checkout, source = request.config.rootpath, tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(checkout / name, source)
    for package in ("valor", "components", "pipelines"):
        shutil.copytree(checkout / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(path.name for path in checkout.iterdir())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=300)
    assert sorted(path.name for path in checkout.iterdir()) == before
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = f"import sys; sys.path.insert(0, {str(site)!r})\n" + textwrap.dedent(WITHOUT_TRAINING_LIBRARIES)
    script += "\nimport valor; assert valor.__file__.startswith(sys.path[0]), valor.__file__"
    out = tmp_path / "wheel.yaml"
    arguments = ["compile", "phantom", "--target", "kfp", "--image", "valor@sha256:" + 64 * "0", "-o", str(out)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, cwd=tmp_path, timeout=120)
    assert out.read_bytes() == compiled(tmp_path, load("phantom"), "kfp").read_bytes()
