"""The rooms stay separate: imports point downward, the core is pure, and a module does nothing when it is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pcpvt"

# Lower rooms first; a room may import itself and what stands before it.
ROOMS = ["errors", "functional", "models", "devices", "config", "data", "store", "modes"]
PURE = {"functional", "models"}
PURE_IMPORTS = {"torch", "einops", "numpy", "math", "re", "typing", "collections", "functools", "hashlib", "__future__"}


def imports(path: Path) -> list[tuple[str, int]]:
    """Modules that a file imports, wherever in it, as (dotted name, line)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_downward(room):
    # functional and models are one floor: the objective applies the model, the model's init draws from rng.
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) | (PURE if room in PURE else set()) | {"torchvision_compat"}
    for path in files(room):
        for name, line in imports(path):
            if name.startswith("pcpvt."):
                assert name.split(".")[1] in allowed, f"{path.relative_to(ROOT)}:{line} imports {name}"


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
        if path.name not in ("npu.py", "launcher.py"):
            assert not any(name.split(".")[0] == "torch_npu" for name, _ in imports(path)), path


def test_no_module_reads_torchs_global_generator():
    """Draws come from rng; a call that takes no generator would tie a run to its history."""
    drawing = {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "dropout", "manual_seed"}
    for path in PACKAGE.rglob("*.py"):
        if path.name.startswith("bench"):
            continue  # measures; draws nothing that a result depends on
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("torch", "F"):
                assert node.attr not in drawing, f"{path.relative_to(ROOT)}:{node.lineno} calls torch.{node.attr}"


def test_files_have_one_subject_and_at_most_about_300_lines():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 310, path
        assert path.name != "utils.py"
        assert path.name == "__init__.py" or ast.get_docstring(ast.parse(path.read_text())), path


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
