"""Precision policies (the dtypes of parameters, computation and output) and loss scaling; casts are explicit.

A policy is written `params=float32,compute=bfloat16,output=float32` (the notation of jmp). Parameters are cast to the
compute dtype once per step, gradients are taken in it and summed in the parameters' dtype, and logits are cast to the
output dtype before the loss.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pcpvt.functional.flat import Flat
from pcpvt.models.layers import Params

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

_NORM = re.compile(r"(^|\.)norm\d?\.(weight|bias)$")


class Policy(NamedTuple):
    params: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    output: torch.dtype = torch.float32

    def __str__(self) -> str:
        return ",".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in self._asdict().items())


def is_norm(name: str) -> bool:
    """Whether a parameter is one of a LayerNorm."""
    return _NORM.search(name) is not None


def cast(params: Flat, policy: Policy, fp32_norms: bool = False) -> Params:
    """Parameters in the compute dtype; `fp32_norms` keeps those of norms in float32 at least (`layers.LayerNorm`)."""
    narrow = params.to(policy.compute)
    wide = params.to(torch.promote_types(policy.compute, torch.float32)) if fp32_norms else narrow
    return {name: (wide if is_norm(name) else narrow)[name] for name in params}


FLOAT32 = Policy()


def parse(text: str) -> Policy:
    """`float32` | `bfloat16` | `float16` | `float64` | `params=..,compute=..,output=..` to a Policy.

    A single name is the compute dtype over float32 parameters and output (float64 is used for all three).

    Raises:
        ValueError: names the part that is not understood.
    """
    if text == "float64":
        return Policy(*[torch.float64] * 3)
    if text in DTYPES:
        return Policy(compute=DTYPES[text])
    fields = {}
    for part in text.split(","):
        name, _, dtype = part.partition("=")
        if name not in Policy._fields or dtype not in DTYPES or name in fields:
            raise ValueError(
                f"{part!r} is not understood; write one of {', '.join(DTYPES)} or "
                "params=DTYPE,compute=DTYPE,output=DTYPE"
            )
        fields[name] = DTYPES[dtype]
    return Policy(**fields)


class DynamicScale(NamedTuple):
    """Loss scale for float16: halved after a non-finite gradient, doubled after `interval` good steps in a row.

    Its state, `{"factor": float32 [], "good": int32 []}`, is part of TrainState.
    """

    initial: float = 2.0**15
    interval: int = 2000
    maximum: float = 2.0**24

    def init(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        return {
            "factor": torch.tensor(self.initial, dtype=torch.float32, device=device),
            "good": torch.zeros((), dtype=torch.int32, device=device),
        }

    def update(self, state: dict[str, Tensor], skip: Tensor) -> dict[str, Tensor]:
        """The next state; `skip` is float32 [], 1 after a non-finite gradient. Nothing is copied to the host."""
        good = (state["good"] + 1) * (1 - skip).to(torch.int32)
        grow = good >= self.interval
        factor = state["factor"] * torch.where(skip > 0, 0.5, torch.where(grow, 2.0, 1.0))
        return {"factor": factor.clamp(1.0, self.maximum), "good": torch.where(grow, torch.zeros_like(good), good)}


class Overflow(NamedTuple):
    """The device's overflow flag, for hardware that saturates: there an overflow gives no inf or nan."""

    clear: Callable[[], None]
    seen: Callable[[], Tensor]  # float32 [] on the device: not 0 if anything overflowed since `clear`


class NoScale(NamedTuple):
    """No loss scaling, for float32 and bfloat16; the state is empty."""

    def init(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        return {}

    def update(self, state: dict[str, Tensor], skip: Tensor) -> dict[str, Tensor]:
        return state


UNSCALED = NoScale()


def loss_scale(policy: Policy) -> DynamicScale | NoScale:
    return DynamicScale() if policy.compute == torch.float16 else UNSCALED
