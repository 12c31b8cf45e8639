"""What `--mode=eval` and `predict` run: weights in this package's model, or an exported graph."""

from collections.abc import Callable
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor

from pcpvt.checkpoints.description import Description
from pcpvt.checkpoints.load import LoadedModel, load_configured
from pcpvt.functional.mixing import decode_images
from pcpvt.functional.objective import normalisation
from pcpvt.models import pcpvt
from pcpvt.runners import exported
from pcpvt.runners.classifier import classifier
from pcpvt.runtime.session import Session


class Runner(NamedTuple):
    """A model that is ready to run, and what is known about it."""

    predict: Callable[[Tensor], Tensor]  # uint8 images `[b, h, w, channels]` to logits `[b, outputs]`, on the device
    path: str  # of the file, or timm:NAME
    which: str  # "params" or "ema"; empty: not known
    outputs: int
    said: Description  # what the file says about itself
    precision: str  # and, of a graph, what runs it
    n_parameters: int | None  # None: not known
    notes: list[str]  # for the log
    meta: dict[str, Any]  # JSON of a checkpoint of pcpvt; empty for other files
    loaded: LoadedModel | None  # the weights; None: a graph

    @property
    def name(self) -> str:
        """The file, and which of its weights."""
        return f"{self.path} ({self.which})" if self.which else self.path

    @property
    def classes(self) -> list[str] | None:
        """Names of the outputs, where the file gives them."""
        return self.said.classes


def open_configured(session: Session) -> Runner:
    """What a config asks for; without `config.checkpoint` the best checkpoint of the workdir. Raises UserError."""
    config = session.config
    if exported.is_graph(config.checkpoint):
        return open_graph(session, config.checkpoint)
    loaded = load_configured(config, session.workdir)
    return of_weights(session, loaded)


def of_weights(session: Session, loaded: LoadedModel) -> Runner:
    """The model with its weights on the device."""
    return Runner(
        classifier(session, loaded.model, loaded.params), loaded.path, loaded.which, loaded.outputs, loaded.said,
        str(session.policy), pcpvt.n_parameters(loaded.model), loaded.notes, loaded.meta, loaded,
    )  # fmt: skip


def open_graph(session: Session, path: str) -> Runner:
    """An exported graph, in the compute precision of the session as far as its runtime has that."""
    graph, said = exported.read(path), exported.describe(path)
    config, facts = session.config, exported.facts(graph)
    exported.check_fit(path, graph, session.size, session.reading.channels, config.num_classes)
    network, runtime = exported.start(path, graph, session.policy.compute)
    mean, std = normalisation(session.reading.channels)
    mean, std = said.mean or mean, said.std or std

    def predict(images: Tensor) -> Tensor:
        if exported.takes_pixels(graph):
            return session.task.logits(network(images.cpu())).to(images.device)
        normalised = decode_images(images.cpu(), None, mean, std)
        return network(rearrange(normalised, "b h w c -> b c h w")).float().to(images.device)

    which = facts.get("weights")
    parameters = None
    if said.model:
        parameters = pcpvt.n_parameters(pcpvt.build(said.model, graph.outputs, in_chans=session.reading.channels))
    return Runner(
        predict, path, which if isinstance(which, str) else "", graph.outputs, said, runtime, parameters, [], {}, None
    )
