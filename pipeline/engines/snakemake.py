"""Snakemake runs the steps of a study, in a separate environment because its library versions conflict with ours."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from data.children import end_with_me
from data.locks import NO_FLOCK
from data.shards.dataset import write_atomically
from pipeline.cli.errors import FailureError
from pipeline.cli.signals import stop_signals
from pipeline.engines.profile import Profile
from pipeline.engines.study import Step

ROOT = Path(__file__).resolve().parents[2]
SNAKEFILE = Path(__file__).with_name("Snakefile")
ENVIRONMENT = ROOT / ".workflow"
STUDY, LOG = "study.yaml", "snakemake.log"
POLL_SECONDS, END_SECONDS = 0.2, 6.0
LOCKED = "CONVOY_LOCKED"  # environment variable of an engine whose study is locked
LOCK_SECONDS = 10.0  # limit for an engine that a signal has stopped
DRAWINGS = (".dot", ".png", ".svg")
NAMED = 3  # steps in a reason
NO_EXIT_CODE = "At least one job did not complete"  # Snakemake's error, where no step has one either


class Ended(NamedTuple):
    """A step that has ended: its exit code and seconds."""

    step: Step
    code: int
    seconds: int


def build_environment() -> Path:
    """Return Snakemake's program; install it on first use. Raises: OSError where that fails."""
    program = ENVIRONMENT / "bin" / "snakemake"
    if not (ENVIRONMENT / "ready").is_file():
        print(f"installing Snakemake into {ENVIRONMENT.name}", flush=True)
        made = subprocess.run(["make", "--quiet", "workflow"], cwd=ROOT, check=False)
        if made.returncode:
            raise OSError("Snakemake could not be installed: make workflow says why")
    return program


def write_study(steps: Sequence[Step], folder: Path, *, profile: Profile) -> None:
    """Write the resolved study, `study.yaml`, and the command of each step where it has changed."""
    for file, content in render_study(steps, folder, profile=profile).items():
        if not file.is_file() or file.read_bytes() != content:  # its time decides whether a step is done
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, content)


def forget_other_parts(steps: Sequence[Step], folder: Path) -> None:
    """Let parts of data sets run again that another number of parts has replaced."""
    known = {folder / "done" / step.identity for step in steps}
    for file in folder.glob("done/*/*@*of*"):
        dataset = file.with_name(file.name.partition("@")[0])
        if dataset in known and file not in known:  # a data set that this command leaves out keeps its parts
            for part in file.parent.glob(f"{dataset.name}@*of*"):
                part.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Lock a study for this process and an engine that inherits the yielded file: Snakemake's lock outlives a kill.

    Without flock only each training is locked. Raises: ValueError when another process runs the study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + LOCK_SECONDS
    with (folder / ".lock").open("a+") as file:
        while not _has_locked(file):
            if time.monotonic() > end:
                file.seek(0)
                owner = file.read() or "another process"
                raise ValueError(f"{folder} is run by {owner}: wait until that and its jobs have ended, or end it")
            time.sleep(POLL_SECONDS)
        _name_owner(file.fileno(), f"pipeline.workflow, process {os.getpid()}")
        os.environ[LOCKED] = "1"
        try:
            yield file.fileno()
        finally:
            del os.environ[LOCKED]


def _name_owner(lock: int, process: str) -> None:
    os.ftruncate(lock, 0)
    os.write(lock, f"{process} on {socket.gethostname()}".encode())


def _has_locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
    return True


@contextmanager
def study_as_written(steps: Sequence[Step], folder: Path, *, profile: Profile) -> Iterator[None]:
    """Write the study for this block only: looking at what would run must not change what will."""
    files = render_study(steps, folder, profile=profile)
    known = {*files, *folder.glob("done/**/*"), *folder.glob("steps/**/*.exit")}  # the engine removes some at its start
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in known if file.is_file()}
    write_study(steps, folder, profile=profile)
    try:
        yield
    finally:
        for file in files.keys() - before.keys():
            file.unlink()
        for file, (content, time_ns) in before.items():
            if not file.is_file() or file.read_bytes() != content:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, content)
                os.utime(file, ns=(time_ns, time_ns))
        made = {inner for file in files for inner in file.parents if inner.is_relative_to(folder)}
        for inner in sorted(made, reverse=True):  # deep ones first
            with suppress(OSError):  # not empty
                inner.rmdir()


def render_study(steps: Sequence[Step], folder: Path, *, profile: Profile) -> dict[Path, bytes]:
    """Return the contents of `study.yaml` and of the file of each step's command, by path."""
    files: dict[Path, bytes] = {}
    by_verb: dict[str, dict[str, object]] = {}
    for step in steps:
        command = " ".join(map(shlex.quote, step.overrides))
        begun = [] if step.begun is None else [str(step.begun)]
        described = {"command": command, "needs": step.needs, "result": str(step.result), "begun": begun}
        by_verb.setdefault(step.verb, {})[step.name] = described
        own = {"verb": step.verb, "overrides": step.overrides, "needs": step.needs}
        files[folder / "steps" / step.verb / f"{step.name}.json"] = json.dumps(own, indent=1).encode()
    launch = {"python": sys.executable, "root": str(ROOT), "prefix": dict(profile.prefix)}
    study = {"folder": str(folder), "launch": launch, "resources": profile.resources, "steps": by_verb}
    return files | {folder / STUDY: json.dumps(study, indent=1).encode() + b"\n"}


def find_current_steps(steps: Sequence[Step], folder: Path) -> set[str]:
    """Return the steps that are done: with their command as it is now, and after all that they need."""
    times: dict[str, int] = {}
    for step in steps:  # each after those that it needs
        done, command = folder / "done" / step.identity, folder / "steps" / step.verb / f"{step.name}.json"
        with suppress(FileNotFoundError, KeyError):  # not done, or what it needs is not
            time_ns, needed = done.stat().st_mtime_ns, [times[one] for one in step.needs]
            ran_command = done.read_text().partition("\n")[2]
            if ran_command == command.read_text() and time_ns >= max(needed, default=0):
                times[step.identity] = time_ns
    return set(times)


def build_command_line(program: Path, folder: Path, *, profile: Profile, arguments: Sequence[str]) -> list[str]:
    """Return Snakemake's command line for the study in a folder."""
    common = ["-s", str(SNAKEFILE), "--configfile", str(folder / STUDY), "--nocolor", "--nolock"]  # `locked` is ours
    at_once = ["--cores", str(profile.jobs)] if profile.executor == "local" else ["--jobs", str(profile.jobs)]
    return [str(program), *common, "--executor", profile.executor, *at_once, *profile.arguments, *arguments]


def list_planned_steps(words: Sequence[str], *, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the steps that Snakemake would run, and why. Raises: OSError with its message when it fails."""
    answer = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise OSError(_reason(answer.stdout + answer.stderr))
    for block in re.split(r"\n(?=(?:local)?rule )", answer.stdout)[1:]:
        verb = block.split(maxsplit=2)[1].rstrip(":")
        fields = dict(re.findall(r"^    (\w+): (.*)$", block, re.MULTILINE))
        if "wildcards" in fields:
            identity = f"{verb}/{fields['wildcards'].removeprefix('name=')}"
            reasons = [_in_words(reason, folder) for reason in fields.get("reason", "").split("; ")]
            if not (folder / "done" / identity).exists():  # a new command is no reason then
                reasons = ["not done yet", *(reason for reason in reasons if reason.startswith("after "))]
            yield identity, "; ".join(reasons)


def _in_words(reason: str, folder: Path) -> str:
    """Return one of Snakemake's reasons with names of steps instead of files."""
    text, _, files = reason.partition(": ")
    if text == "Forced execution":  # Snakemake's own, too, for a step whose job was killed
        return "interrupted, or forced"
    commands, steps = f"{folder}/steps/", f"{folder}/done/"
    paths = files.split(", ")
    if text == "Updated input files" and any(path.startswith(commands) for path in paths):
        return "its command has changed"
    names = [path.removeprefix(steps) for path in paths if path]
    if text in ("Updated input files", "Input files updated by another job") and names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"after {', '.join(sorted(names)[:NAMED])}{more}"
    return reason


def draw(words: Sequence[str], file: Path) -> None:
    """Draw the graph of the steps into a file with one of the endings DRAWINGS. Raises: OSError."""
    answer = subprocess.run([*words, "--dag", "dot"], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise OSError(_reason(answer.stderr))
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".dot":
        file.write_text(answer.stdout)
        return
    program = shutil.which("dot")
    if program is None:
        raise OSError(f"graph={file} needs Graphviz: install it, or write {file.with_suffix('.dot')}")
    drawing = [program, f"-T{file.suffix[1:]}", "-o", str(file)]
    drawn = subprocess.run(drawing, input=answer.stdout, capture_output=True, text=True, check=False)
    if drawn.returncode:
        raise OSError(f"graph={file}: {drawn.stderr.strip() or program}")


def run(words: Sequence[str], steps: Sequence[Step], *, folder: Path, lock: int) -> Iterator[Ended]:
    """Run the engine, which inherits the lock; yield each step that has ended, again if the engine repeats it.

    The engine's own lines go to `snakemake.log`. Raises: OSError when it fails without a failed step, FailureError when
    it is killed.
    """
    since = dict.fromkeys((step.identity for step in steps), time.time_ns())
    log, codes = folder / LOG, dict.fromkeys((step.identity for step in steps), 0)  # of each step's last try
    with log.open("w") as file, _group(words, output=file, lock=lock) as process:
        _name_owner(lock, f"Snakemake, process {process.pid}")
        is_over = False
        while not is_over:
            is_over = process.poll() is not None
            for ended in _ended(steps, folder, since=since):
                codes[ended.step.identity] = ended.code
                yield ended
            time.sleep(0 if is_over else POLL_SECONDS)
    if process.returncode < 0:
        raise FailureError(f"Snakemake was killed by signal {-process.returncode}: the same command continues")
    if process.returncode and not any(codes.values()):
        reason = _reason(log.read_text())
        if NO_EXIT_CODE in reason:
            raise FailureError(
                f"a step ended without an exit code, so it was killed or could not start: {log} names it"
            )
        raise OSError(reason)


@contextmanager
def _group(words: Sequence[str], *, output: IO[str], lock: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program with a process group, to which a signal is passed on, SIGUSR1 as SIGTERM."""
    process = subprocess.Popen(
        words,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **end_with_me()},
        start_new_session=True,
        pass_fds=(lock,),
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # a program that was killed leaves steps behind
            os.killpg(process.pid, signal.SIGINT if stop_signals.first == signal.SIGINT else signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)


def _ended(steps: Sequence[Step], folder: Path, *, since: dict[str, int]) -> Iterator[Ended]:
    """Yield the steps that have ended later than `since`, which is brought up to date."""
    for step in steps:
        file = folder / "steps" / step.verb / f"{step.name}.exit"
        with suppress(OSError, ValueError):
            changed = file.stat().st_mtime_ns
            if changed > since[step.identity]:
                code, seconds = map(int, file.read_text().split())
                since[step.identity] = changed
                yield Ended(step, code, seconds)


def _reason(text: str) -> str:
    """Return the line in which Snakemake names its error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [number for number, line in enumerate(lines) if re.match(r"\w*(Error|Exception)\b", line)]
    return " ".join(lines[named[-1] : named[-1] + 3]) if named else " ".join(lines[-1:])
