"""A verb's declaration of its command line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from pipeline.cli.compose import choices, compose, default_groups, groups

MAX_EXAMPLE = 70  # columns; longer commands push their text to the right


@dataclass(frozen=True)
class Verb:
    """A command and the rules of its command line beyond `conf/<name>.yaml`.

    `examples` maps arguments to what they do. `required_group` needs a choice unless one of `alternatives` is given.
    `implied` maps a key to the groups that set it and the choice to add when none of them was chosen. `aliases` are
    short keys; `text_keys` are always strings. A word without a key sets `positional`. `open_groups` take new keys with
    a plus, which the verb checks itself. `out_is_folder` is false where `out` names a file. `minimums` has the least
    values of integers.
    `check_values` raises ConfigError for other values that no command of the verb can have; it imports nothing heavy.
    `check_objects` raises ValueError for objects that cannot be built; a study calls it before anything runs.
    """

    name: str
    description: str
    examples: Mapping[str, str]
    required_group: str | None = None
    alternatives: tuple[str, ...] = ()
    implied: Mapping[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    text_keys: tuple[str, ...] = ()
    positional: str | None = None
    open_groups: tuple[str, ...] = ()
    out_is_folder: bool = True
    minimums: Mapping[str, int] = field(default_factory=dict)
    check_values: Callable[[DictConfig], object] | None = None
    check_objects: Callable[[DictConfig], object] | None = None

    @property
    def groups(self) -> set[str]:
        """The groups from which it takes a choice."""
        return default_groups(self.name) | self.added_groups

    @property
    def added_groups(self) -> set[str]:
        """The groups that are absent from its defaults and need a plus: `+model=resnet`."""
        return {self.required_group or "", *self.alternatives} & groups()


def help_text(verb: Verb, overrides: Sequence[str]) -> str:
    """Return the help of a verb: examples, groups and their configs, and the composed values."""

    def rank(group: str) -> tuple[bool, bool, str]:
        return group not in verb.added_groups, group != verb.required_group, group

    commands = {f"python -m pipeline.{verb.name} {words}".strip(): text for words, text in verb.examples.items()}
    width = min(max(map(len, commands)), MAX_EXAMPLE)
    added, sorted_groups = verb.added_groups, sorted(verb.groups, key=rank)
    return "\n".join(
        [
            f"{verb.description}\n",
            *(f"  {command:<{width}}   {text}".rstrip() for command, text in commands.items()),
            *(["\nConfig groups and their choices"] if sorted_groups else []),
            *(f"  {'+' * (group in added)}{group}= {', '.join(choices(group))}" for group in sorted_groups),
            "\nSet any value with KEY=VALUE; --cfg job prints the resulting config. conf/ explains each value.\n",
            OmegaConf.to_yaml(compose(verb.name, overrides)),
        ]
    )
