"""`--mode=schedule`: the learning rate of any config, step by step, without training: printed, as CSV and as a plot."""

from __future__ import annotations

from pcpvt.checkpoints.atomic import write_atomically
from pcpvt.config.plan import Plan, make_plan
from pcpvt.report import charts, page
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console
from pcpvt.runtime.session import Session

IMAGENET = 1_281_167  # training images of ImageNet-1k
ROWS, POINTS = 24, 2000  # printed and written; a shorter run has all its steps in the CSV


def run(session: Session) -> int:
    """Writes `schedule.csv` and `schedule.html` and prints a table; returns the exit code."""
    config, console = session.config, Console(session.world.is_main)
    if config.data.name in ("", "folder") and not config.data.path:
        console.say(f"note: config.data.path is not set: {IMAGENET:,} training images are assumed, as ImageNet has")
        examples, classes = IMAGENET, 1000
    else:
        source = sessions.open_data(session, "train")
        examples, classes = len(source), len(source.classes)
    plan = make_plan(config, examples=examples, num_classes=classes, micro_batch=config.batch_size)
    console.say(
        f"{config.schedule}: {plan.steps} steps of batch {plan.batch} = {plan.epochs:.4g} epochs; peak {plan.lr:.4g}"
    )
    console.say(f"{'epoch':>9} {'step':>9}  lr")
    for step in spread(plan.steps, ROWS):
        console.say(f"{epoch(plan, step):9.2f} {step:9d}  {plan.schedule(step):.4e}")
    steps = spread(plan.steps, POINTS)
    rows = [f"{step},{epoch(plan, step):.6f},{plan.schedule(step):.10e}" for step in steps]
    curve = charts.Series("learning rate", [(epoch(plan, step), plan.schedule(step)) for step in steps])
    text = page.render_charts(
        f"{config.model.name}: learning rate", [charts.chart("Learning rate, by epoch", [curve], zero=True)]
    )
    table = "step,epoch,lr\n" + "\n".join(rows) + "\n"
    write_atomically(session.workdir / "schedule.csv", lambda temporary: temporary.write_text(table))
    write_atomically(session.workdir / "schedule.html", lambda temporary: temporary.write_text(text))
    console.say(f"written: {session.workdir / 'schedule.csv'}, schedule.html")
    return 0


def spread(steps: int, count: int) -> list[int]:
    """At most `count` steps from the first to the last, evenly."""
    if steps <= count:
        return list(range(steps))
    return [round(i * (steps - 1) / (count - 1)) for i in range(count)]


def epoch(plan: Plan, step: int) -> float:
    return step * plan.batch / plan.examples
