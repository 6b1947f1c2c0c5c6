from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from pictures import KINDS, SIZES, draw, images_of, make_sources, make_transforms, mixed, poisoned, targets_of

from paceline.data.device.pack import Sources, packed
from paceline.data.device.reference import jittered, render_reference
from paceline.data.device.table import PictureInt, TileInt
from paceline.data.plain import plain_of
from paceline.data.render import FILL, Workspace, render
from paceline.native.library import library

SIZE = 160
STILL = {kind: replace(config, hsv_h=0, hsv_s=0, hsv_v=0) for kind, config in KINDS.items()}


def on_host(transforms, sources):
    out = np.empty((len(transforms), SIZE, SIZE, 3), np.uint8)
    images = list(images_of(transforms, sources))
    render(transforms, range(len(transforms)), images, Workspace(SIZE), out, plain=plain_of(transforms))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mosaic", [True, False])
@pytest.mark.parametrize("grey", [True, False])
def test_the_reference_is_the_hosts_picture(kind: str, mosaic: bool, grey: bool) -> None:
    """Within a mean of 2/255, and that of the whole set within 1/255 (1.5 where OpenCV jitters colours)."""
    means = []
    for seed in range(3):
        transforms, sources = make_transforms(KINDS[kind], 12, SIZE, mosaic=mosaic, seed=seed), make_sources(grey=grey)
        drawn = draw(transforms, sources).permute(0, 2, 3, 1).numpy() * 255
        means.extend(np.abs(drawn - on_host(transforms, sources)).mean(axis=(1, 2, 3)))
    assert max(means) < 2
    assert np.mean(means) < (1.5 if library() is None else 1)


def test_the_sets_of_these_tests_hold_every_case() -> None:
    transforms = make_transforms(KINDS["aligned"], 12, SIZE)
    present = transforms.sources >= 0
    assert set(transforms.halvings[present]) >= {0, 1, 2}
    assert (~present).any()
    assert transforms.flips.any(axis=0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_the_reference(kind: str, interpreted) -> None:
    """At most 1/255 apart but for 1e-5 of the pixels, at a size that is no multiple of the block."""
    for seed, size in enumerate((64, 75)):
        transforms = mixed(make_transforms(KINDS[kind], 6, size, seed=seed))
        sources = make_sources(grey=True)
        difference = (draw(transforms, sources, interpreted) - draw(transforms, sources)).abs() * 255
        assert (difference > 1).float().mean() < 1e-5
        assert difference.mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_and_reference_write_every_type_channels_last(dtype: torch.dtype, interpreted) -> None:
    transforms, sources = make_transforms(KINDS["aligned"], 2, 64), make_sources()
    exact = draw(transforms, sources)
    for renderer in (render_reference, interpreted):
        drawn = draw(transforms, sources, renderer, dtype=dtype)
        assert drawn.dtype == dtype
        assert drawn.shape == (2, 3, 64, 64)
        assert drawn.is_contiguous(memory_format=torch.channels_last)
        assert (drawn.float() - exact).abs().max() <= torch.finfo(dtype).eps + 2e-6


def test_masked_tiles_paint_by_their_opacity(interpreted) -> None:
    """A mask of half opacity over the second tile of an aligned mosaic paints half of it over what lies below."""
    transforms, sources = make_transforms(STILL["aligned"], 2, 64, seed=3), make_sources()
    tile = np.flatnonzero(transforms.sources[0] >= 0)[-1]
    mask = np.full(sources[transforms.sources[0, tile]].shape[:2], 51, np.uint8)
    whole = draw(transforms, sources)
    sources_without = transforms.sources.copy()
    sources_without[0, tile] = -1
    without = draw(replace(transforms, sources=sources_without), sources)
    transforms.masked[0, tile] = True
    torch.testing.assert_close(draw(transforms, sources), without)  # nothing was picked from it
    for renderer in (render_reference, interpreted):
        masked = draw(transforms, sources, renderer, masks={(0, int(tile)): mask})
        torch.testing.assert_close(masked, without + 0.2 * (whole - without), atol=1e-4, rtol=0)
    assert (whole - without).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_do_not_depend_on_their_batch(kind: str) -> None:
    transforms, sources = mixed(make_transforms(KINDS[kind], 5, SIZE)), make_sources(grey=True)
    together = draw(transforms, sources)
    for row in range(5):
        alone = replace(
            transforms,
            **{name: value[row : row + 1] for name, value in vars(transforms).items() if isinstance(value, np.ndarray)},
        )
        assert torch.equal(draw(alone, sources)[0], together[row])


@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_a_rectangle_lie_on_its_box(kind: str) -> None:
    """White rectangles on black: centre and area of what is drawn are those of the mapped rectangle.

    The area's error over the longer side is how far an edge can have moved: less than 0.6 px, and so the centre.
    """
    sources = []
    for height, width in SIZES:
        image = np.zeros((height, width, 3), np.uint8)
        image[height // 4 : height // 2, width // 4 : width // 2] = 255
        sources.append(image)
    transforms = make_transforms(replace(STILL[kind], translate=0, scale=0.3), 10, SIZE, mosaic=False)
    drawn = draw(transforms, sources)[:, 0].numpy()
    checked = 0
    for row in range(len(transforms)):
        height, width = SIZES[transforms.sources[row, 0]]
        box = np.array([width // 4, height // 4, width // 2, height // 2], np.float64)
        corners = np.array([box[[0, 1]], box[[2, 1]], box[[2, 3]], box[[0, 3]]])
        matrix = transforms.matrices[row, 0]
        mapped = corners @ matrix[:2, :2].T + matrix[:2, 2]
        if (mapped < 2).any() or (mapped > SIZE - 2).any():
            continue
        mask = cv2.fillConvexPoly(np.zeros((SIZE, SIZE), np.uint8), np.rint(mapped).astype(np.int32), 1)
        near = cv2.dilate(mask, np.ones((9, 9), np.uint8)) > 0
        inside = np.where(near & (np.abs(drawn[row] - FILL / 255) > 1e-6), drawn[row], 0)
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        centre = np.array([(x * inside).sum(), (y * inside).sum()]) / inside.sum()
        assert np.abs(centre - mapped.mean(axis=0)).max() < 0.3
        first, second = mapped[1] - mapped[0], mapped[3] - mapped[0]
        area = abs(first[0] * second[1] - first[1] * second[0])
        assert abs(inside.sum() - area) / max(np.hypot(*first), np.hypot(*second)) < 0.6
        checked += 1
    assert checked >= 4


def test_jitter_is_hsv_by_its_definition() -> None:
    import colorsys

    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (400, 3)).astype(np.float32))
    for hue, saturation, value in ((0.0625, 1.3, 0.8), (-0.125, 0.5, 1.2), (0.5, 1.0, 1.0), (0.0, 0.0, 1.0)):
        expected = [
            colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), min(v * value, 1))
            for h, s, v in (colorsys.rgb_to_hsv(*pixel) for pixel in (pixels / 255).tolist())
        ]
        drawn = jittered(pixels, hue * 6, saturation, value) / 255
        torch.testing.assert_close(drawn, torch.tensor(expected), atol=1e-4, rtol=0)


def test_layers_greyscale_and_swaps() -> None:
    """Against the picture drawn without them."""
    transforms, sources = make_transforms(STILL["aligned"], 3, 64), make_sources()
    plain = draw(transforms, sources)
    transforms.swaps[0] = (2, 0, 1)
    transforms.grey[1] = True
    transforms.layers[2], transforms.shares[2] = 1, 0.25
    drawn = draw(transforms, sources)
    torch.testing.assert_close(drawn[0], plain[0][[2, 0, 1]])
    luma = (plain[1] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    torch.testing.assert_close(drawn[1], luma.expand(3, -1, -1))
    torch.testing.assert_close(drawn[2], 0.25 * FILL / 255 + 0.75 * plain[2], atol=1e-5, rtol=0)


def test_cuts_stay_grey_under_tiles_that_yield_and_show_those_that_do_not(interpreted) -> None:
    transforms, sources = make_transforms(STILL["aligned"], 2, 64, seed=1), make_sources()
    batch = packed(transforms, Sources.of(images_of(transforms, sources)), targets_of(transforms), poisoned)
    memory = torch.from_numpy(batch.buffer)
    table, _ = batch.opened(memory)
    whole = render_reference(memory, memory, table, 64, torch.float32)
    table.pictures_int[:, PictureInt.CUT :] = torch.tensor([10, 20, 40, 50], dtype=torch.int32)
    table.tiles_int[..., TileInt.YIELDS] = torch.tensor([1, 0], dtype=torch.int32)[:, None]
    expected = whole.clone()
    expected[0, :, 20:50, 10:40] = FILL / 255
    assert not torch.equal(expected, whole)
    for renderer in (render_reference, interpreted):
        torch.testing.assert_close(renderer(memory, memory, table, 64, torch.float32), expected, atol=1e-5, rtol=0)


def test_perspective_is_that_of_opencv(interpreted) -> None:
    """One tile per picture, its map bent: the horizon is outside, and what is seen lies where OpenCV puts it."""
    transforms, sources = make_transforms(STILL["turned"], 6, 96, mosaic=False), make_sources()
    bend = np.array([[1.1, 0.1, -9], [-0.05, 0.9, 6], [0.0012, -0.0008, 1]])
    bent = replace(
        transforms,
        matrices=bend @ transforms.matrices,
        places=np.broadcast_to(np.array([0, 0, 96, 96]), transforms.places.shape).copy(),
        halvings=np.zeros_like(transforms.halvings),
    )
    drawn = draw(bent, sources)
    assert ((draw(bent, sources, interpreted) - drawn).abs() * 255 > 1).float().mean() < 1e-5
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    for row in range(len(bent)):
        indices = np.linalg.inv(half) @ bent.matrices[row, 0] @ half
        image = sources[bent.sources[row, 0]]
        there = cv2.warpPerspective(np.full_like(image, 255), indices, (96, 96), flags=cv2.INTER_NEAREST) > 0
        inside = cv2.erode(there[..., 0].astype(np.uint8), np.ones((5, 5))) > 0
        expected = cv2.warpPerspective(image, indices, (96, 96), flags=cv2.INTER_LINEAR)
        difference = np.abs(drawn[row].permute(1, 2, 0).numpy() * 255 - expected)[inside]
        assert difference.mean() < 2
        assert inside.sum() > 500
