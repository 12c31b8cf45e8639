"""The parameters of a run: what they start from, and which of them are trained, how."""

import re
from collections.abc import Collection, Sequence

from ml_collections import ConfigDict

from pcpvt.checkpoints.channels import adapt_channels
from pcpvt.checkpoints.labels import fit_head
from pcpvt.checkpoints.load import HEAD, match_params, read_weights
from pcpvt.errors import UserError
from pcpvt.functional import muon, optim
from pcpvt.models import pcpvt
from pcpvt.models.init import init
from pcpvt.runtime.session import Session


def init_params(
    session: Session, model: pcpvt.PCPVT, classes: Sequence[str] | None = None
) -> tuple[pcpvt.Params, list[str]]:
    """Parameters before the first step, on the host, and notes for the log: initialised, or from `config.finetune`.

    Args:
        classes: of the data; a file that names its own gives the head's rows by name.
    """
    config = session.config
    params = {n: v.to(session.policy.params) for n, v in init(model, config.seed).items()}
    notes = []
    if config.finetune:
        path, weights = read_weights(config.finetune, config.weights)
        fresh = matched(config, "fresh", list(params))
        adapted, about_channels = adapt_channels(weights.params, config.model.in_chans, path)
        head: pcpvt.Params | None = None
        about_head: list[str] = []
        if classes is not None and not fresh & set(HEAD):
            head, about_head = fit_head(path, weights, params, classes, config)
        taken = fresh if head is None else {*fresh, *HEAD}  # the head is settled
        fitted, said = match_params(adapted, pcpvt.shapes(model), path=path, fresh=taken)
        params |= {n: v.to(session.policy.params) for n, v in {**fitted, **(head or {})}.items()}
        notes = [f"fine-tuning from {path} ({weights.which})", *weights.notes, *about_channels, *said, *about_head]
    for field in ("fresh", "frozen"):
        if config[field]:
            notes.append(f"{field}: {_listed(matched(config, field, list(params)), params)}")
    return params, notes


def _listed(selected: Collection[str], params: pcpvt.Params) -> str:
    share = sum(params[n].numel() for n in selected) / sum(v.numel() for v in params.values())
    listed = stems(selected, list(params))
    more = f" and {len(listed) - 12} more" if len(listed) > 12 else ""
    return f"{len(selected)} of {len(params)} leaves, {share:.0%}: {', '.join(listed[:12])}{more}"


def stems(selected: Collection[str], names: Sequence[str], stem: str = "") -> list[str]:
    """Names in short: a stem such as `blocks.0` stands for all names below it when all of them are selected."""
    inside = set(selected)
    if inside.issuperset(names):
        return [stem]
    parts: dict[str, list[str]] = {}
    for name in names:
        part = name.removeprefix(stem).lstrip(".").partition(".")[0]
        parts.setdefault(f"{stem}.{part}".lstrip("."), []).append(name)
    return [s for part, below in parts.items() if inside.intersection(below) for s in stems(selected, below, part)]


def matched(config: ConfigDict, field: str, names: Collection[str]) -> set[str]:
    """The parameters that the regular expression of a field ("fresh", "frozen") matches; none when it is empty.

    Raises:
        UserError: when it matches none or all of them.
    """
    pattern = config[field]
    found = {name for name in names if pattern and re.search(pattern, name)}
    if pattern and len(found) in (0, len(names)):
        which = "all" if found else "none"
        raise UserError(f"config.{field}: {pattern!r} matches {which} of the {len(names)} parameters: correct it")
    return found


def param_groups(session: Session, params: pcpvt.Params) -> list[optim.Group]:
    """The parameters that are not frozen, by weight decay and learning rate."""
    config, frozen = session.config, matched(session.config, "frozen", params)
    trained = {name: value for name, value in params.items() if name not in frozen}
    layer_decay = pcpvt.layer_decay(pcpvt.SPECS[config.model.name], config.layer_decay)
    if config.optimizer == "muon":
        return optim.groups(trained, config.weight_decay, layer_decay, muon.is_matrix)
    return optim.groups(trained, config.weight_decay, layer_decay)
