"""The kinds of single values that a recipe holds, and their bounds."""

from typing import Annotated

import pydantic

Positive = Annotated[int, pydantic.Field(ge=1, le=2**31 - 1, strict=True)]
Count = Annotated[int, pydantic.Field(ge=0, le=2**31 - 1, strict=True)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**31, strict=True)]
"""What every generator takes, NumPy's old one included, with room for what is added to tell models apart."""
PhantomSeed = Annotated[int, pydantic.Field(ge=0, lt=10**8, strict=True)]
"""Ids of phantom subjects hold it in eight digits (`valor.data.phantom.keys`)."""
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]


def _sum_to_one(fractions: tuple[float, float, float]) -> tuple[float, float, float]:
    if abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"the fractions sum to {sum(fractions):g}, expected 1")
    return fractions


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] < bounds[1]:
        raise ValueError(f"the bounds are {bounds[0]:g} and {bounds[1]:g}, expected the first below the second")
    return bounds


def heads_of(width: int) -> int:
    """Return how many attention heads the phantom's models have at a width: of about 32 each."""
    return max(1, width // 32)


def _whole_heads(width: int) -> int:
    # Even, for rotary positions turn pairs.
    if width % (2 * heads_of(width)):
        raise ValueError(f"a width of {width} makes no whole heads of an even width; take a multiple of 32")
    return width


Width = Annotated[int, pydantic.Field(ge=8, strict=True), pydantic.AfterValidator(_whole_heads)]
Vocabulary = Annotated[int, pydantic.Field(ge=300, strict=True)]
"""Tokens: all bytes, the special ones, and some to spare."""
Text = Annotated[str, pydantic.StringConstraints(strip_whitespace=True, min_length=1)]
Share = Annotated[tuple[Fraction, Fraction], pydantic.AfterValidator(_rising)]
SplitFractions = Annotated[tuple[Fraction, Fraction, Fraction], pydantic.AfterValidator(_sum_to_one)]
