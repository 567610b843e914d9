"""The report of a training's network for the dashboard: receptive field, cost, effective field at the start."""

from models.analysis.report import Report
from pipeline.cli.console import main_console, print_facts, print_line
from pipeline.report import measure
from pipeline.report.sample_images import sample_images
from pipeline.train.job import Job

NUM_SAMPLE_IMAGES = 4  # over which the effective field is averaged
MAX_ACTIVATION_BYTES = 2 * 2**30  # of one image, up to which the effective field is measured


def record_network_report(job: Job, *, precision: str) -> None:
    """Write the report to the run's folder and its facts to the journal; without a report the training continues."""
    try:
        report = report_network(job, precision=precision)
    except ValueError as error:
        print_line(main_console(), f"no report: {error}")
        job.run.journal.record({"params_millions": job.num_parameters / 1e6}, 0)
        return
    measure.write_report(report, job.run.initial_report)
    job.run.journal.record(report.facts, 0)


def report_network(job: Job, *, precision: str) -> Report:
    """Report on the network with its initial weights. Raises: ValueError for a network that cannot be traced."""
    net, size = job.module.net, job.data.training_augment.size
    training = measure.TrainingSettings(job.data.settings.batch_size, precision, job.module.recipe.optimizer_factory())
    report = measure.measure_network(net, job.settings.network, image_shape=(3, *size), training=training)
    if report.memory.activations > MAX_ACTIVATION_BYTES * report.batch_size:
        print_facts(main_console(), {"report": "without the effective field, which would need gigabytes here"})
        return report
    samples = sample_images(None, NUM_SAMPLE_IMAGES, size=size)
    return measure.measure_effective_field(report, net, samples=samples, weights=job.initial_weights.description)
