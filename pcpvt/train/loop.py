"""The running part of training: one TrainState, the loop that advances it, and when it is saved and evaluated.

Everything that decides what comes next is in the state or in the checkpoint's JSON, so a run that was cut anywhere goes
on as if it had not been.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from pcpvt.checkpoints.writer import Saver
from pcpvt.config import stored
from pcpvt.config.plan import make_plan
from pcpvt.data import sources
from pcpvt.data.loader import Loader
from pcpvt.distributed import collectives, signals
from pcpvt.errors import UserError
from pcpvt.evaluate import evaluator, mistakes
from pcpvt.functional import state as states
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console
from pcpvt.runtime.session import Session
from pcpvt.train import divergence, preflight, resume, setup
from pcpvt.train.history import Diverged, Recorder


class _Interrupted(Exception):
    """All processes agreed to stop in the middle of an evaluation."""


class Trainer:
    """One training run: `train` advances it to its end, or to a signal."""

    def __init__(self, session: Session, console: Console):
        self.session, self.config, self.console = session, session.config, console

        # Data and model.
        self.train_source = sessions.open_data(session, "train")
        self.val_source = sessions.open_data(session, "val")
        sources.check_classes(self.train_source, self.val_source)
        self.model = sessions.build_model(self.config, sessions.count_classes(self.config, self.train_source))
        self.plan = make_plan(
            self.config,
            examples=len(self.train_source),
            num_classes=self.model.num_classes,
            micro_batch=session.device.micro_batch(session.size, session.policy.compute, self.model.branches // 2),
        )

        # State: new, fine-tuned, or resumed. Loader processes take seconds to start: they do so meanwhile.
        self.resumed = resume.newest(session, console)
        classes, step = list(self.train_source.classes), 0
        if self.resumed is not None:
            self.notes = resume.check_compatible(session, self.resumed.meta, classes, self.plan.examples)
            step = self.resumed.meta["step"]
        self.batches = setup.train_batches(session, self.model, self.train_source)
        self.loader = self._start_reading(step)
        if self.resumed is None:
            params, self.notes = setup.init_params(session, self.model, classes)
        else:
            params = resume.params_of(self.resumed, self.model)
        optimizer = setup.optimizer(session, self.plan, params)
        self.state = setup.init_state(session, params, optimizer)
        memory: dict[str, Any] = {"best": None, "metrics": None}
        if self.resumed is not None:
            self.state, memory = resume.restore(self.resumed, self.state), self.resumed.meta
        resume.check_agreement(self.now)
        self.best: dict[str, Any] | None = memory["best"]
        self.metrics: dict[str, float] | None = memory["metrics"]  # of the present parameters

        # What works on it.
        self.step = setup.train_step(session, self.model, self.plan, optimizer)
        self.unreadable = evaluator.Unreadable(self.train_source, console)
        self.evaluator = evaluator.Evaluator(session, self.model, self.val_source, self.plan.eval_batch)
        self.recorder = Recorder(session, self.plan, console, self.now, memory if self.resumed else None)
        self.saver = Saver(session.checkpoints, self.config.keep, before=self.recorder.sync)
        if self.resumed is not None:
            self.saver.last_good = self.resumed.path
        self._saved: int | None = self.now  # the step that needs no saving: its checkpoint is written, or being written

    @property
    def now(self) -> int:
        """Steps done."""
        return int(self.state.step)

    @property
    def finished(self) -> bool:
        return self.now >= self.plan.steps and not self.owes_evaluation()

    def owes_evaluation(self) -> bool:
        """Whether the state is at a point where it is evaluated, and was not: the run was cut there."""
        ends = self.now >= self.plan.steps
        return self.metrics is None and self.now > 0 and (self.due(self.plan.eval_every) or (ends and self.evaluates()))

    def evaluates(self) -> bool:
        return self.plan.eval_every > 0

    def due(self, every: int) -> bool:
        return bool(every) and self.now % every == 0

    def stopping(self) -> bool:
        """Whether any process got a signal: all must take the same decision at the same step."""
        return collectives.any_true(signals.stop_requested())

    def train(self) -> bool:
        """Goes on to the end of the plan; False when a signal ended it before, with all that was done saved.

        Raises:
            UserError: when it cannot go on, or what was done could not be saved.
        """
        try:
            return self._train()
        except Diverged as error:
            self._settle()
            last_good = self.saver.last_good
            raise divergence.explain(self.session, self.plan, self.train_source, error.steps, last_good) from None

    def _train(self) -> bool:
        try:
            completed = self._advance()
        except _Interrupted:
            completed = False
        except UserError:  # data or a peer is gone: the state is whole, between steps or before one has changed it
            self._save()
            self._settle()
            raise
        self._save()
        self._settle(fatal=True)
        return completed

    def _advance(self) -> bool:
        plan = self.plan
        if self.owes_evaluation():
            self._evaluate()
        timing = preflight.FirstSteps(self)
        batches = iter(self.session.device.prefetch(self.loader))
        while self.now < plan.steps:
            if self.stopping():
                return False
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            if self.now == 0:
                self.recorder.images(batch)
            replaced = self._replaced(batch)
            self.state, metrics = self.step(self.state, batch)
            self.recorder.replaced += replaced
            self.metrics = None
            ends = self.now == plan.steps
            logs = ends or self.due(plan.log_every)
            evaluates = self.due(plan.eval_every) or (ends and self.evaluates())
            seconds = self.recorder.step(self.now, metrics, began, waited, read=logs)
            signals.finish_step_first(self.config.grace)  # from the first step on there is something to save
            timing.step(seconds, waited)
            if logs:
                self.recorder.record(self.now)
            if ends or evaluates or self.due(plan.save_every):
                self._save()
            if evaluates:
                self._evaluate()
        return True

    def _start_reading(self, step: int) -> Loader:
        device, steps = self.session.device, range(step, self.plan.steps)
        workers = sessions.workers(self.session, self.train_source)
        loader = Loader(self.batches, steps, workers, start=device.worker_start, pin=device.pins_memory)
        if steps:
            loader.start()
        return loader

    def _replaced(self, batch: dict[str, Tensor]) -> int:
        """Names the unreadable images that others took the place of in a batch, and counts them over all processes."""
        if self.config.data.on_error != "skip":
            return 0
        wanted = [draw.index for draw in self.batches.draws(self.now)]
        replaced = [(i, used) for i, used in zip(wanted, batch["id"].tolist(), strict=True) if i != used]
        for index, used in replaced:
            self.unreadable.name(index, f"sample {used} is used instead")
        return int(collectives.sum_numbers([float(len(replaced))])[0])

    def _evaluate(self) -> None:
        """Evaluates the present parameters, whose checkpoint is being written meanwhile, and notes the result on it."""
        began = time.perf_counter()
        observer = mistakes.PredictionLog(len(self.val_source))

        def observe(batch: dict[str, Tensor], logits: Tensor) -> None:
            if self.stopping():
                raise _Interrupted
            observer(batch, logits)

        self.metrics = self.evaluator(self.state.ema or self.state.params, observe)
        self.recorder.evaluation(self.now, self.metrics, time.perf_counter() - began)
        if self.best is None or self.metrics["acc1"] >= self.best["acc1"]:
            self.best = {**self.metrics, "step": self.now}
            mistakes.try_write(self.session, observer, self.val_source, self.now, self.console)
        if not self.session.world.is_main:
            return
        self._report(self.saver.wait())
        if self._saved == self.now:
            memory = self.recorder.state_dict()
            self.saver.note(self.now, metrics=self.metrics, best=self.best, records=memory["records"])
        else:  # it could not be written before the evaluation: perhaps now
            self._save()

    def _save(self) -> None:
        """Hands the whole state to the background writer, unless it has it already."""
        if not self.session.world.is_main or self._saved == self.now:
            return
        meta = {
            "step": self.now,
            "config": stored.flat(self.config) | resume.origin(self.resumed),
            "model": self.config.model.name,
            "pad": self.config.model.pad,
            "classes": list(self.train_source.classes),
            "image_size": list(self.session.size),
            "examples": self.plan.examples,
            "metrics": self.metrics,
            "best": self.best,
            **self.recorder.state_dict(),
        }
        self._report(self.saver.save(setup.copy_to_host(states.flatten(self.state)), meta))
        self._saved = self.now

    def _report(self, error: Exception | None) -> None:
        if error is not None:
            self._saved = None
            self.console.warn(f"checkpoint not written ({_reason(error)}); training goes on with the earlier ones")

    def _settle(self, *, fatal: bool = False) -> None:
        """Waits for the writer; a checkpoint that failed is an error where nothing comes after it."""
        error = self.saver.wait()
        if error is not None and fatal:
            raise UserError(
                f"{self.session.checkpoints}: the checkpoint of step {self.now} was not written ({_reason(error)}); "
                f"the last good one is {self.saver.last_good or 'none'}: free space, and start the same command again"
            )
        self._report(error)

    def close(self) -> None:
        """Ends what runs beside the loop."""
        self._settle()
        self.recorder.close()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
