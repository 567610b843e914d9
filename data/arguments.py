"""The error for arguments that a function cannot work with."""


class ArgumentError(ValueError):
    """An argument has an impossible value.

    `args` are the parts of the message: texts, and arguments as (name, value), whose names a caller may replace.
    """

    def __str__(self) -> str:
        return "".join(part if isinstance(part, str) else f"{part[0]}={part[1]}" for part in self.args)


def require(condition: bool, rule: str, **argument: object) -> None:
    """Raise ArgumentError with `name=value rule`, for one argument, unless a condition holds."""
    if not condition:
        raise ArgumentError(*argument.items(), f" {rule}")
