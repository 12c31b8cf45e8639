"""Several checkpoints of one architecture evaluated together: each member, their averaged probabilities, and the soup.

    --mode=eval --config.eval.ensemble=a.safetensors,b.safetensors      files, workdirs (their best) or timm:NAME
    --mode=eval --config.eval.ensemble=ema                              raw and averaged weights of one checkpoint

The list names all members. The words `params` and `ema` stand for the raw and the averaged weights of the checkpoint
that eval would take alone, and `ema` by itself for both; files are read as `config.weights` says. The soup is the
uniform mean of the members' weights (Wortsman et al. 2022): it costs as much as one model, and suits members of one
descent.

Each member runs by itself, with the kernels, the precision and the batch size of its own evaluation, so its figures are
those that it gets alone. (As one model by `torch.func.vmap` they were not, in bfloat16.)
"""

import time
from collections.abc import Sequence

import torch

from pcpvt.checkpoints.labels import listed, match
from pcpvt.checkpoints.load import HEAD, OWN, LoadedModel, load_model, member_names
from pcpvt.config.plan import eval_batch
from pcpvt.errors import UserError
from pcpvt.evaluate import evaluator, output
from pcpvt.functional.objective import Batch
from pcpvt.models import pcpvt
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console, warn_once
from pcpvt.runtime.session import Session


def members(session: Session) -> list[LoadedModel]:
    """The members that `config.eval.ensemble` names, all of one model.

    Raises:
        UserError: when they are fewer than two, or a file does not fit.
    """
    config = session.config
    names = member_names(config.eval.ensemble)
    if len(names) < 2:
        raise UserError(f"config.eval.ensemble: {config.eval.ensemble!r}: name two or more by comma, or give ema")
    if config.checkpoint and not {config.checkpoint, *OWN} & set(names):
        raise UserError(f"config.eval.ensemble: is without {config.checkpoint}: add it, or leave out config.checkpoint")
    loaded: list[LoadedModel] = []
    for name in names:
        own = name in OWN
        path = (config.checkpoint or session.workdir) if own else name
        # The first one settles what the others must be.
        outputs = loaded[0].model.num_classes if loaded else config.num_classes
        loaded.append(
            load_model(
                path, model=config.model.name, num_classes=outputs, which=name if own else config.weights,
                pad=config.model.pad, in_chans=config.model.in_chans, task=config.task,
            )
        )  # fmt: skip
        if loaded[-1].said.task not in ("", config.task):
            raise UserError(
                f"config.eval.ensemble: {path} was trained with config.task={loaded[-1].said.task} and the others with "
                f"{config.task}: give members of the same task"
            )
    return loaded


def soup(params: Sequence[pcpvt.Params]) -> pcpvt.Params:
    """The uniform mean of several sets of parameters."""
    return {name: torch.stack([p[name] for p in params]).mean(0) for name in params[0]}


def differences(session: Session, member: LoadedModel) -> list[str]:
    """Notes where a member says that it is evaluated with another size or crop than this ensemble."""
    size, crop = member.said.size, member.said.crop
    notes = []
    if size is not None and size != session.size:
        notes.append(
            f"says {size[0]}x{size[1]} px; all members are evaluated at {session.size[0]}x{session.size[1]} px"
        )
    if crop is not None and crop != session.config.eval.crop:
        notes.append(f"says crop {crop:g}; all members are evaluated with {session.config.eval.crop:g}")
    return notes


def align(loaded: Sequence[LoadedModel]) -> list[LoadedModel]:
    """The members with their outputs in the order of the first one that names its classes.

    Raises:
        UserError: when two name different classes.
    """
    first = next((member for member in loaded if member.classes is not None), loaded[0])
    aligned = []
    for member in loaded:
        if first.classes is None or member.classes in (None, first.classes):
            aligned.append(member)
            continue
        assert member.classes is not None
        if set(member.classes) != set(first.classes):
            raise UserError(
                f"config.eval.ensemble: {member.path} was trained on {listed(member.classes)} and {first.path} on "
                f"{listed(first.classes)}: give members of the same classes"
            )
        named = [member.classes.index(name) for name in first.classes]
        rows = [*named, *range(len(named), member.model.num_classes)]  # a head may have more outputs than names
        head = {name: member.params[name][rows] for name in HEAD}
        aligned.append(member._replace(params={**member.params, **head}, said=first.said))
    return aligned


def run(session: Session) -> int:
    """Evaluate the ensemble and write `result-eval.json`, whose own metrics are those of the averaged probabilities."""
    began = time.perf_counter()
    config = session.config
    console = Console(session.world.is_main)
    members_said = members(session)
    for member in members_said:
        for note in (*member.notes, *differences(session, member)):
            console.say(f"note: {member.path}: {note}")
    loaded = align(members_said)
    named = next((member for member in loaded if member.classes is not None), loaded[0])
    matched = match(named, sessions.open_data(session, "val"), config)
    for note in matched.notes:
        console.say(f"note: {note}")
    for warning in matched.warnings:
        warn_once(warning)
    dataset, model = matched.dataset, loaded[0].model
    predict, task = session.predictor(model), session.task
    every = [session.inference(p) for p in [*(m.params for m in loaded), soup([m.params for m in loaded])]]
    split = evaluator.open_split(session, dataset, eval_batch(config))
    console.say(
        f"evaluating {len(loaded)} members on {len(dataset)} images of {config.data.path or config.data.name}, split "
        f"{evaluator.split_name(dataset)}: {session.preprocessing(str(session.policy))}"
    )

    def eval_step(batch: Batch) -> list[evaluator.Scored]:
        *each, blend = [predict(params, batch["image"]) for params in every]
        outputs = [task.average(each), *each, blend]  # the first one is recorded
        return [(logits, task.sums(logits, batch["label"], batch["valid"])) for logits in outputs]

    found = evaluator.evaluate(session, split, eval_step)
    assert found is not None  # nothing stops it
    average, *each, blend = (evaluation.metrics for evaluation in found)
    for member, figures in zip(loaded, each, strict=True):
        console.say(f"{member.path} ({member.which}): {evaluator.report(figures)}")
    console.say(f"soup (mean of weights): {evaluator.report(blend)}")
    console.say(f"ensemble (mean of probabilities): {evaluator.report(average)}")
    described = [{"checkpoint": m.path, "weights": m.which, **figures} for m, figures in zip(loaded, each, strict=True)]
    result = {
        "epochs": None, "checkpoint": config.eval.ensemble, "weights": "ensemble", "precision": str(session.policy),
        "n_parameters": pcpvt.n_parameters(model),
        "ensemble": {"members": described, "average": average, "soup": blend},
    }  # fmt: skip
    evaluated = output.Evaluated(dataset, matched.left_out, found[0], result)
    output.write(session, evaluated, time.perf_counter() - began)
    return 0
