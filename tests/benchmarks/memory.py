"""A stage-2 step (the projector alone trains) by group size: peak memory and time against TRL's own.

Memory is the process's peak above what it held once the model was built.
"""

import argparse
import statistics
from typing import Any

from architectures import ARCHITECTURES
from lane import Work
from race import once, race, ratio, require_same_training

GROUPS = (4, 8, 16, 32)


def compare(generations: int, *, architecture: str, rounds: int) -> dict[str, Any]:
    """Return the peaks, their ratio, and the ratio of step time for one group size.

    Each round is of new processes: what one of stock TRL's holds at its peak differs by a third from run to run.
    """
    works = {
        name: Work(variant=name, architecture=architecture, generations=generations, projector_only=True, steps=2)
        for name in ("stock", "valor")
    }
    races = [race(works) for _ in range(rounds)]
    seconds = {name: [second for lanes in races for second in lanes[name].seconds] for name in works}
    above = {name: [lanes[name].above_model_mb for lanes in races] for name in works}
    differences = [require_same_training(lanes) for lanes in races]
    return {
        "work": vars(works["valor"]),
        "differences": {key: max(found[key] for found in differences) for key in differences[0]},
        "threads": 1,
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "above_model_mb": {name: ratio(each, [1.0] * rounds) for name, each in above.items()},
        "model_mb": races[0]["valor"].end["model_mb"],
        "ratios": {
            "stock / valor": ratio(seconds["stock"], seconds["valor"]),
            "memory, stock / valor": ratio(above["stock"], above["valor"]),
        },
    }


def main() -> None:
    """Run the group sizes that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="small")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="processes of each kind, with a step that counts after one that does not (default 3)",
    )
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
