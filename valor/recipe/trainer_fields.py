"""Write the list of TRL config fields that recipes are checked against: `python -m valor.recipe.trainer_fields`."""

import dataclasses
import json
from pathlib import Path

PATH = Path(__file__).with_name("trainer_fields.json")


def installed_fields() -> dict[str, list[str]]:
    """Return {config class: its sorted field names} of the installed TRL."""
    from trl import GRPOConfig, SFTConfig

    return {cls.__name__: sorted(f.name for f in dataclasses.fields(cls)) for cls in (SFTConfig, GRPOConfig)}


if __name__ == "__main__":
    PATH.write_text(json.dumps(installed_fields(), indent=1) + "\n", encoding="utf-8")
