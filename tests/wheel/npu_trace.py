"""Lists the operators that a function runs on an NPU, and whether the installed torch_npu has kernels for them.

Nothing is computed: tensors are fake tensors, with a shape, a dtype and the device npu:0. Run it in a process started
with `real_torch_npu.environment("Ascend910B2")`.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

# Generic kernels made of other operators, in the dispatcher's order of preference.
GENERIC = ("CompositeExplicitAutogradNonFunctional", "CompositeExplicitAutograd", "CompositeImplicitAutograd")


class Operator(NamedTuple):
    calls: int
    where: str  # "npu": it has a kernel; "composite": made of operators that have one; "cpu": falls back to the host
    missing: tuple[str, ...]  # for "cpu": the operators without a kernel


def trace(function: Callable[[], object]) -> dict[str, Operator]:
    """Calls `function` once with fake tensors; returns its operators on npu tensors by name.

    `function` creates its npu tensors itself (`device="npu"`). It may use CPU tensors created earlier. Reading a value
    from a fake tensor raises, except from a constant: `int(torch.tensor(3))`.
    """
    if not torch.npu.device_count():
        raise RuntimeError("autograd on npu needs a simulated device: start with environment('Ascend910B2')")
    with FakeTensorMode(allow_non_fake_inputs=True), _Recorder() as recorder:
        function()
    return {
        name: Operator(calls, _where(name, recorder.missing[name]), tuple(sorted(recorder.missing[name])))
        for name, calls in sorted(recorder.calls.items())
    }


def report(operators: dict[str, Operator]) -> str:
    """The table of a trace, as Markdown."""
    rows = [f"| `{name}` | {o.calls} | {o.where} | {', '.join(o.missing)} |" for name, o in operators.items()]
    return "\n".join(["| operator | calls | runs as | without a kernel |", "|---|---|---|---|", *rows])


def _where(name: str, missing: set[str]) -> str:
    if missing:
        return "cpu"
    return "npu" if has_kernel(name, "PrivateUse1") else "composite"


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.missing: defaultdict[str, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if func.namespace != "prim" and any(t.device.type == "npu" for t in tensors):
            self.calls[func.name()] += 1
            self.missing[func.name()] |= without_kernel(func, args, kwargs)
        return out


class _Collector(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def without_kernel(func, args: tuple, kwargs: dict, inside: tuple[str, ...] = ()) -> set[str]:
    """Operators without an NPU kernel that this call needs; generic kernels run on meta tensors to find theirs."""
    name = func.name()
    if has_kernel(name, "PrivateUse1") or name in inside:
        return set()
    generic = next((key for key in GENERIC if has_kernel(name, key)), None)
    if generic is None:
        return {name}
    with _disable_current_modes():
        args, kwargs = tree_map(_on_meta, (args, kwargs))
        # A kernel that reads values stops with an error; the operators that it called before count.
        with _Collector() as collector, contextlib.suppress(Exception):
            func._op_dk(getattr(DispatchKey, generic), *args, **kwargs)
    return set().union(*(without_kernel(*call, (*inside, name)) for call in collector.seen))


def _on_meta(value):
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value
