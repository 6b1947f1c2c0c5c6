from __future__ import annotations

import torch

from paceline.data.buffers import Buffers


def test_memory_comes_back_when_no_tensor_looks_at_it() -> None:
    buffers = Buffers((4, 3), num_kept=2)
    tensor = torch.from_numpy(buffers.take())
    address = tensor.data_ptr()
    row = tensor.reshape(-1)[2:].view(5, 2)[1]
    del tensor
    assert torch.from_numpy(buffers.take()).data_ptr() != address
    del row
    taken = {torch.from_numpy(lease).data_ptr() for lease in [buffers.take(), buffers.take()]}
    assert address in taken


def test_leases_are_apart() -> None:
    buffers = Buffers((8,), num_kept=2)
    leases = [buffers.take() for _ in range(4)]
    for number, lease in enumerate(leases):
        lease.fill(number)
    assert [int(lease[0]) for lease in leases] == [0, 1, 2, 3]
