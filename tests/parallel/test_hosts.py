"""Several hosts, as network namespaces: torchrun across them, a cut link, a host that dies."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from network import Network, why_not

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

SCRIPT = Path(__file__).with_name("faulty.py")
FAULT_S = 30
"""In which every rank has to end."""
CUT_S = 90
"""In which torchrun has to end after a link was cut."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "namespaces")]


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    with Network(num_hosts=request.param) as network:
        yield network


def torchrun(network: Network, folder: Path, deed: str, *, static: bool = False) -> list[subprocess.Popen[str]]:
    """Start one rank on each host."""
    started = []
    for number in range(network.num_hosts):
        store = f"{network.address(0)}:29400"
        if static:
            place = ["--master-addr", network.address(0), "--master-port", "29400", "--node-rank", str(number)]
        else:
            place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", store, "--rdzv-id", "test"]
            place += ["--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", network.address(number)]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(network.num_hosts)]
        command += ["--nproc-per-node", "1", *place, str(SCRIPT), str(folder), deed, "40"]
        environment = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        started.append(network.run(number, command, environment))
    return started


def await_work(folder: Path, runs: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 300  # a start may be slow beside other programs; what is tested comes after it
    while not all((folder / f"step{rank}").exists() for rank in range(len(runs))):
        assert time.monotonic() < end, "the ranks did not start"
        assert all(run.poll() is None for run in runs), [run.communicate()[0] for run in runs if run.poll() is not None]
        time.sleep(0.05)


def ends(runs: list[subprocess.Popen[str]], *, within_s: float) -> list[str]:
    """Wait for the end of all, in time; returns what each said about it."""
    end = time.monotonic() + within_s
    outputs = [run.communicate(timeout=max(end - time.monotonic(), 0.1))[0] for run in runs]
    return [" / ".join(re.findall(r"^paceline: .*$", output, re.MULTILINE)) for output in outputs]


@pytest.mark.parametrize("network", [2], indirect=True)
def test_a_cut_link_ends_both_sides(network: Network, tmp_path: Path) -> None:
    runs = torchrun(network, tmp_path, "nothing")
    await_work(tmp_path, runs)
    time.sleep(2.5)  # a beat or two
    network.cut(1)
    first, second = ends(runs, within_s=CUT_S)
    assert re.search(r"rank 1 on host1 has given no sign of life for \d+ s \(step \d+, phase step\)", first), first
    assert "rank 1 on host1 gets no answer from the store at 10.77.0.1:" in second, second
    assert all(run.returncode != 0 for run in runs)
    for number in range(2):
        network.await_empty(number, until=time.monotonic() + 5)


@pytest.mark.parametrize("network", [3], indirect=True)
def test_a_host_that_dies_ends_the_others(network: Network, tmp_path: Path) -> None:
    runs = torchrun(network, tmp_path, "nothing")
    await_work(tmp_path, runs)
    time.sleep(2.5)
    network.kill(2)
    said = ends(runs, within_s=FAULT_S + 15)
    for text in said[:2]:
        assert re.fullmatch(r"paceline: rank 2 on host2 .* \(step \d+, phase step\); all ranks were ended\.", text), (
            said
        )
    assert all(run.returncode != 0 for run in runs)


@pytest.mark.parametrize("network", [2], indirect=True)
def test_a_stopped_rank_alone_on_its_host(network: Network, tmp_path: Path) -> None:
    runs = torchrun(network, tmp_path, "freeze1", static=True)
    await_work(tmp_path, runs)
    said = ends(runs, within_s=FAULT_S + 15)
    assert re.search(r"rank 1 on host1 (has given no sign of life|was stopped)", said[0]), said
    assert "rank 1 on host1 was stopped for 10 s" in said[1], said
    for number in range(2):
        network.await_empty(number, until=time.monotonic() + 5)
