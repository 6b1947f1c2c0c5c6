"""`paceline train`: puts data, network, engine, loop and records together."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from paceline.attributes import missing
from paceline.commands.device import backend_of, describe_device, deterministic_algorithms
from paceline.commands.evaluation import Evaluations
from paceline.commands.layout import check_layout
from paceline.commands.memory import Exhaustion, held_bytes
from paceline.commands.pictures import RunPictures
from paceline.commands.ready import Ready
from paceline.commands.resume import going_on, may_exist
from paceline.data.user_transform import UserTransform
from paceline.ledger import CudaClock, Ledger
from paceline.models.statistics import count_parameters
from paceline.parallel.build import num_ranks
from paceline.parallel.gather import from_first, group_apart, largest
from paceline.parallel.process_group import joined
from paceline.records import EndRecord, EvaluationRecord, RunFolder, RunRecord
from paceline.training.apart import Apart
from paceline.training.budget import Budget
from paceline.training.compiling import compiles_loss
from paceline.training.crowd import CrowdAwareStep
from paceline.training.ema import Ema
from paceline.training.freeze import freeze_nodes
from paceline.training.graphed import CudaCapture, graphed
from paceline.training.judge import Judge
from paceline.training.keeper import WeightsKeeper
from paceline.training.loop import Loop
from paceline.training.machine import Machine
from paceline.training.optim import build_optimizer
from paceline.training.plan import carrying_out, kernels_of, laid_out
from paceline.training.recipe import Recipe
from paceline.training.state import TrainingState
from paceline.training.step import EagerStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from paceline.batch import Batch
    from paceline.callbacks import Callback
    from paceline.data.loader import TrainLoader
    from paceline.evaluation.evaluator import Evaluation
    from paceline.options import TrainOptions
    from paceline.parallel.engine import Criterion, Engine
    from paceline.training.compiling import Compiler
    from paceline.training.optim import OptimPlan
    from paceline.training.optimizer import Optimizer
    from paceline.training.step import Step

log = logging.getLogger("paceline")

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

    if not TYPE_CHECKING:  # or else every name would pass the type checker

        def __getattr__(self, name: str) -> NoReturn:
            """Say what to write instead of an attribute that other YOLO trainers have."""
            raise missing(self, name)

    def __repr__(self) -> str:
        """Say where the run is, how it ended and how good it is, without the figures of each class."""
        best = f", the best was epoch {self.end.best_epoch}: {self.evaluation}" if self.evaluation else ""
        return f"<TrainResult {self.folder.path}: {self.end.reason}, epoch {self.end.epochs}{best}>"

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
    with (
        deterministic_algorithms(alone=options.loop.deterministic),
        joined(backend=backend_of(options.loop.device), limits=options.limits, devices=options.ranks.devices) as group,
    ):
        check_layout(options, group.rank.world, goes_on=resumed is not None)
        user = UserTransform(transform) if transform else None
        ready = Ready(options, resumed=resumed, group=group, transform=user)
        return _Training(ready, callbacks if group.rank.is_main else ()).run()


@dataclass(frozen=True, kw_only=True)
class _Learner:
    """The network in training."""

    engine: Engine
    optimizer: Optimizer
    ema: Ema
    capture: CudaCapture | None
    """Records its steps, where these are to be graphs."""
    frozen: Sequence[nn.Module]
    """Nodes that are not trained."""


class _Training:
    """One run being put together; each method builds one thing."""

    def __init__(self, ready: Ready, callbacks: Sequence[Callback]) -> None:
        self._ready = ready
        self._callbacks = tuple(callbacks)
        self._budget = Budget(limit_s=ready.limit_s)
        clock = CudaClock(ready.device) if ready.device.type == "cuda" else None
        self._ledger = Ledger(device_clock=clock)

    def run(self) -> TrainResult:
        """Train, keep the weights, draw; the loader's threads have ended when this returns."""
        ready, options, plan = self._ready, self._ready.options, self._ready.choice.plan
        is_main = ready.group.rank.is_main
        recipe = Recipe.of(
            options.optim,
            num_images=len(ready.train_index),
            num_classes=len(ready.data_set.names),
            batch=ready.batch,
            epochs=options.loop.epochs,
        )
        with ExitStack() as stack:
            learner = self._learner(recipe.plan, stack)
            loader = stack.enter_context(ready.data.train_loader())
            evaluation_loader = stack.enter_context(ready.data.eval_loader())
            feed = ready.ranks.feed(ready.data.on_device(loader, plan))
            folder = self._folder()  # when all that the user might have to mend has been said
            keeper = self._keeper(folder, learner)
            state, best = self._state(keeper)
            epochs_before = state.epoch
            self._write_options(folder)
            evaluations = Evaluations(
                evaluation_loader,
                ready.val_index,
                options.postprocess,
                device=ready.device,
                amp_dtype=plan.precision.amp_dtype,
            )
            self._start(folder, str(recipe.plan), state)
            loop = Loop(
                engine=learner.engine,
                step=self._taken(learner),
                schedule=recipe.schedule,
                ema=learner.ema,
                data=feed,
                judge=self._judge(learner, evaluations, keeper, state, best),
                keeper=keeper,
                state=state,
                budget=self._budget,
                elapsed=self._elapsed_s,
                ledger=self._ledger,
                config=options.loop,
                close_mosaic=options.augment.close_mosaic,
                device=ready.device,
                callbacks=self._callbacks,
                frozen=learner.frozen,
                stops=ready.group.preemption.agreed,
                awaited=keeper.awaited,
            )
            states = 1 if recipe.plan.name == "SGD" else 2
            end = self._watched(loop, state, held_bytes(learner.engine.network, ready.device, states=states))
            if options.loop.plots:
                if 0 < state.best_epoch <= epochs_before and end.reason != "preempted":
                    evaluations.best = None  # what is drawn are the best weights, evaluated before this run went on
                    keeper.load_best(learner.ema.network)
                    evaluations(learner.ema.network)
                if is_main:
                    self._draw(folder, loader, evaluation_loader, evaluations.best)
        if is_main:
            folder.append("end", end)
            folder.mark("PREEMPTED" if end.reason == "preempted" else "DONE")
        for callback in self._callbacks:
            callback.on_end(end)
        return TrainResult(folder=folder, end=end, evaluation=end.best)

    def _learner(self, optimizer: OptimPlan, stack: ExitStack) -> _Learner:
        """Build the engine as the plan says, and what moves its weights; `stack` then holds what the plan opens."""
        ready, network, plan = self._ready, self._ready.loaded.network, self._ready.choice.plan
        ready.step.compile_ahead(plan, ready.group)
        laid_out(network, channels_last=plan.channels_last)
        frozen = freeze_nodes(network, ready.options.loop.freeze)
        compiler = ready.step.compiler(plan, keeps=ready.group.rank.is_main) if plan.compile else None
        capture = CudaCapture(ready.device) if plan.graphs else None
        with capture.aside() if capture else nullcontext(), kernels_of(plan):
            engine = self._engine(compiler)
        learner = _Learner(
            engine=engine,
            optimizer=build_optimizer(optimizer, engine.network, engine.parts.leaf),
            ema=Ema(engine.network, average=engine.parts.twin()),
            capture=capture,
            frozen=frozen,
        )
        stack.enter_context(carrying_out(plan))
        if compiler is not None:
            stack.enter_context(compiler)
            compiler.compile_network(network)
        return learner

    def _keeper(self, folder: RunFolder, learner: _Learner) -> WeightsKeeper:
        ready = self._ready
        return WeightsKeeper(
            run=folder,
            model=ready.loaded.model,
            names=ready.data_set.names,
            imgsz=ready.options.data.imgsz,
            save_period=ready.options.loop.save_period,
            engine=learner.engine,
            ema=learner.ema,
            optimizer=learner.optimizer,
            writes=ready.group.rank.is_main,
        )

    def _judge(
        self,
        learner: _Learner,
        evaluations: Evaluations,
        keeper: WeightsKeeper,
        state: TrainingState,
        best: EvaluationRecord | None,
    ) -> Judge:
        return Judge(
            evaluate=evaluations,
            apart=self._apart(evaluations),
            parts=learner.engine.parts,
            ema=learner.ema,
            state=state,
            elapsed=self._elapsed_s,
            records=keeper,
            ledger=self._ledger,
            config=self._ready.options.loop,
            callbacks=self._callbacks,
            best=best,
        )

    def _elapsed_s(self) -> float:
        """Seconds of training by the first rank's clock; all ranks come here."""
        return from_first(self._budget.seconds_since_start())

    def _state(self, keeper: WeightsKeeper) -> tuple[TrainingState, EvaluationRecord | None]:
        """Begin anew, or where the run that goes on has ended; and the figures of its best weights."""
        if self._ready.resumed is None:
            return TrainingState(epochs=self._ready.options.loop.epochs), None
        state = keeper.restore()
        log.info("Going on after epoch %d of %d.", state.epoch, state.epochs)
        self._budget.spent_before_s = state.elapsed_s
        return state, keeper.best_evaluation(state)

    def _write_options(self, folder: RunFolder) -> None:
        """Write them without `resume`: who takes this file for a run of their own does not mean to go on with this."""
        ready = self._ready
        if ready.group.rank.is_main:
            loop = dataclasses.replace(ready.options.loop, resume="")
            dataclasses.replace(ready.options, loop=loop).write(folder.config)
            folder.mark("")
            folder.sweep()

    def _watched(self, loop: Loop, state: TrainingState, held: int) -> EndRecord:
        """Train, while the other ranks hear how far this one is, and memory that is spent is explained."""
        ready = self._ready
        first_step = state.step

        def place_of_main_thread() -> tuple[int, str]:
            usual = "compile" if state.step == first_step else "step"
            return state.step, _PHASES.get(self._ledger.outermost, usual)

        layout = ready.ranks.layout
        exhaustion = Exhaustion(
            batch=ready.batch,
            unit=layout.replicas * layout.microbatches,
            device=ready.device,
            rank=ready.group.rank,
            fitted=ready.sized.fitted,
        )
        ready.group.follow(place_of_main_thread)
        with exhaustion.explained(held, lambda: state.step > first_step):
            end = loop.run()
        ready.group.follow(None)
        ready.group.report(state.step, "end")
        return end

    def _draw(
        self, folder: RunFolder, loader: TrainLoader, evaluation_loader: Iterable[Batch], best: Evaluation | None
    ) -> None:
        """Draw what was trained on, unless an earlier part of the run has, what was found, and the curves."""
        ready = self._ready
        pictures = RunPictures(run=folder, names=ready.data_set.names)
        if ready.resumed is None or not pictures.has_training_batches:
            mosaic = ready.options.loop.epochs > ready.options.augment.close_mosaic
            pictures.training_batches(loader.epoch(0, mosaic=mosaic))
        if best is not None:
            pictures.evaluation(best, evaluation_loader, ready.val_index)
        pictures.curves()

    def _taken(self, learner: _Learner) -> Step:
        """Say how steps are taken: by graphs, eagerly, or with as many threads as the machine has cores to spare."""
        ready = self._ready
        eager = EagerStep(learner.engine, learner.optimizer, learner.ema, self._ledger)
        step = graphed(eager, learner.capture, largest=largest if num_ranks() > 1 else None)
        loop = ready.options.loop
        if not ready.step.task.leaves_threads or loop.tune_step == "off" or loop.deterministic:
            return step
        if ready.choice.plan.compile:  # compiled code is for one number of threads, and would be made anew
            return step
        return CrowdAwareStep(step, most=Machine.of(ready.device).physical_cores)

    def _apart(self, evaluations: Evaluations) -> Apart | None:
        """Prepare to evaluate beside the training, where that was asked for and can be."""
        ready = self._ready
        if not ready.options.loop.val_async:
            return None
        if not ready.ranks.evaluates_whole:
            log.warning("val_async: evaluation goes through the stages that train, so the training waits for it.")
            return None
        return Apart(evaluations.apart(group_apart()), device=ready.device, alone=num_ranks() == 1)

    def _folder(self) -> RunFolder:
        """Take the folder of the run that goes on, or let rank 0 make a new one."""
        ready = self._ready
        run = ready.options.run
        if ready.resumed is not None:
            return ready.resumed

        def create() -> str:
            return str(RunFolder.create(run.project, run.name, exist_ok=may_exist(ready.options)).path)

        return RunFolder(path=Path(ready.group.share("folder", create)))

    def _engine(self, compiler: Compiler | None) -> Engine:
        ready = self._ready
        criterion: Criterion = ready.step.criterion
        if compiler is not None and compiles_loss(ready.device):
            criterion = compiler.compile_criterion(criterion)
        return ready.ranks.engine(
            ready.loaded.network,
            criterion,
            batch=ready.batch,
            imgsz=ready.options.data.imgsz,
            amp_dtype=ready.choice.plan.precision.amp_dtype,
            clip=ready.options.optim.clip,
            ledger=self._ledger,
            loss_scale=ready.choice.plan.precision.loss_scale,
        )

    def _start(self, folder: RunFolder, optimizer: str, state: TrainingState) -> None:
        ready = self._ready
        record = RunRecord(
            folder=folder.path,
            model=ready.loaded.model,
            data=str(ready.data_set.source),
            class_names=ready.data_set.names,
            epochs=state.epochs,
            num_train_images=len(ready.train_index),
            num_val_images=len(ready.val_index),
            num_parameters=count_parameters(ready.loaded.network),
            device=describe_device(ready.device),
            precision=ready.choice.plan.precision.name,
            step=ready.choice.text,
            optimizer=optimizer,
        )
        if ready.group.rank.is_main:
            folder.append("run", record)
        for callback in self._callbacks:
            callback.on_start(record)
        augment = ready.options.augment
        if augment.mosaic and state.epochs <= augment.close_mosaic and not self._budget.is_set:
            log.info(
                "No mosaics: the last close_mosaic=%d epochs go without them, and this run has %d; close_mosaic=0 has "
                "them to the end.",
                augment.close_mosaic,
                state.epochs,
            )
