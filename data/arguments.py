"""Checks of arguments and their error; `models` has the same error, because neither room imports the other."""

import math
from collections.abc import Sequence

Part = str | tuple[str, object]  # of a message: text, or an argument as (name, value)


class ArgumentError(ValueError):
    """An argument has an impossible value.

    `args` are the parts of the message; a caller may replace the names of arguments in it.
    """

    def __str__(self) -> str:
        return "".join(part if isinstance(part, str) else f"{part[0]}={part[1]}" for part in self.args)


def require(condition: bool, rule: str, /, **argument: object) -> None:
    """Raise ArgumentError with `name=value rule`, for one argument, unless a condition holds."""
    if not condition:
        ((name, value),) = argument.items()
        raise ArgumentError((name, value), f" {rule}")


def require_probability(**argument: float) -> None:
    """Raise ArgumentError unless an argument is from 0 to 1."""
    ((_, value),) = argument.items()
    require(0 <= value <= 1, "must be a probability: 0 to 1", **argument)


def require_colour(**argument: Sequence[int]) -> None:
    """Raise ArgumentError unless an argument has three levels of a pixel."""
    ((name, value),) = argument.items()
    is_colour = len(value) == 3 and all(isinstance(level, int) and 0 <= level <= 255 for level in value)
    require(is_colour, "must be three levels from 0 to 255", **{name: list(value)})


def require_ranges(*, scale: Sequence[float], ratio: Sequence[float]) -> None:
    """Raise ArgumentError unless `scale` and `ratio` are ranges of areas and of shapes of rectangles."""
    for name, value in (("scale", scale), ("ratio", ratio)):
        is_range = len(value) == 2 and all(isinstance(one, int | float) and math.isfinite(one) for one in value)
        require(is_range, "must be a range of two numbers", **{name: list(value)})
    require(0 < scale[0] <= scale[1] <= 1, "must rise from above 0 to at most 1", scale=list(scale))
    require(0 < ratio[0] <= ratio[1], "must rise from above 0", ratio=list(ratio))
