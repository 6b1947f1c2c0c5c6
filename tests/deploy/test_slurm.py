"""The Slurm recipe, run by Slurm's own daemons on this machine: a job is stopped by a signal, requeued and finished."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

RECIPE = Path(__file__).resolve().parents[2] / "deploy" / "slurm.sbatch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")


def why_not() -> str:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} missing (Debian packages slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons want to be started by root"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "slurm")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cluster of one node, in a folder of its own."""
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": "localhost(127.0.0.1)",
        "SlurmctldPort": free_port(),
        "SlurmdPort": free_port(),
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
        "CryptoType": "crypto/munge",
        "MpiDefault": "none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "AccountingStorageType": "accounting_storage/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.log",
        "ReturnToService": 2,
        "NodeName": f"localhost NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 CPUs={os.cpu_count()}",
        "PartitionName": "main Nodes=localhost Default=YES State=UP",
    }
    conf = folder / "slurm.conf"
    conf.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{word}={folder}/munge.{end}" for word, end in files.items()]
    commands = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D", "-c", "-f", str(conf)],
        ["slurmd", "-D", "-N", "localhost", "-f", str(conf)],
    ]
    daemons = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("w") as out:
                daemons.append(subprocess.Popen(command, stdout=out, stderr=out))
            time.sleep(0.5)
        end = time.monotonic() + 30
        while "idle" not in subprocess.run(["sinfo", "-h"], check=False, capture_output=True, text=True).stdout:
            if any(daemon.poll() is not None for daemon in daemons) or time.monotonic() > end:
                said = "\n".join(file.read_text() for file in (*folder.glob("*.out"), *folder.glob("*.log")))
                pytest.skip(f"Slurm cannot run here: {said[-2000:]}")
            time.sleep(0.3)
        yield folder
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def state(job: str) -> str:
    return subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%T"], check=False, capture_output=True, text=True
    ).stdout.strip()


def test_a_job_is_stopped_requeued_and_finished(
    slurm: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, log = tmp_path / "runs", tmp_path / "log"
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for name, value in {"RUNS": runs, "RANKS": 2, "NAME": "mine", "PORT": free_port()}.items():
        monkeypatch.setenv(f"PACELINE_{name}", str(value))
    words = f"data={squares} imgsz=64 batch=4 epochs=8 workers=1 amp=off nbs=4 plots=false device=cpu".split()
    asked = ["--parsable", "--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30", f"--output={log}"]
    job = subprocess.run(
        ["sbatch", *asked, str(RECIPE), *words], check=True, capture_output=True, text=True
    ).stdout.strip()

    def said() -> str:
        return log.read_text() if log.exists() else ""

    def wait_for(file: Path, limit_s: float) -> None:
        end = time.monotonic() + limit_s
        while not file.exists():
            assert time.monotonic() < end, f"no {file.name} in time; {state(job)}\n{said()}"
            time.sleep(0.2)

    wait_for(runs / "mine" / "weights" / "resume.safetensors", 120)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)  # as Slurm does before the time limit
    wait_for(runs / "mine" / "PREEMPTED", 60)
    wait_for(runs / "mine" / "DONE", 150)
    assert "Start 0 of mine on localhost." in said()
    assert "mine was asked to stop; it goes back into the queue." in said()
    assert "Start 1 of mine on localhost." in said()
    epochs = [line for line in (runs / "mine" / "metrics.jsonl").read_text().splitlines() if '"kind": "epoch"' in line]
    assert len(epochs) == 8
    end = time.monotonic() + 30
    while state(job) not in ("", "COMPLETED"):
        assert time.monotonic() < end, state(job)
        time.sleep(0.2)
