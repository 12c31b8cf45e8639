"""The architecture: imports go down only, the core is pure, and modules do nothing when they are imported."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from pcpvt import main
from pcpvt.config.fields import DEVICES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pcpvt"

# Upper rooms first; a room imports itself and rooms below it.
ROOMS = [
    "main", "api", "bench", "train", "export", "predict", "evaluate", "runners", "report", "nodes", "runtime",
    "checkpoints", "config", "data", "images", "readers", "distributed", "devices", "functional", "models", "rng",
    "errors", "torchvision_compat",
]  # fmt: skip
PURE = {"functional", "models"}
PURE_IMPORTS = {"torch", "einops", "numpy", "math", "re", "typing", "collections", "functools", "hashlib", "__future__"}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Modules that a file imports, wherever in it, as (dotted name, line)."""
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in PACKAGE.rglob("*.py")}  # fmt: skip


def imported_modules(path: Path) -> list[tuple[str, str, int]]:
    """(module, name inside it or "", line) of each import of this package's own code."""
    found = []
    for name, line in imports(path):
        inner = ""
        while name.startswith("pcpvt") and name not in MODULES:
            name, _, inner = name.rpartition(".")
        if name in MODULES and name != "pcpvt":
            found.append((name, inner, line))
    return found


def edges() -> dict[str, list[tuple[str, int]]]:
    """Module to the modules it imports, with the line; line 0: imports by a computed name."""
    by_name = [("pcpvt.main", f"pcpvt.{module}") for module in main.MODES.values()]
    by_name += [("pcpvt.devices", f"pcpvt.devices.{name}") for name in DEVICES]
    graph = {
        module: [(name, line) for name, _, line in imported_modules(path) if name != module]
        for module, path in MODULES.items()
    }
    for importer, module in by_name:
        assert module in MODULES, module
        graph[importer].append((module, 0))
    return graph


def upward(graph: dict[str, list[tuple[str, int]]]) -> list[str]:
    """Imports of an upper room from a lower one."""
    rank = {room: i for i, room in enumerate(ROOMS)}

    def room(module: str) -> int:
        return rank[module.split(".")[1]] if "." in module else -1

    return [
        f"{module}:{line} imports {name}"
        for module, found in graph.items()
        for name, line in found
        if room(name) < room(module)
    ]


def circle(graph: dict[str, list[tuple[str, int]]]) -> list[str]:
    """The modules of one import circle; empty when there is none."""
    try:
        graphlib.TopologicalSorter({m: {name for name, _ in found} for m, found in graph.items()}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_module_is_in_a_room():
    for module in MODULES:
        assert module == "pcpvt" or module.split(".")[1] in ROOMS, module


def test_imports_go_down_between_rooms():
    assert upward(edges()) == []


def test_imports_form_no_circle():
    assert circle(edges()) == []


def test_upward_imports_and_circles_are_detected():
    graph = edges()
    graph["pcpvt.models.layers"] = [*graph["pcpvt.models.layers"], ("pcpvt.train.loop", 1)]
    assert upward(graph) == ["pcpvt.models.layers:1 imports pcpvt.train.loop"]
    assert {"pcpvt.models.layers", "pcpvt.train.loop"} <= set(circle(graph))


def test_private_names_are_not_imported():
    for path in PACKAGE.rglob("*.py"):
        for module, name, line in imported_modules(path):
            private = [part for part in f"{module}.{name}".split(".") if part.startswith("_")]
            assert not private, f"{path.relative_to(ROOT)}:{line} imports {module}.{name}"


def test_no_room_holds_more_than_15_percent_of_the_lines():
    lines = {room: sum(len(path.read_text().splitlines()) for path in files(room)) for room in ROOMS}
    for room, count in lines.items():
        assert count <= 0.15 * sum(lines.values()), f"{room} has {count} of {sum(lines.values())} lines"


def test_a_training_run_is_one_function_of_at_most_120_lines():
    (train,) = (
        node
        for node in parsed(PACKAGE / "train" / "loop.py").body
        if isinstance(node, ast.FunctionDef) and node.name == "train"
    )
    assert train.end_lineno is not None and train.end_lineno - train.lineno < 120


def test_params_and_batch_are_defined_once():
    for name in ("Params", "Batch"):
        homes = [
            path
            for path in PACKAGE.rglob("*.py")
            for node in parsed(path).body
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
        ]
        assert len(homes) == 1, homes


@pytest.mark.parametrize("room", sorted(PURE))
def test_the_core_knows_no_files_processes_or_devices(room):
    for path in files(room):
        for name, line in imports(path):
            assert name.split(".")[0] in PURE_IMPORTS | {"pcpvt"}, f"{path.relative_to(ROOT)}:{line} imports {name}"
        text = path.read_text()
        for word in (".cuda", ".npu", "open(", "print("):
            assert word not in text, f"{path.relative_to(ROOT)} has {word}"


def test_only_the_npu_device_names_torch_npu():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "npu.py":
            assert not any(name.split(".")[0] == "torch_npu" for name, _ in imports(path)), path


def test_no_module_reads_torchs_global_generator():
    """Draws come from rng; a call that takes no generator would tie a run to its history."""
    drawing = {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "dropout", "manual_seed"}
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "bench":
            continue  # measures; draws nothing that a result depends on
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("torch", "F"):
                assert node.attr not in drawing, f"{path.relative_to(ROOT)}:{node.lineno} calls torch.{node.attr}"


def test_files_have_one_subject_and_at_most_about_300_lines():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 310, path
        assert path.name != "utils.py"
        assert path.name == "__init__.py" or ast.get_docstring(parsed(path)), path


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['pcpvt', '--help']\n"
        "from pcpvt import main\n"
        "try:\n    main.entry()\n"
        "except SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--config.batch_size" in done.stdout
