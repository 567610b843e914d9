"""The first augmented images of a training, as a picture for the dashboard."""

from pipeline.pages.image_grid import draw_grid
from pipeline.train.job import Job

COUNT = 32


def record_augmented_images(job: Job) -> None:
    """Write the picture to the run's folder. Raises: ValueError naming images that cannot be decoded."""
    images, labels = job.data.preview(COUNT)
    file = job.run.augmented_images
    file.parent.mkdir(exist_ok=True)
    draw_grid(images.numpy(), [job.data.dataset.classes[label] for label in labels.tolist()]).save(file)
