"""Kills, signals and failures of several processes: nothing is lost, nothing stays, and the cause is named once."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1

import pytest

from data.shards.dataset import Dataset
from tests.support.commands import TWO_RANKS
from tests.support.processes import TORCHRUN, Training, interruptible, train_undisturbed, two_ranks
from tests.support.resume import checkpoint, differences, results

pytestmark = pytest.mark.faults
NET = (
    "+model=mobilenet", "model.variant=mobilenet_v3_small", "model.stochastic_depth=0.2", "recipe.optimizer.lr=0.001",
    "trainer.precision=32-true", "augment=reference", "policy=randaugment", "erasing=pixel", "mix=mixup_cutmix",
    "averaging=ema", "averaging.min_windows=0", "recipe.layer_decay=0.7", "recipe.head_warmup=0.1", "tracking=none",
)  # fmt: skip
# 15 steps of two ranks; checkpoints at every second one, so that most kills lose a step.
SHORT = two_ranks(
    *NET, "data.batch_size=8", "recipe.epochs=3", "+trainer.limit_train_batches=5", "+trainer.limit_val_batches=2",
    "log_every=1", "checkpoint.every_steps=2",
)  # fmt: skip
ENDLESS = ("+model=lenet", "data.batch_size=32", "recipe.epochs=400", "log_every=10", "tracking=none")
FAILING = (*two_ranks(*ENDLESS), "trust=true", "classifier._target_=tests.support.failing.Failing")


def killed_at_random(root: Path, name: str, *, kills: int, seed: int) -> int:
    """Train with kills of the entire group at random moments, to the end; return how many of them hit a training."""
    draw, hits = random.Random(seed), 0
    for _ in range(kills):
        training = Training(root, name, *SHORT)
        for text in ("dashboard", *["step "] * draw.randint(0, 4)):
            training.wait_for(text)
        try:
            training.process.wait(draw.uniform(0, 0.3))
        except subprocess.TimeoutExpired:
            hits += 1
        training.kill()
        if training.end().code == 0:
            break
    ended = Training(root, name, *SHORT).end()
    assert ended.code == 0, ended
    return hits


def signals() -> list[object]:
    """Every way to send every signal; those that are rare are left to the soak tests."""
    pairs = itertools.product(["process", "group", "rank 1", "torchrun"], [SIGTERM, SIGINT, SIGUSR1])
    often = {("process", SIGINT), ("group", SIGTERM), ("group", SIGINT), ("rank 1", SIGTERM), ("torchrun", SIGUSR1)}
    return [
        pytest.param(*pair, id=f"{pair[0]}-{pair[1].name}", marks=() if pair in often else pytest.mark.soak)
        for pair in pairs
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """A folder with the digits, and the undisturbed run of two ranks."""
    return train_undisturbed(tmp_path_factory.mktemp("faults"), digits, SHORT)


def test_a_chain_of_kills_over_two_ranks_ends_in_the_same_bits(root: Path) -> None:
    assert killed_at_random(root, "cut", kills=5, seed=0) > 1
    assert differences(results(root / "runs" / "complete"), results(root / "runs" / "cut")) == []
    assert not [one for one in (root / "runs" / "cut" / "checkpoints").iterdir() if one.name.startswith(".")]


def test_kills_more_frequent_than_epochs_still_progress(root: Path) -> None:
    kills = 0
    while not (root / "runs" / "slow" / "result.json").is_file():
        training = Training(root, "slow", *SHORT)
        assert training.wait_for("dashboard")
        for _ in range(4):  # steps of 5 an epoch
            training.wait_for("step ")
        training.kill()
        training.end()
        kills += 1
        assert kills < 20
    assert kills >= 3
    assert differences(results(root / "runs" / "complete"), results(root / "runs" / "slow")) == []


@pytest.mark.parametrize(("to", "number"), signals())
def test_a_signal_stops_all_ranks_after_the_same_step(root: Path, to: str, number: signal.Signals) -> None:
    name = f"{to}-{number.name}".replace(" ", "")
    words = ENDLESS if to == "process" else two_ranks(*ENDLESS)
    with interruptible():
        training = Training(root, name, *words, **({"launcher": TORCHRUN} if to == "torchrun" else {}))
        assert training.wait_for("step 60/"), training.end()
        if to == "group":
            training.signal_group(number)
        elif to == "rank 1":
            training.rank(1).send_signal(number)
        else:
            training.process.send_signal(number)
        ended = training.end()
    code = 130 if number == SIGINT else 143
    # torchrun hides the codes of its processes; SIGUSR1 kills it, and its processes get SIGTERM from the kernel.
    assert ended.code == ({SIGUSR1: -SIGUSR1}.get(number, 1) if to == "torchrun" else code)
    assert (ended.status["state"], ended.status["exit_code"]) == ("stopped", code)
    assert ended.status["reason"] == ("SIGTERM" if (to, number) == ("torchrun", SIGUSR1) else number.name)
    assert f"stopped: the same command continues after step {ended.status['step']}" in ended.stdout
    assert checkpoint(training.folder)["global_step"] == ended.status["step"] >= 60
    if to != "torchrun":
        assert ended.stderr == ""


def test_a_signal_before_the_first_step_stops_all_ranks(root: Path) -> None:
    """While they start, connect and wait for each other."""
    draw = random.Random(0)
    with interruptible():
        for _ in range(8):
            training = Training(root, "early", *two_ranks(*ENDLESS))
            with pytest.raises(subprocess.TimeoutExpired):
                training.process.wait(draw.uniform(1, 6))
            number = draw.choice([SIGTERM, SIGINT, SIGUSR1])
            training.signal_group(number) if draw.random() < 0.5 else training.process.send_signal(number)
            began = time.monotonic()
            ended = training.end()
            assert ended.code == (130 if number == SIGINT else 143), ended
            assert time.monotonic() - began < 12
            assert ended.status.get("state") in (None, "stopped")


def test_the_end_of_the_agent_stops_its_ranks_with_a_checkpoint(root: Path) -> None:
    training = Training(root, "agent", *two_ranks(*ENDLESS), launcher=TORCHRUN)
    assert training.wait_for("step 60/"), training.end()
    training.process.kill()
    ended = training.end()
    assert ended.status["state"] == "stopped"
    assert checkpoint(training.folder)["global_step"] == ended.status["step"]


@pytest.mark.parametrize(
    ("how", "cause", "code"),
    [
        ("1,30,value", "rank 1 raised ValueError: an image of ours", 1),
        pytest.param("0,30,bug", "rank 0 raised RuntimeError: a bug of ours", 2, marks=pytest.mark.soak),
        ("1,30,kill", "rank 1 was killed by signal 9", 2),
        ("0,30,kill", "rank 0 has ended", 2),
        pytest.param("1,30,exit", "rank 1 exited with code 7", 2, marks=pytest.mark.soak),
        ("1,30,sleep", "rank 1 is behind: nothing has moved for 5 seconds (the stacks are in runs/", 2),
        pytest.param("0,30,sleep", "rank 0 is behind: nothing has moved for 5 seconds", 2, marks=pytest.mark.soak),
        ("1,30,stop", "rank 1 does not answer: nothing has moved for 5 seconds", 2),
        ("1,30,full", "rank 1 raised OSError: No space left on device", 2),
    ],
)
def test_a_failing_rank_ends_all_and_is_named_once(root: Path, how: str, cause: str, code: int) -> None:
    name = how.replace(",", "-")
    training = Training(root, name, *FAILING, "hang_seconds=5", FAIL=how)
    assert training.wait_for("step 20/"), training.end()
    ended = training.end()
    assert ended.code == (-signal.SIGKILL if how == "0,30,kill" else code), ended
    assert ended.stderr.count("error: ") == 1, ended.stderr
    assert ended.stderr.startswith(f"error: {cause}"), ended.stderr
    assert len(ended.stderr.splitlines()) == 1, "no wall of tracebacks"
    assert (ended.status["state"], ended.status["exit_code"]) == ("failed", code)
    assert ended.status["reason"].startswith(cause)
    if "sleep" in how:
        stacks = (training.folder / "ranks" / f"rank-{how[0]}.txt").read_text()
        assert "in training_step" in stacks
        assert len(list((training.folder / "ranks").iterdir())) == 2


def test_a_process_that_hangs_alone_ends_with_its_stacks(root: Path) -> None:
    words = [word for word in FAILING if word not in TWO_RANKS]
    training = Training(root, "alone", *words, "hang_seconds=3", FAIL="0,30,sleep")
    ended = training.end()
    assert ended.code == 2, ended
    assert ended.stderr.startswith("error: nothing has moved for 3 seconds (the stacks are in runs/alone/ranks)")
    assert "in training_step" in (training.folder / "ranks" / "rank-0.txt").read_text()


def test_rank_0_is_named_when_it_does_not_answer(root: Path) -> None:
    words = (*FAILING, "hang_seconds=15", "name=silent")
    training = Training(root, "silent", *words, launcher=TORCHRUN, FAIL="0,30,stop")
    assert training.wait_for("step 20/"), training.end()
    ended = training.end()
    assert ended.stderr.count("error: rank 0 does not answer: nothing has moved for 15 seconds") == 1, ended.stderr


def test_a_suspended_training_continues(root: Path) -> None:
    words = [word for word in FAILING if word not in TWO_RANKS and "epochs" not in word]
    training = Training(root, "suspended", *words, "recipe.epochs=4", "hang_seconds=3", FAIL="0,3000,bug")
    assert training.wait_for("step 20/"), training.end()
    training.signal_group(signal.SIGSTOP)
    time.sleep(6)
    training.signal_group(signal.SIGCONT)
    assert training.end().code == 0


def test_a_full_disk_ends_a_training_in_one_line_and_it_continues_with_space(root: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("needs the right to mount a small file system")
    words = (
        "+model=lenet", "data.batch_size=32", "recipe.epochs=6", "tracking=none", "trainer=cpu", f"runs={disk}/runs",
        "checkpoint.every_steps=20",
    )  # fmt: skip
    try:
        (disk / "ballast").write_bytes(bytes(2_000_000))
        ended = Training(root, "full", *words).end()
        assert ended.code == 2, ended
        assert ended.stderr.startswith("error: No space left on device"), ended.stderr
        assert len(ended.stderr.splitlines()) == 1
        (disk / "ballast").unlink()
        ended = Training(root, "full", *words).end()
        assert ended.code == 0, ended
        assert "continues after step" in ended.stdout
        assert Training(root, "space", *(word for word in words if "runs=" not in word)).end().code == 0
        one, other = results(root / "runs" / "space"), results(disk / "runs" / "full")
        assert differences(one, other) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_ranks_with_other_settings_are_refused(root: Path) -> None:
    # The second rank of this launcher reads its own environment.
    ended = Training(
        root,
        "differ",
        *two_ranks("+model=mobilenet", "tracking=none"),
        "model.variant=mobilenet_v${oc.env:LOCAL_RANK,2}",
    ).end()
    assert ended.code == 1, ended
    assert "rank 1 has model.variant=mobilenet_v1, rank 0 has mobilenet_v2: all ranks need the same" in ended.stderr
    assert ended.stderr.count("error:") == 1
    assert os.listdir(root / "runs" / "differ" / "checkpoints") == []
