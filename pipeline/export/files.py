"""Write the files of an export, compare them with the network, and only then move them into their folder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from data.loading.inputs import split_sources
from data.shards.dataset import Dataset
from pipeline.export.graph import export_program, in_precision, write_program
from pipeline.export.images import SPLIT, Images, labelled_crops
from pipeline.export.record import RECORD, ExportedFile, describe_model, earlier_files, onnx_facts, write_record
from pipeline.export.settings import ONNX, PROGRAM, Form
from pipeline.export.tensors import write_tensors
from pipeline.export.verify import Answer, accuracies, largest_difference, open_file
from pipeline.runs.calibration import digest
from pipeline.runs.trained import TrainedModel

NETWORK = ""  # stands for the network itself among file names


class DifferentAnswersError(Exception):
    """An exported file does not answer as the network does."""


class Checks(NamedTuple):
    """How files are checked: the images, the largest differences allowed, and the validation split for accuracies."""

    images: Images
    tolerance: Mapping[str, float]  # by precision
    dataset: Dataset | None  # None: no accuracies
    val_images: int | None  # None: all
    batch_size: int


class Exported(NamedTuple):
    """An export by file name, the accuracy of the network itself, notes for its user, and files of other weights."""

    files: dict[str, ExportedFile]
    top1: float | None
    notes: list[str]
    stale: list[str]


def export_files(model: TrainedModel, forms: list[Form], *, folder: Path, checks: Checks, opset: int) -> Exported:
    """Write all forms into a folder, or none.

    Raises: DifferentAnswersError; ValueError for a network that a format cannot express.
    """
    described = describe_model(model)
    with _create_folder(folder), TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        partial = Path(name)
        paths = {form: partial / form.file_name for form in forms}
        notes = [note for form, path in paths.items() if (note := _write(model, form, path=path, opset=opset))]
        answers = {form: open_file(path, form, model=model) for form, path in paths.items()}
        differences = {form: _compare(model, answer, form=form, checks=checks) for form, answer in answers.items()}
        top1, count = _accuracies(model, answers, checks=checks)
        files = {
            form.file_name: ExportedFile(
                form.format,
                form.precision,
                bytes=path.stat().st_size,
                sha256=digest(path),
                largest_difference=differences[form],
                top1=top1.get(form.file_name),
                val_images=count,
            )
            for form, path in paths.items()
        }
        kept, others = earlier_files(folder, described)
        written = sorted(partial.iterdir())
        if occupied := [path.name for path in (*written, folder / RECORD) if (folder / path.name).is_dir()]:
            raise ValueError(f"{folder / occupied[0]} is a folder: remove it, or add out=FOLDER")
        (folder / RECORD).unlink(missing_ok=True)  # it would describe files that are replaced now
        for path in written:
            path.replace(folder / path.name)
    listed = kept | {name: asdict(one) for name, one in files.items()}
    facts = {"compared_on": checks.images.description, "top1": top1.get(NETWORK), "files": listed}
    write_record(folder, described | facts)
    return Exported(files, top1.get(NETWORK), notes, [name for name in others if name not in files])


@contextmanager
def _create_folder(folder: Path) -> Iterator[None]:
    """Create a folder, and remove it after an error if it was created here and is empty."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise


def _write(model: TrainedModel, form: Form, *, path: Path, opset: int) -> str | None:
    """Write one file; return a note for its user, None without one."""
    if form.format not in (ONNX, PROGRAM):
        return write_tensors(model, form, path=path)
    stores_bfloat16 = form.format == ONNX and form.precision == "bfloat16"
    module = in_precision(model, "float32" if stores_bfloat16 else form.precision)
    program = export_program(module, model.size)
    if form.format == PROGRAM:
        write_program(program, path)
        return None
    from pipeline.export.onnx_graph import store_as_bfloat16, write_onnx

    write_onnx(program, path, opset=opset, facts=onnx_facts(model))
    if not stores_bfloat16:
        return None
    store_as_bfloat16(path)
    return f"{path.name} stores bfloat16 and computes float32: onnxruntime has no bfloat16 convolution on CPUs"


def _compare(model: TrainedModel, answer: Answer, *, form: Form, checks: Checks) -> float:
    """Return the largest difference. Raises: DifferentAnswersError when it exceeds the tolerance."""
    difference = largest_difference(answer, model, crops=checks.images.crops, batch_size=checks.batch_size)
    allowed = checks.tolerance[form.precision]
    if not difference <= allowed:
        raise DifferentAnswersError(
            f"{form.file_name} differs by {difference:.2g} in a probability on {checks.images.description}, "
            f"above tolerance.{form.precision}={allowed:g}: nothing was written"
        )
    return difference


def _accuracies(
    model: TrainedModel, answers: Mapping[Form, Answer], *, checks: Checks
) -> tuple[dict[str, float], int | None]:
    """Return the accuracy of each file and of the network, and the number of images; without a data set nothing."""
    if checks.dataset is None:
        return {}, None
    samples = split_sources(checks.dataset, SPLIT, limit=checks.val_images)
    named: dict[str, Answer] = {NETWORK: model, **{form.file_name: answer for form, answer in answers.items()}}
    return accuracies(named, labelled_crops(model, samples, batch_size=checks.batch_size))
