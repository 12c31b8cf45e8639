"""The NPU code against the real torch_npu wheel with stub libraries: `pytest -m wheel`. Downloads 42 MB once."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
WHEEL = TESTS / "wheel"
pytestmark = pytest.mark.wheel


def real_environment(soc: str) -> dict[str, str]:
    sys.path.insert(0, str(WHEEL))
    try:
        import real_torch_npu
    finally:
        sys.path.remove(str(WHEEL))
    try:
        return real_torch_npu.environment(soc)
    except real_torch_npu.Unavailable as reason:
        pytest.skip(str(reason))


def run(*arguments: str | Path, soc: str = "Ascend910B2") -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, env=real_environment(soc), capture_output=True, text=True, timeout=300)


def on_wheel(body: Callable[[], None]) -> Callable[[], None]:
    """Decorator for a test without arguments: its body runs in a process whose torch.npu is the real wheel's."""

    def test() -> None:
        paths = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(WHEEL)!r}]"
        ended = run("-c", f"{paths}; import {body.__module__} as m; m.{body.__name__}.body()")
        assert ended.returncode == 0, f"exit {ended.returncode}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"

    test.__name__, test.__doc__, test.body = body.__name__, body.__doc__, body
    return test


def test_every_used_name_and_keyword_exists():
    ended = run(WHEEL / "conformance.py", *(TESTS.parent / "pcpvt" / "devices").glob("*.py"))
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert int(ended.stdout.splitlines()[-1].split()[0]) >= 8, f"too few uses were seen: {ended.stdout}"


@on_wheel
def test_names_that_device_uses_of_its_module_exist():
    import torch

    source = (TESTS.parent / "pcpvt" / "devices" / "base.py").read_text()
    names = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.module"
    }
    assert len(names) >= 7 and [name for name in names if not hasattr(torch.npu, name)] == []


def test_wrong_names_keywords_and_options_are_reported(tmp_path):
    (tmp_path / "wrong.py").write_text(
        "import torch\nfrom torch_npu import npu_fusion_attention as attend\n"
        "torch.npu.set_device(0)\ntorch.npu.set_devise(0)\ntorch.npu.set_compile_mode(jit=True)\n"
        "torch.npu.config.allow_internal_formats = False\nattend(1, 2, 3, 4, 'BNSD', scales=1.0)\n"
    )
    ended = run(WHEEL / "conformance.py", tmp_path / "wrong.py")
    reported = [line for line in ended.stdout.splitlines() if "wrong.py:" in line]
    assert [int(line.split(":")[1]) for line in reported] == [4, 5, 6, 7], ended.stdout
    assert "6 uses, 4 wrong" in ended.stdout and ended.returncode == 1


@on_wheel
def test_hccls_watchdog_takes_another_limit_and_its_recorder_obeys_our_variables():
    import datetime
    import json
    import os

    import torch.distributed as dist
    from torch_npu._C import _distributed_c10d as library

    from pcpvt.devices.npu import Npu

    os.environ |= {name: value.format(file="/tmp/x") for name, value in Npu.recording.items()}
    seconds = datetime.timedelta(seconds=300)
    group = library.ProcessGroupHCCL(dist.HashStore(), 0, 1, seconds)
    group.set_timeout(datetime.timedelta(seconds=30))
    assert group.options._timeout == datetime.timedelta(seconds=30)
    found = json.loads(Npu().recorded_collectives()["hccl"])
    assert "version" in found, found
    os._exit(0)  # the stub libraries do not let its threads end


@on_wheel
def test_standin_has_only_names_and_arguments_of_the_wheel():
    import torch
    import torch_npu

    for file, real in (("npu.py", torch.npu), ("__init__.py", torch_npu)):
        tree = ast.parse((TESTS / "npu_standin" / "site" / "torch_npu" / file).read_text())
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
        assert functions
        for function in functions:
            operator = getattr(torch.ops.npu, function.name, None)
            if operator is not None:
                known = {a.name for name in operator.overloads() for a in getattr(operator, name)._schema.arguments}
            else:
                target = getattr(real, function.name)
                known = set(inspect.signature(target.__new__ if inspect.isclass(target) else target).parameters)
            ours = {a.arg for a in [*function.args.args, *function.args.kwonlyargs]}
            assert ours <= known, f"{file}: {function.name}: {ours - known} unknown"
        imported = [a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
        if file == "npu.py":
            assert all(hasattr(real, name) for name in imported if name != "annotations")
    assert torch.npu.utils.is_support_inf_nan


@on_wheel
def test_wheel_and_standin_refuse_the_same_operators_under_torch_func():
    import torch
    import torch.nn.functional as F
    from torch._subclasses.fake_tensor import FakeTensorMode

    def raises(function) -> bool:
        try:
            torch.func.grad(lambda t: function(t).sum())(torch.empty(2, 2, 6, 4, device="npu"))
        except RuntimeError as error:
            return "storage" in str(error)
        return False

    with FakeTensorMode():
        assert raises(lambda t: F.scaled_dot_product_attention(t, t, t))
        assert raises(lambda t: t.softmax(-1))
        assert raises(lambda t: F.adaptive_avg_pool2d(t, 1))
        assert raises(lambda t: F.one_hot((t > 0).long()) * t[..., None])
        assert not raises(lambda t: torch.ops.aten._softmax(t, -1, False))
        assert not raises(lambda t: F.layer_norm(t, (4,)))


@on_wheel
def test_wheel_lacks_the_optimizer_kernels_that_the_standin_refuses():
    from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel

    source = (TESTS / "npu_standin" / "standin.cpp").read_text()
    listed = source.split("refused{")[1].split("};")[0].replace('"', "").replace("\n", "").split(",")
    assert len(listed) > 5 and not [name for name in listed if has_kernel(name.strip(), "PrivateUse1")]
    assert has_kernel("aten::_fused_adamw_", "PrivateUse1") and has_kernel("aten::_foreach_mul_.List", "PrivateUse1")


@on_wheel
def test_fused_adamw_ignores_grad_scale_and_found_inf():
    import torch
    from torch.autograd.profiler import profile

    def calls(**given) -> list[str]:
        lists = [[torch.empty(4, device="npu")] for _ in range(4)]
        numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
        with profile() as record:
            try:
                one = [torch.empty((), device="npu")]
                torch._fused_adamw_(*lists, [], one, **numbers, amsgrad=False, maximize=False, **given)
            except RuntimeError as error:
                assert "aclnnApplyAdamWV2" in str(error)  # the kernel itself is not in the stub libraries
        return [event.name for event in record.function_events if event.name.startswith("aten::")]

    scalar = torch.empty((), device="npu")
    plain, scaled = calls(), calls(grad_scale=scalar, found_inf=scalar)
    assert "aten::_fused_adamw_" in plain and plain == scaled


@on_wheel
def test_vision_transformer_step_does_not_fall_back_to_the_cpu():
    import torch
    from npu_trace import report, trace
    from test_npu_standin import ADAMW, by_autograd, by_func, example

    def step(differentiate) -> None:
        params, image, label = example(torch.bfloat16)
        params = {name: torch.empty(p.shape, dtype=p.dtype, device="npu") for name, p in params.items()}
        image, label = (torch.zeros(t.shape, dtype=t.dtype, device="npu") for t in (image, label))
        grads = [g.float() for g in differentiate(params, image, label)[0].values()]
        master, mu, nu = ([torch.zeros_like(g) for g in grads] for _ in range(3))
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, [1 / (norm + 1)] * len(grads))
        count = torch.ones((), device="npu")
        torch._fused_adamw_(master, grads, mu, nu, [], [count] * len(grads), lr=int(torch.tensor(3)) * 1e-3, **ADAMW)

    for differentiate in (by_autograd, by_func):
        operators = trace(lambda differentiate=differentiate: step(differentiate))
        assert not [name for name, o in operators.items() if o.where == "cpu"], report(operators)
        assert operators["npu::npu_fusion_attention"].where == "npu"


@pytest.mark.parametrize(
    ("soc", "attention"), [("Ascend910B2", "npu::npu_fusion_attention"), ("Ascend910A", "aten::_softmax")]
)
def test_pcpvt_step_does_not_fall_back_to_the_cpu(soc, attention):
    ended = run(WHEEL / "our_step.py", soc=soc)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert soc in ended.stdout and attention in ended.stdout
    assert ended.stdout.count("_fused_adamw_") == 2, "once per gradient implementation"


# Launches of a step; when a change makes them fewer, lower the budget and the figures in the README.
BUDGET = {
    "Ascend910B2": {"train": 870, "train_ema": 873, "eval": 277},
    "Ascend910A": {"train": 1058, "train_ema": 1061, "eval": 338},
}


@pytest.mark.parametrize(("product", "step"), [(p, step) for p, steps in BUDGET.items() for step in steps])
def test_a_step_stays_within_its_launches_and_waits_once_at_most(product, step):
    real_environment(product)  # skips without the wheel
    sys.path.insert(0, str(WHEEL))
    try:
        import launches
    finally:
        sys.path.remove(str(WHEEL))
    found = launches.count(product, step)
    assert 0.9 * BUDGET[product][step] < found.total <= BUDGET[product][step], found.operators.most_common(12)
    assert sum(found.waits.values()) == (0 if step == "eval" else 1), found.waits
    forms = ["aclnnGeluV2 none"] if step == "eval" else ["aclnnGeluV2 none", "aclnnGeluBackwardV2 none"]
    assert found.gelus == dict.fromkeys(forms, 16), "exact GELU, once per block"


@on_wheel
def test_operator_without_a_kernel_is_reported():
    import torch
    from npu_trace import trace

    def function() -> None:
        x = torch.empty(4, device="npu")
        torch.nn.functional.huber_loss(x, x)

    assert {n: o.missing for n, o in trace(function).items() if o.where == "cpu"} == {
        "aten::huber_loss": ("aten::huber_loss",)
    }


@on_wheel
def test_the_library_reads_the_settings_that_are_its_own():
    import torch_npu

    from pcpvt.devices.npu_settings import SETTINGS

    library = (Path(torch_npu.__file__).parent / "lib" / "libtorch_npu.so").read_bytes()
    own = [name for name, setting in SETTINGS.items() if "torch_npu: " in setting.source]
    assert len(own) == 4
    assert [name for name in [*own, "expandable_segments"] if name.encode() not in library] == []
