"""The machine: what a bench ran on, in the words and numbers that have to be equal for another to be compared."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import psutil
import torch

from paceline.planning.record import MachineRecord

_PACKAGES = ("paceline", "torch", "numpy", "opencv-python-headless", "simplejpeg", "triton")
_CPUINFO = Path("/proc/cpuinfo")


def machine_of(device: torch.device) -> MachineRecord:
    """Describe this machine and the device."""
    processor = processor_name()
    on_cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_cuda else psutil.virtual_memory().total
    return MachineRecord(
        device=torch.cuda.get_device_name(device) if on_cuda else processor,
        processor=processor,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=round(memory / 1e9, 1),
        threads=torch.get_num_threads(),
        load_average=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        versions=_versions(on_cuda=on_cuda),
    )


def processor_name(cpuinfo: Path = _CPUINFO) -> str:
    """Name the processor as the kernel does, or as the platform does."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _versions(*, on_cuda: bool) -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    if on_cuda:
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    return found
