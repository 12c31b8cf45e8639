"""Digests: a few numbers, computed on the device, by which processes compare large tensors with one another.

A checksum is exact: it differs whenever a single bit does. A sketch is for results that differ in rounding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pcpvt.functional.flat import Flat

_ROW = 1024  # words of 32 bits; also the row of a flat tensor
CHECKSUM = 2  # numbers
_PATTERNS = 2  # of signs in a sketch
SKETCH = 1 + _PATTERNS  # numbers


def checksum(tensor: Tensor) -> Tensor:
    """The digest, int64 [CHECKSUM], of the bit pattern of a tensor of any shape and dtype, of up to 2**27 words.

    The tensor's words of 32 bits, in rows, are summed by row and by column, modulo 2**32 as integers are on every
    device, so the order of addition does not matter. The sums are added with weights below 2**15, which cannot
    overflow. If one word changes, its row's and its column's sum change, and so do both numbers; two changes go
    unnoticed only where they cancel in both.
    """
    words = tensor.detach().reshape(-1).view(torch.uint8)
    if gap := -len(words) % (4 * _ROW):
        words = torch.cat([words, words.new_zeros(gap)])
    rows = words.view(torch.int32).view(-1, _ROW)
    sums = (rows.sum(dim, dtype=torch.int32).to(torch.int64) for dim in (1, 0))
    return torch.stack([(each * _weights(len(each), each.device)).sum() for each in sums])


def sketch(flat: Tensor) -> Tensor:
    """The digest, float32 [SKETCH], of a flat tensor of whole rows: its norm, and its products with vectors of signs.

    The products of two tensors differ by about the norm of their difference, and by d if one element differs by d.
    """
    rows = flat.view(-1, _ROW)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    across, down = _weights(_ROW, flat.device), _weights(len(rows), flat.device)
    numbers = [torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1))]
    for bit in range(_PATTERNS):
        signs, others = ((weights >> bit + 3 & 1).to(rows.dtype) * 2 - 1 for weights in (across, down))
        numbers.append((rows @ signs) @ others)
    return torch.stack(numbers).to(torch.float32)


def parts(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a state by path, as `state.flatten`, but named tensors in one flat tensor are one part."""
    if isinstance(tree, Flat):
        return {prefix: tree.flat} if tree else {}
    if isinstance(tree, Tensor):
        return {prefix: tree}
    items: Mapping[str, Any] = tree._asdict() if hasattr(tree, "_asdict") else tree
    found: dict[str, Tensor] = {}
    for name, value in items.items():
        found |= parts(value, f"{prefix}/{name}" if prefix else name)
    return found


def _weights(count: int, device: torch.device) -> Tensor:
    """int64 `[count]` from 1 to 2**15 - 1, without a pattern in which likely errors would cancel."""
    i = torch.arange(count, device=device)
    return (i * 7919 + i * i * 10007 + (i >> 3) * 31) % 32767 + 1
