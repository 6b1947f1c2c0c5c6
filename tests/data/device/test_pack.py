from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from pictures import KINDS, SIZES, draw, images_of, make_sources, make_transforms, poisoned, targets_of

from paceline.data.device.buffers import PackBuffers, usual_bytes
from paceline.data.device.pack import Copies, Sources, laid_out, packed
from paceline.data.device.reference import render_reference
from paceline.data.device.resident import in_memory, resident, uploaded
from paceline.data.device.table import Geometry, TileFloat, inverted, inverted_aligned

CPU = torch.device("cpu")


@dataclass
class Flat:
    flat: np.ndarray
    offsets: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    planes: np.ndarray


def flat_of(sources) -> Flat:
    """Images one after the other, with gaps."""
    starts, pieces, at = [], [], 0
    for image in sources:
        starts.append(at + 7)
        pieces += [np.full(7, 99, np.uint8), image.reshape(-1)]
        at += 7 + image.size
    return Flat(
        flat=np.concatenate(pieces),
        offsets=np.array(starts, np.int64),
        heights=np.array([image.shape[0] for image in sources], np.int32),
        widths=np.array([image.shape[1] for image in sources], np.int32),
        planes=np.array([3 if image.ndim == 3 else 1 for image in sources], np.int32),
    )


def opened(batch, resident_set=None):
    memory = torch.from_numpy(batch.buffer)[: batch.used]
    table, targets = batch.opened(memory)
    size = batch.size
    return render_reference(
        memory if resident_set is None else resident_set, memory, table, size, torch.float32
    ), targets


@pytest.mark.parametrize("kind", KINDS)
def test_the_three_ways_to_the_sources_give_the_same_pictures(kind: str) -> None:
    transforms, sources = make_transforms(KINDS[kind], 12, 128), make_sources(grey=True)
    flat = flat_of(sources)
    expected = draw(transforms, sources)
    from_flat = packed(transforms, in_memory(flat, transforms.sources), targets_of(transforms), poisoned)
    assert torch.equal(opened(from_flat)[0], expected)
    numbers_only = packed(transforms, resident(flat, transforms.sources), targets_of(transforms), poisoned)
    assert torch.equal(opened(numbers_only, uploaded(flat, CPU))[0], expected)
    assert numbers_only.used < from_flat.used / 10


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_behind_the_used_bytes_or_between_the_arrays_is_read(kind: str) -> None:
    transforms, sources = make_transforms(KINDS[kind], 6, 96), make_sources(grey=True)
    where = Sources.of(images_of(transforms, sources))
    drawn = []
    for value in (0, 255):
        batch = packed(
            transforms, where, targets_of(transforms), lambda count, value=value: np.full(count, value, np.uint8)
        )
        drawn.append(opened(batch)[0])
    assert torch.equal(*drawn)


def test_targets_arrive_as_they_were() -> None:
    transforms = make_transforms(KINDS["aligned"], 3, 64)
    rng = np.random.default_rng(0)
    targets = targets_of(transforms) | {
        "boxes": rng.random((3, 32, 4)).astype(np.float32),
        "labels": rng.integers(0, 80, (3, 32)),
        "valid": rng.random((3, 32)) < 0.5,
    }
    batch = packed(transforms, Sources.of(images_of(transforms, make_sources())), targets, poisoned)
    _, arrived = opened(batch)
    assert len(batch) == 3
    for name, array in targets.items():
        np.testing.assert_array_equal(arrived[name].numpy(), array)
        assert arrived[name].numpy().dtype == array.dtype


@pytest.mark.parametrize("mosaic", [True, False])
def test_turned_crops_hold_what_the_picture_shows_and_little_more(mosaic: bool) -> None:
    """Cutting them to what can be reached changes no pixel, and leaves less to copy than the whole visible parts."""
    transforms = make_transforms(KINDS["turned"], 20, 128, mosaic=mosaic)
    sources = make_sources()
    heights, widths = SIZES[np.maximum(transforms.sources, 0)].transpose(2, 0, 1)
    crops = Geometry(transforms, heights, widths).crops
    whole = Geometry(replace(transforms, places=np.full_like(transforms.places, 0)), heights, widths)
    assert not whole.present.any()
    assert (crops.left + crops.width <= widths).all()
    assert (crops.top + crops.height <= heights).all()
    visible = np.prod(transforms.visible[..., 2:] - transforms.visible[..., :2], axis=-1)
    assert (crops.width * crops.height)[transforms.sources >= 0].sum() < (0.9 if mosaic else 0.95) * visible[
        transforms.sources >= 0
    ].sum()
    # What lies outside the crops is poison, and nobody sees it.
    poisoned_sources = []
    for row in range(len(transforms)):
        images = []
        for tile, number in enumerate(transforms.sources[row].tolist()):
            if number < 0:
                images.append(None)
                continue
            image = np.full_like(sources[number], 255)
            rows = slice(int(crops.top[row, tile]), int(crops.top[row, tile] + crops.height[row, tile]))
            columns = slice(int(crops.left[row, tile]), int(crops.left[row, tile] + crops.width[row, tile]))
            image[rows, columns] = sources[number][rows, columns]
            images.append(image)
        poisoned_sources.append(images)
    batch = packed(transforms, Sources.of(poisoned_sources), targets_of(transforms), poisoned)
    assert torch.equal(opened(batch)[0], draw(transforms, sources))


def test_maps_go_from_the_picture_to_the_crop() -> None:
    for config in KINDS.values():
        transforms = make_transforms(config, 8, 96)
        heights, widths = SIZES[np.maximum(transforms.sources, 0)].transpose(2, 0, 1)
        geometry = Geometry(transforms, heights, widths)
        table = geometry.table(starts=np.zeros(heights.shape, np.int64), pitches=widths, planes=np.ones_like(widths))
        for row, tile in np.argwhere(geometry.present):
            point = np.array([31.0, 17, 1])
            crop = table.tiles_float[row, tile, : TileFloat.SEEN].reshape(3, 3) @ point
            source = np.linalg.solve(transforms.matrices[row, tile], point)
            corner = np.array([geometry.crops.left[row, tile], geometry.crops.top[row, tile]])
            blocks = (source[:2] / source[2] - corner) / geometry.unit[row, tile]
            np.testing.assert_allclose(crop[:2] / crop[2], blocks, atol=2e-3)


def test_inverses_are_inverses_also_in_perspective() -> None:
    matrices = np.random.default_rng(1).normal(size=(5, 4, 3, 3)) + 3 * np.eye(3)
    np.testing.assert_allclose(inverted(matrices) @ matrices, np.broadcast_to(np.eye(3), matrices.shape), atol=1e-9)
    assert (inverted(np.zeros((1, 3, 3))) == 0).all()


def test_maps_along_the_axes_are_inverted_alike() -> None:
    random = np.random.default_rng(1)
    matrices = np.zeros((5, 4, 3, 3))
    matrices[..., 0, 0], matrices[..., 1, 1] = random.uniform(-3, 3, (2, 5, 4))
    matrices[..., 0, 2], matrices[..., 1, 2] = random.uniform(-300, 300, (2, 5, 4))
    matrices[..., 2, 2] = 1.0
    np.testing.assert_allclose(inverted_aligned(matrices), inverted(matrices), rtol=1e-12, atol=1e-12)
    nowhere = np.zeros((1, 3, 3))
    assert np.array_equal(inverted_aligned(nowhere)[0], np.diag([0.0, 0.0, 1.0]))


def test_buffers_come_back_and_large_batches_get_their_own() -> None:
    buffers = PackBuffers(100, 2, pinned=False)
    first, second = buffers.take(100), buffers.take(5)
    addresses = {first.ctypes.data, second.ctypes.data}
    assert len(addresses) == 2
    assert buffers.take(10).ctypes.data not in addresses
    assert buffers.take(101).size >= 101
    assert buffers.oversized == 2
    tensor = torch.from_numpy(first)
    del first, second
    assert buffers.take(1).ctypes.data != tensor.data_ptr()
    del tensor
    taken = [buffers.take(1), buffers.take(1)]
    assert {buffer.ctypes.data for buffer in taken} == addresses


def test_usual_bytes_are_bounded_by_the_images() -> None:
    assert usual_bytes(2, 640, 4, 1000) < 2 * (4000 + 70_000)
    assert usual_bytes(2, 640, 4, 10**9) < 2 * (6 * 640 * 640 + 70_000)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_copies_are_cut_into_parts_of_about_as_many_bytes(count: int) -> None:
    rng = np.random.default_rng(0)
    rectangles = rng.integers(1, 50, (60, 5))
    whole = Copies(rectangles=rectangles, alive=None)
    parts = whole.parts(count)
    assert 1 <= len(parts) <= count
    np.testing.assert_array_equal(np.concatenate([part.rectangles for part in parts]), rectangles)
    assert sum(part.num_bytes for part in parts) == whole.num_bytes == (rectangles[:, 2] * rectangles[:, 3]).sum()
    assert max(part.num_bytes for part in parts) <= whole.num_bytes / count + 49 * 49
    assert Copies(rectangles=rectangles[:0], alive=None).parts(count) == []


def test_parts_of_the_copies_make_the_same_batch() -> None:
    transforms, sources = make_transforms(next(iter(KINDS.values())), 8, 96), make_sources()
    images = Sources.of(images_of(transforms, sources))
    expected = packed(transforms, images, targets_of(transforms), poisoned)
    batch, copies = laid_out(transforms, images, targets_of(transforms), poisoned)
    parts = copies.parts(5)
    assert 2 <= len(parts) <= 5
    for part in reversed(parts):
        part.make()
    assert np.array_equal(batch.buffer[: batch.used], expected.buffer[: expected.used])
