"""The weights with which a training starts."""

from models.options import SMALL_IMAGE
from pipeline.cli.console import main_console, print_facts
from pipeline.train.job import Job


def load_initial_weights(job: Job, *, norm_eps: float | None, is_resumed: bool) -> None:
    """Load the job's file of weights, if any, and print what was loaded; a resumed run keeps its own.

    Raises: FileNotFoundError; ValueError when the file does not fit the network.
    """
    file = job.initial_weights.file
    if file is None:
        return
    if is_resumed:
        print_facts(main_console(), {"weights": f"{file} is not read: the run continues with its own weights"})
        return
    classes = job.data.dataset.classes
    loaded = job.initial_weights.load_into(job.module.net, norm_eps=norm_eps, classes=classes)
    facts = {"weights": f"{file}: {loaded}", **({"head": loaded.head} if loaded.head else {})}
    own = getattr(job.module.net, "image_size", None)
    theirs = loaded.image_size if loaded.is_ours else SMALL_IMAGE + 1  # publishers' networks are for large images
    if own and theirs and (own <= SMALL_IMAGE) != (theirs <= SMALL_IMAGE):
        facts["strides"] = f"those for images of {own} pixels, not those with which {file} was trained"
    print_facts(main_console(), facts)
