"""Counters of joules, on files and a library that only look like the real ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from paceline.planning.energy import GpuCounter, NoCounter, PackageCounter, counter_of


def zone(root: Path, name: str, kind: str, energy_uj: int, range_uj: int = 1000) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder


def test_packages_and_memory_are_summed_and_parts_of_packages_are_not(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 10)
    other = zone(tmp_path, "intel-rapl:1", "package-1", 20)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 30)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 40)
    counter = PackageCounter(tmp_path)
    start = counter.joules()
    for folder, energy in ((package, 110), (other, 40), (memory, 33), (core, 999)):
        (folder / "energy_uj").write_text(str(energy))
    assert counter.joules() - start == pytest.approx((100 + 20 + 3) / 1e6)
    assert counter.source == "RAPL: package-0 and dram and package-1, with all that runs there"


def test_a_counter_that_wraps_around_goes_on(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900, range_uj=1000)
    counter = PackageCounter(tmp_path)
    start = counter.joules()
    for energy in (50, 700, 100):
        (package / "energy_uj").write_text(str(energy))
        last = counter.joules()
    assert last - start == pytest.approx((150 + 650 + 400) / 1e6)


def test_no_counters_say_so(tmp_path: Path) -> None:
    with pytest.raises(NoCounter, match="has no RAPL counters"):
        PackageCounter(tmp_path / "nowhere")
    zone(tmp_path, "intel-rapl:0", "psys", 1)
    with pytest.raises(NoCounter, match="has no RAPL counters"):
        PackageCounter(tmp_path)


def test_counters_that_may_not_be_read_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    read = Path.read_text

    def refuse(path: Path, *args: object, **kwargs: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(NoCounter, match="may only be read by an administrator"):
        PackageCounter(tmp_path)
    monkeypatch.undo()
    (package / "energy_uj").write_text("much")
    with pytest.raises(NoCounter, match="cannot be read"):
        PackageCounter(tmp_path)


class _Library(SimpleNamespace):
    """NVML as the counter uses it: one GPU, known by its UUID."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-abc":
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        if self.millijoules is None:
            raise self.NVMLError("Not Supported")
        return int(self.millijoules)


@pytest.mark.parametrize(("uuid", "millijoules"), [("abc", 5000), ("other", 5000), ("abc", None)])
def test_a_gpu_is_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch, uuid: str, millijoules: int | None) -> None:
    library = _Library(millijoules=millijoules)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    if uuid == "abc" and millijoules:
        counter = counter_of(torch.device("cuda", 3))
        assert isinstance(counter, GpuCounter)
        start = counter.joules()
        library.millijoules += 2500
        assert counter.joules() - start == 2.5
    else:
        with pytest.raises(NoCounter, match="does not count the energy of cuda:3"):
            counter_of(torch.device("cuda", 3))


def test_without_the_library_a_gpu_has_no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoCounter, match="nvidia-ml-py is not installed"):
        counter_of(torch.device("cuda", 0))
