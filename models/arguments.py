"""The error for impossible arguments; `data` has the same, because neither room imports the other."""

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
