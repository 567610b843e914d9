"""Of several ranks, only the first lists and checks the files of a data set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.shards.dataset import Dataset
from tests.support.paths import ROOT
from tests.support.processes import free_port

RANKS = 2
# Opens a data set, and connects the ranks afterwards as Lightning does; prints how often tars were listed.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch.distributed
from data.shards import indexing
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pipeline.build.data import DataConfig
from pipeline.build.first_rank import answer_of_first_rank
environment = TorchElasticEnvironment() if TorchElasticEnvironment.detect() else SLURMEnvironment()
rank, listed, found = environment.global_rank(), [], indexing.list_tars
indexing.list_tars = lambda root: listed.append(root) or found(root)
index = sys.argv[2].replace("RANK", str(rank))
answer = {"error": None}
try:
    datasets = [DataConfig(sys.argv[1], 32, 8, 100, 1, 1, index=index).open_dataset() for _ in range(2)]
    answer["digests"] = [one.splits["train"].digest for one in datasets]
    answer["decided"] = answer_of_first_rank(lambda: f"by rank {rank}")
except ValueError as error:
    answer["error"] = str(error)
os.environ |= {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}
torch.distributed.init_process_group("gloo", rank=rank, world_size=environment.world_size())
torch.distributed.barrier()
torch.distributed.destroy_process_group()
Path(sys.argv[3], f"{rank}.json").write_text(json.dumps(answer | {"listed": len(listed)}))
"""


def launch(launcher: str, out: Path, *words: str) -> list[dict[str, object]]:
    """Run the script on all ranks, and return their answers."""
    (out / "script.py").write_text(SCRIPT)
    command = [str(out / "script.py"), *words, str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if launcher == "torchrun":
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))
        subprocess.run([*torchrun, *command], env=environment, check=True, capture_output=True)
    else:
        names = {
            "SLURM_STEP_NUM_TASKS": RANKS,
            "SLURM_STEP_TASKS_PER_NODE": RANKS,
            "SLURM_NTASKS": RANKS,
            "SLURM_NTASKS_PER_NODE": RANKS,
        }
        common = names | {"SLURM_JOB_NAME": "train", "SLURM_NODEID": 0, "MASTER_PORT": free_port()}
        common |= {"MASTER_ADDR": "127.0.0.1", "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_ID": 1}
        processes = []
        for rank in range(RANKS):
            own = common | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            variables = environment | {name: str(value) for name, value in own.items()}
            processes.append(subprocess.Popen([sys.executable, *command], env=variables))
        assert [process.wait(120) for process in processes] == [0] * RANKS
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture
def tars(digits: Dataset, tmp_path: Path) -> Path:
    (tmp_path / "tars").mkdir()
    for path in digits.folder.glob("*.tar"):
        shutil.copy2(path, tmp_path / "tars")
    return tmp_path / "tars"


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_the_first_rank_alone_lists_the_tars(launcher: str, tars: Path, digits: Dataset, tmp_path: Path) -> None:
    answers = launch(launcher, tmp_path, str(tars), str(tmp_path / "index"))
    assert [answer["listed"] for answer in answers] == [2, 0]
    assert [answer["decided"] for answer in answers] == ["by rank 0"] * 2
    assert all(answer["digests"] == [digits.splits["train"].digest] * 2 for answer in answers)


def test_an_index_on_a_local_disk_is_made_by_each_rank(tars: Path, digits: Dataset, tmp_path: Path) -> None:
    answers = launch("torchrun", tmp_path, str(tars), str(tmp_path / "index-RANK"))
    assert answers[1]["listed"] == 1, "the second opening has the manifest of the first"
    assert all(answer["digests"] == [digits.splits["train"].digest] * 2 for answer in answers)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_the_first_rank_tells_the_others_its_error(launcher: str, tars: Path, tmp_path: Path) -> None:
    (tars / "train-000000.tar").write_bytes(b"no tar" * 1000)
    answers = launch(launcher, tmp_path, str(tars), str(tmp_path / "index"))
    assert {str(answer["error"]) for answer in answers} == {answers[0]["error"]}
    assert "train-000000.tar is damaged or cut short" in str(answers[0]["error"])
    assert [answer["listed"] for answer in answers] == [1, 0]
