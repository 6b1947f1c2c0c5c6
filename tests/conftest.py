"""Fixtures that every room's tests use."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import ModuleType

torch.set_num_threads(1)  # processes that compute with all cores at once slow each other many times
if "PYTEST_XDIST_WORKER" in os.environ:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it would be ignored, in processes of tests as well

SETTLED_AT_ONCE = {"_SETTLED_WEIGHTS": 1024, "_SETTLED_PARTS": 16, "_SETTLED_CHANNELS": 64}
"""What a program of a kernel settles when it is interpreted: a program takes long here, however little it does."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _version(package: Any) -> tuple[int, int]:
    major, minor = package.__version__.split(".")[:2]
    return int(major), int(minor)


@contextmanager
def _interpreted(*names: str) -> Iterator[ModuleType]:
    """Let Triton's interpreter run the kernels of modules, imported anew in this order; give the last of them."""
    triton = pytest.importorskip("triton")
    if _version(triton) < (3, 9) and _version(np) >= (2, 4):  # which no longer takes an array of one for a number
        pytest.skip(f"the interpreter of Triton {triton.__version__} cannot count with NumPy {np.__version__}")
    names = ("paceline.models.operations.turn_kernels", *names)  # which others call
    rooms = [(importlib.import_module(room), name) for room, _, name in (name.rpartition(".") for name in names)]
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _interpret_the_language(patch)
        for room, name in rooms:
            patch.delitem(sys.modules, f"{room.__name__}.{name}", raising=False)
            patch.delattr(room, name, raising=False)
        try:
            modules = [importlib.import_module(name) for name in names]
            for module in modules:
                for name in vars(module).keys() & SETTLED_AT_ONCE.keys():
                    patch.setattr(module, name, SETTLED_AT_ONCE[name])
            yield modules[-1]
        finally:
            for room, name in rooms:
                sys.modules.pop(f"{room.__name__}.{name}", None)
                vars(room).pop(name, None)
            for others in sorted(
                set(sys.modules) - before
            ):  # that were imported meanwhile: theirs are interpreted, too
                room_name, _, name = others.rpartition(".")
                if room_name.startswith("paceline."):
                    del sys.modules[others]
                    vars(sys.modules[room_name]).pop(name, None)


def _interpret_the_language(patch: pytest.MonkeyPatch) -> None:
    """Do for Triton's own functions, such as `tl.sum`, what it does only if told before it was imported first."""
    language = importlib.import_module("triton.language")
    compiled = importlib.import_module("triton.runtime.jit").JITFunction
    interpreted = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    for module in (language, language.standard, language.math):
        for name, value in list(vars(module).items()):
            if isinstance(value, compiled):
                patch.setattr(module, name, interpreted(value.fn))
    _take_bfloat16_for_numbers(patch)
    _patch_once_per_launch(patch)


def _patch_once_per_launch(patch: pytest.MonkeyPatch) -> None:
    """Patch Triton's language when a kernel is launched, and not again for each function that it calls."""
    language, interpreter = (importlib.import_module(f"triton.{name}") for name in ("language", "runtime.interpreter"))
    if not hasattr(interpreter, "_LangPatchScope"):  # as in older versions
        return
    done: set[int] = set()
    patched, restored = interpreter._patch_lang, interpreter._LangPatchScope.restore

    def patch_lang(function: Any) -> Any:
        seen = {id(value) for value in function.__globals__.values()} & {id(language), id(language.core)}
        if seen <= done:
            return None  # which is asked for where a kernel is launched, not where it calls
        done.update(seen)
        return patched(function)

    def restore(scope: Any) -> None:
        done.clear()
        restored(scope)

    patch.setattr(interpreter, "_patch_lang", patch_lang)
    patch.setattr(interpreter._LangPatchScope, "restore", restore)


def _take_bfloat16_for_numbers(patch: pytest.MonkeyPatch) -> None:
    """Round to bfloat16, where the interpreter cuts off; let `tl.dot` multiply its numbers, not their bits."""
    language = importlib.import_module("triton.language")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    cast, multiply = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, value: Any, kind: Any) -> Any:
        if (value.dtype.scalar, kind.scalar) != (language.float32, language.bfloat16):
            return cast(self, value, kind)
        rounded = torch.from_numpy(np.array(value.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16), kind.scalar)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (
            self.cast_impl(value, language.float32) if value.dtype.scalar == language.bfloat16 else value
            for value in (a, b)
        )
        return multiply(self, a, b, *others)

    patch.setattr(builder, "cast_impl", cast_impl)
    patch.setattr(builder, "create_dot", create_dot)


@pytest.fixture(scope="session")
def interpreting() -> Callable[..., AbstractContextManager[ModuleType]]:
    """Return what lets kernels run without a GPU, as long as it is open; takes the names of their modules."""
    return _interpreted


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of facts and real data beside the repository; tests that need it skip where a clone does not have it."""
    folder = Path(os.environ.get("PACELINE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "facts").is_dir():
        pytest.skip("no folder of shared facts and data beside this repository")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep every cache of the package out of the user's home, in one folder per test session."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo what its own one has patched
        patch.setenv("PACELINE_CACHE", str(tmp_path_factory.getbasetemp() / "paceline-cache"))
        yield


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLO data set of 12 + 5 images of 80 x 64 px: bright squares (class 0) and dark ones (class 1)."""
    folder = tmp_path_factory.mktemp("squares")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for number in range(count):
            image = random.integers(90, 130, (64, 80, 3)).astype(np.uint8)
            lines = []
            for label in range(number % 3):
                side = int(random.integers(14, 26))
                x, y = int(random.integers(0, 80 - side)), int(random.integers(0, 64 - side))
                cv2.rectangle(
                    image, (x, y), (x + side - 1, y + side - 1), (250, 250, 250) if label == 0 else (5, 5, 5), -1
                )
                box = ((x + side / 2) / 80, (y + side / 2) / 64, side / 80, side / 64)
                lines.append(f"{label} " + " ".join(f"{value:.6f}" for value in box))
            cv2.imwrite(str(folder / "images" / split / f"{number:02}.png"), image)
            (folder / "labels" / split / f"{number:02}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [bright, dark]\n")
    return folder / "data.yaml"
