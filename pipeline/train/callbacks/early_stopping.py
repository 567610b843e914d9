"""End a training when the metric that chooses its best checkpoint no longer improves."""

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason

from pipeline.build.choice import Choice


class StopEarly(EarlyStopping):
    """Stop at the end of an epoch, after `patience` evaluations in a row without an improvement.

    As Lightning's callback, it counts before the checkpoint is written, which holds the counter. Unlike that, it does
    not count an epoch without an evaluation, takes a NaN for no improvement instead of ending at once, and trains no
    further epoch when the run was killed after the decision to stop.
    """

    def __init__(self, choice: Choice, *, num_epochs: int) -> None:
        assert choice.patience is not None
        super().__init__(
            choice.metric.key,
            min_delta=choice.min_improvement,
            patience=choice.patience,
            mode=choice.metric.mode,
            check_finite=False,
            check_on_train_epoch_end=True,
        )
        self.num_epochs = num_epochs
        self._has_evaluated = False  # in this epoch

    @property
    def reason(self) -> str | None:
        """When and why the training stopped; None where it did not, or had reached its last epoch anyway."""
        epoch = self.stopped_epoch + 1
        if self.stopping_reason is not EarlyStoppingReason.PATIENCE_EXHAUSTED or epoch >= self.num_epochs:
            return None
        enough = f" by more than {abs(self.min_delta):g}" if self.min_delta else ""
        evaluations = "the last evaluation" if self.patience == 1 else f"the last {self.patience} evaluations"
        return f"epoch {epoch} of {self.num_epochs}: {self.monitor} did not improve{enough} in {evaluations}"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train no further where the checkpoint holds the decision to stop."""
        if self.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that there is a value to judge."""
        self._has_evaluated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the epoch's last evaluation, if there was one."""
        if self._has_evaluated:  # Lightning repeats this hook, without an evaluation, when a run resumes
            self._has_evaluated = False
            super().on_train_epoch_end(trainer, pl_module)
