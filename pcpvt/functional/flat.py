"""Named tensors in one flat tensor, so that a cast, a sum, a norm or an update of all of them is one kernel.

S has 304 parameters, and on an NPU launching a kernel takes as long as computing on most of them.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from pcpvt.models.layers import Params

ALIGNMENT = 64  # elements, 128 bytes or more: kernels read a view as fast as a tensor with memory of its own
_ROW = 1024  # elements; a flat tensor is a whole number of rows


class Flat(dict[str, Tensor]):
    """A dict of parameters that are views of `flat` `[n]`, in order; `pack` makes one.

    A view starts at a multiple of ALIGNMENT; what lies between views is zero. The weight of a patch projection,
    `[o, c, p, q]`, is stored in the order of its linear map, `[o, p q c]`.
    """

    def __init__(self, flat: Tensor, shapes: Mapping[str, torch.Size]):
        self.flat, self.shapes, self._spans = flat, dict(shapes), {}
        start = 0
        for name, shape in self.shapes.items():
            self._spans[name] = (start, start := start + _up(shape.numel(), ALIGNMENT))
        sizes = [stop - start for start, stop in self._spans.values()]
        pieces = flat.split([*sizes, len(flat) - start])  # the last one is the rest of the row
        super().__init__({n: _view(piece, s) for (n, s), piece in zip(self.shapes.items(), pieces, strict=False)})

    def to(self, target: torch.dtype | torch.device) -> "Flat":
        """The parameters in another dtype or on another device; without a copy if they already are."""
        flat = self.flat.to(target)
        return self if flat is self.flat else Flat(flat, self.shapes)

    def clone(self) -> "Flat":
        return Flat(self.flat.clone(), self.shapes)

    def zeros(self, names: Sequence[str]) -> "Flat":
        """Zeros with the names and shapes of parameters that follow each other."""
        begin = list(self).index(names[0]) if names else 0
        assert list(self)[begin : begin + len(names)] == list(names), "these parameters do not follow each other"
        shapes = {name: self.shapes[name] for name in names}
        return Flat(self.flat.new_zeros(_length(shapes.values())), shapes)

    def gather(self, tensors: Params, dtype: torch.dtype) -> Tensor:
        """The flat tensor `[m]`, in `dtype`, of tensors for the first parameters, such as their gradients."""
        assert set(list(self)[: len(tensors)]) == set(tensors), "these parameters are not the first"
        return join({name: tensors[name] for name in list(self)[: len(tensors)]}, dtype)

    def span(self, names: Sequence[str]) -> slice:
        """Where parameters that follow each other lie."""
        return slice(self._spans[names[0]][0], self._spans[names[-1]][1])


def stack(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Parameters of one shape that follow each other, as a view `[k, *shape]` of their part of a flat tensor."""
    numel = math.prod(shape)
    return flat.view(-1, _up(numel, ALIGNMENT))[:, :numel].unflatten(1, shape)


def pack(params: Params, first: Sequence[str] = ()) -> Flat:
    """The parameters, which are of one dtype, copied into one flat tensor; the names in `first` come first."""
    ordered = {name: params[name] for name in [*first, *(name for name in params if name not in set(first))]}
    return Flat(
        join(ordered, next(iter(params.values())).dtype), {name: value.shape for name, value in ordered.items()}
    )


def join(tensors: Params, dtype: torch.dtype) -> Tensor:
    """The flat tensor, in `dtype`, of a Flat with these tensors; neighbours of one dtype are copied by one kernel."""
    values = list(tensors.values())
    flat = torch.empty(_length([value.shape for value in values]), dtype=dtype, device=values[0].device)
    start, pieces = 0, []
    for value, following in zip(values, [*values[1:], None], strict=True):
        pieces.append(_in_order(value))
        if gap := -value.numel() % ALIGNMENT:
            pieces.append(value.new_zeros(gap))
        if following is None or following.dtype != value.dtype:
            stop = start + sum(map(len, pieces))
            torch.cat(pieces, out=flat[start:stop])
            start, pieces = stop, []
    flat[start:].zero_()
    return flat


def norm(flat: Tensor) -> Tensor:
    """The Euclidean norm of a flat tensor: of the norms of its rows.

    PyTorch's CPU kernel sums all 24 M elements of S one after the other, and is 0.15 % wrong; this is 1e-7 off.
    """
    rows = torch.linalg.vector_norm(flat.view(-1, _ROW), dim=1)
    return torch.linalg.vector_norm(rows)


def _view(piece: Tensor, shape: torch.Size) -> Tensor:
    piece = piece[: shape.numel()]
    if len(shape) != 4:
        return piece.view(shape)
    o, c, p, q = shape
    return rearrange(piece.view(o, p, q, c), "o p q c -> o c p q")


def _in_order(value: Tensor) -> Tensor:
    """`[n]`, in the order of the flat tensor; a copy only if the tensor's memory has another order."""
    return (rearrange(value, "o c p q -> o p q c") if value.ndim == 4 else value).reshape(-1)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _length(shapes) -> int:
    return _up(sum(_up(shape.numel(), ALIGNMENT) for shape in shapes), _ROW)
