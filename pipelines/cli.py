"""The `valor` command. Heavy libraries are imported in the commands that need them, so that --help is quick."""

import contextlib
import errno
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from valor.artifacts import full_disk_is_a_resource_error
from valor.errors import Interrupted, UserError, ValorError, shown

SHOWN_PATH = 200
_ABOUT_A_PATH = {
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EROFS,
    errno.ELOOP,
}  # fmt: skip
"""What the system says of a path that the user chose."""
_RECIPE_HELP = "RECIPE is a path, or the name of a built-in recipe such as `phantom` (see `valor recipes`)."


class _Group(click.Group):
    """Turns a ValorError, or what the system says of a path, into one line and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            with full_disk_is_a_resource_error(Path(".")), _refused_path_is_a_users_mistake():
                return super().invoke(context)
        except ValorError as error:
            click.echo(f"valor: error: {error}", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("valor: error: interrupted; run again", err=True)
            context.exit(Interrupted.exit_code)


@contextlib.contextmanager
def _refused_path_is_a_users_mistake() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno not in _ABOUT_A_PATH:
            raise
        path = shown(str(error.filename), limit=SHOWN_PATH)
        raise UserError(f"{path}: {error.strerror}; check the path and who may use it") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="valor-rrg")
def main() -> None:
    """VALOR: train, evaluate and release a chest X-ray report generator as one pipeline.

    \b
    Exit codes: 2 a user's mistake, 3 data failed its checks, 4 the gate refused, 5 an outside service failed,
    6 out of disk or memory, 7 a hash does not match, 8 a training guard stopped, 143 interrupted.
    """


def _recipe_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    override = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE",
        help="Override a recipe key, such as data.root=/data/mimic-cxr; repeatable, the value is YAML.",
    )  # fmt: skip
    return click.argument("recipe")(override(command))


@main.command(epilog=_RECIPE_HELP)
@_recipe_arguments
def run(recipe: str, overrides: tuple[str, ...]) -> None:
    """Run a recipe on this machine, reusing every task whose inputs, settings and code are unchanged.

    \b
    Examples:
      valor run phantom
      valor run iu_xray --set data.root=/data/openi
      valor run my_recipe.yaml --set sft.trainer.max_steps=50 --set seed=7
    """
    from valor.recipe import load

    loaded = load(recipe, overrides)
    from pipelines.local import runner

    sys.exit(runner.run(loaded))


@main.command(name="compile", epilog=_RECIPE_HELP)
@_recipe_arguments
@click.option("--target", type=click.Choice(["kfp", "vertex"]), required=True, help="Where the pipeline will run.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="A .yaml file.")
@click.option("--image", default="", help="Container image of every task; default valor:<version>.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="Environment variable of every task; repeatable.")
def compile_command(
    recipe: str, overrides: tuple[str, ...], target: str, output: Path, image: str, env: tuple[str, ...]
) -> None:
    """Compile a recipe for a cluster; needs no torch, and the same recipe gives the same bytes.

    \b
    Examples:
      valor compile phantom --target kfp -o phantom.yaml
      valor compile phantom --target vertex -o phantom.yaml --image valor@sha256:1f0c... \\
          --env VALOR_WORK_ROOT=gs://bucket/work --env MLFLOW_TRACKING_URI=https://mlflow.example
    """
    from valor.recipe import load

    loaded = load(recipe, overrides)
    from pipelines.compiling import compile_recipe
    from pipelines.targets import is_pinned

    if "@sha256:" in image and not is_pinned(image):
        raise UserError(f"--image {shown(image)}: a digest is @sha256: and 64 hex digits")
    if output.suffix not in (".yaml", ".yml"):
        raise click.UsageError(f"--output is {str(output)!r}, expected a name that ends in .yaml")
    image = image or _default_image()
    compile_recipe(loaded, target=target, output=output, image=image, env=_pairs(env))  # type: ignore[arg-type]
    click.echo(f"{output}: pipeline {loaded.name} for {target}")
    _say_what_is_missing(image, env=_pairs(env))


@main.command()
def recipes() -> None:
    """List the built-in recipes.

    \b
    Example:
      valor recipes
    """
    from valor.recipe import builtin_names, load

    for name in builtin_names():
        click.echo(f"{name:14} {load(name).description}")


@main.command(epilog=_RECIPE_HELP)
@_recipe_arguments
@click.option("--show", is_flag=True, help="Print the resolved recipe as YAML.")
def check(recipe: str, overrides: tuple[str, ...], show: bool) -> None:
    """Check a recipe without running anything.

    \b
    Examples:
      valor check my_recipe.yaml
      valor check phantom --set sft.trainer.learning_rate=1e-4 --show
    """
    from valor.recipe import load

    loaded = load(recipe, overrides)
    if show:
        import yaml

        click.echo(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False), nl=False)
    else:
        click.echo(f"{recipe}: a valid recipe named {loaded.name}")


@main.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("-n", "--studies", default=20, show_default=True, help="How many studies to draw.")
@click.option("--seed", default=1, show_default=True, help="Other seeds share no subject.")
def phantom(out: Path, studies: int, seed: int) -> None:
    """Draw phantom studies as DICOM and reports in MIMIC-CXR's layout, with truth and masks beside them.

    \b
    Examples:
      valor phantom /tmp/phantom -n 200 --seed 3
      valor run phantom --set data.root=/tmp/phantom/data --set data.annotations_root=/tmp/phantom/annotations \\
          --set data.public=true
    """
    from pipelines.phantoms import write_phantom

    root, truth = write_phantom(out, studies=studies, seed=seed)
    click.echo(f"{studies} studies: --set data.root={root} --set data.annotations_root={truth} --set data.public=true")


@main.command(name="expert-gate")
@click.argument("expert")
@click.option(
    "--dataset", type=click.Path(path_type=Path, file_okay=False, exists=True), required=True,
    help="A dataset artifact: `validate-data/dataset` of a run.",
)  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="A new directory.")
@click.option("--revision", default="", metavar="COMMIT", help="Of a hub id: the full commit hash.")
@click.option(
    "-n", "--studies", default=500, type=click.IntRange(0), show_default=True, help="Of split val, at most; 0: all."
)
@click.option("--threshold", default=0.85, type=click.FloatRange(0, 1), show_default=True, help="Of all four measures.")
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True, help="Of the draw of studies.")
def expert_gate(
    expert: str, dataset: Path, out: Path, revision: str, studies: int, threshold: float, seed: int
) -> None:
    """Measure what an expert from outside can tell, and make it fit for `grpo_vision.similarity: statements`.

    EXPERT is a CLIP or SigLIP: a directory, gs:// or a hub id. Per finding its AUC, side swap, negation and deletion
    are measured on the dataset's validation studies; a finding below the threshold is masked from rewards, and the rest
    is calibrated. The studies must be unknown to the expert: keep them out of its training.

    \b
    Example, the dataset of a finished run:
      valor expert-gate /models/biomed-clip --dataset .valor/pipeline/RUN/validate-data/dataset -o /models/gated
      valor run mimic_cxr --set models.expert=/models/gated --set grpo_vision.similarity=statements
    """
    from pipelines.experts import measure_gate
    from valor.models.expert_gate import show
    from valor.models.statements import require_rewarded
    from valor.recipe import ExpertGate, ModelSettings

    if not expert.strip() or str(out).startswith("gs:"):
        raise UserError(f"EXPERT is {shown(expert)!r} and --out {shown(str(out))!r}; give a model and a new directory")
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold is {threshold}, expected a number from 0 to 1")
    limits = ExpertGate(min_auc=threshold, min_side_swap=threshold, min_negation=threshold, min_deletion=threshold)
    settings = ModelSettings(expert=expert, expert_revision=revision, expert_gate=limits)
    gate = measure_gate(settings, dataset=dataset, studies=studies, seed=seed, out=out)
    click.echo(show(gate))
    try:
        require_rewarded(gate)
    except UserError:
        click.echo(f"{out}: passes for no finding, so only grpo_vision.similarity: paper can use it")
    else:
        click.echo(f"{out}: --set models.expert={out} --set grpo_vision.similarity=statements")


@main.command()
@click.argument("version", metavar="NAME/VERSION")
def lineage(version: str) -> None:
    """Print what made a model version, from the version back to the data's digest.

    \b
    Examples:
      valor lineage valor-phantom/1
      valor lineage valor-phantom/champion
    """
    name, slash, number = version.rpartition("/")
    if not slash or not name or not re.fullmatch("[0-9]{1,9}|champion", number):
        raise UserError(f"{shown(version)}: expected NAME/VERSION, such as valor/1 or valor/champion")
    from valor.tracking import lineage as tracking_lineage

    found = tracking_lineage.chain(name, number)
    click.echo(tracking_lineage.render(found))
    found.require_agreement()


@main.command()
@click.option("--arm", "arms", multiple=True, metavar="NAME", help="Only this arm; repeatable. Default: all.")
@click.option("--seed", "seeds", multiple=True, type=int, metavar="N", help="Only this seed; repeatable.")
@click.option("--cores", default=2, type=click.IntRange(1), show_default=True, help="How many jobs run side by side.")
@click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), default=Path("docs/experiments"), show_default=True,
    help="Where tables, figures and the page go.",
)  # fmt: skip
@click.option("--list", "only", flag_value="list", help="Only list the arms and what each is there to answer.")
@click.option("--collect", "only", flag_value="collect", help="Only collect what is finished so far; write the page.")
@click.option("--document", "only", flag_value="document", help="Only write the page again from what was collected.")
def experiments(arms: tuple[str, ...], seeds: tuple[int, ...], cores: int, results: Path, only: str | None) -> None:
    """Compare the recipe with its baselines and ablations on phantoms, over several seeds.

    What is finished is skipped, what was cut off continues. Work is kept in VALOR_HOME/experiments.

    
    Examples:
      valor experiments --list
      valor experiments --seed 9001 --arm valor --arm continued --results /tmp/trial
      valor experiments --collect
    """
    from pipelines.experiments import command

    if only == "list":
        click.echo(command.listing())
        return
    if only == "document":
        page = command.document(results)
    elif only == "collect":
        page = command.collect_all(arms, seeds=seeds, folder=results)
    else:
        page = command.run_all(arms, seeds=seeds, cores=cores, folder=results)
    click.echo(f"{page}: written")


@main.command()
@click.option("--port", default=5000, type=click.IntRange(1, 65535), show_default=True, help="Port on this machine.")
def ui(port: int) -> None:
    """Open MLflow on this home's runs and models (Ctrl-C ends it).

    \b
    Examples:
      valor ui
      VALOR_HOME=/data/valor valor ui --port 5001
    """
    from pipelines.local.ui import serve

    sys.exit(serve(port=port))


def _say_what_is_missing(image: str, *, env: dict[str, str]) -> None:
    """Say what the compiled pipeline still needs to run well on a cluster."""
    from pipelines.targets import is_pinned
    from valor.context import LASTING

    if missing := [name for name in LASTING if name not in env]:
        click.echo(f"note: every task needs {', '.join(missing)}: give --env, or set them on the cluster", err=True)
    if not is_pinned(image):
        click.echo(f"note: {image} is no digest, so caching is off: KFP could not see that its code changed", err=True)


def _default_image() -> str:
    import importlib.metadata

    return f"valor:{importlib.metadata.version('valor-rrg')}"


def _pairs(pairs: tuple[str, ...]) -> dict[str, str]:
    for pair in pairs:
        if not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", pair):
            raise click.UsageError(f"--env {pair}: expected NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


if __name__ == "__main__":
    main()
