"""The Python face: a detector that is trained, scored and used by the methods of one object."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Unpack

from paceline.attributes import missing
from paceline.callbacks import require_callbacks
from paceline.cli.console import ConsoleHandler, logging_to
from paceline.commands.device import resolve_device
from paceline.commands.predict import Predictor, predict
from paceline.commands.weights import LoadedNetwork, find_weights, load_network, require_model
from paceline.errors import UserError
from paceline.models.statistics import count_gflops, count_parameters
from paceline.options import BenchOptions, PredictOptions, TrainOptions, ValOptions, settle_resume
from paceline.results import Results

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from paceline.callbacks import Callback
    from paceline.commands.sources import Source
    from paceline.commands.train import TrainResult
    from paceline.commands.tune_answer import TuneResult
    from paceline.evaluation.evaluator import Evaluation
    from paceline.keywords import BenchKeywords, PredictKeywords, TrainKeywords, TuneKeywords, ValKeywords
    from paceline.planning.record import BenchRecord

__all__ = ["YOLO", "NetworkInfo", "Results"]

_CATALOGUE_CLASSES = 80
log = logging.getLogger("paceline")


@dataclass(frozen=True, kw_only=True)
class NetworkInfo:
    """The size of a network."""

    name: str
    """Its architecture."""
    num_classes: int
    num_parameters: int
    imgsz: int
    """Side of the input that `gflops` is for, in pixels."""
    gflops: float
    """10^9 operations for one image: twice the multiply-adds of the convolutions."""

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.num_classes} classes, {self.num_parameters:,} parameters, "
            f"{self.gflops:.1f} GFLOPs at {self.imgsz} x {self.imgsz}"
        )


class YOLO:
    """A detector.

    ```
    model = YOLO("yolo11n")                    # an architecture, or weights: YOLO("runs/train")
    result = model.train(data="shapes", epochs=3)
    evaluation = model.val()
    for found in model.predict("street.jpg"):
        print(found.boxes.xyxy, found.boxes.conf, found.boxes.cls)
    ```

    After `train` the object holds the best weights of that run. Images as arrays have their colours in the order blue,
    green, red, as OpenCV reads them.
    """

    def __init__(self, model: str | Path = "yolo11n", task: Literal["detect"] | None = None) -> None:
        """Name a network of `paceline models`, a .safetensors file of a run, or a run folder.

        task: may be said, and is detection. Raises UserError for anything else.
        """
        if task not in (None, "detect"):
            raise UserError(f"task={task!r}: only detection is offered; leave task out.")
        self._model = str(model)
        self._loaded: LoadedNetwork | None = None
        self._predictors: dict[str, Predictor] = {}
        require_model(self._model)
        self._weights = find_weights(self._model)

    if not TYPE_CHECKING:  # or else every name would pass the type checker

        def __getattr__(self, name: str) -> NoReturn:
            """Say what to write instead of an attribute that other YOLO trainers have."""
            raise missing(self, name)

    def __repr__(self) -> str:
        return f"YOLO({self._model!r})"

    @property
    def model(self) -> str:
        """What this object holds: an architecture's name, or the path of weights."""
        return self._model

    @property
    def names(self) -> dict[int, str]:
        """Class names by number; empty for an architecture that was not trained yet."""
        return {} if self._weights is None else dict(enumerate(self._load().names))

    def info(self, *, verbose: bool = True) -> NetworkInfo:
        """Count the network's parameters and operations, and, if `verbose`, say them in the log."""
        if self._weights is None:
            numbers = tuple(str(number) for number in range(_CATALOGUE_CLASSES))
            loaded = load_network(self._model, numbers)
        else:
            loaded = self._load()
        imgsz = loaded.imgsz or 640
        info = NetworkInfo(
            name=loaded.model,
            num_classes=loaded.network.num_classes,
            num_parameters=count_parameters(loaded.network),
            imgsz=imgsz,
            gflops=count_gflops(loaded.network, imgsz),
        )
        if verbose:
            with logging_to(ConsoleHandler()):
                log.info("%s.", info)
        return info

    def train(
        self,
        *,
        callbacks: Sequence[Callback] = (),
        transform: Callable[..., Any] | None = None,
        **options: Unpack[TrainKeywords],
    ) -> TrainResult:
        """Train, starting from what this object holds, and hold the best weights afterwards.

        With `devices=4` or `device=[0, 1]` as many processes are started, from a script without a main guard and from a
        notebook too; `callbacks` are called in the first of them, and have what they remember there afterwards, but for
        open files and the like.

        `transform` changes each training picture: a function of (image, boxes, labels), which are uint8 HW3 RGB, N4
        xyxy in pixels and N class numbers, that returns the same three; or an Albumentations pipeline.

        Raises UserError for whatever the caller can mend, before anything is written, and RankError where one of
        several processes failed.
        """
        from paceline.cli.runs import train_with_progress, warn_of_embedded_data

        require_callbacks(callbacks)
        with logging_to(ConsoleHandler()):
            given = settle_resume(self._named(options))
            settled = TrainOptions.from_flat(given)
            warn_of_embedded_data(given)
        result = train_with_progress(settled, callbacks, transform)
        self._hold(result.best_weights)
        return result

    def tune(self, **options: Unpack[TuneKeywords]) -> TuneResult:
        """Search hyper-parameters by runs that start from what this object holds, which stays as it is.

        `space` may be a mapping such as `{"lr0": {"low": 0.001, "high": 0.1, "log": True}}`. Raises UserError for
        whatever the caller can mend, before anything is written.
        """
        from paceline.cli.trials import TrialTable
        from paceline.commands.tune import settle_tune, tune

        given = dict(self._named(options))
        if given.get("resume") and not given.get("storage"):
            del given["model"]  # a resumed search knows what it trains; one that is joined is told
        with TemporaryDirectory() as folder, TrialTable() as table, logging_to(ConsoleHandler()):
            space = given.get("space")
            if isinstance(space, Mapping):
                file = Path(folder) / "space.yaml"
                file.write_text(json.dumps(space), encoding="utf-8")  # which is YAML too
                given["space"] = str(file)
            return tune(settle_tune(given), table.show)

    def benchmark(self, **options: Unpack[BenchKeywords]) -> BenchRecord:
        """Measure how fast this object's network trains here, print the tables, and return the figures.

        `model.benchmark(imgsz=640, batch=16)` is `paceline bench`. The object stays as it is. Raises UserError for
        whatever the caller can mend.
        """
        from paceline.cli.bench import bench_and_print

        with logging_to(ConsoleHandler()):
            settled = BenchOptions.from_flat(self._named(options))
        return bench_and_print(settled)

    def val(self, **options: Unpack[ValKeywords]) -> Evaluation:
        """Score the weights; without `data`, on the data set that they were trained on."""
        from paceline.commands.val import validate

        with logging_to(ConsoleHandler()):
            return validate(ValOptions.from_flat(self._named(options)))

    def predict(self, source: Source, **options: Unpack[PredictKeywords]) -> list[Results]:
        """Find objects in a file, a folder, a pattern, an array (HW3, uint8, BGR), or a list of these.

        Files are written only where `save`, `save_txt` or `save_json` asks for them.
        """
        return list(self.stream(source, **options))

    __call__ = predict

    def stream(self, source: Source, **options: Unpack[PredictKeywords]) -> Iterator[Results]:
        """Like `predict`, but one result after the other, so that many images need little memory."""
        with logging_to(ConsoleHandler()):
            settled = PredictOptions.from_flat({"save": False} | self._named(options))
            device = settled.prediction.device
            if device not in self._predictors:
                self._predictors[device] = Predictor(self._load(), resolve_device(device))
            yield from predict(settled, source, predictor=self._predictors[device])

    def _named(
        self, options: TrainKeywords | TuneKeywords | BenchKeywords | ValKeywords | PredictKeywords
    ) -> dict[str, object]:
        """Put this object's model before the options of a call."""
        return {"model": self._model, **options}

    def _load(self) -> LoadedNetwork:
        if self._loaded is None:
            self._loaded = load_network(self._model, None)
        return self._loaded

    def _hold(self, weights: Path) -> None:
        self._model, self._weights = str(weights), weights
        self._loaded, self._predictors = None, {}
