"""Models with weights that stay the same: bound or compiled ahead, equal to the plain functions, and compiled once."""

from __future__ import annotations

import io
import os
import shutil

import pytest
import torch
from reference import images, nano

from pcpvt.checkpoints.load import load_model
from pcpvt.config import recipes
from pcpvt.data import sources
from pcpvt.devices import ahead
from pcpvt.errors import UserError
from pcpvt.functional.objective import make_predict
from pcpvt.runners import classifier as module
from pcpvt.runners.classifier import classifier
from pcpvt.runtime import session as sessions


def session(folder, **fields) -> sessions.Session:
    config = recipes.from_arg("cpu,digits", "pcpvt_nano", 0.0)
    config.update_from_flattened_dict({"precision": "float32", "image_size": 32, "image_width": 64, **fields})
    return sessions.start(config, folder)


def network():
    model, params = nano()
    return model, {name: value.float() for name, value in params.items()}


def pixels(batch: int) -> torch.Tensor:
    return (images(batch, 32, 64, 3) * 40 + 128).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_a_bound_model_computes_what_the_model_computes_with_the_weights_of_its_making(tmp_path, kernels):
    model, params = network()
    expected = make_predict(model)(params, pixels(3))
    bound = classifier(session(tmp_path, kernels=kernels), model, params)
    first = bound(pixels(3))
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)
    other = classifier(session(tmp_path, kernels=kernels), model, {n: 2 * v for n, v in params.items()})
    assert not torch.allclose(other(pixels(3)), expected)
    assert torch.equal(bound(pixels(3)), first)
    assert all(p.is_meta for p in model.parameters())


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty compile cache; packages hold programs, which are run as they were captured."""

    def compile_package(program):
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return buffer

    monkeypatch.setattr(ahead, "compile_package", compile_package)
    monkeypatch.setattr(ahead, "load_package", lambda path: torch.export.load(path).module())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


def test_the_whole_graph_is_compiled_once_for_every_batch_size(cache, tmp_path):
    model, params = network()
    compiled = classifier(session(tmp_path, compile="inductor"), model, params)
    for batch in (1, 3):
        expected = make_predict(model)(params, pixels(batch))
        torch.testing.assert_close(compiled(pixels(batch)), expected, rtol=1e-5, atol=1e-6)


def test_a_package_is_compiled_when_something_changed_and_those_used_last_are_kept(cache, tmp_path, monkeypatch):
    model, params = network()
    compiled: list[int] = []
    monkeypatch.setattr(module, "_compile", lambda *of: compiled.append(1) or b"package")
    monkeypatch.setattr(module, "KEPT", 3)
    monkeypatch.setattr(ahead, "load_package", lambda path: lambda images: path)

    def path(change: float = 0.0, **fields):
        here = session(tmp_path, compile="inductor", **fields)
        run = classifier(here, model, {**params, "head.bias": params["head.bias"] + change})
        return run(torch.zeros(1, *here.size, 3, dtype=torch.uint8))

    first = path()
    assert path() == first and len(compiled) == 1
    others = [path(1.0), path(image_width=32), path(kernels="plain"), path(precision="bfloat16")]
    assert len({first, *others}) == len(compiled) == 5
    kept = others[-3:]
    for age, package in zip((3, 1, 2), kept, strict=True):
        os.utime(package, (age, age))
    assert path(kernels="plain") == kept[1] and len(compiled) == 5  # used again
    newest = path(2.0)
    assert sorted(newest.parent.iterdir()) == sorted([newest, kept[0], kept[1]])


def test_what_prevents_compiling_is_one_line(cache, tmp_path, monkeypatch):
    model, params = network()
    here = session(tmp_path, compile="inductor")

    def broken(*of):
        raise RuntimeError("no working C++ compiler\nand a second line")

    monkeypatch.setattr(module, "_compile", broken)
    with pytest.raises(
        UserError, match=r"config\.compile: .*no working C\+\+ compiler.*: use config.compile=none"
    ) as it:
        classifier(here, model, params)
    assert "\n" not in str(it.value)


@pytest.mark.slow  # with the compiler replaced: test_the_whole_graph_is_compiled_once_for_every_batch_size
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_predictions_are_those_of_the_model(trained, tmp_path, monkeypatch):
    """In the precision of this processor, on all validation images, with a batch of another size at the end."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    loaded, digits = load_model(trained), torch.from_numpy(sources.digits("val", (32, 32)).images)
    fields = {"image_size": 32, "image_width": 32, "precision": "auto"}
    digits = digits.permute(0, 2, 1, 3)  # as a view: compiled code reads memory in order
    eager, compiled = (
        classifier(session(tmp_path, compile=choice, **fields), loaded.model, loaded.params)
        for choice in ("none", "inductor")
    )
    expected, found = (torch.cat([f(part) for part in digits.split(100)]) for f in (eager, compiled))
    low = session(tmp_path, **fields).policy.compute == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=(2**-5 if low else 1e-5) * expected.abs().max().item())
    counts, wanted = (logits.argmax(-1).bincount(minlength=10) for logits in (found, expected))
    assert (counts - wanted).abs().sum() <= (2 if low else 0)
    monkeypatch.setattr(ahead, "compile_package", None)  # from here on the package is there
    again = classifier(session(tmp_path, compile="inductor", **fields), loaded.model, loaded.params)
    assert torch.equal(again(digits[:100]), found[:100])
