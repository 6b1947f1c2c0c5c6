"""How far apart cells of maps lie."""

from __future__ import annotations

import torch

from paceline.models.operations.pitch import pitch_of, readable


def test_only_maps_with_cells_at_even_distances_have_a_pitch() -> None:
    whole = torch.zeros(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    assert pitch_of(whole) == 6
    assert pitch_of(whole[:, 2:4]) == 6
    assert pitch_of(torch.zeros(2, 6, 4, 5)) is None
    assert pitch_of(whole[:, :, ::2]) is None
    assert pitch_of(whole[:, ::2]) is None
    assert pitch_of(torch.zeros(1).expand(2, 6, 4, 5)) is None


def test_a_map_is_read_where_it_lies_or_copied() -> None:
    whole = torch.rand(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    for values, is_copied in ((whole, False), (whole[:, 1:5], False), (whole[:, ::2], True), (whole[..., ::2], True)):
        found, pitch = readable(values)
        assert torch.equal(found, values)
        assert (found.data_ptr() != values.data_ptr()) == is_copied
        assert pitch == pitch_of(found)
