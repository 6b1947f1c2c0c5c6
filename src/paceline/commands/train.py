"""`paceline train`: puts data, network, engine, loop and records together."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paceline.commands.device import describe_device, place, resolve_device
from paceline.commands.evaluation import evaluate_network
from paceline.commands.pictures import RunPictures
from paceline.commands.weights import load_network, require_model
from paceline.data.dataset import open_data_set
from paceline.data.device.choice import choose_training_data
from paceline.data.loader import EvalLoader, TrainLoader
from paceline.data.user_transform import UserTransform
from paceline.errors import UserError
from paceline.ledger import CudaClock, Ledger
from paceline.losses.detection import DetectionLoss
from paceline.models.graph import DetectionModel
from paceline.models.statistics import count_parameters
from paceline.options import TrainOptions
from paceline.parallel.single import SingleEngine
from paceline.records import EndRecord, EvaluationRecord, RunFolder, RunRecord
from paceline.training.budget import Budget, parse_duration
from paceline.training.ema import Ema
from paceline.training.freeze import freeze_nodes
from paceline.training.keeper import WeightsKeeper
from paceline.training.loop import Loop
from paceline.training.optim import build_optimizer
from paceline.training.precision import choose_precision
from paceline.training.recipe import Recipe
from paceline.training.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.callbacks import Callback
    from paceline.commands.weights import LoadedNetwork
    from paceline.data.dataset import DataSet
    from paceline.data.index import Index
    from paceline.evaluation.evaluator import Evaluation
    from paceline.training.precision import Precision

log = logging.getLogger("paceline")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run gives back; everything else is in its folder."""

    folder: RunFolder
    end: EndRecord
    evaluation: EvaluationRecord | None
    """Figures of the best weights."""

    @property
    def best_weights(self) -> Path:
        """File of the best weights."""
        return self.folder.weights / "best.safetensors"


def train(
    options: TrainOptions, callbacks: Sequence[Callback] = (), transform: Callable[..., Any] | None = None
) -> TrainResult:
    """Train as the options say. Raises UserError for whatever the user can mend, before anything is written.

    `transform` changes each training picture, see `UserTransform`; it is not kept, so a resumed run needs it again.
    """
    resumed = _resumed_folder(options)
    if resumed is not None:
        stored = TrainOptions.read(resumed.config)
        options = dataclasses.replace(stored, loop=dataclasses.replace(stored.loop, resume=str(resumed.path)))
    return _Training(options, callbacks, resumed, UserTransform(transform) if transform else None).run()


class _Training:
    """One run being put together; each method builds one thing."""

    def __init__(
        self,
        options: TrainOptions,
        callbacks: Sequence[Callback],
        resumed: RunFolder | None,
        transform: UserTransform | None = None,
    ) -> None:
        self._transform = transform
        self._options = options
        self._callbacks = tuple(callbacks)
        self._resumed = resumed
        require_model(options.model)
        self._device = resolve_device(options.loop.device)
        limit_s = parse_duration(options.loop.time) if options.loop.time else None
        if options.loop.deterministic:
            torch.use_deterministic_algorithms(mode=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.manual_seed(options.loop.seed)
        self._data_set = open_data_set(options.data, seed=options.loop.seed)
        self._train_index, self._val_index = _splits(self._data_set)
        self._loaded = self._network()
        self._batch = self._fitting_batch()
        self._precision = choose_precision(
            options.loop.amp,
            self._loaded.network,
            device=self._device,
            imgsz=options.data.imgsz,
            batch=self._batch,
        )
        self._budget = Budget(limit_s=limit_s)
        clock = CudaClock(self._device) if self._device.type == "cuda" else None
        self._ledger = Ledger(device_clock=clock)

    def run(self) -> TrainResult:
        """Train, keep the weights, draw; the loader's threads have ended when this returns."""
        options, network = self._options, self._loaded.network
        recipe = Recipe.of(
            options.optim,
            num_images=len(self._train_index),
            num_classes=len(self._data_set.names),
            batch=self._batch,
            epochs=options.loop.epochs,
        )
        frozen = freeze_nodes(network, options.loop.freeze)
        engine = self._engine()
        optimizer = build_optimizer(recipe.plan, engine.network, engine.parts.leaf)
        ema = Ema(engine.network, average=engine.parts.twin())
        folder = self._resumed or RunFolder.create(options.run.project, options.run.name, exist_ok=options.run.exist_ok)
        keeper = WeightsKeeper(
            run=folder,
            model=self._loaded.model,
            names=self._data_set.names,
            imgsz=options.data.imgsz,
            save_period=options.loop.save_period,
            engine=engine,
            ema=ema,
            optimizer=optimizer,
        )
        state, best = TrainingState(epochs=options.loop.epochs), None
        if self._resumed:
            state = keeper.restore()
            self._budget.spent_before_s = state.elapsed_s
            best = keeper.best_evaluation()
        options.write(folder.config)
        with ExitStack() as stack:
            loader = stack.enter_context(self._train_loader())
            evaluation_loader = stack.enter_context(self._eval_loader())
            pictures = RunPictures(run=folder, names=self._data_set.names) if options.loop.plots else None
            evaluations = _Evaluations(self, evaluation_loader)
            self._start(folder, str(recipe.plan), state)
            if pictures and not self._resumed:
                with self._ledger.span("pictures"):
                    pictures.training_batches(
                        loader.epoch(0, mosaic=options.loop.epochs > options.augment.close_mosaic)
                    )
            training_data = choose_training_data(
                loader,
                options.data.render,
                self._device,
                self._precision.amp_dtype or torch.float32,
                upload=options.data.cache == "device",
            )
            loop = Loop(
                engine=engine,
                optimizer=optimizer,
                schedule=recipe.schedule,
                ema=ema,
                data=training_data,
                evaluate=evaluations,
                keeper=keeper,
                state=state,
                budget=self._budget,
                ledger=self._ledger,
                config=options.loop,
                close_mosaic=options.augment.close_mosaic,
                device=self._device,
                callbacks=self._callbacks,
                frozen=frozen,
                best=best,
            )
            end = loop.run()
            if pictures and evaluations.best is not None:
                pictures.evaluation(evaluations.best, evaluation_loader, self._val_index)
                pictures.curves()
        folder.append("end", end)
        for callback in self._callbacks:
            callback.on_end(end)
        return TrainResult(folder=folder, end=end, evaluation=end.best)

    def _network(self) -> LoadedNetwork:
        loop = self._options.loop
        loaded = load_network(self._options.model, self._data_set.names, pretrained=loop.pretrained)
        place(loaded.network, self._device)
        return loaded

    def _fitting_batch(self) -> int:
        """Images per step: a set smaller than the batch would only repeat its images within one step."""
        asked, available = self._options.data.batch, len(self._train_index)
        if asked > available:
            log.warning("batch=%d is more than the %d training images; the batch is %d.", asked, available, available)
        return min(asked, available)

    def _engine(self) -> SingleEngine:
        network = self._loaded.network
        criterion = DetectionLoss(
            self._options.loss,
            num_classes=network.num_classes,
            reg_max=network.reg_max,
            strides=network.strides,
        )
        return SingleEngine(
            network,
            criterion,
            amp_dtype=self._precision.amp_dtype,
            clip=self._options.optim.clip,
            ledger=self._ledger,
            loss_scale=self._precision.loss_scale,
        )

    def _train_loader(self) -> TrainLoader:
        data = dataclasses.replace(self._options.data, batch=self._batch)
        on_device = data.render == "device" or (data.render == "auto" and self._device.type == "cuda")
        return TrainLoader(
            self._train_index,
            data,
            self._options.augment,
            seed=self._options.loop.seed,
            on_device=on_device,
            transform=self._transform,
        )

    def _eval_loader(self) -> EvalLoader:
        data = self._options.data
        return EvalLoader(
            self._val_index, data.imgsz, batch=self._batch, workers=data.workers, cache=data.cache, rect=data.rect
        )

    def _start(self, folder: RunFolder, optimizer: str, state: TrainingState) -> None:
        record = RunRecord(
            folder=folder.path,
            model=self._loaded.model,
            data=str(self._data_set.source),
            class_names=self._data_set.names,
            epochs=state.epochs,
            num_train_images=len(self._train_index),
            num_val_images=len(self._val_index),
            num_parameters=count_parameters(self._loaded.network),
            device=describe_device(self._device),
            precision=self._precision.name,
            optimizer=optimizer,
        )
        folder.append("run", record)
        for callback in self._callbacks:
            callback.on_start(record)

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return self._device

    @property
    def precision(self) -> Precision:
        """How it computes."""
        return self._precision

    @property
    def val_index(self) -> Index:
        """What it is evaluated on."""
        return self._val_index

    @property
    def options(self) -> TrainOptions:
        """What the user asked for."""
        return self._options


class _Evaluations:
    """Evaluates the averaged network after an epoch, and keeps the best evaluation whole for the pictures."""

    def __init__(self, training: _Training, batches: EvalLoader) -> None:
        self._training = training
        self._batches = batches
        self.best: Evaluation | None = None

    def __call__(self, network: torch.nn.Module) -> EvaluationRecord:
        training = self._training
        assert isinstance(network, DetectionModel)
        evaluation = evaluate_network(
            network,
            self._batches,
            training.val_index,
            training.options.postprocess,
            device=training.device,
            amp_dtype=training.precision.amp_dtype,
        )
        if self.best is None or evaluation.record.ap > self.best.record.ap:
            self.best = evaluation
        return evaluation.record


def _splits(data_set: DataSet) -> tuple[Index, Index]:
    if data_set.train is None or len(data_set.train) == 0:
        raise UserError(f"{data_set.source} has no training images; add a `train` entry to it.")
    assert data_set.val is not None, "a set without a val split is split when it is opened"
    return data_set.train, data_set.val


def _resumed_folder(options: TrainOptions) -> RunFolder | None:
    """Find the run that `resume` names: a folder, a file in its weights, or `true` for the newest run."""
    resume = options.loop.resume
    if not resume or resume.lower() in {"false", "no", "0"}:
        return None
    if resume.lower() in {"true", "yes", "1"}:
        project = options.run.project
        found = sorted(project.glob("*/weights/resume.safetensors"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"There is no run to resume in {project}; name one: resume=runs/train.")
        return RunFolder(path=found[-1].parents[1])
    path = Path(resume)
    folder = path.parents[1] if path.suffix == ".safetensors" and len(path.parts) > 2 else path
    if not (folder / "weights" / "resume.safetensors").is_file():
        raise UserError(f"{folder} holds no weights/resume.safetensors, so it cannot be resumed; check the path.")
    return RunFolder(path=folder)
