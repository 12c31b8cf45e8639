"""Checks that the names which source files use of `torch.npu` and `torch_npu` exist in the installed torch_npu.

`check(files)` returns one line per wrong use: a name that does not exist, an option that cannot be set, or a call whose
arguments do not fit the signature (for operators: the schema). It does not detect names used through getattr with a
string, through a variable that holds the module, or as tensor methods.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Use(NamedTuple):
    line: int
    path: str  # dotted, e.g. torch.npu.set_device
    call: ast.Call | None
    assigned: bool


def check(files: list[Path]) -> tuple[int, list[str]]:
    """(number of uses, one line per wrong use)."""
    count, wrong = 0, []
    for file in files:
        for use in sorted(uses(ast.parse(file.read_text())), key=lambda use: use.line):
            count += 1
            if problem := misuse(use):
                wrong.append(f"{file}:{use.line}: {use.path}: {problem}")
    return count, wrong


def uses(tree: ast.AST) -> Iterator[Use]:
    """Every use of the two modules; for a.b.c only the whole chain, not a.b."""
    local_names = {"torch": "torch", "torch_npu": "torch_npu"}  # to dotted paths
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in imports:
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for name in node.names:
            if prefix or name.asname:
                local_names[name.asname or name.name] = prefix + name.name
            if _is_npu(prefix + name.name):
                yield Use(node.lineno, prefix + name.name, None, False)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in inner:
            root, *rest = ast.unparse(node).split(".")
            path = ".".join([local_names.get(root, ""), *rest])
            if root.isidentifier() and _is_npu(path):
                yield Use(node.lineno, path, calls.get(id(node)), isinstance(node.ctx, ast.Store))


def _is_npu(path: str) -> bool:
    return path.split(".")[0] == "torch_npu" or path.split(".")[:2] == ["torch", "npu"]


def misuse(use: Use) -> str | None:
    """The error of one use, or None."""
    *owner, name = use.path.split(".")
    if not owner:
        return None
    try:
        target = importlib.import_module(owner[0])
        for part in owner[1:]:
            target = getattr(target, part)
        if use.assigned:
            # torch.npu.config and similar objects accept any name; those with an effect are constants in __setattr__.
            setter = getattr(type(target).__setattr__, "__code__", None)
            return None if setter is None or name in setter.co_consts else "no such option"
        target = getattr(target, name)
    except AttributeError as error:
        return None if _is_module(use.path) else f"does not exist ({error})"
    return wrong_arguments(use, target) if use.call else None


def _is_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ImportError:
        return False


def wrong_arguments(use: Use, target: object) -> str | None:
    """The error of a call's arguments, or None."""
    import torch

    keywords = [k.arg for k in use.call.keywords if k.arg]
    operator = getattr(torch.ops.npu, use.path.split(".")[-1], None) if use.path.startswith("torch_npu.npu_") else None
    if operator is not None:
        schemas = [getattr(operator, overload)._schema for overload in operator.overloads()]
        unknown = set(keywords) - {argument.name for schema in schemas for argument in schema.arguments}
        return f"unknown keywords {sorted(unknown)}" if unknown else None
    if any(isinstance(a, ast.Starred) for a in use.call.args) or len(keywords) < len(use.call.keywords):
        return None  # * and ** cannot be checked without running the code
    try:
        inspect.signature(target).bind(*use.call.args, **dict.fromkeys(keywords))
    except TypeError as error:
        return str(error)
    except ValueError:
        return None  # a built-in function without a signature
    return None


if __name__ == "__main__":
    count, problems = check([Path(name) for name in sys.argv[1:]])
    print(*problems, f"{count} uses, {len(problems)} wrong", sep="\n")
    sys.exit(bool(problems))
