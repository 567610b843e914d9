"""Average the weights of checkpoints: `python -m pipeline.average runs=[RUN,RUN]`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.cli.errors import ConfigError
from pipeline.cli.run import fast_imports, run_verb
from pipeline.cli.verb import Verb

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pipeline.runs.restore import RestoredRun

# Options of a network that do not change what it computes in an evaluation.
OF_TRAINING = ("dropout", "stochastic_depth", "norm_momentum")
LONG = CLASSES, COLOURS = "classes", "colours (mean, std)"  # whose values no message needs


def check_values(config: DictConfig) -> None:
    """Raise ConfigError for a command that does not name at least two checkpoints."""
    if bool(config.runs) == (config.run is not None):
        raise ConfigError("an average needs either runs=[RUN,RUN] or run=RUN last=K")
    if (config.run is None) != (config.last is None):
        raise ConfigError("run=RUN and last=K go together: the K newest checkpoints of a run")
    if config.run is None and len(config.runs) < 2:
        raise ConfigError(f"runs=[{config.runs[0]}] is one run: name two or more, or run=RUN last=K")


VERB = Verb(
    "average",
    "Average the weights of checkpoints, of one run or of several runs of one network.",
    {
        "run=NAME last=5": "its newest five, where it was trained with checkpoint.keep=5",
        "runs=[NAME,OTHER]": "the best weights of two runs in runs/",
    },
    text_keys=("run", "out", "device", "folder"),
    minimums={"last": 2, "norm_images": 0},
    check_values=check_values,
)


def main(config: DictConfig) -> None:
    """Write a run with the average weights, and print the command that evaluates it."""
    with fast_imports():
        from pipeline.cli.console import main_console, print_facts
        from pipeline.runs.trained import choose_device

    device, sources = choose_device(config.device), find_sources(config)
    check_alike(sources)
    first = sources[0]
    folder = Path(str(config.out or f"{first.run.folder}-average"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already: remove it, or add out=FOLDER")
    net, files = average_networks(sources)
    norms = estimate_norms(net, first, num_images=config.norm_images, device=device)
    write_run(folder, first, net=net, files=files)
    unfinished = dict.fromkeys(str(source.run.folder) for source in sources if not source.run.is_finished)
    facts = {"unfinished": ", ".join(unfinished)} if unfinished else {}
    facts |= {"weights": f"mean of {', '.join(files)}", "norms": norms, "folder": str(folder)}
    print_facts(main_console(), {**facts, "next": f"python -m pipeline.evaluate run={folder}"})


def find_sources(config: DictConfig) -> list[RestoredRun]:
    """Return the checkpoints that the config names. Raises: FileNotFoundError, ValueError."""
    from pipeline.runs.checkpoints import load_manifest
    from pipeline.runs.find import find_run
    from pipeline.runs.restore import RestoredRun

    trust, folder = bool(config.trust), Path(str(config.folder))
    if config.run is None:
        found = [find_run(str(name), runs=folder, key="runs") for name in config.runs]
        sources = [RestoredRun(one.run.folder, trust=trust, checkpoint=one.checkpoint) for one in found]
        names = [source.weights_file.absolute() for source in sources]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"runs: {repeated[0]} is named twice")
        return sources
    run = find_run(str(config.run), runs=folder).run
    manifests = list(islice(run.checkpoints.manifests(), config.last))
    if len(manifests) < config.last:
        kept = f"{run.folder} has {len(manifests)} checkpoints"
        raise ConfigError(f"last={config.last}: {kept}, more are kept by a training with checkpoint.keep={config.last}")
    checkpoints = [run.checkpoints.path / load_manifest(manifest).file for manifest in manifests]
    return [RestoredRun(run.folder, trust=trust, checkpoint=checkpoint) for checkpoint in checkpoints]


def check_alike(sources: Sequence[RestoredRun]) -> None:
    """Raise ConfigError unless all runs have one network, one list of classes and one preparation of images."""
    first = sources[0]
    for source in sources[1:]:
        expected, found = describe(first), describe(source)
        for name in {**expected, **found}:
            mine, its = expected.get(name), found.get(name)
            if mine != its:
                values = f": {its} instead of {mine}" if name not in LONG else ""
                alike = "only runs of one network, with the same classes and colours, have an average"
                raise ConfigError(f"runs: {source.run.folder} and {first.run.folder} differ in {name}{values}; {alike}")


def describe(source: RestoredRun) -> dict[str, object]:
    """Return what runs must share."""
    facts = source.dataset_facts()
    model = {f"model.{name}": value for name, value in source.values("model").items() if name not in OF_TRAINING}
    return {"network": source.network, CLASSES: facts.classes, COLOURS: (facts.mean, facts.std), **model}


def average_networks(sources: Sequence[RestoredRun]) -> tuple[nn.Module, dict[str, str]]:
    """Return a network with the mean of all weights, and the SHA-256 of each file by its path.

    Raises: FileNotFoundError, ValueError.
    """
    from models.layers import batch_norms
    from models.learning.averaging import mean_of

    net, _ = sources[0].load_network()
    eps, files = {norm.eps for norm in batch_norms(net)}, dict[str, str]()

    def states() -> Iterator[dict[str, Tensor]]:
        for source in sources:
            other, files[str(source.weights_file)] = source.load_network()
            if (found := {norm.eps for norm in batch_norms(other)}) != eps:
                raise ValueError(f"runs: batch norms of {source.weights_file} have an eps of {found}, not {eps}")
            yield other.state_dict()

    net.load_state_dict(mean_of(states()))
    return net, files


def estimate_norms(net: nn.Module, source: RestoredRun, *, num_images: int, device: torch.device) -> str:
    """Estimate the statistics of batch norms on training crops of a run's images; return how, in words."""
    from models.analysis import fresh_norms
    from models.layers import batch_norms

    if not batch_norms(net):
        return "none"
    if num_images == 0:
        return "mean of their statistics"
    batches = training_images(source, num_images, device=device)
    counted = fresh_norms.estimate_norms(net.to(device), batches)
    net.cpu()
    return f"statistics of {counted:,} training images"


def training_images(source: RestoredRun, num_images: int, *, device: torch.device) -> Iterator[Tensor]:
    """Yield the crops of an epoch's first batches, with at least so many images unless the data set has fewer.

    Raises: ValueError when the run was trained on other images.
    """
    from data.augment.augmentation import Augmentation
    from data.loading.loader import TrainingLoader
    from data.loading.order import TrainingPlan
    from pipeline.runs.trained import decode_settings_on

    dataset = source.open_dataset()
    if "train" in source.changed_splits(dataset):
        changed = f"{dataset.root} has other training images than those of {source.run.folder}"
        raise ValueError(f"{changed}: norm_images=0 takes the mean of the batch-norm statistics")
    index = dataset.index("train")
    batch_size = min(source.batch_size, len(index))
    plan = TrainingPlan(index.shard_samples, seed=0, shuffle_window=len(index), batch_size=batch_size)
    decode, augment = decode_settings_on(device, source.dataset_facts()), Augmentation(source.build_training_crop())
    loader = TrainingLoader(index, source.open_storage(dataset), plan=plan, augment=augment, decode=decode)
    for batch in islice(loader, -(-num_images // batch_size)):
        yield batch.images.to(device)


def write_run(folder: Path, first: RestoredRun, *, net: nn.Module, files: dict[str, str]) -> None:
    """Write the folder of a finished run with the settings of the first one; it appears when it is complete."""
    from models.layers import batch_norms
    from pipeline.runs.checkpoints import Checkpoint
    from pipeline.runs.run import Run
    from pipeline.runs.status import State, write_status

    norms, state = batch_norms(net), {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    settings = {"norm_eps": norms[0].eps if norms else None, "image_size": getattr(net, "image_size", None)}
    with _folder_at_once(folder) as partial:
        run = Run(partial)
        run.checkpoints.path.mkdir()
        for name in (run.config_file.name, run.fingerprint_file.name):
            shutil.copyfile(first.run.folder / name, partial / name)
        written = run.checkpoints.write({"state_dict": state, **settings}, Checkpoint(0, 0, ""))
        write_status(run.status_file, State.FINISHED, step=0)
        checkpoint = str(Run(folder).checkpoints.path / "last.ckpt")
        chosen = {"checkpoint": checkpoint, "checkpoint_sha256": written.sha256}
        run.finish({"val/top1": None, "chosen_by": None, **chosen, "averaged": files})


@contextmanager
def _folder_at_once(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, and rename it to that at the end; after an error there is none."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


if __name__ == "__main__":
    run_verb(VERB, main)
