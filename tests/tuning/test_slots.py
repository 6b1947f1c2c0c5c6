"""Slots: every core at most once, every device once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import UserError
from paceline.tuning.slots import divide


@given(st.integers(1, 130), st.integers(0, 130))
def test_groups_of_cores_are_disjoint_and_equal(num_cores: int, wanted: int) -> None:
    cores = [3 * core + 1 for core in range(num_cores)]
    if wanted > num_cores:
        with pytest.raises(UserError, match="at most that many"):
            divide(["cpu"], cores, wanted)
        return
    slots = divide(["cpu"], cores, wanted)
    used = [core for slot in slots for core in slot.cores]
    assert slots
    assert len(set(used)) == len(used)
    assert set(used) <= set(cores)
    assert {len(slot.cores) for slot in slots} == {wanted or max(1, num_cores // 8)}
    assert len({slot.name for slot in slots}) == len(slots)


@given(st.integers(1, 16), st.integers(1, 130))
def test_each_gpu_has_one_slot_and_some_cores(num_devices: int, num_cores: int) -> None:
    slots = divide([str(device) for device in range(num_devices)], range(num_cores), 0)
    assert [slot.device for slot in slots] == [str(device) for device in range(num_devices)]
    assert all(slot.cores for slot in slots)
    if num_cores >= num_devices:
        assert len({core for slot in slots for core in slot.cores}) == sum(len(slot.cores) for slot in slots)
