"""The training loop: take a batch, step, record, save when due, evaluate when due, stop when asked.

Everything that decides what comes next is in the state or the history, which checkpoints store, so an interrupted run
continues as if it had not been interrupted.
"""

import time
from collections.abc import Sequence

from torch import Tensor

from pcpvt.checkpoints.writer import Saver
from pcpvt.config.plan import Plan
from pcpvt.distributed import collectives, signals, stacks
from pcpvt.errors import FaultError, PeerError, UserError
from pcpvt.evaluate import mistakes
from pcpvt.evaluate.evaluator import UnreadableLog, evaluate, per_class
from pcpvt.functional.state import TrainState
from pcpvt.train import history as histories
from pcpvt.train import preflight
from pcpvt.train.history import History, Rate, Window
from pcpvt.train.setup import TrainSetup, checkpoint_meta
from pcpvt.train.writers import Writer

# (steps done, the step's metrics, with on_error=skip its samples' ids), still on the device
Pending = list[tuple[int, dict[str, Tensor], Tensor | None]]
SHORT_WAIT = 300.0  # seconds that ranks wait for one another after the first step, at least: as long as a save may take
PATIENCE = 20  # times the slowest step that they wait otherwise
MAX_PENDING = 100  # reading metrics earlier than needed would stall the device


def train(
    setup: TrainSetup, state: TrainState, history: History, writers: Sequence[Writer], saver: Saver
) -> tuple[TrainState, History]:
    """Train from `state` to the end of the plan or of the patience, until a signal asks to stop, or until it diverged.

    Unless it has diverged (see `History.diverged`), everything is saved on return.

    Raises:
        UserError: when training cannot continue (what was done is saved), or the last checkpoint cannot be written.
    """
    session, plan, config = setup.session, setup.plan, setup.session.config
    start = step = int(state.step)  # steps done
    pending: Pending = []
    rate, unreadable = Rate(), UnreadableLog(setup.batches.dataset, setup.console)
    first_seconds, stopped = 0.0, False
    try:
        if owes_evaluation(plan, history, step):  # the run was interrupted between this checkpoint and its evaluation
            history, stopped = _evaluate(setup, state, history, writers, saver)
        batches = iter(session.device.prefetch(setup.train_loader))
        while step < plan.steps and not stopped and not history.exhausted(config.patience):
            # Stop when asked. All processes take the same decision at the same step.
            if setup.stopwatch.meet(stop_requested):
                break

            # Take a batch.
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            if step == 0:
                for writer in writers:
                    writer.first_batch(batch)
            # A copy: the batch's own would keep its shared memory, and a file descriptor, until it is read.
            ids = batch["id"].clone() if config.data.on_error == "skip" else None

            # Step. The new state reuses the memory of the old one.
            state, metrics = setup.step(state, batch)
            step += 1
            stacks.at_step(step)
            # The evaluation in the history belongs to the former parameters.
            history = history._replace(metrics=None)
            pending.append((step, metrics, ids))

            # Decide what is due.
            ends = step == plan.steps
            logs = ends or _due(plan.log_every, step)
            evaluates = _evaluation_due(plan, step)
            saves = ends or evaluates or _due(plan.save_every, step)
            changes_size = plan.sizes.changes_before(step)  # of the next step

            # Read the metrics if something needs them; the first two steps are timed for the preflight.
            if logs or saves or changes_size or len(pending) >= MAX_PENDING or step - start <= 2:
                history, pending = _read(setup, unreadable, history, pending, writers), []
                if history.diverged(config.max_skipped):
                    break

            # Record.
            seconds = time.perf_counter() - began
            rate.add(plan.batch, seconds, waited)
            history = histories.add_step(history, seconds, timed=step - start > 1 or plan.steps == 1)
            signals.finish_step_first(config.grace)  # from the first step on there is something to save
            for writer in writers:
                writer.step(step, rate)
            if rate.slowest:
                collectives.limit_waiting(max(SHORT_WAIT, PATIENCE * rate.slowest))
            if step - start == 1:
                first_seconds = seconds
            elif step - start == 2:
                memory, images = session.device.memory_stats(), len(setup.split.dataset)
                setup.console.say(preflight.expectation(plan, step, images, first_seconds, seconds, memory))
                reader = setup.train_loader
                setup.console.say(preflight.feeding(reader.seconds, seconds - waited, reader.workers))
            setup.stopwatch.add(waited, interrupted=saves or evaluates)
            if logs:
                entry = histories.train_record(history, plan, step, rate, setup.mfu(rate.images_per_sec, step - 1))
                try:
                    entry |= setup.stopwatch.record()
                finally:  # where another process is lost meanwhile, the record is complete but for these
                    history = history._replace(window=Window(), records=history.records + 1)
                    for writer in writers:
                        writer.record(entry)

            if changes_size:
                rate.restart()

            # Save, and evaluate while the checkpoint is being written.
            if saves:
                _save(setup, state, history, saver)
            if evaluates:
                history, stopped = _evaluate(setup, state, history, writers, saver)
    except UserError as error:  # the data or another process failed; no step had begun to change the state
        if isinstance(error, FaultError) and error.passed is not None:
            saver.withdraw(error.passed, error.evidence)
        if isinstance(error, FaultError) and not error.state_is_whole:
            raise
        history = _read(setup, unreadable, history, pending, writers, with_others=False)
        saver.save(state, checkpoint_meta(setup, history))
        saver.finish()
        raise
    history = _read(setup, unreadable, history, pending, writers)
    if history.diverged(config.max_skipped):
        saver.finish()
    else:
        _save(setup, state, history, saver)
        saver.finish_last(step)
    return state, history


def _save(setup: TrainSetup, state: TrainState, history: History, saver: Saver) -> None:
    """Save a state that all processes agree on; otherwise see `Audit.compare_states`."""
    try:
        setup.audit.compare_states(state)
    except PeerError:  # who is lost has not found the state wrong
        saver.save(state, checkpoint_meta(setup, history))
        saver.finish()
        raise
    saver.save(state, checkpoint_meta(setup, history))


def finished(plan: Plan, history: History, step: int, patience: int) -> bool:
    """Whether nothing is left to do after `step` steps."""
    ended = step >= plan.steps or history.exhausted(patience)
    return ended and not owes_evaluation(plan, history, step)


def owes_evaluation(plan: Plan, history: History, step: int) -> bool:
    """Whether an evaluation was due after `step` steps and did not take place."""
    return step > 0 and history.metrics is None and _evaluation_due(plan, step)


def stop_requested() -> bool:
    """Whether any process got a signal."""
    return collectives.any_true(signals.stop_requested())


def _read(
    setup: TrainSetup, unreadable: UnreadableLog, history: History, pending: Pending, writers: Sequence[Writer],
    *, with_others: bool = True,
) -> History:  # fmt: skip
    """Add the pending steps' metrics, up to the step at which the run counts as diverged, and replaced images.

    Args:
        with_others: add up the replaced images of all processes, which must all call this; otherwise only this one's.
    """
    config = setup.session.config
    if config.data.on_error == "skip":
        replaced = _name_replaced(setup, unreadable, pending)
        if with_others:
            replaced = int(collectives.sum_numbers([float(replaced)])[0])
        history = history._replace(replaced=history.replaced + replaced)
    for step, metrics, _ in pending:
        history = histories.add_metrics(history, step, metrics)
        if history.streak:
            for writer in writers:
                writer.bad_step(history.streak[-1])
        if history.diverged(config.max_skipped):
            break
    return history


def _name_replaced(setup: TrainSetup, unreadable: UnreadableLog, pending: Pending) -> int:
    """Name the unreadable images that this process has replaced in the pending steps; returns their number."""
    count = 0
    for step, _, ids in pending:
        assert ids is not None
        for draw, used in zip(setup.batches.draws(step - 1), ids.tolist(), strict=True):
            if draw.index != used:
                unreadable.add(draw.index, f"sample {used} is used instead")
                count += 1
    return count


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _evaluation_due(plan: Plan, step: int) -> bool:
    return _due(plan.eval_every, step) or (plan.eval_every > 0 and step >= plan.steps)


def _evaluate(
    setup: TrainSetup, state: TrainState, history: History, writers: Sequence[Writer], saver: Saver
) -> tuple[History, bool]:
    """Evaluate the current parameters; returns the history, and whether a signal stopped the evaluation.

    With EMA the metrics are those of the averaged weights; `acc1_raw` (or `map_raw`) and `loss_raw` are those of the
    weights.
    """
    session, data, step = setup.session, setup.split.dataset, int(state.step)
    began = time.perf_counter()
    weights = [session.inference(params) for params in (state.ema, state.params) if params]
    summaries = evaluate(
        session,
        setup.split,
        lambda batch: [setup.eval_step(params, batch) for params in weights],
        stop=stop_requested,
    )
    if summaries is None:
        return history, True
    evaluation, *others = summaries
    metrics = evaluation.metrics
    for other in others:
        metrics |= {f"{name}_raw": other.metrics[name] for name in (session.task.metrics[0], "loss")}
    entry = histories.eval_record(setup.plan, step, metrics, time.perf_counter() - began)
    for writer in writers:
        writer.record(entry)
    history = histories.add_evaluation(history, step, metrics, session.config.best)
    if history.best is not None and history.best["step"] == step:
        about = {"step": step, **per_class(evaluation, data.classes)}
        assert evaluation.log is not None  # it is of the first model
        mistakes.write(session, evaluation.log, data, about, setup.console.warn)
    saver.add_evaluation(state, checkpoint_meta(setup, history))
    return history, False
