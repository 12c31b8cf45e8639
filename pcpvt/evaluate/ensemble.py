"""Several checkpoints of one architecture evaluated together: each member, their averaged probabilities, and the soup.

    --mode=eval --config.eval.ensemble=a.safetensors,b.safetensors      files, workdirs (their best) or timm:NAME
    --mode=eval --config.eval.ensemble=ema                              raw and averaged weights of one checkpoint

The list names all members. The words `params` and `ema` stand for the raw and the averaged weights of the checkpoint
that eval would take alone, and `ema` by itself for both; files are read as `config.weights` says. The soup is the
uniform mean of the members' weights (Wortsman et al. 2022): it costs as much as one model, and suits members of one
descent.

On devices with `torch.func.vmap` all members run as one model whose weights have one more axis; elsewhere, and when
compiled, one by one.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pcpvt.checkpoints.load import OWN, LoadedModel, check_labels, load_model, member_names
from pcpvt.config.plan import eval_batch
from pcpvt.devices.compile import backend
from pcpvt.errors import UserError
from pcpvt.evaluate import evaluator
from pcpvt.functional import metrics
from pcpvt.functional.objective import Batch, make_predict
from pcpvt.models import pcpvt
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console
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
        which = name if own else config.weights
        options = {"which": which, "pad": config.model.pad, "in_chans": config.model.in_chans}
        loaded.append(load_model(path, model=config.model.name, num_classes=outputs, **options))
    return loaded


def soup(params: Sequence[pcpvt.Params]) -> pcpvt.Params:
    """The uniform mean of several sets of parameters."""
    return {name: torch.stack([p[name] for p in params]).mean(0) for name in params[0]}


def predict_each(
    session: Session, model: pcpvt.PCPVT, params: Sequence[pcpvt.Params]
) -> Callable[[Tensor], list[Tensor]]:
    """uint8 images `[b, h, w, 3]` to the logits `[b, classes]` of each set of parameters."""
    each = [session.compute(p) for p in params]
    if not vmaps(session):
        one = session.predictor(model)
        return lambda images: [one(p, images) for p in each]
    # What torch.func.stack_module_state does to modules. The CPU's fused attention has no batching rule: written out.
    stacked = {name: torch.stack([p[name] for p in each]) for name in each[0]}
    predict = torch.func.vmap(make_predict(model, policy=session.policy), (0, None))
    return lambda images: list(predict(stacked, images))


def vmaps(session: Session) -> bool:
    """Whether the members run as one; compiled blocks take one member after the other."""
    return session.device.supports_vmap and backend(session.device, session.config.compile) == "none"


def average_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Members' logits to the logarithm of their mean probabilities, `[b, classes]`."""
    return torch.stack([member.log_softmax(-1) for member in logits]).logsumexp(0) - math.log(len(logits))


def run(session: Session) -> int:
    """Evaluate the ensemble and write `result-eval.json`, whose own metrics are those of the averaged probabilities."""
    began = time.perf_counter()
    config = session.config
    console = Console(session.world.is_main)
    loaded = members(session)
    dataset = sessions.open_data(session, "val")
    for member in loaded:
        check_labels(member, dataset.classes, config.num_classes)
    model, count = loaded[0].model, len(loaded)
    predict = predict_each(session, model, [*(m.params for m in loaded), soup([m.params for m in loaded])])
    # As many activations at once as for one model.
    split = evaluator.open_split(session, dataset, max(1, eval_batch(config) // (count + 1)))
    how = "together (vmap)" if vmaps(session) else "one by one"
    console.say(f"evaluating {count} members {how} on {len(dataset)} images of {config.data.path or config.data.name}")

    def eval_step(batch: Batch) -> list[evaluator.Scored]:
        *each, blend = predict(batch["image"])
        outputs = [*each, blend, average_probabilities(each)]
        return [(logits, metrics.sums(logits, batch["label"], batch["valid"])) for logits in outputs]

    summaries = evaluator.evaluate(session, split, eval_step)
    assert summaries is not None  # nothing stops it
    *each, blend, average = summaries
    names = [f"{m.path} ({m.which})" for m in loaded]
    names += ["soup (mean of weights)", "ensemble (mean of probabilities)"]
    for name, summary in zip(names, summaries, strict=True):
        console.say(f"{name}: {evaluator.report(summary)}")
    described = [{"checkpoint": m.path, "weights": m.which, **figures} for m, figures in zip(loaded, each, strict=True)]
    figures = {
        **average, "epochs": None, "checkpoint": config.eval.ensemble, "weights": "ensemble",
        "ensemble": {"members": described, "average": average, "soup": blend, "vmap": vmaps(session)},
    }  # fmt: skip
    evaluator.write_result(session, model, figures, time.perf_counter() - began)
    return 0
