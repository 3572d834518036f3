"""Write the list of TRL config fields that recipes are checked against: `python -m valor.recipe.trainer_fields`."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("trainer_fields.json")
_KINDS = {
    bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "dict", types.NoneType: "null",
}  # fmt: skip


def installed_fields() -> dict[str, dict[str, str]]:
    """Return {config class: {field: the kinds of value that it takes, such as `int | null`}} of the installed TRL."""
    from trl import GRPOConfig, SFTConfig

    return {cls.__name__: _fields(cls) for cls in (SFTConfig, GRPOConfig)}


def _fields(config: Any) -> dict[str, str]:
    hints = typing.get_type_hints(config)
    return {name: _kinds(hints[name]) for name in sorted(field.name for field in dataclasses.fields(config))}


def _kinds(hint: Any) -> str:
    """Return the kinds of a type hint; where TRL takes JSON or a path for a mapping, a recipe has the mapping."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    bases = [typing.get_origin(member) or member for member in members]
    kinds = [_KINDS[base] for base in bases if base in _KINDS]
    if not kinds:
        raise TypeError(f"{hint}: none of {', '.join(_KINDS.values())}; add its kind here")
    return " | ".join(kind for kind in kinds if not (kind == "str" and "dict" in kinds))


if __name__ == "__main__":
    PATH.write_text(json.dumps(installed_fields(), indent=1) + "\n", encoding="utf-8")
