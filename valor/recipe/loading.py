"""From a file, a built-in name or a task's parameter to a checked recipe, and from a mistake to one line."""

import difflib
import re
from collections.abc import Collection, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pydantic
import yaml

from valor.errors import UserError, shown
from valor.recipe import rules
from valor.recipe.sections import SECTION_OF_STAGE, Recipe, Section

_INHERITED = ("seed", "publish_text")


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe from a path or by the name of a built-in one.

    Args:
        recipe: a path, or a name such as `phantom` (looked up in the package `pipelines.recipes`).
        overrides: `key.sub=value` strings; values are YAML.

    Raises:
        UserError: no such recipe, broken YAML, unknown key, wrong value or unknown trainer field.
    """
    text, source = _read(str(recipe))
    tree = _parse_yaml(text, source)
    if not isinstance(tree, dict):
        raise UserError(f"{source}: a recipe is a mapping of sections, this is {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse(tree, source=source)


def parse(tree: dict[str, Any], *, source: str) -> Recipe:
    """Validate a recipe's tree; sections inherit the top level's `seed` and `publish_text`."""
    tree, inheriting = dict(tree), set()
    for section, field in Recipe.model_fields.items():
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, Section)):
            continue
        value = {} if tree.get(section) is None else tree[section]
        if not isinstance(value, dict):
            raise UserError(f"{source}: {section} is {shown(repr(value))}, expected a mapping")
        inherited = {k: tree[k] for k in _INHERITED if k in tree and k in model.model_fields}
        tree[section] = {**inherited, **value}
        inheriting |= {(section, key) for key in inherited if key not in value}
    try:
        recipe = Recipe.model_validate(tree)
    except pydantic.ValidationError as error:
        raise UserError(_first_problem(error, source, inheriting)) from None
    rules.check(recipe, source)
    return recipe


def parse_section(stage: str, settings_json: str) -> Any:
    """Parse the JSON of a stage's section into its settings class."""
    section = SECTION_OF_STAGE[stage]
    model = Recipe.model_fields[section].annotation
    try:
        settings = model.model_validate_json(settings_json)  # type: ignore[union-attr]
    except pydantic.ValidationError as error:
        raise UserError(_first_problem(error, f"settings of {stage}")) from None
    if section in rules.TRAINER_CLASS:
        rules.check_training(section, settings, f"settings of {stage}")
    return settings


def builtin_names() -> list[str]:
    """Return the names of the built-in recipes."""
    folder = resources.files("pipelines.recipes")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


class _StrictLoader(yaml.SafeLoader):
    """yaml's safe loader, which lets the last of two equal keys win in silence, with that refused."""

    def construct_document(self, node: yaml.Node) -> Any:
        # Depth first, so that an alias inside of what its anchor names is refused and not made into a ring.
        self.deep_construct = True
        return super().construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (LookupError, TypeError, AttributeError):
            # yaml trusts that what has a tag such as !!bool is written as one.
            problem = f"this is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            # A key that is a list or a mapping is told by yaml.
            if isinstance(key.value, str):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 takes 1e-4 for text, as it lacks a dot; a learning rate is what it looks like.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        at = f":{place.line + 1}" if place else ""
        raise UserError(f"{source}{at}: not valid YAML: {getattr(error, 'problem', 'cannot be read')}") from None
    except (ValueError, RecursionError) as error:
        # A date or an integer that cannot be, or nesting without end.
        raise UserError(f"{source}: not valid YAML: {shown(str(error))}") from None


def _read(recipe: str) -> tuple[str, str]:
    path = Path(recipe)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), recipe
        except UnicodeDecodeError as error:
            raise UserError(f"{recipe}: no UTF-8 text (byte {error.start}); a recipe is a YAML file") from None
        except OSError as error:
            raise UserError(f"{recipe}: cannot be read ({error.strerror}); a recipe is a YAML file") from None
    if recipe in builtin_names():
        return (resources.files("pipelines.recipes") / f"{recipe}.yaml").read_text(encoding="utf-8"), recipe
    raise UserError(f"{shown(recipe)}: no such file and no built-in recipe; built-in are {', '.join(builtin_names())}")


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise UserError(f"--set {shown(ascii(override)[1:-1])}: expected key=value, such as data.root=/data/mimic-cxr")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {shown(override)}: {parent} is not a section")
    node[leaf] = _parse_yaml(value, f"--set {shown(override)}")


def _first_problem(
    error: pydantic.ValidationError, source: str, inheriting: Collection[tuple[int | str, ...]] = ()
) -> str:
    """Tell the first problem, and how many more there are; what sections inherited is told once, where it stands."""
    problems = [problem for problem in error.errors(include_url=False) if problem["loc"] not in inheriting]
    problem = problems[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{source}: {where}: unknown key{_siblings(problem['loc'])}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    place = f"{source}: {where}" if where else source
    return f"{place}: {problem['msg']}, got {shown(repr(problem['input']))}{more}"


def _siblings(loc: tuple[int | str, ...]) -> str:
    """Name the keys that the section of an unknown key knows, closest first."""
    model: Any = Recipe
    for part in loc[:-1]:
        fields = getattr(model, "model_fields", {})
        model = fields[part].annotation if part in fields else None
    known = list(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known keys are {', '.join(known)}" if known else ""
