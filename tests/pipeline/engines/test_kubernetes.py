"""Kubernetes: manifests that its published schemas accept, and every end of a job."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from pipeline.cli.compose import compose
from pipeline.cli.errors import FailureError
from pipeline.cli.signals import SAVE_SECONDS
from pipeline.engines.kubernetes.__main__ import verb_in
from pipeline.engines.kubernetes.job import Limits, run
from pipeline.engines.kubernetes.kubectl import RESOURCES, Kubectl
from pipeline.engines.kubernetes.manifest import Manifest, Settings, build_manifest
from pipeline.engines.kubernetes.node import STOP_SECONDS
from pipeline.engines.kubernetes.options import read_options
from tests.support.commands import run_module
from tests.support.kubectl import FakeCluster, pod, write_cluster
from tests.support.paths import ROOT
from tests.support.processes import interruptible

SETTINGS = Settings("team/convoy:1", "shared", Path("/data"), Path("/data/work"), nodes=2, gpus=8, secret="mlflow")
COMMAND = ("pipeline.train", "+model=resnet", "out=studies/a/runs/ResNet_50", "trainer.x=$(HOSTNAME)")
QUICK = Limits(poll_seconds=0.01, silent_seconds=0.2, gone_seconds=5.0)
MODELS = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "JobSet": models.JobsetV1alpha2JobSet,
}
Tree = dict[str, Any]


def objects(manifest: Manifest) -> list[Tree]:
    content: Tree = manifest.content
    return content["items"] if content["kind"] == "List" else [content]


def job_template(manifest: Manifest) -> Tree:
    """The template of the Job that JobSet creates."""
    first = objects(manifest)[0]
    spec = first["spec"] if first["kind"] == "JobSet" else first["spec"]["template"]["spec"]
    (replicated,) = spec["replicatedJobs"]
    return replicated["template"]


def as_read(found: Tree) -> Tree:
    """What the models of Kubeflow Trainer and JobSet keep of an object: fields unknown to them are lost."""
    model: Any = MODELS[found["kind"]]
    return model.from_dict(copy.deepcopy(found)).to_dict()


@pytest.fixture(params=["trainjob", "jobset"])
def manifest(request: pytest.FixtureRequest) -> Manifest:
    return build_manifest(SETTINGS._replace(kind=request.param), COMMAND)


def test_the_models_of_trainer_and_jobset_lose_nothing(manifest: Manifest) -> None:
    found = objects(manifest)
    kinds = ["JobSet"] if manifest.kind == "jobset" else ["TrainingRuntime", "TrainJob"]
    assert [one["kind"] for one in found] == kinds
    for one in found:
        assert as_read(one) == one


MISTAKES: dict[str, Callable[[Manifest], Tree]] = {
    "complMode": lambda manifest: job_template(manifest)["spec"],
    "numNode": lambda manifest: objects(manifest)[-1]["spec"],
    "gracePeriod": lambda manifest: job_template(manifest)["spec"]["template"]["spec"],
    "onExitCode": lambda manifest: job_template(manifest)["spec"]["podFailurePolicy"]["rules"][1],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_round_trip_notices_an_unknown_field(manifest: Manifest, name: str) -> None:
    MISTAKES[name](manifest)[name] = 3
    assert any(as_read(one) != one for one in objects(manifest))


def validate_job(template: Tree) -> None:
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": template["spec"]}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_the_schema_of_kubernetes_accepts_the_job(manifest: Manifest) -> None:
    template = job_template(manifest)
    validate_job(template)
    template["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        validate_job(template)


def action(rules: list[Tree], code: int, *, is_disrupted: bool = False) -> str | None:
    """The action of the first rule that matches, as Kubernetes documents podFailurePolicy."""
    for rule in rules:
        conditions, codes = rule.get("onPodConditions"), rule.get("onExitCodes")
        if conditions and is_disrupted and {"type": "DisruptionTarget", "status": "True"} in conditions:
            return rule["action"]
        if codes and codes["operator"] == "In" and code in codes["values"]:
            return rule["action"]
    return None


def test_exit_codes_decide_what_a_failed_pod_means(manifest: Manifest) -> None:
    job = job_template(manifest)["spec"]
    rules = job["podFailurePolicy"]["rules"]
    decided = {code: action(rules, code) for code in (1, 2, 130, 143, 137)}
    assert decided == {1: "FailJob", 2: "Count", 130: "Ignore", 143: "Ignore", 137: None}
    assert {action(rules, code, is_disrupted=True) for code in (1, 2, 137, 143)} == {"Ignore"}
    pod_spec = job["template"]["spec"]
    (container,) = pod_spec["containers"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules[1:]} == {container["name"]} == {"node"}
    assert (pod_spec["restartPolicy"], job["podReplacementPolicy"]) == ("Never", "Failed"), (
        "podFailurePolicy needs both"
    )
    assert pod_spec["terminationGracePeriodSeconds"] > STOP_SECONDS > SAVE_SECONDS


def test_each_node_is_one_pod_that_connects_to_the_first_one(manifest: Manifest) -> None:
    job = job_template(manifest)["spec"]
    (container,) = job["template"]["spec"]["containers"]
    name = manifest.name
    assert name.startswith("train-resnet-50-")
    assert len(f"{name}-node-0-0-abcde") <= 63, "a name in DNS"
    assert job["parallelism"] == job["completions"] == 2
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert environment["PET_MASTER_ADDR"] == f"{name}-node-0-0.{name}"
    assert (environment["PET_NNODES"], environment["PET_NPROC_PER_NODE"]) == ("2", "8")
    assert container["workingDir"] == "/data/work"
    assert {one["mountPath"] for one in container["volumeMounts"]} == {"/data", "/dev/shm"}
    assert container["command"][-5:] == ["-m", *COMMAND[:-1], "trainer.x=$$(HOSTNAME)"]
    assert job["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container["envFrom"] == [{"secretRef": {"name": "mlflow"}}]


def test_kubectl_is_asked_for_the_kinds_of_the_manifest(manifest: Manifest) -> None:
    kinds = {f"{one['kind'].lower()}s.{one['apiVersion'].partition('/')[0]}" for one in objects(manifest)}
    assert kinds == set(RESOURCES[manifest.kind])


def test_equal_commands_have_equal_names() -> None:
    name = build_manifest(SETTINGS, COMMAND).name
    assert build_manifest(SETTINGS, COMMAND).name == name
    assert build_manifest(SETTINGS, (*COMMAND, "seed=1")).name != name
    assert build_manifest(SETTINGS._replace(image="team/convoy:2"), COMMAND).name != name


def test_the_profile_gives_options_that_the_program_has() -> None:
    profile = compose(
        "workflow", ["profile=kubernetes", "profile.image=a/b:1", "profile.claim=c", "profile.nodes=4"]
    ).profile
    found = {}
    for verb in ("train", "evaluate"):
        python, *words, dashes = shlex.split(profile.prefix[verb])
        assert (python, words[:2], dashes) == ("{python}", ["-m", "pipeline.engines.kubernetes"], "--")
        _, found[verb] = read_options(words[2:], folder=Path("/data"))
    expected = Settings("a/b:1", "c", Path("/data"), Path("/data"), nodes=4)
    assert found == {"train": expected, "evaluate": expected._replace(nodes=1)}
    assert verb_in(["/usr/bin/python", "-m", "pipeline.train", "seed=1"]) == ["pipeline.train", "seed=1"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return write_cluster(tmp_path)


def end_of(kind: str = "trainjob", *, limits: Limits = QUICK) -> int:
    return run(build_manifest(SETTINGS._replace(kind=kind), COMMAND), Kubectl("team"), limits=limits)


@pytest.mark.parametrize(("kind", "condition"), [("trainjob", "Complete"), ("jobset", "Completed")])
def test_a_success_is_shown_and_removed(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str], kind: str, condition: str
) -> None:
    cluster.play("Created", condition, pods=[pod("a-0", "Succeeded", code=0), pod("a-1", "Running")], log="top-1 0.97")
    assert end_of(kind) == 0
    assert "pods: 1 Running, 1 Succeeded\ntop-1 0.97" in capsys.readouterr().out
    assert cluster.verbs() == ["apply", "delete"]
    assert {words[0] for words in cluster.calls()} == {"--namespace=team"}


ENDS = {
    "user error": ([pod("a-0", "Failed", code=2), pod("a-1", "Failed", code=1)], 1, "a-1 ended with exit code 1: "),
    "failure": ([pod("a-0", "Failed", code=143), pod("a-1", "Failed", code=2)], 2, "a-1 ended with exit code 2: "),
    "memory": ([pod("a-0", "Failed", code=137, reason="OOMKilled")], 2, "a-0 ended with exit code 137 (OOMKilled): "),
    "no pods": ([], 2, "has failed\n"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_failed_job_has_the_exit_code_of_its_pods(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    pods, code, text = ENDS[end]
    cluster.play("Failed", pods=pods, log="step 3\nerror: why")
    assert end_of() == code
    printed = capsys.readouterr().err
    assert text in printed
    assert printed.count("\n") == 1
    assert printed.endswith("error: why\n") == bool(pods)
    assert cluster.verbs() == ["apply"], "it stays, for kubectl describe"


def test_a_disruption_and_a_silent_moment_end_nothing(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    pods = [pod("a-0", "Failed", code=143), pod("a-0b", "Pending", waits="ImagePullBackOff"), pod("a-1", "Running")]
    cluster.play("Created", "Created", "Complete", pods=pods, silent=(9, 10))
    assert end_of(limits=QUICK._replace(silent_seconds=20.0)) == 0
    assert len(cluster.calls()) > 11
    assert "pods: 1 Failed, 1 Pending (ImagePullBackOff), 1 Running\n" in capsys.readouterr().out


def test_a_job_that_others_delete_is_stopped(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.play("Created", "Gone")
    assert end_of() == 143
    assert capsys.readouterr().err.endswith("was deleted by others\n")


def test_the_same_command_waits_for_its_running_job_and_replaces_one_that_has_ended(cluster: FakeCluster) -> None:
    cluster.run_earlier_job()
    cluster.play("Created", "Created", "Complete")
    assert end_of() == 0
    assert cluster.verbs() == ["delete"]
    cluster.run_earlier_job()
    cluster.play("Failed", pods=[pod("a-0", "Failed", code=1)], leaving=3)
    asked = len(cluster.calls())
    assert end_of() == 1
    assert cluster.verbs() == ["delete", "delete", "apply"]
    later = cluster.calls()[asked:]
    applied = [words[1] for words in later].index("apply")
    assert sum(words[1:3] == ["get", "pods"] for words in later[:applied]) == 5, "it waits for the pods that save"


def test_pods_that_do_not_end_are_a_failure(cluster: FakeCluster) -> None:
    cluster.run_earlier_job()
    cluster.play("Failed", pods=[pod("a-0", "Running")], leaving=1000)
    with pytest.raises(FailureError, match="still being deleted: pod/a-0"):
        run(build_manifest(SETTINGS, COMMAND), Kubectl("team"), limits=QUICK._replace(gone_seconds=0.1))


@pytest.mark.parametrize("silence", [{"refuses": "all"}, {"refuses": "apply"}, {"hangs": True}])
def test_a_cluster_that_does_not_answer_is_a_failure(cluster: FakeCluster, silence: dict[str, Any]) -> None:
    cluster.play(**silence)
    job = build_manifest(SETTINGS, COMMAND)
    message = "has not answered in 0.2 seconds" if "hangs" in silence else "Unable to connect to the server"
    with pytest.raises(FailureError, match=message):
        run(job, Kubectl("", seconds=0.2 if "hangs" in silence else 30.0), limits=QUICK)


def test_a_runtime_that_trainer_does_not_know_yet_is_no_failure(cluster: FakeCluster) -> None:
    cluster.play("Complete", silent=(6, 6))
    assert end_of() == 0
    assert cluster.verbs() == ["apply", "apply", "delete"]


def test_a_cluster_that_stays_silent_while_a_job_runs_is_a_failure(cluster: FakeCluster) -> None:
    cluster.play(silent=(7, 100_000))
    with pytest.raises(FailureError, match="Unable to connect to the server"):
        end_of()
    assert cluster.verbs() == ["apply"], "the same command finds it"
    assert len(cluster.calls()) > 7


OPTIONS = ("--image=a/b:1", "--claim=c", "--poll-seconds=0.05")
TRAIN = ("pipeline.train", "+model=lenet", "seed=1")
WORDS = (*OPTIONS, "--", "python", "-m", *TRAIN)


def test_print_writes_the_manifest(tmp_path: Path) -> None:
    answer = run_module(tmp_path, "pipeline.engines.kubernetes", "--print", *WORDS)
    settings = Settings("a/b:1", "c", tmp_path.resolve(), tmp_path.resolve())
    assert yaml.safe_load(answer.stdout) == build_manifest(settings, TRAIN).content


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_deletes_the_job(cluster: FakeCluster, number: signal.Signals, code: int) -> None:
    cluster.play("Created")
    command = [sys.executable, "-m", "pipeline.engines.kubernetes", *WORDS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    folder, pipe = cluster.folder, subprocess.PIPE
    with interruptible(), subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        (written,) = re.findall(r"^wrote (manifests/train-\w+.yaml)$", process.stdout.readline().strip())
        assert process.stdout.readline().endswith("is in the cluster\n")
        assert yaml.safe_load((folder / written).read_text()) == json.loads((folder / "applied.json").read_text())
        process.send_signal(number)
        assert process.wait(20) == code
        assert process.stdout.read().endswith("is being deleted: its pods save and end\n")
    assert cluster.verbs() == ["apply", "delete"]


RANK = """
import os, signal, sys, time
if sys.argv[1] == "waits":
    print("waits", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    time.sleep(60)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
print(os.environ["RANK"], os.environ["WORLD_SIZE"], flush=True)
sys.exit(int(sys.argv[1]))
"""


def start_node(folder: Path, rank: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.engines.kubernetes.node", "rank.py", rank]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.engines
def test_a_node_exits_with_the_code_of_its_rank(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    with ExitStack() as stack:
        waits, killed, *nodes = (
            stack.enter_context(start_node(tmp_path, rank, **variables))
            for rank, variables in (
                ("waits", {}),
                ("killed", {}),
                ("1", {**shared, "PET_NODE_RANK": "0"}),
                ("1", {**shared, "PET_NODE_RANK": "1"}),
            )
        )
        assert waits.stdout is not None
        assert waits.stdout.readline() == "waits\n"
        waits.send_signal(signal.SIGTERM)
        assert waits.wait(30) == 143
        assert killed.wait(30) == 2
        assert [(node.communicate(timeout=30)[0], node.returncode) for node in nodes] == [("0 2\n", 1), ("1 2\n", 1)]


def test_the_dockerfile_keeps_its_promises() -> None:
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    by_word: dict[str, list[str]] = {}
    for line in lines:
        word, _, rest = line.partition(" ")
        by_word.setdefault(word, []).append(rest)
    (base,), (user,) = by_word["FROM"], by_word["USER"]
    assert re.fullmatch(r"nvidia/cuda:13\.\d+\.\d+-\w+-ubuntu24\.04", base)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "runAsNonRoot needs a number"
    assert lines.index(f"USER {user}") > max(number for number, line in enumerate(lines) if line.startswith("RUN"))
    (install,) = (one for one in by_word["RUN"] if "pip install" in one)
    assert install.count("--require-hashes") == 2
    assert "uv pip sync" in install
    assert "--compile-bytecode" in install
    assert sum("compileall" in one for one in by_word["RUN"]) == 1
    assert "://" not in "".join(lines)
    copied = [one.split()[0] for one in by_word["COPY"]]
    assert copied == ["requirements.lock", "conf", "data", "models", "pipeline"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == set(copied)
