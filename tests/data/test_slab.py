from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data import slab as slab_module
from paceline.data import slab_file
from paceline.data.slab import Slab
from paceline.data.slab_file import remove_unused

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

COUNT = 9


def array(number: int) -> NDArray[np.uint8]:
    """An array whose shape and content tell its number; every third one has no colour."""
    shape = (3 + number, 5) if number % 3 == 0 else (3 + number, 5, 3)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def fill(slab: Slab, numbers: Iterable[int] = range(COUNT)) -> None:
    for number in numbers:
        with slab.claim(number):
            assert slab.store(number, array(number), stamp=number) is not None


def whole(slab: Slab) -> list[bool]:
    """Which arrays are there, as they were written."""
    found = []
    for number in range(COUNT):
        with slab.claim(number):
            view = slab.load(number, stamp=number)
        assert view is None or np.array_equal(view, array(number))
        found.append(view is not None)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "a.slab"


@pytest.mark.parametrize("shared", [True, False])
def test_what_is_written_comes_back(path: Path, shared: bool) -> None:
    slab = Slab.open(path, COUNT, 10_000, kept=True) if shared else Slab(COUNT, 10_000)
    assert whole(slab) == [False] * COUNT
    assert slab.get(4) is None
    fill(slab)
    assert whole(slab) == [True] * COUNT
    for number in range(COUNT):
        view = slab.get(number)
        assert view is not None
        assert view.shape == array(number).shape
        np.testing.assert_array_equal(view, array(number))
    slab.close()


def test_an_image_without_colour_takes_one_plane(path: Path) -> None:
    sizes = []
    for planes in (1, 3):
        slab = Slab.open(path.with_suffix(f".{planes}"), 10, 10 * 3 * 1_000_000, kept=False)
        before = slab.used_bytes
        for number in range(10):
            shape = (1000, 640) if planes == 1 else (1000, 640, 3)
            assert slab.store(number, np.zeros(shape, np.uint8)) is not None
        sizes.append(slab.used_bytes - before)
        slab.close()
    assert sizes == [6_400_000, 19_200_000]


def test_a_kept_file_serves_the_next_run_and_the_disk_is_not_charged_for_what_is_not_there(path: Path) -> None:
    first = Slab.open(path, COUNT, 10**10, kept=True)
    fill(first)
    first.close()
    assert path.stat().st_blocks * 512 < 100 * 2**20
    second = Slab.open(path, COUNT, 10**9, kept=True)
    assert whole(second) == [True] * COUNT
    second.close()


def test_another_stamp_is_another_image(path: Path) -> None:
    slab = Slab.open(path, COUNT, 10_000, kept=True)
    fill(slab)
    assert slab.load(3, stamp=99) is None
    before = slab.used_bytes
    assert slab.store(3, array(3) + 1, stamp=99) is not None
    assert slab.used_bytes == before
    view = slab.load(3, stamp=99)
    assert view is not None
    np.testing.assert_array_equal(view, array(3) + 1)
    slab.close()


def test_users_of_one_file_see_each_others_arrays_and_the_last_one_removes_it(path: Path) -> None:
    one, two = (Slab.open(path, COUNT, 10_000, kept=False) for _ in range(2))
    fill(one, range(4))
    assert whole(two) == [True] * 4 + [False] * 5
    fill(two, range(4, COUNT))
    assert whole(one) == [True] * COUNT
    assert not remove_unused(path)
    view = one.get(2)
    one.close()
    assert path.exists()
    two.close()
    assert not path.exists()
    assert view is not None
    np.testing.assert_array_equal(view, array(2))


def test_claims_exclude_other_users_until_they_are_let_go(path: Path) -> None:
    one, two = (Slab.open(path, COUNT, 10_000, kept=False) for _ in range(2))
    order: list[str] = []

    def second() -> None:
        with two.claim(5):
            order.append("second")

    with one.claim(5), two.claim(6):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]
    one.close()
    two.close()


def test_room_is_shared_out_once(path: Path) -> None:
    """Many users that write at the same time overwrite nothing of each other."""
    count = 200
    slabs = [Slab.open(path, count, 10**6, kept=True) for _ in range(4)]

    def write(user: int) -> None:
        for number in range(user, count, 4):
            with slabs[user].claim(number):
                slabs[user].store(number, np.full((number % 17 + 1, 7), number % 251, np.uint8))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    for number in range(count):
        view = slabs[0].load(number)
        assert view is not None
        assert (view == number % 251).all()
    for slab in slabs:
        slab.close()


def test_a_full_slab_says_so_and_keeps_what_it_has() -> None:
    slab = Slab(COUNT, 300)
    kept = [slab.store(number, array(number)) is not None for number in range(COUNT)]
    assert any(kept)
    assert not all(kept)
    assert "are full" in slab.full
    assert [slab.get(number) is not None for number in range(COUNT)] == kept


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_bits_are_never_believed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Wherever bytes of a kept file change, each array is as it was written or missing, and can be written again."""
    path = tmp_path_factory.mktemp("slab") / "a.slab"
    slab = Slab.open(path, COUNT, 10_000, kept=True)
    fill(slab)
    end = slab.used_bytes
    slab.close()
    content = bytearray(path.read_bytes())
    region = data.draw(st.sampled_from([(0, 64), (64, 64 + 40 * COUNT), (4096, end)]))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(region[0], region[1] - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    again = Slab.open(path, COUNT, 20_000, kept=True)
    missing = [number for number, there in enumerate(whole(again)) if not there]
    for number in missing:
        assert again.store(number, array(number), stamp=number) is not None
    assert whole(again) == [True] * COUNT
    again.close()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.99])
def test_a_file_that_was_cut_off_is_filled_up_again(path: Path, share: float) -> None:
    slab = Slab.open(path, COUNT, 10_000, kept=True)
    fill(slab)
    end = slab.used_bytes
    slab.close()
    os.truncate(path, int(end * share))
    for numbers in (range(COUNT), range(COUNT - 1, -1, -1)):  # in another order than they were written
        os.truncate(path, min(int(end * share), path.stat().st_size))
        again = Slab.open(path, COUNT, 10_000, kept=True)
        there = whole(again)
        assert not all(there)
        fill(again, [number for number in numbers if not there[number]])
        assert whole(again) == [True] * COUNT
        again.close()


CUT_IN_USE = """
import os, sys
import numpy as np
from pathlib import Path
from paceline.data.cache import RecentCache, SlabCache
from paceline.data.slab import Slab
from paceline.errors import UserError

def make(number):
    return lambda: np.full((40, 60), number, np.uint8)

cache = SlabCache(Slab.open(Path(sys.argv[1]), 9, 30_000, kept=sys.argv[2] == "kept"), RecentCache(0), what="tests")
for number in range(6):
    assert cache.get(number, make(number)).max() == number
assert cache.look(8) is None
os.truncate(sys.argv[1], int(sys.argv[3]))
for use in (lambda: cache.look(4), lambda: cache.get(4, make(4)), lambda: cache.get(7, make(7))):
    try:
        print(use().sum())
    except UserError as error:
        print(error)
cache.slab.close()
assert cache.look(8) is None
"""


@pytest.mark.parametrize("kind", ["kept", "shared"])
@pytest.mark.parametrize("length", [0, 5000])
def test_a_file_that_is_cut_off_in_use_is_one_sentence(path: Path, kind: str, length: int) -> None:
    """And no signal: neither for arrays that were seen before, nor for those that would be read or written."""
    done = subprocess.run(
        [sys.executable, "-c", CUT_IN_USE, path, kind, str(length)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    sentence = f"{path} was cut off by another program while it was in use; remove the file if it is still there, and"
    assert [line.startswith(sentence) for line in done.stdout.splitlines()] == [True] * 3


def test_only_what_was_hit_is_lost(path: Path) -> None:
    slab = Slab.open(path, COUNT, 10_000, kept=True)
    fill(slab)
    offset = int(slab.table()["offset"][4])
    slab.close()
    with path.open("r+b") as file:
        file.seek(offset + 10)
        byte = file.read(1)[0]
        file.seek(offset + 10)
        file.write(bytes([byte ^ 8]))
    again = Slab.open(path, COUNT, 10_000, kept=True)
    assert whole(again) == [number != 4 for number in range(COUNT)]
    again.close()


def test_places_that_are_lost_are_had_again(path: Path) -> None:
    """Entries that are damaged in one run after another do not fill the file up for good."""
    slab = Slab.open(path, COUNT, 10_000, kept=True)
    fill(slab)
    most, worst = slab.used_bytes, 0
    slab.close()
    for run in range(12):
        with path.open("r+b") as file:
            file.seek(64 + 40 * (run % COUNT) + 3)
            file.write(b"\xff")
        again = Slab.open(path, COUNT, 10_000, kept=True)
        fill(again, [number for number, there in enumerate(whole(again)) if not there])
        assert whole(again) == [True] * COUNT
        worst = max(worst, again.used_bytes)
        again.close()
    assert worst <= most + max(-(-array(number).size // 64) * 64 for number in range(COUNT))


def test_a_damaged_entry_that_names_a_far_place_costs_no_other_array(path: Path) -> None:
    """A file is as long as it may become, so there are places in it that nobody has."""
    count = 64
    slab = Slab.open(path, count, 1_000_000, kept=True)
    for number in range(count):
        with slab.claim(number):
            assert slab.store(number, np.full((8, 8), number, np.uint8)) is not None
    slab.close()
    with path.open("r+b") as file:
        file.seek(64 + 40 * 4 + 2)  # the third byte of an offset: half a million further on
        file.write(b"\x08")
    again = Slab.open(path, count, 1_000_000, kept=True)
    for number in range(count):
        with again.claim(number):
            assert (again.load(number) is None) == (number == 4)
    again.close()


def test_another_version_is_made_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slab = Slab.open(path, COUNT, 10_000, kept=True)
    fill(slab)
    slab.close()
    monkeypatch.setattr(slab_file, "VERSION", 2)
    again = Slab.open(path, COUNT, 10_000, kept=True)
    assert whole(again) == [False] * COUNT
    fill(again)
    with pytest.raises(OSError, match="another run uses it"):
        Slab.open(path, COUNT + 1, 10_000, kept=True)
    again.close()
    other = Slab.open(path, COUNT + 1, 10_000, kept=True)
    assert other.load(0) is None
    other.close()


FILL_AND_DIE = """
import os, signal, sys
import numpy as np
from pathlib import Path
from paceline.data.slab import Slab

slab = Slab.open(Path(sys.argv[1]), 9, 10_000, kept=sys.argv[2] == "kept")
for number in range(4):
    slab.store(number, np.full((number + 3, 5), number, np.uint8))
original = np.copyto
def half(view, array):
    view[:2] = array[:2]
    os.kill(os.getpid(), signal.SIGKILL)
np.copyto = half
with slab.claim(4):
    slab.store(4, np.full((7, 5), 4, np.uint8))
"""


@pytest.mark.parametrize("kept", [True, False])
def test_a_process_that_dies_while_it_writes_leaves_no_lock_and_nothing_half_done(path: Path, kept: bool) -> None:
    process = subprocess.run(
        [sys.executable, "-c", FILL_AND_DIE, str(path), "kept" if kept else "shared"], check=False, timeout=60
    )
    assert process.returncode == -signal.SIGKILL
    assert path.exists()
    if not kept:
        assert remove_unused(path)
        assert not path.exists()
        return
    slab = Slab.open(path, COUNT, 10_000, kept=True)
    with slab.claim(4):
        assert [slab.load(number) is not None for number in range(COUNT)] == [True] * 4 + [False] * 5
        assert slab.store(4, np.full((7, 5), 4, np.uint8)) is not None
    for number in range(5):
        view = slab.load(number)
        assert view is not None
        assert view.shape == (number + 3, 5)
        assert (view == number).all()
    slab.close()


def test_a_full_disk_is_an_answer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slab = Slab.open(path, COUNT, 10**9, kept=True)
    reserve = os.posix_fallocate
    monkeypatch.setattr(slab_module, "_GROWTH_BYTES", 500)

    def limited(descriptor: int, start: int, length: int) -> None:
        if start + length > 4096 + 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, start, length)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    kept = [slab.store(number, array(number)) is not None for number in range(COUNT)]
    assert kept[0]
    assert not kept[-1]
    assert "No space left on device" in slab.full
    assert [slab.load(number) is not None for number in range(COUNT)] == kept
    slab.close()


LIMITED = """
import resource, sys
import numpy as np
from pathlib import Path
from paceline.data.slab import Slab

resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    Slab.open(Path(sys.argv[1]), 9, 10**9, kept=True)
except OSError as error:
    print("refused", error.errno)
slab = Slab.open(Path(sys.argv[1]), 9, 200_000, kept=True)
print([slab.store(number, np.zeros((100, 300, 3), np.uint8)) is not None for number in range(4)], slab.full)
"""


def test_a_limit_on_files_is_an_answer(path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], check=False, capture_output=True, text=True, timeout=60
    )
    assert process.stdout.startswith(f"refused {errno.EFBIG}\n[True, True, False, False] the 0.0 GB"), process.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_a_small_tmpfs_never_ends_the_process(tmp_path: Path) -> None:
    """Memory that the system cannot give is noticed before it is written to: no bus error."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        slab = Slab.open(place / "a.slab", COUNT, 10**8, kept=False)
        kept = [slab.store(number, np.ones((200, 400, 3), np.uint8)) is not None for number in range(COUNT)]
        slab.close()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    assert "takes no more" in slab.full
    assert kept == [True] * 4 + [False] * 5
