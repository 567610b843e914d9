"""Check a command line before anything heavy is imported.

Hydra answers many mistakes with a traceback or not at all. These checks answer each in one sentence that names the
nearest valid word.
"""

import copy
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from pipeline.cli.compose import (
    CONF,
    PARTS,
    choices,
    compose,
    default_groups,
    groups,
    known_keys,
    quote,
    replace_parts,
    verbs,
)
from pipeline.cli.errors import ConfigError, nearest
from pipeline.cli.hooks import check_hooks
from pipeline.cli.secrets import mask_secrets
from pipeline.cli.verb import Verb

CLOSED = ("pipeline.", "data.augment.", "models.learning.")  # targets whose arguments are all in the config
# Keys that are null for "none", although all configs give a number.
NULLABLE = (
    *("checkpoint.every_minutes", "recipe.base_lr", "recipe.loss.target_threshold", "recipe.optimizer.max_grad_norm"),
    *("model.stochastic_depth", "model.dropout"),
)
# Hydra's own flags.
FLAGS = ("--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i", "--multirun", "-m", "--run", "-r")
FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i")
HELP = ("--help", "-h")
SWEEP = ("-m", "--multirun")
Composed = dict[tuple[str, ...], DictConfig]
INTERPOLATION = re.compile(r"\$\{[^}]*\}")
MERGED = ("callbacks",)  # groups whose configs go together; others are alternatives
FLAGS_ALONE = (*HELP, "--hydra-help", "--version")
# The types that a value may have, by the type of its default, and their name in messages.
KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    list: ("a list", (list,)),
    dict: ("a group of keys", (dict,)),
    str: ("a string", (str, int, float, list)),
}


def check_command_line(verb: Verb, arguments: Sequence[str], *, composed: Composed | None = None) -> list[str]:
    """Check flags, choices, keys and types; return the arguments with aliases and implied choices resolved.

    `composed` keeps configs by verb and groups, for commands that choose the same ones.
    Raises: ConfigError.
    """
    typed = overrides_in(arguments)
    bare = [word for word in typed if "=" not in word and not word.startswith("~")]
    if verb.positional is not None and len(bare) > 1:
        raise ConfigError(f"{verb.name} takes one {verb.positional}, not {' and '.join(bare)}")
    words = [_expand_alias(verb, word, sweeps=bool({*SWEEP} & {*arguments})) for word in typed]
    flags = [word for word in arguments if word not in typed]
    complete = [*flags, *words]  # Hydra takes flags only before overrides
    if any(flag in complete for flag in HELP):
        return complete
    overrides = [_parse(word) for word in words]
    for key, (setters, choice) in verb.implied.items():
        if _sets(overrides, key) and not _sets(overrides, *setters):
            complete, overrides = [*complete, choice], [*overrides, _parse(choice)]
    chosen = [override for override in overrides if _is_group(override)]
    for override in chosen:
        _check_choice(verb, override)
    _check_chosen_once(chosen)
    parts = _replace_parts(verb, chosen)
    base = _check_hooks(verb, overrides, parts=parts, composed={} if composed is None else composed)
    _check_one_network(verb, chosen)
    if any(flag in complete for flag in FLAGS_ALONE):
        return complete
    _check_required(verb, base, overrides=overrides)
    _check_keys(verb, base, overrides=overrides)
    if set(SWEEP) & set(complete):
        _check_no_secret(base, overrides)
    unset = {key for key, value in known_keys(base).items() if value == "???"}
    missing = sorted(unset - {override.key_or_group for override in overrides})
    if missing:
        raise ConfigError(f"{missing[0]} has no default: add {missing[0]}=VALUE")
    return [*flags, *parts, *complete[len(flags) :]]  # values that are typed come last


def overrides_in(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that are neither flags nor values of flags."""
    for word in arguments:
        if word.startswith("-") and word not in (*FLAGS, *FLAGS_ALONE):
            raise ConfigError(f"there is no flag {word}: set values with KEY=VALUE, without dashes, --help lists them")
    pairs = zip(["", *arguments], arguments, strict=False)
    return [word for before, word in pairs if not word.startswith("-") and before not in FLAGS_WITH_VALUE]


def _expand_alias(verb: Verb, word: str, *, sweeps: bool) -> str:
    """Replace a short key by the full one, and quote a text that Hydra's grammar would parse or refuse."""
    if verb.positional is not None and "=" not in word and not word.startswith("~"):
        word = f"{verb.positional}={word}"
    key, equals, value = word.partition("=")
    if equals and _is_open(verb, key.lstrip("+")):
        return f"{key}={_quote_overrides(value)}"
    is_group = value[:1] + value[-1:] in ("[]", "{}")
    if not equals or key not in (*verb.aliases, *verb.text_keys) or is_group:
        return word
    is_quoted = value[:1] in ("'", '"') and value[-1:] == value[:1]
    needs_no_quotes = value in ("", "null") or is_quoted or (sweeps and "," in value)
    quoted = value if needs_no_quotes else quote(value)
    return f"{verb.aliases.get(key, key)}={quoted}"


def _parse(word: str) -> Override:
    """Parse an override. Raises: ConfigError for what Hydra's grammar does not take."""
    try:
        override: Override = OverridesParser.create().parse_override(word)
        return override
    except HydraException:
        name, equals, _ = word.partition("=")
        if not equals and re.fullmatch(r"[\w./@]+", name):
            raise ConfigError(f"{name} has no value: {name}=VALUE") from None
        advice = "put quotes around a value with spaces or brackets, and the shell's around those: \"KEY='a b'\""
        raise ConfigError(f"{word} is not KEY=VALUE in Hydra's grammar: {advice}") from None


def _quote_overrides(text: str) -> str:
    """Quote the overrides in lists and in groups of them: Hydra's grammar has no `=` there."""
    text = text.strip()
    if text[:1] == "[" and text[-1:] == "]":
        return f"[{','.join(map(_quote_overrides, _split(text[1:-1])))}]"
    if text[:1] == "{" and text[-1:] == "}":
        pairs = (part.partition(":") for part in _split(text[1:-1]))
        return f"{{{','.join(f'{key}{colon}{_quote_overrides(value)}' for key, colon, value in pairs)}}}"
    return text if "=" not in text or text[0] in "'\"" else quote(text.replace("\\,", ","))


def _split(text: str) -> list[str]:
    """Split a text at its commas, except for those in brackets, in quotes, and after a backslash."""
    parts, depth, mark, before = [""], 0, "", ""
    for letter in text:
        is_escaped, before = before == "\\", letter
        if mark and letter == mark and not is_escaped:
            mark = ""
        elif not mark and letter in "'\"" and parts[-1].strip()[-1:] in ("", "[", "{", ",", ":"):
            mark = letter
        depth += 0 if mark else (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0 and not mark and not is_escaped:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _check_choice(verb: Verb, override: Override) -> None:
    group = override.key_or_group
    if override.is_delete():
        return
    if group not in verb.groups:
        others = [other for other in verbs() if group in default_groups(other)]
        has = "has" if len(others) == 1 else "have"
        hint = f"{' and '.join(others)} {has}" if others else f"it takes {', '.join(sorted(verb.groups))}"
        raise ConfigError(f"{verb.name} has no group {group}, {hint}")
    names, value = choices(group), override.value()
    if override.is_sweep_override():
        selected: list[object] = list(override.sweep_string_iterator())
    else:
        selected = [*value] if isinstance(value, list) else [value]
    for name in selected:
        if str(name) not in names:
            raise ConfigError(f"{group}={name} is not one of {', '.join(names)}{nearest(str(name), names)}")
    if isinstance(value, list) and len(value) > 1 and group not in MERGED:
        choice = " or ".join(f"{group}={name}" for name in value)
        raise ConfigError(f"{group}={','.join(map(str, value))} are alternatives: choose {choice}")
    if group in verb.added_groups and not override.is_add():
        raise ConfigError(f"{group}={value} needs a plus: +{group}={value}")
    if override.is_add() and group not in verb.added_groups:
        raise ConfigError(f"+{group}={value} needs no plus: {group}={value}")


def _check_chosen_once(overrides: Iterable[Override]) -> None:
    """Refuse a group with two choices, of which Hydra would drop the first."""
    chosen: dict[str, str] = {}
    for override in overrides:
        if override.is_delete() or override.input_line is None:
            continue
        group, value = override.key_or_group, override.input_line.partition("=")[2]
        before = chosen.setdefault(group, value)
        if before != value:
            both = f", or {group}=[{before},{value}]" if group in MERGED else ""
            raise ConfigError(f"{group}={before} and {group}={value} are alternatives: choose one{both}")


def _check_required(verb: Verb, base: DictConfig, *, overrides: list[Override]) -> None:
    group = verb.required_group
    if group is None or group in base or _sets(overrides, group, *verb.alternatives):
        return
    others = [override for override in overrides if not override.key_or_group.startswith(f"{group}.")]
    _check_keys(verb, base, overrides=others)
    raise ConfigError(f"no {group}: add +{group}=NAME, one of {', '.join(choices(group))}")


def _check_keys(verb: Verb, base: DictConfig, *, overrides: list[Override]) -> None:
    known, deleted = known_keys(base), [override.key_or_group for override in overrides if override.is_delete()]
    for override in overrides:
        key = override.key_or_group
        if key in groups() or _is_hydras(override):
            continue
        is_open, adds = _is_open(verb, key), override.is_add() or override.is_force_add()
        if key not in known and not (adds and (is_open or _is_addable(key, base))):
            hint = _open_hint(key, known, adds=not override.is_delete()) if is_open else _hint(key, known, base=base)
            raise ConfigError(f"there is no {key}{hint}")
        if key in known and key not in deleted and not override.is_sweep_override():
            if is_open:
                _check_shape(override, known)
            elif isinstance(override.value(), dict) and known[key] == {}:
                _check_names(override, known, base=base)
            _check_type(verb, override, default=known[key])


def _check_names(override: Override, known: Mapping[str, object], *, base: DictConfig) -> None:
    """Raise ConfigError for a group of values that names a key which is not there."""
    key, values = override.key_or_group, override.value()
    assert isinstance(values, dict)
    for name in (f"{key}.{one}" for one in values if "_target_" not in values):  # another target, other arguments
        if name not in known and not _is_addable(name, base):
            raise ConfigError(f"there is no {name}{_hint(name, known, base=base)}")


def _check_shape(override: Override, known: Mapping[str, object]) -> None:
    """Refuse what Hydra does not merge: a list with a group of keys, and new keys of a group without a plus."""
    key, value = override.key_or_group, override.value()
    shapes = (dict, list)
    if isinstance(value, shapes) and isinstance(known[key], shapes) and type(value) is not type(known[key]):
        kind = "a list" if isinstance(known[key], list) else "a group of keys"
        raise ConfigError(f"{key} is {kind}: to replace it, write ~{key} +{key}=VALUE")
    new = [f"{key}.{name}" for name in value if f"{key}.{name}" not in known] if isinstance(value, dict) else []
    if new and not override.is_add():
        raise ConfigError(f"there is no {new[0]}: +{new[0]}=VALUE adds it")


def _is_open(verb: Verb, key: str) -> bool:
    return key.startswith(tuple(f"{group}." for group in verb.open_groups))


def _open_hint(key: str, known: Mapping[str, object], *, adds: bool) -> str:
    """Return the nearest key, and how to add this one where its parent is a group of keys."""
    parent = key.rpartition(".")[0]
    likely = _nearest_sibling(key, known) or ("" if known.get(parent) == {} else nearest(key, known))
    return f"{likely or ':'} +{key}=VALUE adds it" if adds and known.get(parent) == {} else likely


def _nearest_sibling(key: str, known: Mapping[str, object]) -> str:
    parent, _, last = key.rpartition(".")
    siblings = [name.removeprefix(f"{parent}.") for name in known if name.startswith(f"{parent}.")]
    similar = difflib.get_close_matches(last, siblings, n=1, cutoff=0.7)
    return f": did you mean {parent}.{similar[0]}?" if similar else ""


def _hint(key: str, known: Mapping[str, object], *, base: DictConfig) -> str:
    """Return the likely key: one with the same ending, a new one with a plus, or the nearest."""
    last = key.rpartition(".")[2]
    if part := _part_with(key, base):
        return f": {part} has it"
    same_ending = {name for name in known if name.endswith(f".{last}")}  # lr for recipe.optimizer.lr
    same_ending = same_ending or {name for name in known if name.endswith(f"_{last}")}
    if "." not in key:
        return nearest(key, known.keys() | groups()) or nearest(key, same_ending, cutoff=0)
    if same_ending:
        return nearest(key, same_ending, cutoff=0)
    if _is_addable(key, base):
        target = known[f"{key.rpartition('.')[0]}._target_"]
        return f"{_nearest_sibling(key, known) or ' in this config:'} +{key}=VALUE passes it to {target}"
    return nearest(key, known)


def _part_with(key: str, base: DictConfig) -> str:
    """Return the choices that would set a key, for one of a part that is not chosen, such as recipe.mix.probability."""
    for group, paths in PARTS.items():
        for path in paths:
            if key.startswith(f"{path}.") and not OmegaConf.select(base, path):
                having = [name for name in choices(group) if _has(group, name, last=key.removeprefix(f"{path}."))]
                return " or ".join(f"{group}={name}" for name in having)
    return ""


def _has(group: str, name: str, *, last: str) -> bool:
    config = OmegaConf.load(CONF / group / f"{name}.yaml")
    return isinstance(config, DictConfig) and last in config


def _is_addable(key: str, base: DictConfig) -> bool:
    """Return whether a node takes further arguments, and the key is not an existing one misspelt."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(base, parent) if parent else None
    if not isinstance(node, DictConfig) or str(node.get("_target_", CLOSED)).startswith(CLOSED):
        return False
    return not difflib.get_close_matches(name, [str(other) for other in node], n=1, cutoff=0.85)


def _check_type(verb: Verb, override: Override, *, default: object) -> None:
    if type(default) not in KINDS:
        return
    key, value = override.key_or_group, override.value()
    name, allowed = KINDS[type(default)]
    is_interpolation = isinstance(value, str) and "${" in value
    is_rectangle = key.endswith("image_size") and isinstance(value, list)  # height and width
    fits = isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)
    if not (fits or is_interpolation or is_rectangle or (value is None and _is_optional(verb, key))):
        raise ConfigError(f"{key}={override.get_value_string()} is not {name} (default {default})")


def _is_optional(verb: Verb, key: str) -> bool:
    """Return whether a key may be null, as recipe.layer_decay is without recipe=finetune."""
    return key in NULLABLE or known_keys(compose(verb.name, [])).get(key, key) is None


def _sets(overrides: list[Override], *keys: str) -> bool:
    return any(override.key_or_group in keys for override in overrides)


def _check_one_network(verb: Verb, chosen: Iterable[Override]) -> None:
    """Raise ConfigError for +model= beside an experiment that has a network."""
    words = {override.key_or_group: override for override in chosen if not override.is_delete()}
    if verb.required_group != "model" or not {"model", "experiment"} <= words.keys():
        return
    for word in _each(words["experiment"]):
        if "model" in compose(verb.name, [word]):
            raise ConfigError(f"{word} has a network: leave +model= out; model.variant=NAME changes the experiment's")


def _replace_parts(verb: Verb, chosen: Iterable[Override]) -> tuple[str, ...]:
    """Return the overrides that parts beside an experiment need. Raises: ConfigError for a sweep that needs several."""
    kept = [override for override in chosen if not override.is_delete()]
    needed = {replace_parts(verb.name, *words) for words in product(*(_each(override) for override in kept))}
    if len(needed) > 1:
        swept = " and ".join(override.key_or_group for override in kept if override.is_sweep_override())
        reason = "an experiment has values of its own, which each choice replaces in another way"
        raise ConfigError(f"no sweep over {swept} here: {reason}; give each a command, or list them in a study")
    return needed.pop()


def _check_hooks(verb: Verb, overrides: list[Override], *, parts: Sequence[str], composed: Composed) -> DictConfig:
    """Check what Hydra would run for every combination of groups; return the config of the first, without values."""
    deciding = [one for one in overrides if _is_group(one) or _is_hydras(one) or _is_trust(one)]
    combinations = [(verb.name, *words) for words in product(*(_each(override) for override in deciding))]
    for words in combinations:
        if words not in composed:
            composed[words] = compose(verb.name, [*words[1:], *parts], with_hydra=True)
        check_hooks(composed[words])
    first = copy.deepcopy(composed[combinations[0]])
    with open_dict(first):
        del first["hydra"]
        if "trust" in first:
            first.trust = False  # its default
    return first


def _check_no_secret(base: DictConfig, overrides: list[Override]) -> None:
    """Refuse values that Hydra would write into `multirun.yaml`."""
    typed = {one.key_or_group: one.get_value_string() for one in overrides if not one.is_delete()}
    values = {key: INTERPOLATION.sub("", str(value)) for key, value in {**known_keys(base), **typed}.items() if value}
    for key, value in mask_secrets(values).items():
        if values[key] and value != values[key]:
            advice = f"read it from the environment, {key}=${{oc.env:NAME}} trust=true"
            raise ConfigError(f"{key} has a secret, which a sweep would write into multirun.yaml: {advice}")


def _is_group(override: Override) -> bool:
    return override.key_or_group in groups()


def _is_hydras(override: Override) -> bool:
    return override.key_or_group.partition("/")[0].partition(".")[0] == "hydra"


def _is_trust(override: Override) -> bool:
    return override.key_or_group == "trust" and not override.is_delete() and override.value() is True


def _each(override: Override) -> list[str]:
    """Return an override as typed, or one for each value of a sweep."""
    line = override.input_line or ""
    if not override.is_sweep_override():
        return [line]
    return [f"{line.partition('=')[0]}={value}" for value in override.sweep_string_iterator()]
