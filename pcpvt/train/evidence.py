"""What an audit that found a difference leaves in the workdir: `debug/audit-STEP-WHAT/`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pcpvt.distributed import collectives
from pcpvt.errors import warn
from pcpvt.functional.objective import Batch
from pcpvt.runtime import records

KEPT = 10  # folders of a run with batches and differences; later ones hold the verdict only
LISTED = 5  # differing elements of a parameter


class Evidence:
    """The folder of one audit; every process may write into it. A file that cannot be written is only a warning."""

    def __init__(self, workdir: Path, step: int, what: str):
        self.folder = workdir / "debug" / f"audit-{step:08d}-{what}"
        others = [path for path in self.folder.parent.glob("audit-*") if path != self.folder]
        self.detailed = len(others) < KEPT

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """One JSON object."""

        def write(path: Path) -> None:
            records.write_json(path, dict(value))

        self._write(name, write)

    def write_batch(self, name: str, batch: Batch) -> None:
        """The tensors of a batch."""

        def write(path: Path) -> None:
            safetensors.torch.save_file({n: value.cpu().contiguous() for n, value in batch.items()}, path)

        self._write(name, write)

    def _write(self, name: str, write: Any) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.folder / name)
        except (OSError, safetensors.SafetensorError) as error:
            warn(f"{self.folder / name}: not written ({error})")


def received(tensor: Tensor, sends: bool) -> Tensor:
    """The tensor of the one process that sends, on all processes, which pass one of its shape; exact."""
    if tensor.is_floating_point():
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        bits = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int64)
        return received(bits, sends).view(tensor.dtype)
    return collectives.psum([tensor if sends else torch.zeros_like(tensor)])[0]


def differences(spans: Mapping[str, slice], ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """By parameter, where the bits of two flat tensors differ: how many elements, how far, the first ones with values.

    Args:
        spans: where each parameter lies.
    """
    found: dict[str, Any] = {}
    ours, theirs = (value.reshape(-1).cpu() for value in (ours, theirs))
    ours = ours.to(theirs.dtype)
    unequal = _bits(ours) != _bits(theirs)
    for name, span in spans.items():
        places = unequal[span].nonzero().flatten().tolist()
        if not places:
            continue
        a, b = ours[span].double(), theirs[span].double()
        found[name] = {
            "elements": len(a), "differing": len(places), "largest": (a - b).abs().max().item(),
            "norm": a.norm().item(), "norm_of_difference": (a - b).norm().item(),
            "first": [{"index": i, "ours": a[i].item(), "theirs": b[i].item()} for i in places[:LISTED]],
        }  # fmt: skip
    return found


def _bits(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int64)
