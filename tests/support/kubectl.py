"""A program `kubectl` that plays a cluster, as a file says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

PROGRAM = """#!{python} -ES
import json, sys, time
from pathlib import Path

folder = Path(__file__).parent
play = json.loads((folder / "play.json").read_text())
words = [word for word in sys.argv[1:] if not word.startswith(("--request-timeout", "--namespace"))]
with (folder / "calls").open("a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
if play["hangs"]:
    time.sleep(60)
asked_in_all = len((folder / "calls").read_text().splitlines())
if play["refuses"] in ("all", words[0]) or play["silent"][0] <= asked_in_all <= play["silent"][1]:
    sys.exit("Unable to connect to the server: dial tcp 192.0.2.1:443: i/o timeout")
job = folder / "job"
if words[0] == "apply":
    if not job.exists():
        job.write_text("0")
    (folder / "applied.json").write_text(sys.stdin.read())
elif words[0] == "delete":
    job.unlink(missing_ok=True)
    (folder / "leaving").write_text(str(play["leaving"]))
elif words[0] == "logs":
    print(play["log"])
elif words[1] == "pods":
    leaving = folder / "leaving"
    looks = int(leaving.read_text()) if leaving.exists() else 0
    leaving.write_text(str(max(0, looks - 1)))
    print(json.dumps({{"items": play["pods"] if job.exists() or looks else []}}))
elif job.exists() and words[-1] == "name":
    print("\\n".join(word for word in words[1:] if "/" in word))
elif job.exists():
    asked = int(job.read_text())
    job.write_text(str(asked + 1))
    states = play["states"]
    state = states[min(asked, len(states) - 1)]
    if state == "Gone":
        job.unlink()
    else:
        print(json.dumps({{"metadata": {{}}, "status": {{"conditions": [{{"type": state, "status": "True"}}]}}}}))
"""


class FakeCluster(NamedTuple):
    """A folder with the program, what it plays, and what it was asked."""

    folder: Path

    def play(self, *states: str, pods: list[dict[str, Any]] | None = None, refuses: str = "", **others: object) -> None:
        """Set the job's condition at each question, the last one for good; `Gone` is a job that others delete.

        `refuses` is a verb or `all`, `silent` the first and the last call without an answer, `leaving` how often the
        pods are listed after the job is deleted.
        """
        scene = {"states": states or ("Created",), "pods": pods or [], "refuses": refuses}
        defaults = {"log": "", "hangs": False, "silent": [0, 0], "leaving": 0}
        (self.folder / "play.json").write_text(json.dumps(defaults | scene | others))

    def run_earlier_job(self) -> None:
        """Leave a job of an earlier command."""
        (self.folder / "job").write_text("0")

    def calls(self) -> list[list[str]]:
        """Return the words of each call, without those of the connection."""
        lines = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").is_file() else []
        return [[word for word in json.loads(line) if not word.startswith("--request-timeout")] for line in lines]

    def verbs(self) -> list[str]:
        """Return the verb of each call that changes something."""
        verbs = [next(word for word in words if not word.startswith("-")) for words in self.calls()]
        return [verb for verb in verbs if verb in ("apply", "delete")]


def write_cluster(folder: Path) -> FakeCluster:
    """Write the program `kubectl` into a folder, which belongs in front of PATH."""
    program = folder / "kubectl"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    return FakeCluster(folder)


def pod(name: str, phase: str, *, code: int | None = None, reason: str = "", waits: str = "") -> dict[str, Any]:
    """Return a pod as `kubectl get -o json` prints it."""
    state: dict[str, Any] = {"waiting": {"reason": waits}} if waits else {"running": {}}
    if code is not None:
        state = {"terminated": {"exitCode": code, "reason": reason or "Error"}}
    return {"metadata": {"name": name}, "status": {"phase": phase, "containerStatuses": [{"state": state}]}}
