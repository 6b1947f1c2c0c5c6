"""`paceline predict`: from images to results, and to the files that are asked for."""

from __future__ import annotations

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.commands.device import make_current, resolve_device
from paceline.commands.sources import find_images
from paceline.commands.weights import load_network
from paceline.data.headers import BadImage
from paceline.data.render import letterbox
from paceline.errors import UserError
from paceline.evaluation.postprocess import postprocess
from paceline.letterbox import Letterbox
from paceline.models.fusion import fuse
from paceline.records import RunFolder, write_atomically
from paceline.results import Boxes, Results

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray
    from torch import Tensor

    from paceline.commands.config import PredictConfig
    from paceline.commands.sources import ImageSource, Source
    from paceline.commands.weights import LoadedNetwork
    from paceline.evaluation.config import PostprocessConfig
    from paceline.evaluation.postprocess import Detections
    from paceline.options import PredictOptions

log = logging.getLogger("paceline")

_MOST_THREADS = 8
_DEFAULT_IMGSZ = 640


def predict(
    options: PredictOptions, source: Source | None = None, *, predictor: Predictor | None = None
) -> Iterator[Results]:
    """Find objects in images, one result after the other, in the order of the images.

    `source` goes before the options' own and may hold arrays; `predictor` before loading what `model` names. A file
    that is no whole image is left out, and the log says so. Files are written as the results are taken.
    Raises UserError, before anything is written, for a source without images or weights that are not there.
    """
    wanted = options.prediction.source if source is None else source
    if isinstance(wanted, tuple) and not wanted:
        raise UserError("predict needs something to look at: source=street.jpg, a folder, or a pattern.")
    images = find_images(wanted)
    if predictor is None:
        if not options.model:
            raise UserError("predict needs weights: model=runs/train, or a .safetensors file.")
        predictor = Predictor(
            load_network(options.model, None), make_current(resolve_device(options.prediction.device))
        )
    predictor.check(options.prediction.classes)
    config = options.prediction
    if not (config.save or config.save_txt or config.save_json):
        return _results(images, predictor, config, options.postprocess)
    return _written(_results(images, predictor, config, options.postprocess), options)


class Predictor:
    """A network made ready for prediction: folded, on its device, with its class names."""

    def __init__(self, loaded: LoadedNetwork, device: torch.device) -> None:
        self._network = fuse(loaded.network).to(device)
        self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device = device
        self._imgsz = loaded.imgsz or _DEFAULT_IMGSZ
        self.names: dict[int, str] = dict(enumerate(loaded.names))

    def check(self, classes: Sequence[int]) -> None:
        """Raise UserError for a class that the network does not have."""
        for number in classes:
            if number not in self.names:
                raise UserError(
                    f"classes={number} is not known: these weights have classes 0 to {len(self.names) - 1}; "
                    "choose among these."
                )

    @torch.inference_mode()
    def __call__(
        self,
        paths: Sequence[str],
        images: Sequence[NDArray[np.uint8]],
        config: PostprocessConfig,
        *,
        imgsz: int = 0,
        classes: Sequence[int] = (),
    ) -> list[Results]:
        """Find objects in a batch of images (HW3, BGR, of any size); `imgsz` 0 takes that of the weights."""
        started = time.perf_counter()
        side = imgsz or self._imgsz
        boxes = [Letterbox.fit(image.shape[0], image.shape[1], side, side) for image in images]
        batch = self._network_input(images, boxes)
        prepared = self._now()
        predictions = self._network(batch)
        computed = self._now()
        size_hw = (batch.shape[2], batch.shape[3])
        detections = postprocess(predictions, size_hw, config, classes=classes)
        found = _to_boxes(detections, boxes)
        ended = time.perf_counter()
        times = {
            "preprocess": prepared - started,
            "inference": computed - prepared,
            "postprocess": ended - computed,
        }
        speed = {name: 1000 * seconds / len(images) for name, seconds in times.items()}
        return [
            Results(path=path, orig_img=image, boxes=own, names=self.names, speed=speed)
            for path, image, own in zip(paths, images, found, strict=True)
        ]

    def _network_input(self, images: Sequence[NDArray[np.uint8]], boxes: Sequence[Letterbox]) -> Tensor:
        """Letterbox images (HW3, BGR) into one batch: B3HW, RGB, float32 in [0, 1]."""
        canvases = np.empty((len(images), boxes[0].canvas_height, boxes[0].canvas_width, 3), np.uint8)
        for image, box, canvas in zip(images, boxes, canvases, strict=True):
            letterbox(image, box, canvas)
        batch = torch.from_numpy(canvases).to(self._device).flip(-1).permute(0, 3, 1, 2)
        return batch.to(torch.float32, memory_format=torch.channels_last).div_(255.0)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _to_boxes(detections: Detections, letterboxes: Sequence[Letterbox]) -> list[Boxes]:
    """Map each image's detections back to its own pixels."""
    corners, scores = detections.boxes.cpu(), detections.scores.cpu()
    labels, counts = detections.labels.cpu(), detections.count.tolist()
    return [
        Boxes(
            xyxy=torch.from_numpy(box.inverse(corners[row, :count].double().numpy())).float(),
            conf=scores[row, :count],
            cls=labels[row, :count],
            orig_shape=(box.height, box.width),
        )
        for row, (box, count) in enumerate(zip(letterboxes, counts, strict=True))
    ]


def _results(
    images: Sequence[ImageSource], predictor: Predictor, config: PredictConfig, postprocessing: PostprocessConfig
) -> Iterator[Results]:
    """Predict batch by batch, the next one being decoded meanwhile."""
    bad: list[tuple[str, BadImage]] = []
    for group in _decoded(images, config.batch):
        whole = [(image.path, pixels) for image, pixels in group if not isinstance(pixels, BadImage)]
        bad += [(image.path, reason) for image, reason in group if isinstance(reason, BadImage)]
        if whole:
            paths, arrays = zip(*whole, strict=True)
            yield from predictor(paths, arrays, postprocessing, imgsz=config.imgsz, classes=config.classes)
    if len(bad) == len(images):
        path, reason = bad[0]
        others = f" Nor is any of the {len(bad) - 1} others an image." if len(bad) > 1 else ""
        raise UserError(f"{path} {reason}.{others}")
    for path, reason in bad:
        log.warning("%s %s; it was left out.", path, reason)


def _decoded(
    images: Sequence[ImageSource], size: int
) -> Iterator[list[tuple[ImageSource, NDArray[np.uint8] | BadImage]]]:
    """Decode groups of up to `size` images in threads, one group ahead of the one that is taken."""
    groups = [images[first : first + size] for first in range(0, len(images), size)]
    with ThreadPoolExecutor(
        max_workers=min(os.cpu_count() or 1, _MOST_THREADS), thread_name_prefix="decode"
    ) as threads:
        waiting: list[Future[NDArray[np.uint8] | BadImage]] = []
        for number, group in enumerate(groups):
            current = waiting or [threads.submit(_load, image) for image in group]
            following = groups[number + 1] if number + 1 < len(groups) else ()
            waiting = [threads.submit(_load, image) for image in following]
            yield [(image, future.result()) for image, future in zip(group, current, strict=True)]


def _load(image: ImageSource) -> NDArray[np.uint8] | BadImage:
    try:
        return image.load()
    except BadImage as error:
        return error


def _written(results: Iterator[Results], options: PredictOptions) -> Iterator[Results]:
    """Pass results on, writing for each what was asked for; the folder is made for the first of them."""
    config, run = options.prediction, options.run
    folder: RunFolder | None = None
    names = FileNames()
    entries: list[dict[str, object]] = []
    for result in results:
        if folder is None:
            folder = RunFolder.create(run.project, run.name, exist_ok=run.exist_ok, default_name="predict")
        name = names.new(result.path)
        if config.save:
            result.save(folder.path / f"{name}.jpg", conf=config.show_conf)
        if config.save_txt:
            result.save_txt(folder.path / "labels" / f"{name}.txt", save_conf=config.save_conf)
        if config.save_json:
            height, width = result.orig_shape
            entries.append({"file": result.path, "height": height, "width": width, "boxes": result.to_dicts()})
        yield result
    assert folder is not None, "a source without any image raises"
    if config.save_json:
        write_atomically(folder.path / "predictions.json", (json.dumps(entries, indent=1) + "\n").encode())
    log.info("Results are in %s.", folder.path)


class FileNames:
    """Names of the files of each image: that of the image, with a number where several have the same."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._numbers: dict[str, int] = {}  # the last one that each stem was given: those below are taken

    def new(self, path: str) -> str:
        """Return the name, without suffix, of the files of an image that was not named before."""
        stem = Path(path).stem
        number = self._numbers.get(stem, 1)
        name = stem if number == 1 else f"{stem}-{number}"
        while name in self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name)
        self._numbers[stem] = number
        return name
