from __future__ import annotations

import pytest
import torch

from paceline.data.buffers import Buffers


@pytest.mark.gpu
def test_pinned_buffers_are_page_locked_and_used_again() -> None:
    buffers = Buffers((4, 8, 8, 3), num_kept=2, pinned=True)
    tensor = torch.from_numpy(buffers.take()).permute(0, 3, 1, 2)
    assert tensor.is_pinned()
    address = tensor.data_ptr()
    tensor.fill_(7)
    copied = tensor.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert (copied == 7).all()
    del tensor
    again = torch.from_numpy(buffers.take())
    assert again.data_ptr() == address
    assert again.is_pinned()
