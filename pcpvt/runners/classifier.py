"""A model with weights that stay the same, as a function from pixels to logits: the fastest that the device has.

Without a compiler the model holds the weights in the kernels' format and runs in inference mode. With
`config.compile=inductor` on a CPU the whole graph is compiled ahead of time, with the weights as constants; the package
is kept in the compile cache (`TORCHINDUCTOR_CACHE_DIR`), so that the next start only loads it.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

import pcpvt as root
from pcpvt.checkpoints import checkpoint
from pcpvt.devices import ahead
from pcpvt.devices.compile import backend, reason
from pcpvt.errors import UserError, suppress_logging
from pcpvt.functional import mixing
from pcpvt.functional.objective import normalisation
from pcpvt.functional.precision import Policy
from pcpvt.models import pcpvt
from pcpvt.models.layers import Kernels
from pcpvt.models.pcpvt import PCPVT, Params
from pcpvt.runtime.session import Session

KEPT = 8  # compiled packages, of about the size of the weights each; the oldest are deleted


class Classifier(nn.Module):
    """A bound model from uint8 images `[b, h, w, channels]` to logits `[b, classes]`."""

    def __init__(self, bound: PCPVT, policy: Policy, kernels: Kernels):
        super().__init__()
        self.bound, self.policy, self.kernels = bound, policy, kernels

    def forward(self, images: Tensor) -> Tensor:
        x = mixing.decode_images(images, None, *normalisation(self.bound.in_chans))
        return self.bound(x.to(self.policy.compute), kernels=self.kernels).to(self.policy.output)


def classifier(session: Session, model: PCPVT, params: Params) -> Callable[[Tensor], Tensor]:
    """uint8 images `[b, h, w, channels]` on the device to logits, by weights that are copied now.

    Raises:
        UserError: when the model cannot be compiled as `config.compile` says.
    """
    kind = backend(session.device, session.config.compile)
    if kind == "inductor" and session.device.name == "cpu":
        return _compiled(session, model, params)
    if kind != "none":
        predict, weights = session.predictor(model), session.inference(params)
        return lambda images: predict(weights, images)
    return torch.inference_mode()(
        Classifier(pcpvt.bind(model, session.inference(params)), session.policy, session.kernels)
    )


def _compiled(session: Session, model: PCPVT, params: Params) -> Callable[[Tensor], Tensor]:
    """The compiled package of this model at this size, from the compile cache or new in it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir(), "pcpvt")
    path = folder / f"{_key(session, model, params)}.pt2"
    try:
        if not path.exists():
            _write(folder, path, _compile(session, model, params))
        path.touch()  # it was used last
        package = ahead.load_package(path)
    except OSError as error:
        raise UserError(
            f"config.compile: {folder}: cannot be written ({error.strerror or error}): set TORCHINDUCTOR_CACHE_DIR, or "
            "use config.compile=none"
        ) from None
    except Exception as error:  # PyTorch raises what it likes, also when there is no C++ compiler
        raise UserError(
            f"config.compile: 'inductor' cannot compile here ({reason(error)}): use config.compile=none"
        ) from error
    shape = (*session.size, model.in_chans)

    def run(images: Tensor) -> Tensor:
        assert images.shape[1:] == shape, images.shape  # compiled code checks neither sizes nor strides
        return package(images.contiguous())

    return run


def _compile(session: Session, model: PCPVT, params: Params) -> bytes:
    constants = {name: nn.Parameter(value, False) for name, value in session.compute(params).items()}
    device = session.device
    plain = session.config.kernels == "plain"
    kernels = device.plain_kernels() if plain else device.kernels(session.policy.compute, compiled=True)
    whole = Classifier(pcpvt.bind(model, constants), session.policy, kernels)
    images = torch.zeros(2, *session.size, model.in_chans, dtype=torch.uint8)
    with suppress_logging():
        program = torch.export.export(whole, (images,), dynamic_shapes={"images": {0: Dim("batch")}})
    return ahead.compile_package(program).getvalue()


def _key(session: Session, model: PCPVT, params: Params) -> str:
    """Changes with all that the compiled code depends on: weights, size, precision, processor, PyTorch, our code."""
    code = hashlib.blake2b(digest_size=16)
    for room in ("devices", "functional", "models", "runners"):
        for file in sorted(Path(root.__file__).parent.joinpath(room).glob("*.py")):
            code.update(file.read_bytes())
    about = {
        "torch": torch.__version__, "processor": ahead.instructions(),
        "threads": torch.get_num_threads(), "code": code.hexdigest(),
        "size": session.size, "precision": str(session.policy), "kernels": session.config.kernels,
        "model": [model.spec, model.num_classes, model.pad, model.in_chans],
    }  # fmt: skip
    return checkpoint.digest(about, sorted(params.items()))


def _write(folder: Path, path: Path, content: bytes) -> None:
    """Writes the package, whole or not at all, and deletes the oldest of too many."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
    kept = sorted(folder.glob("*.pt2"), key=lambda other: other.stat().st_mtime, reverse=True)
    for old in kept[KEPT:]:
        old.unlink(missing_ok=True)
