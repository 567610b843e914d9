"""A comparison as a run of MLflow, of which the compared runs are the children."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runs.run import Run
from pipeline.tracking.contents import FINISHED
from pipeline.tracking.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

COMPARISON_TAG, PARENT_TAG = "convoy.comparison", "mlflow.parentRunId"
ARTIFACTS = "comparison"


def send_comparison(
    store: Store, name: str, *, runs: Sequence[Run], files: Sequence[Path], facts: Mapping[str, float]
) -> str | None:
    """Send a comparison's files and facts, and put the pages of its runs under it; return what is missing and why.

    The same folder keeps its page, which is found by a tag. Where no run has a page, the comparison gets none.
    """
    nothing = f"none of these runs is in {store.printed_address}"
    if store.file is not None and not store.file.exists():
        return nothing
    try:
        with redirect_stderr(StringIO()):
            missing = _send(store, name, runs=runs, files=files, facts=facts)
    except Exception as error:  # noqa: BLE001  # a backend may raise anything
        return store.failure(error)
    if len(missing) == len(runs):
        return nothing
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} not in {store.printed_address}" if missing else None


def _is_there(client: MlflowClient, identity: str) -> bool:
    """Return whether a page exists and was not deleted; a run trained with tracking=none has none."""
    from mlflow.exceptions import MlflowException

    try:
        return identity != "" and client.get_run(identity).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _send(
    store: Store, name: str, *, runs: Sequence[Run], files: Sequence[Path], facts: Mapping[str, float]
) -> list[str]:
    client, experiment_id = store.open()
    tracked, missing = [], []
    for run in runs:
        if _is_there(client, run.tracking_id):
            tracked.append(run.tracking_id)
        else:
            missing.append(run.name)
    if not tracked:
        return missing
    place = hashlib.sha256(str(files[0].parent.absolute()).encode()).hexdigest()  # a path may have quotes
    found = client.search_runs([experiment_id], f"tags.`{COMPARISON_TAG}` = '{place}'")
    page = found[0] if found else client.create_run(experiment_id, run_name=name, tags={COMPARISON_TAG: place})
    parent = page.info.run_id
    try:
        for key, value in facts.items():
            client.log_metric(parent, key, value, step=0)
        _put_under(client, parent, experiment_id=experiment_id, tracked=tracked)
        for file in files:
            client.log_artifact(parent, str(file), ARTIFACTS)
    finally:
        client.set_terminated(parent, FINISHED)
    return missing


def _put_under(client: MlflowClient, parent: str, *, experiment_id: str, tracked: Sequence[str]) -> None:
    """Make these runs, and no others, the children of a comparison. One that a user has put elsewhere stays there."""
    for child in client.search_runs([experiment_id], f"tags.`{PARENT_TAG}` = '{parent}'"):
        if child.info.run_id not in tracked:
            client.delete_tag(child.info.run_id, PARENT_TAG)
    for identity in tracked:
        before = client.get_run(identity).data.tags.get(PARENT_TAG, "")
        is_others = _is_there(client, before) and COMPARISON_TAG not in client.get_run(before).data.tags
        if not is_others:
            client.set_tag(identity, PARENT_TAG, parent)
