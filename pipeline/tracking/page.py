"""The page of a run in MLflow, brought up to date from the run's folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from pipeline.runs.run import Run
from pipeline.tracking import contents
from pipeline.tracking.contents import FINISHED, KILLED, RUNNING
from pipeline.tracking.store import Store

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.entities import Run as MLflowRun

POINTS_PER_REQUEST, PARAMETERS_PER_REQUEST = 1000, 100  # MLflow's limits
TOKEN_TAG, FILES_TAG, TABLES_TAG = "convoy.run", "convoy.files", "mlflow.loggedArtifacts"
DIGEST_LENGTH = 12  # hexadecimal digits of a file's digest in the tag, which holds 8,000 characters


class UnsendableRun(Exception):
    """A run that no further try can send: damaged, or deleted on the server."""


class Page:
    """The page of a run. Every method asks the server what it has, sends the rest and may block; one thread calls them.

    The time of a point is that of its line, so that MLflow drops a point which it gets twice. `num_calls` grows with
    every answer of the server. `restarts` is true for a run that has no checkpoint: if it has other parameters than its
    page, it gets a new one. Methods raise UnsendableRun, and anything that MLflow or its backends raise.
    """

    def __init__(
        self, run: Run, store: Store, *, parameters: Mapping[str, object] | None = None, restarts: bool = False
    ) -> None:
        self.run, self.store = run, store
        self.link: str | None = None
        self.num_calls = self.num_points = self.num_files = 0
        self._parameters, self._restarts = parameters, restarts
        self._page: MLflowRun | None = None  # as the server has described it since the last failure
        self._last_steps: dict[str, int] = {}
        self._line = self._end = 0  # the journal up to here is on the server
        self._digests: dict[Path, tuple[tuple[int, int], str]] = {}  # by size and time of modification
        self._files: set[str] | None = None  # digests of the artifacts on the server

    def forget(self) -> None:
        """Ask the server again what it has, after a failure."""
        self._page = self._files = None

    def send_points(self) -> None:
        """Send the missing points of the journal, in its order, and those of evaluations."""
        page = self._open()
        for metrics, line, end in self._missing_points():
            self._log(metrics=metrics)
            self._last_steps |= {metric.key: metric.step for metric in metrics}
            self._line, self._end = line, end
            self.num_points += len(metrics)
        scores = self._missing_scores(page)
        if scores:
            self._log(metrics=scores)
            self.num_points += len(scores)
            self.forget()

    def send_files(self) -> None:
        """Send the files that the server lacks or has otherwise."""
        page, client = self._open(), self.store.open()[0]
        wanted = contents.files_of(self.run)
        digests = {path: self._digest(path, file) for path, file in wanted.items()}
        if self._files is None:
            recorded = set(page.data.tags.get(FILES_TAG, "").split())
            is_any = bool(recorded & {*digests.values()})
            present = set(self._list_artifacts({str(Path(path).parent) for path in wanted})) if is_any else set()
            self._files = {digests[path] for path in wanted if path in present} & recorded
        missing = [path for path in wanted if digests[path] not in self._files]
        for path in missing:
            client.log_artifact(page.info.run_id, str(wanted[path]), str(Path(path).parent))
            self.num_calls += 1
            self.num_files += 1
        if missing:
            tags = {FILES_TAG: " ".join(digests.values())}
            tables = [{"path": path, "type": "table"} for path in wanted if Path(path).name == contents.LAYER_TABLE]
            self._log(tags=tags | ({TABLES_TAG: json.dumps(tables)} if tables else {}))
            self._files |= {*digests.values()}

    def set_status(self, status: str) -> None:
        """Set the status; before an end, what the server has is read once more, and the rest is sent.

        A page that cannot get every point ends as KILLED instead of FINISHED.
        """
        if status != RUNNING:
            self.forget()
            self._line = self._end = 0
            try:
                self.send_points()
            except UnsendableRun:
                if self._page is not None:
                    self._write_status(KILLED if status == FINISHED else status)
                raise
        self._write_status(status)

    def _write_status(self, status: str) -> None:
        page, client = self._open(), self.store.open()[0]
        if page.info.status == status:
            return
        if status == RUNNING:
            client.update_run(page.info.run_id, status=status)
        else:
            client.set_terminated(page.info.run_id, status)
        self.num_calls += 1
        self.forget()

    def _open(self) -> MLflowRun:
        """Find or create the page, complete its parameters, and learn the last step of each curve."""
        if self._page is None:
            page = self._find() or self._create()
            self.num_calls += 1
            self._last_steps = {metric.key: metric.step for metric in page.data.to_proto().metrics}
            self._send_parameters(page)
            self._page = page
        return self._page

    def _find(self) -> MLflowRun | None:
        """Return the page with the recorded id, or with the run's token; None without one.

        A request that has timed out may create a second page later, which is deleted here.
        """
        client, experiment_id = self.store.open()
        token, page = self._token(), self._page_by_id()
        pages = list(client.search_runs([experiment_id], f"tags.`{TOKEN_TAG}` = '{token}'"))
        if page is None and not pages:
            return None
        page = page or min(pages, key=lambda one: int(one.info.start_time))
        for other in pages:
            if other.info.run_id != page.info.run_id:
                client.delete_run(other.info.run_id)
        if self._restarts and self._differs(page):
            client.set_terminated(page.info.run_id, KILLED)
            self._token_file.unlink()
            return None
        self._show(page)
        return page

    def _page_by_id(self) -> MLflowRun | None:
        from mlflow.exceptions import MlflowException

        if not self.run.tracking_id:
            return None
        try:
            page: MLflowRun = self.store.open()[0].get_run(self.run.tracking_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # that of another server, or of a lost database
                return None
            raise
        if page.info.lifecycle_stage == "deleted":
            raise UnsendableRun(f"its page was deleted in MLflow: remove {self.run.tracking_id_file} for a new one")
        return page

    def _create(self) -> MLflowRun:
        client, experiment_id = self.store.open()
        page: MLflowRun = client.create_run(experiment_id, run_name=self.run.name, tags={TOKEN_TAG: self._token()})
        self._restarts = False
        self._show(page)
        return page

    def _show(self, page: MLflowRun) -> None:
        """Record the id of the page."""
        if self.run.tracking_id != page.info.run_id:
            self.run.tracking_id_file.write_text(f"{page.info.run_id}\n")
        self._restarts = False
        self.link = self.store.link(page.info.experiment_id, page.info.run_id)

    @property
    def _token_file(self) -> Path:
        return self.run.folder / ".mlflow_token"

    def _token(self) -> str:
        """Return the random text by which any server knows the run; it exists before the page does."""
        token = self._token_file.read_bytes() if self._token_file.is_file() else b""
        if not re.fullmatch(rb"\w+", token):
            token = uuid4().hex.encode()
            self._token_file.write_bytes(token)
        return token.decode()

    def _wanted_parameters(self) -> dict[str, str]:
        if self._parameters is None:
            try:
                self._parameters = contents.parameters_of(self.run)
            except (ValueError, OSError) as error:
                raise UnsendableRun(str(error)) from error
        return contents.sent_parameters(self._parameters)

    def _differs(self, page: MLflowRun) -> bool:
        wanted = self._wanted_parameters()
        return any(wanted.get(key) != value for key, value in page.data.params.items())

    def _send_parameters(self, page: MLflowRun) -> None:
        """Send those that the page lacks; MLflow refuses changes, and a continued run keeps its first values."""
        from mlflow.entities import Param

        params = [Param(*one) for one in self._wanted_parameters().items() if one[0] not in page.data.params]
        for start in range(0, len(params), PARAMETERS_PER_REQUEST):
            self.store.open()[0].log_batch(page.info.run_id, params=params[start : start + PARAMETERS_PER_REQUEST])
            self.num_calls += 1

    def _missing_points(self) -> Iterator[tuple[list[Metric], int, int]]:
        """Yield requests with the line and byte of the journal up to which they reach."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        line, end, damage = self._line, self._end, None
        try:
            for point in self.run.journal.points(line=line, end=end):
                new = [
                    Metric(key, value, round(1000 * point.time), point.step)
                    for key, value in point.values.items()
                    if point.step > self._last_steps.get(key, -1)
                ]
                if len(metrics) + len(new) > POINTS_PER_REQUEST:
                    yield metrics, line, end
                    metrics = []
                metrics, line, end = metrics + new, point.line, point.end
        except ValueError as error:
            damage = error
        if end > self._end:
            yield metrics, line, end
        if damage is not None:
            raise UnsendableRun(str(damage)) from damage

    def _missing_scores(self, page: MLflowRun) -> list[Metric]:
        from mlflow.entities import Metric

        shown = page.data.metrics
        try:
            scores = list(contents.scores_of(self.run))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UnsendableRun(
                f"{self.run.evaluation}: an evaluation.json is damaged ({reason}): evaluate again"
            ) from error
        return [
            Metric(one.key, one.value, one.milliseconds, 0)
            for one in scores
            if not math.isclose(one.value, shown.get(one.key, math.nan), rel_tol=1e-12)
        ]

    def _log(self, *, metrics: Sequence[Metric] = (), tags: Mapping[str, str] | None = None) -> None:
        from mlflow.entities import RunTag

        if metrics or tags:
            entities = [RunTag(*one) for one in (tags or {}).items()]
            self.store.open()[0].log_batch(self._open().info.run_id, metrics=metrics, tags=entities)
            self.num_calls += 1

    def _digest(self, path: str, file: Path) -> str:
        """Return the digest of an artifact's path and content, which is read again only when the file has changed."""
        status = file.stat()
        version = (status.st_size, status.st_mtime_ns)
        if self._digests.get(file, (None, ""))[0] != version:
            digest = hashlib.sha256(path.encode() + b"\0" + file.read_bytes()).hexdigest()
            self._digests[file] = version, digest[:DIGEST_LENGTH]
        return self._digests[file][1]

    def _list_artifacts(self, folders: set[str]) -> Iterator[str]:
        for folder in sorted(folders):
            for artifact in self.store.open()[0].list_artifacts(self._open().info.run_id, folder):
                yield artifact.path
            self.num_calls += 1
