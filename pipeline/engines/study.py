"""From a study to its steps: for each the command, the steps that it needs, and the file that it writes last.

A study lists data sets, trainings with their grid, and what is done with each trained run. Steps know nothing of the
engine that runs them.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from data.shards.dataset import ROWS_FOLDER, partial_folder
from pipeline.cli.compose import groups, quote
from pipeline.cli.errors import ConfigError, nearest

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
STUDY_KEYS = ("data", "train", "evaluate", "report", "export", "compare")
TRAIN_KEYS = ("overrides", "runs", "grid")
RUN_KEYS = ("overrides", "data", "weights")
DATA_KEYS = ("pack", "root", "parts", "train")
RESULTS = {"evaluate": "evaluation.json", "report": "report.json", "export": "export.json"}
FIXED = ("out=", "run=", "runs=", "name=", "again=")  # keys that every step sets or does without
FOLDERS = {"evaluate": "evaluation", "report": "reports", "export": "exports"}

Tree = Mapping[str, object]


class Step(NamedTuple):
    """A command of a study: a verb with overrides.

    `name` is unique among the steps of the verb. `needs` are identities of other steps, `result` is the file that the
    command writes last. A part's result is that of all parts; until then its files are in the folder `begun`.
    """

    verb: str
    name: str
    overrides: tuple[str, ...]
    needs: tuple[str, ...]
    result: Path
    begun: Path | None = None

    @property
    def identity(self) -> str:
        """Verb and name, such as `train/resnet`."""
        return f"{self.verb}/{self.name}"

    def trusted(self) -> "Step":
        """Return the step with `trust=true`, where its verb has that."""
        return self if self.verb == "index" else self._replace(overrides=(*self.overrides, "trust=true"))


class Training(NamedTuple):
    """A training of a study: overrides, its data set's name, and the name of the run whose weights it starts from."""

    name: str
    overrides: tuple[str, ...]
    data: str
    weights: str | None


def build_steps(study: Tree, folder: Path) -> list[Step]:
    """Return the steps of a study in `folder`, each after those that it needs.

    Raises: ConfigError for unknown keys, two runs of one name, runs that need each other, impossible names.
    """
    _check_keys(study, STUDY_KEYS, place="study")
    data = _group(study, "data", place="study")
    if not data:
        raise ConfigError("study.data is empty: name a data set, as in +study.data.digits.pack=[source=digits]")
    trainings = _trainings(_group(study, "train", place="study"), data=list(data))
    steps = [step for name, one in data.items() for step in _data_steps(name, one, folder=folder)]
    known = {step.name: step for step in steps}
    steps += [_train_step(one, data, known=known, folder=folder) for one in _ordered(trainings)]
    for verb in RESULTS:
        found = _group(study, verb, place="study").items()
        named = {name: _words(words, place=f"study.{verb}.{name}") for name, words in found}
        for one in trainings:
            steps += [_result_step(verb, name, words=named[name], run=one.name, folder=folder) for name in named]
    if study.get("compare") is not None:
        words = _words(study["compare"], place="study.compare")
        steps.append(_compare_step(words, runs=[one.name for one in trainings], steps=steps, folder=folder))
    return steps


def _data_steps(name: str, found: object, *, folder: Path) -> Iterator[Step]:
    """Yield the packing or indexing of a data set, its parts first; one that a verb has packed before needs neither."""
    place = f"study.data.{name}"
    one = _mapping(found, place=place)
    check_name(name, place=place)
    _check_keys(one, DATA_KEYS, place=place)
    if ("pack" in one) == ("root" in one):
        raise ConfigError(f"{place} needs either pack=[source=...] or root=FOLDER")
    count = one.get("parts", 1)
    if type(count) is not int or count < 1:
        raise ConfigError(f"{place}.parts={count} must be an integer of at least 1")
    out = folder / "data" / name
    if "pack" in one:
        words = (*_words(one["pack"], place=f"{place}.pack"), f"name={name}", f"out={out}")
        step = Step("pack", name, words, (), out / "dataset.json")
    elif not (Path(str(one["root"])) / "dataset.json").is_file():
        step = Step("index", name, (f"root={one['root']}", f"out={out}"), (), out / "dataset.json")
    else:
        return
    parts = [_part_of(step, number, count=count) for number in range(1, count + 1)] if count > 1 else []
    yield from parts
    merge = ("part=merge",) if parts else ()
    yield step._replace(overrides=(*step.overrides, *merge), needs=tuple(part.identity for part in parts))


def _part_of(step: Step, number: int, *, count: int) -> Step:
    """Return the step of a part."""
    out, overrides = step.result.parent, (*step.overrides, f"part={number}/{count}")
    begun = partial_folder(out) if step.verb == "pack" else out / ROWS_FOLDER
    return step._replace(name=f"{step.name}@{number}of{count}", overrides=overrides, begun=begun)


def _trainings(train: Tree, *, data: Sequence[str]) -> list[Training]:
    """Multiply runs by the grid."""
    _check_keys(train, TRAIN_KEYS, place="study.train")
    common = _words(train.get("overrides", []), place="study.train.overrides")
    runs, grid = _group(train, "runs", place="study.train"), dict(_flatten(_group(train, "grid", place="study.train")))
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"study.train.grid.{key}={values} must be a list of at least one value")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]  # type: ignore[call-overload]  # lists, as checked
    found: dict[str, Training] = {}
    for name, one in runs.items():
        training = _training(name, one, data=data)
        for point in points:
            full = "-".join([name, *(_short(key, value) for key, value in point.items())])
            if full in found:
                raise ConfigError(f"study.train has two runs of the name {full}: values of the grid must differ")
            check_name(full, place=f"study.train.runs.{name}")
            words = (*common, *training.overrides, *(f"{key}={_typed(value)}" for key, value in point.items()))
            weights = training.weights
            if weights is not None and weights in runs:  # of the same point of the grid
                weights = "-".join([weights, *(_short(key, value) for key, value in point.items())])
            found[full] = training._replace(name=full, overrides=words, weights=weights)
    if not found:
        raise ConfigError("study.train.runs is empty: name a run, as in +study.train.runs.resnet=[+model=resnet]")
    for one in found.values():
        if one.weights is not None and one.weights not in found:
            place = f"study.train.runs.{one.name}.weights={one.weights}"
            raise ConfigError(f"{place} is not one of its runs{nearest(one.weights, {*runs, *found})}")
    return list(found.values())


def _training(name: str, found: object, *, data: Sequence[str]) -> Training:
    place = f"study.train.runs.{name}"
    if isinstance(found, list):
        found = {"overrides": found}
    one = _mapping(found, place=place, rule="must be a list of overrides, as in [+model=resnet], or a group of keys")
    _check_keys(one, RUN_KEYS, place=place)
    which, weights = one.get("data", data[0]), one.get("weights")
    if which not in data:
        raise ConfigError(f"{place}.data={which} is not one of {', '.join(data)}{nearest(str(which), data)}")
    words = _words(one.get("overrides", []), place=f"{place}.overrides")
    if weights is not None and any(word.lstrip("+").startswith(("weights=", "weights.file=")) for word in words):
        raise ConfigError(f"{place} has two weights: those of the run {weights}, and a file")
    return Training(name, words, str(which), None if weights is None else str(weights))


def _ordered(trainings: Sequence[Training]) -> list[Training]:
    """Return the trainings, each after the one whose weights it starts from. Raises: ConfigError for a cycle."""
    by_name = {one.name: one for one in trainings}
    graph = {one.name: [one.weights] if one.weights is not None else [] for one in trainings}
    try:
        return [by_name[name] for name in TopologicalSorter(graph).static_order()]
    except CycleError as error:
        raise ConfigError(
            f"study.train: these runs start from each other's weights: {', '.join(error.args[1])}"
        ) from None


def _train_step(one: Training, data: Tree, *, known: Mapping[str, Step], folder: Path) -> Step:
    described = _mapping(data[one.data], place=f"study.data.{one.data}")
    place, made = f"study.data.{one.data}.train", known.get(one.data)
    words = list(_words(described.get("train", ["data=shards"]), place=place))
    words += [f"data.root={described.get('root', folder / 'data' / one.data)}"]
    if made is not None and made.verb == "index":
        words += [f"data.index={made.result.parent}"]
    needs = [made.identity] if made is not None else []
    if one.weights is not None:
        needs.append(f"train/{one.weights}")
        words.append(f"weights={folder / 'runs' / one.weights / 'checkpoints' / 'best.ckpt'}")
    out = folder / "runs" / one.name
    overrides = (*_drop_replaced([*words, *one.overrides]), f"out={out}", "again=replace")
    return Step("train", one.name, overrides, tuple(needs), out / "result.json")


def _drop_replaced(words: Sequence[str]) -> list[str]:
    """Leave out a group that a later word chooses again: `policy=trivial` for all trainings, `policy=none` for one."""
    last = {_key(word): word for word in words}
    return [word for word in words if _key(word) not in groups() or word == last[_key(word)]]


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def _result_step(verb: str, name: str, *, words: Sequence[str], run: str, folder: Path) -> Step:
    check_name(name, place=f"study.{verb}")
    out = folder / "runs" / run / FOLDERS[verb] / name
    overrides = (*words, f"run={folder / 'runs' / run}", f"out={out}")
    return Step(verb, f"{run}/{name}", overrides, (f"train/{run}",), out / RESULTS[verb])


def _compare_step(words: Sequence[str], *, runs: Sequence[str], steps: Sequence[Step], folder: Path) -> Step:
    out = folder / "comparison"
    listed = ",".join(_quote(str(folder / "runs" / run)) for run in runs)
    needs = tuple(step.identity for step in steps if step.verb in ("train", "evaluate", "report"))
    return Step("compare", "all", (*words, f"runs=[{listed}]", f"out={out}"), needs, out / "comparison.json")


def _group(tree: Tree, key: str, *, place: str) -> dict[str, object]:
    found = tree.get(key)
    return {} if found is None else dict(_mapping(found, place=f"{place}.{key}"))


def _flatten(tree: Tree) -> Iterator[tuple[str, object]]:
    """Yield full keys with their values: a command line nests `grid.recipe.optimizer.lr`."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", one) for inner, one in _flatten(value))
        else:
            yield key, value


def _mapping(found: object, *, place: str, rule: str = "must be a group of keys") -> Tree:
    if not isinstance(found, Mapping):
        raise ConfigError(f"{place}={found} {rule}")
    return {str(key): value for key, value in found.items()}


def _words(found: object, *, place: str) -> tuple[str, ...]:
    """Return overrides. Raises: ConfigError for what is no list of `key=value`."""
    if not isinstance(found, list | tuple) or not all(isinstance(word, str) and "=" in word for word in found):
        raise ConfigError(f"{place}={found} must be a list of overrides, as in [+model=resnet,recipe.epochs=6]")
    keys = [_key(word) for word in found]
    twice = next((key for key in keys if key in groups() and keys.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(f"{place} chooses {twice} twice: its options are alternatives")
    fixed = next((word for word in found if word.lstrip("+").startswith(FIXED)), None)
    if fixed is not None:
        raise ConfigError(f"{place}: {fixed} is set by the study, whose folder has all results")
    if any(word.lstrip("+").startswith("trust=") for word in found):
        raise ConfigError(f"{place}: trust in a study does not count: trust=true is for the command line")
    return tuple(found)


def _check_keys(tree: Tree, known: Sequence[str], *, place: str) -> None:
    for key in tree:
        if key not in known:
            raise ConfigError(f"{place} has no {key}, it takes {', '.join(known)}{nearest(key, known)}")


def check_name(name: str, *, place: str) -> None:
    """Raise ConfigError for what cannot name a folder."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{place}: {name} cannot name a folder: letters, digits, . _ + and - can")


def _short(key: str, value: object) -> str:
    """Return a value for a name: `resnet50`, or `lr0.1`, with the last part of the key for what is no word."""
    text = re.sub(r"[^\w.+-]+", "-", _typed(value)).strip("-") if isinstance(value, list) else _typed(value)
    return text if isinstance(value, str) and NAME.fullmatch(value) else f"{key.rpartition('.')[2]}{text}"


def _quote(text: str) -> str:
    """Quote a text where Hydra's grammar needs that."""
    return text if re.fullmatch(r"[\w./+-]+", text, re.ASCII) else quote(text)


def _typed(value: object) -> str:
    """Return a value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)
