"""A Slurm of two nodes that this machine plays, and copies of the project."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.paths import ROOT
from tests.support.small_study import STUDY

CLUSTER = ROOT.parent / "shared" / "cluster"  # beside some checkouts
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
DEFAULT_CONF = Path("/etc/slurm/slurm.conf")  # read by jobs of Snakemake, which drops SLURM_CONF


@pytest.fixture(scope="session")
def slurm() -> Iterator[Path]:
    """A running cluster; its folder has the configuration."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing or not CLUSTER.is_dir():
        pytest.skip(f"no {', '.join(missing)}: make servers installs Slurm" if missing else f"no {CLUSTER}")
    if DEFAULT_CONF.is_symlink() and not DEFAULT_CONF.exists():
        DEFAULT_CONF.unlink()  # of tests that were killed
    if DEFAULT_CONF.exists() or not os.access(DEFAULT_CONF.parent, os.W_OK):
        pytest.skip(f"{DEFAULT_CONF} is there or cannot be written: another Slurm is configured, or this is not root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # munge refuses a folder below one that others may not enter
    script = (CLUSTER / "slurm_up.sh").read_text()
    for setting, shorter in (("cred_expire=10", "cred_expire=5"), ("KillWait=5", "KillWait=5\nSlurmdTimeout=5")):
        assert setting in script
        script = script.replace(setting, shorter)
    try:
        with (folder / "start.log").open("w") as log:  # which the daemons keep open
            words = ["bash", "-c", script, "slurm_up", str(folder), "2"]
            subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT)
        DEFAULT_CONF.symlink_to(folder / "slurm.conf")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            patch.setenv("MASTER_ADDR", "127.0.0.1")  # its nodes are no hosts
            yield folder
    finally:
        down = ["bash", str(CLUSTER / "slurm_down.sh"), str(folder)]
        subprocess.run(
            down, check=False, capture_output=True, env={**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        )
        for one in psutil.process_iter(["cmdline"]):  # daemons that `scontrol reconfigure` has replaced
            if str(folder / "slurm.conf") in (one.info["cmdline"] or []):
                one.kill()
        DEFAULT_CONF.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the project's code, as a clone would be."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("conf", "pipeline", "models", "data", ".venv"):
        (root / name).symlink_to(ROOT / name)
    return root


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's configs and code with the study `two`, and a folder `work` to run it in."""
    root = tmp_path_factory.mktemp("project")
    for name in ("conf", "pipeline", "models", "data"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(root)], check=True)
    for name in (".workflow", ".venv", "Makefile", "requirements.lock"):
        (root / name).symlink_to(ROOT / name)
    (root / "conf" / "study" / "two.yaml").write_text(STUDY)
    (root / "work").mkdir()
    return root
