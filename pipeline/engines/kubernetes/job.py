"""A job in the cluster from its start to its exit code."""

import signal
import sys
import time
from contextlib import suppress
from typing import NamedTuple

from pipeline.cli.errors import FAILURE, USER_ERROR, FailureError
from pipeline.cli.signals import EXIT_CODES, stop_signals
from pipeline.engines.kubernetes.kubectl import Kubectl, KubectlError, PodState, summary_of
from pipeline.engines.kubernetes.manifest import GRACE_SECONDS, Manifest

APPLY_TRIES = 3  # Trainer does not know a new TrainingRuntime at once
DELETE_SECONDS = 5.0  # a signal leaves 8


class Limits(NamedTuple):
    """Seconds between two questions, and without an answer of the cluster until that is a failure."""

    poll_seconds: float = 10.0
    silent_seconds: float = 600.0
    gone_seconds: float = GRACE_SECONDS + 60.0


def run(manifest: Manifest, kubectl: Kubectl, *, limits: Limits) -> int:
    """Start the job, or find it running, wait for its end and return the exit code of its command.

    A signal deletes the job, so that its pods save and end. Raises: FailureError when the cluster does not answer.
    """
    try:
        _start(manifest, kubectl, limits=limits)
        print(f"{manifest.kind} {manifest.name} is in the cluster", flush=True)
        has_succeeded = _wait(manifest, kubectl, limits=limits)
    except SystemExit:
        if stop_signals.first is not None:
            _delete_in_time(manifest, kubectl)
        raise
    if has_succeeded is None:
        print(f"error: {manifest.kind} {manifest.name} was deleted by others", file=sys.stderr)
        return EXIT_CODES[signal.SIGTERM]  # its pods have saved
    code = _report(manifest, kubectl, has_succeeded=has_succeeded)
    if has_succeeded:  # a failed one stays for `kubectl describe`
        with suppress(KubectlError):  # the next one of the same name deletes it
            kubectl.delete(manifest)
    return code


def _start(manifest: Manifest, kubectl: Kubectl, *, limits: Limits) -> None:
    """Create the job unless it runs. One of the same name that has ended is deleted first."""
    found = kubectl.job(manifest)
    if found is not None and found.has_succeeded is None and not found.is_being_deleted:
        return
    if kubectl.parts(manifest):
        kubectl.delete(manifest)
    end = time.monotonic() + limits.gone_seconds
    while parts := kubectl.parts(manifest):
        if time.monotonic() > end:
            raise FailureError(f"still being deleted: {', '.join(parts)}: the same command tries again")
        time.sleep(limits.poll_seconds)
    for left in reversed(range(APPLY_TRIES)):
        try:
            kubectl.apply(manifest)
            return
        except KubectlError:
            if left == 0:
                raise
            time.sleep(min(limits.poll_seconds, 2.0))


def _wait(manifest: Manifest, kubectl: Kubectl, *, limits: Limits) -> bool | None:
    """Return whether the job has succeeded, None for one that was deleted; print its pods when they change."""
    answered, shown = time.monotonic(), ""
    while True:
        try:
            found, summary = kubectl.job(manifest), summary_of(kubectl.pods(manifest))
        except KubectlError:
            if time.monotonic() - answered > limits.silent_seconds:
                raise
        else:
            answered = time.monotonic()
            if summary != shown:
                print(f"pods: {summary}", flush=True)
                shown = summary
            if found is None or found.is_being_deleted:
                return None
            if found.has_succeeded is not None:
                return found.has_succeeded
        time.sleep(limits.poll_seconds)


def _report(manifest: Manifest, kubectl: Kubectl, *, has_succeeded: bool) -> int:
    """Print the last lines of the pod that decides, and return the exit code of the command."""
    try:
        pods = sorted(kubectl.pods(manifest), key=lambda pod: _rank(pod, has_succeeded=has_succeeded))
        lines = kubectl.last_lines(pods[0].name).rstrip().splitlines() if pods else []
    except KubectlError as error:
        pods, lines = [], [str(error)]
    for line in lines:
        print(line)
    if has_succeeded:
        return 0
    first = pods[0] if pods else None
    code = USER_ERROR if first is not None and first.code == USER_ERROR else FAILURE
    why = f": {lines[-1]}" if lines else ""
    if first is not None:
        reason = f" ({first.reason})" if first.reason else ""
        why = f": {first.name} ended with exit code {first.code}{reason}{why}"
    print(f"error: {manifest.kind} {manifest.name} has failed{why}", file=sys.stderr)
    return code


def _rank(pod: PodState, *, has_succeeded: bool) -> tuple[int, str]:
    """Sort pods: of a success the first node's, of a failure a user error before others, stopped pods last."""
    if has_succeeded:
        return (pod.code != 0, pod.name)
    if pod.code == USER_ERROR:
        return (0, pod.name)
    return (1 if pod.code not in (None, 0, *EXIT_CODES.values()) else 2, pod.name)


def _delete_in_time(manifest: Manifest, kubectl: Kubectl) -> None:
    try:
        kubectl.delete(manifest, seconds=DELETE_SECONDS)
        print(f"{manifest.kind} {manifest.name} is being deleted: its pods save and end", flush=True)
    except KubectlError as error:
        print(f"error: {manifest.kind} {manifest.name} still runs: {error}", file=sys.stderr)
