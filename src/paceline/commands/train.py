"""`paceline train`: puts data, network, engine, loop and records together."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paceline.commands.device import backend_of, count_devices, describe_device, make_current, place, resolve_device
from paceline.commands.evaluation import Evaluations
from paceline.commands.memory import Exhaustion, held_bytes
from paceline.commands.pictures import RunPictures
from paceline.commands.resume import going_on
from paceline.commands.run_batch import batch_of, require_statistics
from paceline.commands.run_data import RunData, splits
from paceline.commands.step_choice import RunStep
from paceline.commands.weights import load_network, require_model
from paceline.data.dataset import open_data_set
from paceline.data.user_transform import UserTransform
from paceline.errors import UserError
from paceline.ledger import CudaClock, Ledger
from paceline.losses.detection import DetectionLoss
from paceline.models.statistics import count_parameters
from paceline.option_values import AUTO_BATCH
from paceline.parallel.build import Ranks, num_ranks
from paceline.parallel.fingerprint import digest_of, digest_of_package
from paceline.parallel.gather import group_apart, largest
from paceline.parallel.layout import Layout
from paceline.parallel.process_group import joined
from paceline.parallel.rank import rank_of_environment
from paceline.records import EndRecord, EvaluationRecord, RunFolder, RunRecord
from paceline.training.apart import Apart
from paceline.training.budget import Budget, parse_duration
from paceline.training.choice import StepChoice
from paceline.training.compiling import compiles_loss
from paceline.training.crowd import CrowdAwareStep
from paceline.training.ema import Ema
from paceline.training.freeze import freeze_nodes
from paceline.training.graphed import CudaCapture, graphed
from paceline.training.keeper import WeightsKeeper
from paceline.training.loop import Loop
from paceline.training.machine import Machine
from paceline.training.optim import build_optimizer
from paceline.training.plan import laid_out, threads_of
from paceline.training.recipe import Recipe
from paceline.training.state import TrainingState
from paceline.training.step import EagerStep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.callbacks import Callback
    from paceline.commands.weights import LoadedNetwork
    from paceline.options import TrainOptions
    from paceline.parallel.engine import Criterion, Engine
    from paceline.parallel.process_group import ProcessGroup
    from paceline.training.compiling import Compiler
    from paceline.training.step import Step

log = logging.getLogger("paceline")

ANY_NUMBER = 10**9
"""Of nodes, while the network is not there yet."""
ANY_BATCH = 64
"""Of a device, while nobody has measured how much it takes."""
MAY_DIFFER = frozenset({"model", "data", "project", "name", "exist_ok", "resume", "device", "workers", "cache"})
"""Options that may differ between ranks: places, and how a host does its part. Data are compared by what they hold."""
_PHASES = {
    "evaluation": "evaluation",
    "evaluation_wait": "evaluation",
    "checkpoint": "checkpoint",
    "checkpoint_wait": "checkpoint",
    "pictures": "checkpoint",
}
"""Span of the ledger -> phase of the heartbeat; everything else is part of a step."""


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

    In a process that was started as one of several (torchrun, Ray Train, our own launcher), this is its part of the
    run: files are written and callbacks called by rank 0 alone. `transform` changes each training picture, see
    `UserTransform`; it is not kept, so a resumed run needs it again.
    """
    resumed, options = going_on(options)
    with joined(backend=backend_of(options.loop.device), limits=options.limits, devices=options.ranks.devices) as group:
        check_layout(options, group.rank.world)
        user = UserTransform(transform) if transform else None
        return _Training(options, callbacks if group.rank.is_main else (), resumed, group, user).run()


def ranks_to_launch(options: TrainOptions) -> int:
    """Count the processes that have to be started for these options: 1 where this process is all, or one of them."""
    if rank_of_environment() is not None:
        return 1
    _, options = going_on(options, warns=False)
    count = count_devices(options.loop.device, options.ranks.devices)
    check_layout(options, count)
    return count


def check_layout(options: TrainOptions, devices: int) -> None:
    """Raise UserError at once, before anything is started or read, for a layout that is not possible."""
    if options.loop.resume in {"", "auto"}:
        is_auto, batch = options.data.batch == AUTO_BATCH, options.data.batch
        if is_auto:
            batch = devices * max(options.parallel.microbatches, ANY_BATCH)
        layout = Layout.of(options.parallel, devices=devices, batch=batch, nodes=ANY_NUMBER)
        if layout.pipeline > 1 and is_auto:
            raise UserError("batch=auto measures the whole network on one device, which stages are not; give a number.")
        if layout.pipeline > 1 and options.augment.multi_scale > 0:
            raise UserError(
                "multi_scale changes the image size on the way, which stages cannot; leave one of them out."
            )


class _Training:
    """One run being put together; each method builds one thing."""

    def __init__(
        self,
        options: TrainOptions,
        callbacks: Sequence[Callback],
        resumed: RunFolder | None,
        group: ProcessGroup,
        transform: UserTransform | None = None,
    ) -> None:
        self._options = options
        self._group = group
        self._callbacks = tuple(callbacks)
        self._resumed = resumed
        require_model(options.model)
        rank = group.rank
        named = resolve_device(options.loop.device, local_rank=rank.local_rank, local_world=rank.local_world)
        self._device = make_current(named)
        compared = {name: value for name, value in options.to_flat().items() if name not in MAY_DIFFER}
        group.agree("start", {"code": digest_of_package(), "options": digest_of(compared)})
        limit_s = parse_duration(options.loop.time) if options.loop.time else None
        if options.loop.deterministic:
            torch.use_deterministic_algorithms(mode=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.manual_seed(options.loop.seed)
        group.report(0, "index")
        with group.first_on_node("index"):
            self._data_set = open_data_set(options.data, seed=options.loop.seed)
        group.report(0, "start")
        self._train_index, self._val_index = splits(self._data_set)
        group.agree("data", {"data": f"{self._train_index.digest()} {self._val_index.digest()}"})
        self._loaded = self._network()
        self._sized = batch_of(
            options,
            self._loaded.network,
            self._criterion(),
            self._train_index,
            self._val_index,
            device=self._device,
            rank=rank,
        )
        self._options = options = self._sized.settled(options)
        self._batch = self._sized.images
        layout = Layout.of(
            options.parallel, devices=num_ranks(), batch=self._batch, nodes=len(self._loaded.network.nodes)
        )
        require_statistics(options, self._batch // (layout.replicas * layout.microbatches) * layout.norm_ranks)
        self._ranks = Ranks(layout, self._device)
        done = 0 if resumed is None else max((line["epoch"] for line in resumed.records("epoch")), default=0)
        self._step = RunStep(
            options,
            self._loaded,
            self._train_index,
            criterion=self._criterion(),
            layout=layout,
            batch=self._batch,
            device=self._device,
            local_world=rank.local_world,
            epochs_done=done,
            limit_s=limit_s,
        )
        self._choice = StepChoice.from_json(group.share("step", lambda: self._step.choose().to_json()))
        self._data = RunData(
            options,
            self._train_index,
            self._val_index,
            batch=self._batch,
            ranks=self._ranks,
            device=self._device,
            local_world=rank.local_world,
            transform=transform,
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
        plan = self._choice.plan
        laid_out(network, channels_last=plan.channels_last)
        frozen = freeze_nodes(network, options.loop.freeze)
        compiler = self._step.compiler(plan, keeps=self._group.rank.is_main) if plan.compile else None
        capture = CudaCapture(self._device) if plan.graphs else None
        with capture.aside() if capture else nullcontext():
            engine = self._engine(compiler)
        optimizer = build_optimizer(recipe.plan, engine.network, engine.parts.leaf)
        ema = Ema(engine.network, average=engine.parts.twin())
        with ExitStack() as stack:
            stack.enter_context(threads_of(plan))
            if compiler is not None:
                stack.enter_context(compiler)
                compiler.compile_network(network)
            loader = stack.enter_context(self._data.train_loader())
            evaluation_loader = stack.enter_context(self._data.eval_loader())
            feed = self._ranks.feed(self._data.on_device(loader, plan))
            folder = self._folder()  # when all that the user might have to mend has been said
            keeper = WeightsKeeper(
                run=folder,
                model=self._loaded.model,
                names=self._data_set.names,
                imgsz=options.data.imgsz,
                save_period=options.loop.save_period,
                engine=engine,
                ema=ema,
                optimizer=optimizer,
                writes=self._ranks.is_first,
            )
            state, best = TrainingState(epochs=options.loop.epochs), None
            if self._resumed:
                state = keeper.restore()
                self._budget.spent_before_s = state.elapsed_s
                best = keeper.best_evaluation(state)
            epochs_before = state.epoch
            if self._group.rank.is_main:
                # Without `resume`: who takes this file for a run of their own does not mean to go on with this one.
                dataclasses.replace(options, loop=dataclasses.replace(options.loop, resume="")).write(folder.config)
                folder.mark("")
            pictures = (
                RunPictures(run=folder, names=self._data_set.names)
                if options.loop.plots and self._group.rank.is_main
                else None
            )
            evaluations = Evaluations(
                evaluation_loader,
                self._val_index,
                options.postprocess,
                device=self._device,
                amp_dtype=self._choice.plan.precision.amp_dtype,
            )
            self._start(folder, str(recipe.plan), state)
            loop = Loop(
                engine=engine,
                step=self._taken(EagerStep(engine, optimizer, ema, self._ledger), capture),
                schedule=recipe.schedule,
                ema=ema,
                data=feed,
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
                stops=self._group.preemption.agreed,
                apart=self._apart(evaluations),
                awaited=keeper.awaited,
            )
            first_step = state.step

            def place_of_main_thread() -> tuple[int, str]:
                usual = "compile" if state.step == first_step else "step"
                return state.step, _PHASES.get(self._ledger.outermost, usual)

            self._group.follow(place_of_main_thread)
            layout = self._ranks.layout
            exhaustion = Exhaustion(
                batch=self._batch,
                unit=layout.replicas * layout.microbatches,
                device=self._device,
                rank=self._group.rank,
                fitted=self._sized.fitted,
            )
            held = held_bytes(engine.network, self._device, states=1 if recipe.plan.name == "SGD" else 2)
            with exhaustion.explained(held, lambda: state.step > first_step):
                end = loop.run()
            self._group.follow(None)
            self._group.report(state.step, "end")
            if pictures and not (self._resumed and pictures.has_training_batches):
                pictures.training_batches(loader.epoch(0, mosaic=options.loop.epochs > options.augment.close_mosaic))
            is_earlier = 0 < state.best_epoch <= epochs_before
            if options.loop.plots and is_earlier and end.reason != "preempted":  # evaluated before this run went on
                evaluations.best = None
                keeper.load_best(ema.network)
                evaluations(ema.network)
            if pictures and evaluations.best is not None:
                pictures.evaluation(evaluations.best, evaluation_loader, self._val_index)
            if pictures:
                pictures.curves()
        if self._group.rank.is_main:
            folder.append("end", end)
            folder.mark("PREEMPTED" if end.reason == "preempted" else "DONE")
        for callback in self._callbacks:
            callback.on_end(end)
        return TrainResult(folder=folder, end=end, evaluation=end.best)

    def _taken(self, eager: EagerStep, capture: CudaCapture | None) -> Step:
        """Say how steps are taken: by graphs, eagerly, or with as many threads as the machine has cores to spare."""
        step = graphed(eager, capture, largest=largest if num_ranks() > 1 else None)
        loop = self._options.loop
        if not self._step.task.leaves_threads or loop.tune_step == "off" or loop.deterministic:
            return step
        if self._choice.plan.compile:  # compiled code is for one number of threads, and would be made anew
            return step
        return CrowdAwareStep(step, most=Machine.of(self._device).physical_cores)

    def _apart(self, evaluations: Evaluations) -> Apart | None:
        """Prepare to evaluate beside the training, where that was asked for and can be."""
        if not self._options.loop.val_async:
            return None
        if not self._ranks.evaluates_whole:
            log.warning("val_async: evaluation goes through the stages that train, so the training waits for it.")
            return None
        return Apart(evaluations.apart(group_apart()), device=self._device, alone=num_ranks() == 1)

    def _folder(self) -> RunFolder:
        """Take the folder of the run that goes on, or let rank 0 make a new one."""
        run = self._options.run
        if self._resumed is not None:
            return self._resumed
        exist_ok = run.exist_ok or self._options.loop.resume == "auto"  # whose earlier start left nothing to go on from

        def create() -> str:
            return str(RunFolder.create(run.project, run.name, exist_ok=exist_ok).path)

        return RunFolder(path=Path(self._group.share("folder", create)))

    def _network(self) -> LoadedNetwork:
        loop = self._options.loop
        loaded = load_network(self._options.model, self._data_set.names, pretrained=loop.pretrained)
        place(loaded.network, self._device)
        return loaded

    def _criterion(self) -> DetectionLoss:
        network = self._loaded.network
        return DetectionLoss(
            self._options.loss,
            num_classes=network.num_classes,
            reg_max=network.reg_max,
            strides=network.strides,
        )

    def _engine(self, compiler: Compiler | None) -> Engine:
        criterion: Criterion = self._step.criterion
        if compiler is not None and compiles_loss(self._device):
            criterion = compiler.compile_criterion(criterion)
        return self._ranks.engine(
            self._loaded.network,
            criterion,
            batch=self._batch,
            imgsz=self._options.data.imgsz,
            amp_dtype=self._choice.plan.precision.amp_dtype,
            clip=self._options.optim.clip,
            ledger=self._ledger,
            loss_scale=self._choice.plan.precision.loss_scale,
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
            precision=self._choice.plan.precision.name,
            step=self._choice.text,
            optimizer=optimizer,
        )
        if self._group.rank.is_main:
            folder.append("run", record)
        for callback in self._callbacks:
            callback.on_start(record)
