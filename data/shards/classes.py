"""The classes of a data set, from the labels in its tars."""

from data.shards.tars import ShardRows


def class_names(shards: list[ShardRows]) -> tuple[str, ...]:
    """Return the sorted names that occur as labels, or "0" up to the largest number. Raises: ValueError."""
    labels = {row.label for shard in shards for row in shard.rows}
    names = sorted(str(label) for label in labels if isinstance(label, str))
    if names:
        return tuple(names)
    num_samples = sum(len(shard.rows) for shard in shards)
    for shard in shards:
        _check_range(shard, num_samples)
    return _numbers(max(int(label) for label in labels) + 1)


def merge_classes(manifest: tuple[str, ...], tars: tuple[str, ...]) -> tuple[str, ...]:
    """Return the manifest's names where the tars have only numbers, otherwise those of the tars."""
    only_numbers = tars == _numbers(len(tars))
    return manifest if only_numbers and manifest != _numbers(len(manifest)) else tars


def label_numbers(shard: ShardRows, classes: tuple[str, ...]) -> list[int]:
    """Return the shard's labels as positions in `classes`. Raises: ValueError for any other label."""
    if any(isinstance(row.label, int) for row in shard.rows):
        _check_range(shard, len(classes))
        return [int(row.label) for row in shard.rows]
    numbers = {name: number for number, name in enumerate(classes)}
    for row in shard.rows:
        if row.label not in numbers:
            raise ValueError(f"{shard.file}: {row.key} has class {row.label}, which the training split does not have")
    return [numbers[str(row.label)] for row in shard.rows]


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def _check_range(shard: ShardRows, num_classes: int) -> None:
    for row in shard.rows:
        if not isinstance(row.label, int):
            raise ValueError(f"{shard.file}: {row.key} has the label {row.label} where others have numbers")
        if not 0 <= row.label < num_classes:
            allowed = f"0 to {num_classes - 1}, as there are no more classes, or images to have them"
            raise ValueError(f"{shard.file}: {row.key} has label {row.label}, out of range: {allowed}")
