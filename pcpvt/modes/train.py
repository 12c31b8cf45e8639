"""`--mode=train`: what a run does, from top to bottom - data, model, state, step, loop, summary."""

from __future__ import annotations

import signal
import time
from typing import Any

from pcpvt.config.plan import eval_batch
from pcpvt.config.plan import plan as make_plan
from pcpvt.data import sources
from pcpvt.data.loader import Loader
from pcpvt.devices import collectives
from pcpvt.errors import UserError
from pcpvt.functional import state as states
from pcpvt.models import pcpvt
from pcpvt.modes import build, evaluate, resume
from pcpvt.modes import session as sessions
from pcpvt.modes.console import Console, Rate, duration
from pcpvt.modes.exits import PREEMPTED
from pcpvt.modes.session import Session
from pcpvt.store import checkpoint, records
from pcpvt.store.saver import Saver


class Run:
    """The running part of training: one TrainState and what is written about it."""

    def __init__(self, session: Session):
        self.session, self.config = session, session.config
        self.console = Console(session.world.is_main)
        self.signal: int | None = None
        self.seconds = 0.0  # in steps, loader included; for images/s
        self.steps_timed = 0
        self.waited = 0.0

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

        # State: new, fine-tuned, or resumed.
        loaded = resume.newest(session, self.console)
        classes = self.train_source.classes
        params, notes = build.first_params(session, self.model, classes) if loaded is None else (None, [])
        if loaded is not None:
            notes = resume.check_compatible(session, loaded.meta, list(self.train_source.classes))
            params = {n.removeprefix("params/"): v for n, v in loaded.tensors.items() if n.startswith("params/")}
        optimizer = build.optimizer(session, self.plan, params)
        self.state = build.first_state(session, params, optimizer)
        self.window: dict[str, float] = {"loss": 0.0, "steps": 0}
        self.best: dict[str, Any] | None = None
        self.metrics: dict[str, float] | None = None  # of the present parameters
        if loaded is not None:
            self.state = resume.restore(loaded, self.state)
            self.window, self.best, self.metrics = loaded.meta["window"], loaded.meta["best"], loaded.meta["metrics"]
        self.step = build.train_step(session, self.model, self.plan, optimizer)
        self.batches = build.train_batches(session, self.model, self.train_source)
        self.evaluator = evaluate.Evaluator(session, self.model, self.val_source, eval_batch(self.config))
        self.saver = Saver(session.checkpoints, self.config.keep)
        self.pending: list[dict] = []  # metrics still on the device: reading them late keeps it busy
        self.notes = notes

    @property
    def now(self) -> int:
        return int(self.state.step)

    # What is written down.

    def drain(self) -> None:
        """Reads the pending metrics into the window of the next record, in order of the steps."""
        for metrics in self.pending:
            self.window["loss"] += metrics["loss"].item()
            self.window["steps"] += 1
            self.window["grad_norm"] = metrics["grad_norm"].item()
            skipped = int(metrics["skipped"])
            if skipped:
                self.console.warn(
                    f"step {self.now}: the gradient is not finite; {skipped} updates in a row are skipped"
                )
            if skipped >= self.config.max_skipped:
                self.saver.wait()
                last = list(checkpoint.steps(self.session.checkpoints).values())[-1:]
                raise UserError(
                    f"step {self.now}: the gradient was not finite {skipped} times in a row: lower config.lr, or use "
                    f"config.precision=float32; last good checkpoint: {last[0] if last else 'none'}"
                )
        self.pending.clear()

    def record(self, log: records.MetricsFile | None) -> None:
        self.drain()
        n = max(self.window["steps"], 1)
        entry = {
            "kind": "train",
            "step": self.now,
            "epoch": round(self.now * self.plan.batch / self.plan.examples, 4),
            "loss": self.window["loss"] / n,
            "lr": self.plan.schedule(self.now - 1),
            "grad_norm": self.window.get("grad_norm", 0.0),
            "images_per_sec": round(self.images_per_sec(), 2),
            "waiting": round(self.waited / max(self.seconds, 1e-9), 4),
        }
        self.window = {"loss": 0.0, "steps": 0}
        if log is not None:
            log.write(entry)
        self.console.live(self.line(entry)) if self.console.is_terminal else self.console.say(self.line(entry))

    def line(self, entry: dict) -> str:
        left = (self.plan.steps - self.now) * self.plan.batch / max(entry["images_per_sec"], 1e-9)
        return (
            f"epoch {entry['epoch']:.2f}/{self.plan.epochs:.0f}  step {entry['step']}/{self.plan.steps}  "
            f"loss {entry['loss']:.4f}  lr {entry['lr']:.2e}  {entry['images_per_sec']:.0f} images/s  "
            f"{duration(left)} left"
        )

    def images_per_sec(self) -> float:
        return self.steps_timed * self.plan.batch / self.seconds if self.seconds else 0.0

    def save(self) -> None:
        """Hands the whole state to the background writer."""
        self.drain()
        if not self.session.world.is_main:
            return
        meta = {
            "step": self.now,
            "config": resume.flat(self.config),
            "model": self.config.model.name,
            "pad": self.config.model.pad,
            "classes": list(self.train_source.classes),
            "image_size": list(self.session.size),
            "examples": self.plan.examples,
            "metrics": self.metrics,
            "best": self.best,
            "window": self.window,
        }
        self.report_failed(self.saver.submit(build.to_host(states.flatten(self.state)), meta))

    def report_failed(self, error: OSError | None) -> None:
        if error is not None:
            self.console.warn(
                f"checkpoint not written ({error.strerror or error}); training goes on with the earlier ones"
            )

    def evaluate(self, log: records.MetricsFile | None) -> None:
        began = time.perf_counter()
        self.metrics = self.evaluator(self.state.ema or self.state.params)
        entry = {"kind": "eval", "step": self.now, "epoch": round(self.now * self.plan.batch / self.plan.examples, 4)}
        if log is not None:
            log.write({**entry, **self.metrics, "seconds": round(time.perf_counter() - began, 2)})
        if self.best is None or self.metrics["acc1"] >= self.best["acc1"]:
            self.best = {**self.metrics, "step": self.now}
        self.console.say(f"epoch {entry['epoch']:.2f}  {evaluate.report(self.metrics)}")

    # The loop.

    def loop(self, log: records.MetricsFile | None) -> None:
        plan, device = self.plan, self.session.device
        source = Loader(
            self.batches,
            range(self.now, plan.steps),
            sessions.workers(self.session, self.train_source),
            start=device.worker_start,
            pin=sessions.pins(self.session),
        )
        batches = iter(device.prefetch(source))
        rate = Rate()
        while self.now < plan.steps and not self.stopping():
            began = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - began
            self.name_substitutes(batch)
            self.state, metrics = self.step(self.state, batch)
            self.metrics = None
            self.pending.append(metrics)
            due_log = self.due(plan.log_every)
            if due_log or len(self.pending) >= 100:
                self.drain()
            self.seconds += time.perf_counter() - began
            self.steps_timed += 1
            rate.tick()
            if due_log or self.now == plan.steps:
                self.record(log)
            if self.due(plan.eval_every) and self.now < plan.steps:
                self.evaluate(log)
                self.save()
            elif self.due(plan.save_every) and self.now < plan.steps:
                self.save()

    def due(self, every: int) -> bool:
        return bool(every) and self.now % every == 0

    def stopping(self) -> bool:
        """Whether any process got a signal: all must take the same decision at the same step."""
        return collectives.any_true(self.signal is not None)

    def name_substitutes(self, batch: dict) -> None:
        if self.config.data.on_error == "skip":
            wanted = [draw.index for draw in self.batches.draws(self.now)]
            for index, used in zip(wanted, batch["id"].tolist(), strict=True):
                if index != used:
                    self.console.warn(f"{self.train_source.name(index)}: unreadable; sample {used} is used instead")


def run(session: Session) -> int:
    """Trains to the end of the plan, or to a signal; returns the exit code."""
    began = time.perf_counter()
    run = Run(session)
    _announce(run)
    log = records.MetricsFile(session.workdir / "metrics.jsonl", run.now) if session.world.is_main else None
    if session.world.is_main:
        records.write_json(session.workdir / "config.json", session.config.to_dict())
    previous = {
        s: signal.signal(s, lambda number, frame: _on_signal(run, number)) for s in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        started_at = run.now
        run.loop(log)
        if run.stopping():
            run.save()
            run.report_failed(run.saver.wait())
            for number in previous:
                signal.signal(number, signal.SIG_IGN)  # saved: the launcher's own signals must not spoil the exit code
            previous = {}
            collectives.barrier()  # the first rank to leave makes the launcher stop the others
            run.console.say(f"stopped by a signal at step {run.now}; saved. The same command goes on from there.")
            return PREEMPTED
        if run.plan.eval_every and run.metrics is None:
            run.evaluate(log)
        if run.now > started_at or run.metrics is not None:
            run.save()
        error = run.saver.wait()
        if error is not None:
            raise UserError(
                f"{session.checkpoints}: the last checkpoint was not written ({error}): free space and run again"
            )
        _summarize(run, time.perf_counter() - began)
        return 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        run.saver.wait()
        if log is not None:
            log.close()


def _on_signal(run: Run, number: int) -> None:
    if run.signal is not None:
        raise KeyboardInterrupt  # a second signal ends at once
    run.signal = number


def _announce(run: Run) -> None:
    session, plan, config = run.session, run.plan, run.config
    micro = plan.local_batch // plan.accumulate
    say = run.console.say
    say(
        f"{config.model.name}: {pcpvt.n_parameters(run.model):,} parameters, {plan.num_classes} classes, "
        f"{plan.size[0]}x{plan.size[1]} px, {session.policy}"
    )
    say(f"device: {session.world.size} x {session.device.name} ({session.device.describe()}), compile {config.compile}")
    say(
        f"data: {config.data.name or 'folder'} {config.data.path}: {plan.examples} training, "
        f"{len(run.val_source)} validation images"
    )
    say(
        f"plan: {plan.steps} steps = {plan.epochs:.4g} epochs of batch {plan.batch} = {session.world.size} processes x "
        f"{plan.accumulate} x {micro}; peak lr {plan.lr:.3g}"
    )
    for note in run.notes:
        say(f"note: {note}")
    if run.now:
        say(f"resumed at step {run.now} of {plan.steps} from {session.checkpoints}")


def _summarize(run: Run, seconds: float) -> None:
    """The last lines, and `result.json`: the figures of the best checkpoint, which `--mode=eval` reproduces."""
    session, plan = run.session, run.plan
    best = run.best or {}
    step = best.get("step", run.now)
    path = session.checkpoints / f"step-{step:08d}.safetensors"
    result = {
        "mode": "train",
        "acc1": best.get("acc1"),
        "acc5": best.get("acc5"),
        "loss": best.get("loss"),
        "images": run.now * plan.batch,
        "images_per_sec": round(run.images_per_sec(), 2),
        "epochs": plan.epochs,
        "seconds": round(seconds, 2),
        "n_parameters": pcpvt.n_parameters(run.model),
        "checkpoint": str(path),
        "last": run.metrics,
        "device": session.device.describe(),
        "processes": session.world.size,
    }
    if session.world.is_main:
        records.write_json(session.workdir / "result.json", result)
    say = run.console.say
    say("")
    if best:
        say(f"final accuracy: {evaluate.report(best)} (best, step {step})")
    say(f"final images/s: {result['images_per_sec']:.1f}   end-to-end duration: {duration(seconds)}")
    say(f"written to {session.workdir}: result.json, metrics.jsonl, config.json, checkpoints/{path.name}")
