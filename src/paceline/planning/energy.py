"""Energy: counters of joules, of an NVIDIA GPU (NVML) or of the processor's packages and memory (RAPL)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

POWERCAP = Path("/sys/class/powercap")


class EnergyCounter(Protocol):
    """Counts joules from some moment on."""

    @property
    def source(self) -> str:
        """What counts, and what it covers."""

    def joules(self) -> float:
        """Read the counter; only differences mean something."""


class NoCounter(Exception):  # noqa: N818 - it is an answer, not an error
    """Nothing counts energy here; the message says why."""


def counter_of(device: torch.device) -> EnergyCounter:
    """Find what counts the energy of a device. Raises NoCounter."""
    return GpuCounter(device) if device.type == "cuda" else PackageCounter()


class GpuCounter:
    """The total energy of one GPU, its memory included; counted by NVML since Volta, in millijoules."""

    def __init__(self, device: torch.device) -> None:
        """Find the GPU by its UUID, since NVML does not know of CUDA_VISIBLE_DEVICES. Raises NoCounter."""
        import torch

        try:
            import pynvml
        except ImportError as error:
            raise NoCounter("nvidia-ml-py is not installed") from error
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.joules()
        except pynvml.NVMLError as error:
            raise NoCounter(f"NVML does not count the energy of {device} ({error})") from error

    @property
    def source(self) -> str:
        """What counts, and what it covers."""
        return "NVML: the GPU and its memory"

    def joules(self) -> float:
        """Read the counter."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


class PackageCounter:
    """Processor packages and, where they are counted apart, memory; counted by RAPL, in microjoules that wrap around.

    ```
    /sys/class/powercap/intel-rapl:0/         name: package-0   energy_uj   max_energy_range_uj
    /sys/class/powercap/intel-rapl:0:1/       name: dram        ...         (core and uncore are part of the package)
    ```
    AMD's processors answer under the same names. Everything that runs on the machine is counted.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        """Find the zones. Raises NoCounter where there are none, or where only an administrator may read them."""
        zones = sorted(zone for zone in root.glob("intel-rapl:*") if _name(zone).startswith(("package", "dram")))
        if not zones:
            raise NoCounter("this machine has no RAPL counters")
        try:
            self._last = {zone: _number(zone / "energy_uj") for zone in zones}
            self._ranges = {zone: _number(zone / "max_energy_range_uj") for zone in zones}
        except PermissionError as error:
            raise NoCounter(f"{zones[0] / 'energy_uj'} may only be read by an administrator") from error
        except (OSError, ValueError) as error:
            raise NoCounter(f"the RAPL counters cannot be read ({error})") from error
        self._sum_uj = 0
        self.source = f"RAPL: {' and '.join(_name(zone) for zone in zones)}, with all that runs there"

    def joules(self) -> float:
        """Read the counters; to be called before any of them can wrap around twice, which takes minutes."""
        for zone, last in self._last.items():
            now = _number(zone / "energy_uj")
            self._sum_uj += now - last if now >= last else now - last + self._ranges[zone]
            self._last[zone] = now
        return self._sum_uj / 1e6


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _number(file: Path) -> int:
    return int(file.read_text(encoding="utf-8"))
