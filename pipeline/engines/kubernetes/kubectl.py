"""kubectl as a program with a time limit, and what its JSON says about a job."""

import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.cli.errors import FailureError, one_line
from pipeline.engines.kubernetes.manifest import Manifest

RESOURCES = {
    "trainjob": ("trainjobs.trainer.kubeflow.org", "trainingruntimes.trainer.kubeflow.org"),
    "jobset": ("jobsets.jobset.x-k8s.io",),
}
ENDS = {"Complete": True, "Completed": True, "Failed": False}  # conditions of TrainJobs and JobSets
Json = dict[str, Any]


class KubectlError(FailureError):
    """kubectl is missing, has not answered in time or has refused."""


class JobState(NamedTuple):
    """A job in the cluster. `has_succeeded` is None until it has ended."""

    has_succeeded: bool | None
    is_being_deleted: bool


class PodState(NamedTuple):
    """A pod: its phase, why its container waits or has ended, and the exit code of one that has ended."""

    name: str
    phase: str
    reason: str
    code: int | None


class Kubectl:
    """kubectl in a namespace, that of its context if empty. Each call ends after `seconds`.

    All methods raise KubectlError.
    """

    def __init__(self, namespace: str, *, seconds: float = 30.0) -> None:
        self._words = ["kubectl", *([f"--namespace={namespace}"] if namespace else [])]
        self._seconds = seconds

    def apply(self, manifest: Manifest) -> None:
        """Create the job; without effect on one that exists."""
        self._run(["apply", "-f", "-"], stdin=json.dumps(manifest.content))

    def job(self, manifest: Manifest) -> JobState | None:
        """Return the state of the job, None for one that does not exist."""
        found = self._get([f"{RESOURCES[manifest.kind][0]}/{manifest.name}", "--ignore-not-found"])
        if not found:
            return None
        conditions = found.get("status", {}).get("conditions", [])
        ends = [ENDS[one["type"]] for one in conditions if one["type"] in ENDS and one["status"] == "True"]
        return JobState(ends[-1] if ends else None, "deletionTimestamp" in found["metadata"])

    def parts(self, manifest: Manifest) -> list[str]:
        """Return the names of all that exists of the job: its objects, what controllers made of them, its pods."""
        resources = dict.fromkeys((*RESOURCES[manifest.kind], *RESOURCES["jobset"]))
        names = [*(f"{resource}/{manifest.name}" for resource in resources), f"jobs.batch/{manifest.name}-node-0"]
        objects = self._run(["get", *names, "--ignore-not-found", "-o", "name"])
        return [*objects.split(), *(f"pod/{pod.name}" for pod in self.pods(manifest))]

    def pods(self, manifest: Manifest) -> list[PodState]:
        """Return the pods of the job, the ended ones of earlier tries included."""
        found = self._get(["pods", f"--selector=jobset.sigs.k8s.io/jobset-name={manifest.name}"])
        return [_pod_state(one) for one in found["items"]]

    def last_lines(self, pod: str) -> str:
        """Return the last lines that a pod has printed."""
        return self._run(["logs", pod, "--tail=20"])

    def delete(self, manifest: Manifest, *, seconds: float = 30.0) -> None:
        """Delete the job; what controllers made of it is deleted in the background, pods last."""
        names = [f"{resource}/{manifest.name}" for resource in RESOURCES[manifest.kind]]
        # Not in the foreground: Trainer gives a TrainJob that still exists a second JobSet when the first one has gone.
        options = ["--ignore-not-found", "--wait=false", "--cascade=background"]
        self._run(["delete", *names, *options], seconds=seconds)

    def _get(self, words: Sequence[str]) -> Json:
        text = self._run(["get", *words, "-o", "json"])
        try:
            found = json.loads(text or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise KubectlError(f"kubectl get {words[0]} has printed no JSON: {text[:80].strip()}")
        return found

    def _run(self, words: Sequence[str], *, stdin: str = "", seconds: float | None = None) -> str:
        limit = min(self._seconds, seconds or self._seconds)
        # An empty input instead of the terminal's: kubectl would ask there for missing credentials.
        line = [*self._words, f"--request-timeout={max(1, int(limit))}s", *words]
        try:
            answer = subprocess.run(line, input=stdin, capture_output=True, text=True, timeout=limit + 1, check=False)
        except subprocess.TimeoutExpired:
            raise KubectlError(f"kubectl {words[0]} has not answered in {limit:g} seconds") from None
        except OSError as error:
            raise KubectlError(f"kubectl cannot be started: {one_line(error)}") from None
        if answer.returncode:
            lines = answer.stderr.strip().splitlines()
            raise KubectlError(f"kubectl {words[0]}: {lines[-1] if lines else f'exit code {answer.returncode}'}")
        return answer.stdout


def summary_of(pods: Sequence[PodState]) -> str:
    """Return how many pods are in which state: `3 Running, 1 Pending (ImagePullBackOff)`."""
    counts = Counter(f"{pod.phase} ({pod.reason})" if pod.reason else pod.phase for pod in pods)
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "no pods yet"


def _pod_state(found: Json) -> PodState:
    status = found.get("status", {})
    state: Json = next((one.get("state", {}) for one in status.get("containerStatuses", [])), {})
    ended = state.get("terminated", {})
    reasons = [one.get("reason") for one in (state.get("waiting", {}), ended, status)]
    reasons += [one.get("reason") for one in status.get("conditions", []) if one.get("status") == "False"]
    reason = next((one for one in reasons if one and one not in ("Completed", "Error", "ContainersNotReady")), "")
    return PodState(found["metadata"]["name"], status.get("phase", "Unknown"), reason, ended.get("exitCode"))
