"""Study: the trials of a search in an Optuna storage, which outlives every process that works on it.

A trial on its way carries the process that runs it (host, pid, when that process started) and when it was last seen
alive. Whoever opens the study ends the trials of dead processes and queues their values again:

    search A (killed)   0 complete   1 complete   2 running (owner dead)   3 running (owner dead)
    search B --resume   2, 3 interrupted -> queued again as 4, 5                6 ...

A machine that was out of touch for longer than STALE_S, but lives, finds its trials settled by others when it comes
back: they are no longer its own, so it ends them and records nothing.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from paceline import addresses
from paceline.errors import UserError
from paceline.tuning.outcome import Outcome
from paceline.tuning.patience import patiently

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import optuna
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

    from paceline.tuning.config import TuneConfig
    from paceline.tuning.space import SearchSpace, Value

ENDING, REASON, DEVICE, SECONDS, OWNER, SEEN, ROLE = "ending", "reason", "device", "seconds", "owner", "seen", "role"
"""User attributes of a trial."""
DEFAULTS = "defaults"
"""Role of the trial that changes nothing; the search is never worse than it."""
STALE_S = 600.0
"""A trial of another host that was not seen for so long is dead.

Shorter than `patience.LONGEST_S`, for which a storage is asked again: after an outage in between, a machine that could
not reach the storage goes on with the search, but not with the trials that others took over. Where nobody could reach
it, nobody takes anything over (`Study.seen`)."""
UNOWNED_S = 5.0
"""So long may pass between taking a trial and putting one's name to it."""
_IDENTITY = "identity"
_HALVINGS = 2
_HALVING_FACTOR = 3
_TELLING = 0.1
"""Share of their best AP that the defaults had when comparing began: before that all AP is near zero, and luck."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A trial that is to be run."""

    number: int
    values: Mapping[str, Value]


class Study:
    """Trials by number; every call waits for a storage that is locked."""

    def __init__(self, study: optuna.Study, space: SearchSpace, config: TuneConfig, seed: int) -> None:
        self._study = study
        self._distributions = space.distributions()
        self._config = config
        self._running: dict[int, Trial] = {}
        self._is_defaults: dict[int, bool] = {}
        self._last_seen = time.monotonic()
        self._back_at = 0.0
        """When this process was last back after an outage, in seconds of the epoch."""
        self._study.sampler = _sampler(config, seed)

    @classmethod
    def create(
        cls,
        storage: str,
        name: str,
        space: SearchSpace,
        config: TuneConfig,
        *,
        identity: Mapping[str, str],
        defaults: Mapping[str, Value],
        seed: int,
    ) -> Study:
        """Make a study whose first trial is the defaults. Raises UserError where there is one of that name."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        opened = _storage(storage)
        try:
            study = optuna.create_study(storage=opened, study_name=name, direction="maximize")
        except optuna.exceptions.DuplicatedStudyError as error:
            raise UserError(
                f"There is a study {name} in {addresses.shown(storage)} already; go on with it by --resume, or choose "
                "another name."
            ) from error
        study.set_user_attr(_IDENTITY, dict(identity) | {"space": space.fingerprint})
        study.enqueue_trial(dict(defaults), user_attrs={ROLE: DEFAULTS})
        return cls(study, space, config, seed)

    @classmethod
    def resume(
        cls,
        storage: str,
        name: str,
        space: SearchSpace,
        config: TuneConfig,
        *,
        identity: Mapping[str, str],
        seed: int,
        recover: Callable[[int], Outcome | None],
    ) -> Study:
        """Open a study, and settle the trials of processes that are gone.

        `recover` says how a trial had ended, where its run ended before that was recorded; the others are queued again.
        Raises UserError where there is no such study, or it is one of something else.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        opened = _storage(storage)
        try:
            study = optuna.load_study(storage=opened, study_name=name)
        except KeyError as error:
            raise UserError(
                f"There is no study {name} in {addresses.shown(storage)}; check the name, or start one without "
                "--resume; "
                "where several machines share it, the others join when the first has begun."
            ) from error
        stored = study.user_attrs.get(_IDENTITY, {})
        for what, value in (dict(identity) | {"space": space.fingerprint}).items():
            if stored.get(what) != value:
                shown = f" ({stored.get(what)}, not {value})" if what != "space" else ""
                raise UserError(
                    f"The study {name} is one of another {what}{shown}; resume it with its own, or start a new one."
                )
        found = cls(study, space, config, seed)
        found.reclaim(recover)
        return found

    @property
    def optuna(self) -> optuna.Study:
        """What Optuna's own plots take."""
        return self._study

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials in the order of their numbers, those on their way included."""
        return patiently(partial(self._study.get_trials, deepcopy=False))

    def num_started(self) -> int:
        """Count the trials that need not be started any more: ended or on their way, interrupted ones left out."""
        from optuna.trial import TrialState

        return sum(
            trial.state == TrialState.COMPLETE
            or (trial.state != TrialState.WAITING and trial.user_attrs.get(ENDING) != "interrupted")
            for trial in self.trials
        )

    def ask(self, device: str) -> Asked:
        """Take the next trial, which will run on `device`."""
        while True:
            trial = patiently(partial(self._study.ask, self._distributions))
            self._running[trial.number] = trial
            self._is_defaults[trial.number] = patiently(partial(getattr, trial, "user_attrs")).get(ROLE) == DEFAULTS
            if self._write(trial, {OWNER: _owner(), SEEN: time.time(), DEVICE: device}):
                return Asked(number=trial.number, values=dict(trial.params))

    def is_defaults(self, number: int) -> bool:
        """Whether a trial that was taken here is that of the defaults."""
        return self._is_defaults[number]

    def runs_defaults(self) -> bool:
        """Whether the trial of the defaults is on its way here."""
        return any(self._is_defaults[number] for number in self._running)

    def report(self, number: int, seconds: float, ap: float) -> bool:
        """Take the AP after some seconds of training; returns whether the trial should be ended now.

        That is so as well where another machine has settled it.
        """
        trial = self._running.get(number)
        if trial is None:
            return True
        step = max(round(10 * seconds), 1)  # tenths, since steps are whole numbers and runs may be short
        if not self._ours(number, partial(trial.report, ap, step)) or not self._write(trial, {SEEN: time.time()}):
            return True
        if self._is_defaults[number] or self._config.pruner == "none":
            return False
        pruner = self._pruner()
        if pruner is None:
            return False
        self._study.pruner = pruner
        return patiently(trial.should_prune)

    def seen(self) -> None:
        """Say that the running trials are alive; to be called every minute or so.

        Where that was not possible for longer, other machines may have been kept from it too: they get STALE_S anew.
        """
        for trial in [*self._running.values()]:
            self._write(trial, {SEEN: time.time()})
        now = time.monotonic()
        if now - self._last_seen > STALE_S / 2:
            self._back_at = time.time()
        self._last_seen = now

    def finish(self, number: int, outcome: Outcome, seconds: float) -> Outcome:
        """Record the end of a trial; what was interrupted is queued again. Returns the ending that holds for it."""
        trial = self._running.get(number)
        if trial is not None and self._write(trial, {SECONDS: seconds}):
            settled = self._settle(number, trial._trial_id, outcome)
            self._running.pop(number, None)
            if settled:
                if outcome.ending == "interrupted":
                    self._queue_again(trial.params, is_defaults=self._is_defaults[number])
                return outcome
        return Outcome(
            ending="interrupted", reason="another machine had taken it over, since this one was out of touch"
        )

    def queue_defaults_again(self) -> None:
        """Let the defaults be the next trial, where theirs failed for a reason that has nothing to do with them."""
        from optuna.trial import TrialState

        trials = [trial for trial in self.trials if trial.user_attrs.get(ROLE) == DEFAULTS]
        if trials and trials[-1].state == TrialState.FAIL and trials[-1].user_attrs.get(ENDING) == "failed":
            self._queue_again(trials[-1].params, is_defaults=True)

    def best(self, count: int) -> list[FrozenTrial]:
        """Return the best complete trials, best first."""
        from optuna.trial import TrialState

        complete = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))[:count]

    def defaults(self) -> FrozenTrial | None:
        """Return the complete trial of the defaults, if it has ended."""
        return next((trial for trial in self.best(len(self.trials)) if trial.user_attrs.get(ROLE) == DEFAULTS), None)

    def reclaim(self, recover: Callable[[int], Outcome | None]) -> None:
        """Settle the trials of processes that are gone: by what `recover` knows of them, else queue them again."""
        from optuna.trial import TrialState

        for trial in self.trials:
            if trial.state != TrialState.RUNNING or trial.number in self._running or _is_alive(trial, self._back_at):
                continue
            outcome = recover(trial.number) or Outcome(ending="interrupted", reason="the search that ran it was ended")
            settled = self._settle(trial.number, trial._trial_id, outcome)
            if settled and outcome.ending == "interrupted":
                self._queue_again(trial.params, is_defaults=trial.user_attrs.get(ROLE) == DEFAULTS)

    def _write(self, trial: Trial, attributes: Mapping[str, Any]) -> bool:
        """Put attributes to a running trial; False where it is no longer ours."""
        return all(
            self._ours(trial.number, partial(trial.set_user_attr, name, value)) for name, value in attributes.items()
        )

    def _ours(self, number: int, call: Callable[[], object]) -> bool:
        """Make a call that writes to a running trial; False, and the trial forgotten, where another has settled it."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            patiently(call)
        except UpdateFinishedTrialError:
            self._running.pop(number, None)
            return False
        return True

    def _settle(self, number: int, identifier: int, outcome: Outcome) -> bool:
        """Record an ending; False where another process came first, whose ending stays."""
        from optuna.trial import TrialState

        storage = self._study._storage
        for name, text in ((ENDING, outcome.ending), (REASON, outcome.reason)):
            if not self._ours(number, partial(storage.set_trial_user_attr, identifier, name, text)):
                return False
        state, value = TrialState.FAIL, outcome.value
        if outcome.ending == "complete" and value is not None:
            state = TrialState.COMPLETE
        elif outcome.ending in ("pruned", "diverged"):
            state = TrialState.PRUNED
        told = value if state == TrialState.COMPLETE else None
        try:
            return self._ours(number, partial(self._study.tell, number, told, state=state))
        except ValueError:  # what `tell` says where the trial was settled a moment ago
            if patiently(partial(storage.get_trial, identifier)).state.is_finished():
                return False
            raise

    def _queue_again(self, values: Mapping[str, Any], *, is_defaults: bool) -> None:
        attributes = {ROLE: DEFAULTS} if is_defaults else {}
        patiently(partial(self._study.enqueue_trial, dict(values), user_attrs=attributes))

    def _pruner(self) -> BasePruner | None:
        """Make the pruner, whose scale of time is that of the defaults; None until these have ended."""
        from optuna import pruners

        whole = self.defaults()
        if whole is None or not whole.intermediate_values:
            return None
        last = max(whole.intermediate_values)
        telling = _first_telling(whole.intermediate_values)
        if self._config.pruner == "median":
            return pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=max(last // 4, telling - 1))
        least = max(last // _HALVING_FACTOR**_HALVINGS, telling)
        if self._config.pruner == "hyperband":
            return pruners.HyperbandPruner(least, max(last, least + 1), _HALVING_FACTOR)
        return pruners.SuccessiveHalvingPruner(least, _HALVING_FACTOR)


def _first_telling(reached: Mapping[int, float]) -> int:
    """Return the first step at which a curve had risen enough to compare others with it."""
    least = _TELLING * max(reached.values())
    return min(step for step, ap in reached.items() if ap >= least)


def _storage(url: str) -> optuna.storages.BaseStorage:
    """Open a storage by its URL. Raises UserError where that is not possible."""
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import ArgumentError, OperationalError

    waits = {"connect_args": {"timeout": 10}} if url.startswith("sqlite") else {}
    try:
        if url.startswith("journal:"):
            return optuna.storages.JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
        return optuna.storages.RDBStorage(url, engine_kwargs=waits)
    except (ArgumentError, OperationalError, ImportError, ValueError, OSError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"The study cannot be kept in {addresses.shown(url)} ({addresses.shown(cause)}); name a database as "
            "Optuna's storage URLs do."
        ) from error


def _sampler(config: TuneConfig, seed: int) -> BaseSampler:
    from optuna import samplers

    if config.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if config.sampler == "gp":
        return samplers.GPSampler(seed=seed)
    if config.sampler == "qmc":
        return samplers.QMCSampler(seed=seed)
    return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=8)


def _owner() -> dict[str, Any]:
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}


def _is_alive(trial: FrozenTrial, back_at: float) -> bool:
    """Whether the process that runs a trial lives; on another host, whether it was seen lately.

    That host gets its time anew from `back_at`, when we were back after an outage ourselves.
    """
    owner = trial.user_attrs.get(OWNER)
    if owner is None:  # it was taken a moment ago, or its process died between two writes
        return trial.datetime_start is not None and time.time() - trial.datetime_start.timestamp() < UNOWNED_S
    if owner["host"] != socket.gethostname():
        return bool(time.time() - max(trial.user_attrs.get(SEEN, 0.0), back_at) < STALE_S)
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 1.0)
    except psutil.NoSuchProcess:
        return False
