"""Write the names that recipes are checked against (`python -m valor.recipe.known`), after an update of TRL, say.

Nothing imports this: with it, every stage would depend on the evaluation's code.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("known.json")


def installed() -> dict[str, Any]:
    """Return the fields of each TRL config class, and under `metrics` what the gate can compare."""
    from trl import GRPOConfig, SFTConfig

    from valor.clinical.vocabulary import OBSERVATIONS
    from valor.evaluation.measures import SOURCES, measures

    names: dict[str, Any] = {
        cls.__name__: sorted(f.name for f in dataclasses.fields(cls)) for cls in (SFTConfig, GRPOConfig)
    }
    metrics = measures(truth=True, findings=dict.fromkeys(SOURCES, OBSERVATIONS))
    facts = {m.name: {"higher_is_better": m.higher_is_better, "finding": m.finding} for m in metrics}
    return names | {"metrics": facts}


if __name__ == "__main__":
    PATH.write_text(json.dumps(installed(), indent=1) + "\n", encoding="utf-8")
