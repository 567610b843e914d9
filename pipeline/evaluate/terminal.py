"""An evaluation in the terminal."""

from collections.abc import Mapping

from pipeline.evaluate.assess import Evaluation
from pipeline.evaluate.metrics import worst_confusions
from pipeline.evaluate.write import Subject
from pipeline.pages.wording import fixed, plural, share

CONFUSIONS = 3


def facts_of(evaluation: Evaluation, subject: Subject) -> Mapping[str, str]:
    """Return names and values, a line each."""
    summary, calibration = evaluation.summary, evaluation.calibration
    images = plural(len(evaluation.answers.labels), "image")
    facts = {
        "evaluated": f"{subject.run}, {subject.weights}, on {images} of split {subject.split} of {subject.dataset}"
    }
    for name, words in (
        ("top1", "top-1"),
        ("top5", "top-5"),
        ("balanced_accuracy", "balanced"),
        ("f1_macro", "macro F1"),
    ):
        if name in summary:
            facts[words] = f"{share(summary[name])}{_range(evaluation, name)}"
    low, high = evaluation.intervals["loss"]
    facts["loss"] = f"{fixed(summary['loss'], 4)} (95 %: {fixed(low, 4)} to {fixed(high, 4)})"
    error, before = evaluation.calibrated_reliability.error, evaluation.reliability.error
    is_same = evaluation.fitted_on == f"the split {subject.split}"
    fitted = f"fitted on {'these same images, which is too good' if is_same else evaluation.fitted_on}"
    with_it = f"error {share(error)} with temperature {fixed(calibration.temperature, 2)}"
    facts["calibrated"] = f"{with_it}, {share(before)} without; {fitted}"
    facts["unsure"] = _abstention(evaluation)
    if len(evaluation.sizes) > 1:
        tried = ", ".join(f"{size} px {share(accuracy)}" for size, accuracy in evaluation.sizes.items())
        facts["size"] = f"{subject.image_size} px (on {evaluation.fitted_on}: {tried})"
    if evaluation.versus is not None:
        other = evaluation.versus
        alone = f"right alone: {other.right_here_alone:,} here, {other.right_there_alone:,} there"
        facts["versus"] = f"{other.name} {share(other.top1)}; {alone}; McNemar's p {other.p_value:.2g}"
    names = evaluation.classes
    mistakes = [
        f"{names[label]} as {names[answer]} {count:,}"
        for label, answer, count in worst_confusions(evaluation.answers, CONFUSIONS)
    ]
    return facts | ({"mistakes": ", ".join(mistakes)} if mistakes else {})


def _range(evaluation: Evaluation, name: str) -> str:
    low, high = evaluation.intervals[name]
    return f" (95 %: {share(low)} to {share(high)})"


def _abstention(evaluation: Evaluation) -> str:
    wanted = f"{share(evaluation.calibration.precision or 0)} right"
    if evaluation.abstention is None or evaluation.calibration.threshold is None:
        return f"no threshold gives {wanted}"
    coverage, accuracy = evaluation.abstention
    below = f"below {fixed(evaluation.calibration.threshold, 3)}, for {wanted}"
    right = f", {share(accuracy)} of them right" if coverage > 0 else ""
    return f"{below}: {share(coverage)} answered{right}"
