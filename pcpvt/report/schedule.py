"""`--mode=schedule`: the learning rate of any config, without training: printed, as CSV and as a chart."""

from pcpvt.checkpoints.atomic import write_atomically
from pcpvt.config.plan import make_plan, short_run_notes
from pcpvt.report.charts import Series, chart
from pcpvt.report.run import render
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console
from pcpvt.runtime.session import Session

IMAGENET = 1_281_167  # training images of ImageNet-1k
ROWS, POINTS = 24, 2000  # the most that are printed, and written; a shorter run has all its steps in the CSV


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
    for note in short_run_notes(config, plan):
        console.say(f"note: {note}")

    def rows(count: int) -> list[tuple[float, int, float, int, int]]:
        """(epoch, step, learning rate, height, width) of at most `count` steps, evenly spread, the last included."""
        count = min(plan.steps, count)
        steps = [round(i * (plan.steps - 1) / max(count - 1, 1)) for i in range(count)]
        return [(step * plan.batch / plan.examples, step, plan.schedule(step), *plan.sizes.at(step)) for step in steps]

    amount = f"{plan.steps} steps of batch {plan.batch} = {plan.epochs:.4g} epochs"
    console.say(f"{config.schedule}: {amount}; peak {plan.lr:.4g}\n{'epoch':>9} {'step':>9}  lr")
    for epoch, step, lr, height, width in rows(ROWS):
        px = f"  {height}x{width} px" if config.size_schedule else ""
        console.say(f"{epoch:9.2f} {step:9d}  {lr:.4e}{px}")
    points = rows(POINTS)
    table = "step,epoch,lr,height,width\n"
    table += "".join(f"{step},{epoch:.6f},{lr:.10e},{h},{w}\n" for epoch, step, lr, h, w in points)
    curves = [chart("Learning rate, by epoch", [Series("learning rate", [p[0:3:2] for p in points])], zero=True)]
    if config.size_schedule:
        heights = Series("image height", [(epoch, height) for epoch, _, _, height, _ in points])
        curves.append(chart("Image height in training in pixels, by epoch", [heights], zero=True))
    text = render(f"{config.model.name}: learning rate", curves)
    write_atomically(session.workdir / "schedule.csv", lambda temporary: temporary.write_text(table))
    write_atomically(session.workdir / "schedule.html", lambda temporary: temporary.write_text(text))
    console.say(f"written: {session.workdir / 'schedule.csv'}, schedule.html")
    return 0
