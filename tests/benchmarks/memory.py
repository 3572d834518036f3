"""A stage-2 step (the projector alone trains) by group size: peak memory and time against TRL's own.

Memory is the process's peak above what it held once the model was built.
"""

import argparse
from typing import Any

from architectures import ARCHITECTURES
from lane import Work
from race import once, race, ratio, require_same_training

GROUPS = (4, 8, 16, 32)


def compare(generations: int, *, architecture: str, rounds: int) -> dict[str, Any]:
    """Return the peaks, their ratio, and the ratio of step time for one group size."""
    works = {
        name: Work(
            variant=name, architecture=architecture, generations=generations, projector_only=True, steps=rounds + 1
        )
        for name in ("stock", "valor")
    }
    lanes = race(works)
    stock, valor = lanes["stock"], lanes["valor"]
    return {
        "work": vars(works["valor"]),
        "differences": require_same_training(lanes),
        "threads": 1,
        "seconds": {name: sorted(lane.seconds)[len(lane.seconds) // 2] for name, lane in lanes.items()},
        "above_model_mb": {name: lane.above_model_mb for name, lane in lanes.items()},
        "model_mb": valor.end["model_mb"],
        "ratios": {
            "stock / valor": ratio(stock.seconds, valor.seconds),
            "memory, stock / valor": ratio([stock.above_model_mb], [valor.above_model_mb]),
        },
    }


def main() -> None:
    """Run the group sizes that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="small")
    parser.add_argument("--rounds", type=int, default=3, help="steps that count, after one that does not (default 3)")
    parser.add_argument("--only", type=int, choices=GROUPS, help="one group size (default: all)")
    parser.add_argument("--again", action="store_true", help="measure again what has a result")
    options = parser.parse_args()
    for generations in GROUPS if options.only is None else (options.only,):
        result = once(
            f"memory-g{generations:02d}",
            lambda g=generations: compare(g, architecture=options.architecture, rounds=options.rounds),
            options,
        )
        for what, value in result["ratios"].items():
            print(f"  {what}: {value['median']:.2f}", flush=True)


if __name__ == "__main__":
    main()
