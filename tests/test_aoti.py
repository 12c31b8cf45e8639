"""`export.format=aoti`: compiled code computes what the model computes, and says where it cannot run."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile

import pytest
import torch

from pcpvt.checkpoints.load import load_model, trained_config
from pcpvt.config import recipes
from pcpvt.config.resolve import resolve
from pcpvt.data import sources
from pcpvt.devices import cpu_kernels
from pcpvt.errors import UserError
from pcpvt.export import aoti as compiling
from pcpvt.export import run as export
from pcpvt.functional.objective import make_predict
from pcpvt.runners import aoti, exported
from pcpvt.runners.runner import open_configured
from pcpvt.runtime import session as sessions

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")


def session(workdir, trained, **fields) -> sessions.Session:
    """A session that exports the miniature run."""
    stored, _ = trained_config("", [], trained)
    config, _ = resolve(lambda arg: recipes.from_arg(arg, "pcpvt_s", 0.2), "cpu", {}, mode="export", trained=stored)
    config.update_from_flattened_dict({"checkpoint": str(trained), "export.format": "aoti", **fields})
    return sessions.start(config, workdir)


@pytest.fixture(scope="module")
def package(trained, tmp_path_factory):
    """The miniature run as a package, in float32."""
    folder = tmp_path_factory.mktemp("aoti")
    assert export.run(session(folder, trained, precision="float32")) == 0
    return folder / "export" / "pcpvt_nano-aoti.pt2"


def test_a_package_is_evaluated_as_the_checkpoint(pcpvt, trained, package, tmp_path):
    result = json.loads((package.parents[1] / "result-export.json").read_text())
    assert result["output"] == str(package) and [case["batch"] for case in result["verified"]] == [1, 3]
    assert all(case["difference"] < 1e-5 for case in result["verified"])
    words = ["--mode=eval", "--config=configs/pcpvt_s.py:cpu,digits", f"--config.checkpoint={package}"]
    pcpvt(*words, "--config.eval.batch_size=60", f"--workdir={tmp_path}")
    found = json.loads((tmp_path / "result-eval.json").read_text())
    wanted = json.loads((trained / "result.json").read_text())
    assert (found["acc1"], found["acc5"], found["seen"]) == (wanted["acc1"], wanted["acc5"], 364)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert (found["image_size"], found["crop"]) == ([32, 32], 1.0) and list(found["recall"]) == list("0123456789")
    assert found["precision"] == f"AOTInductor, PyTorch {torch.__version__}, float32"


def test_weights_are_packed_and_threads_are_those_of_the_program_that_loads_the_package(package):
    """Without packed weights it takes twice the time; a number of threads in the code would be that of this machine."""
    with zipfile.ZipFile(package) as archive:
        code = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))
    assert "num_threads(" not in code and "_frozen_param" in code


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (
            {"torch": "2.99.0"},
            f"was compiled by PyTorch {torch.__version__} and this is 2.99.0: export the model again",
        ),
        ({"machine": "riscv64", "instructions": ["v"]}, "was compiled for another processor: "),
        ({"instructions": []}, "was compiled for another processor: "),
    ],
)
def test_code_that_cannot_run_here_is_refused_before_it_is_loaded(
    package, trained, tmp_path, monkeypatch, here, message
):
    exported._read.cache_clear()
    monkeypatch.setattr(torch._inductor, "aoti_load_package", None)
    before = aoti.host()
    monkeypatch.setattr(aoti, "host", lambda: {**before, **here})
    with pytest.raises(UserError) as caught:
        open_configured(session(tmp_path, trained)._replace(config=with_checkpoint(package)))
    assert str(caught.value).startswith(f"{package}: {message}") and "\n" not in str(caught.value)


def with_checkpoint(path):
    config = recipes.from_arg("cpu,digits", "pcpvt_nano", 0.0)
    config.checkpoint = str(path)
    return config


def test_packages_of_other_programs_and_damaged_ones_are_one_line(package, tmp_path):
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/data/aotinductor/model/code_metadata.json", '{"AOTI_DEVICE_KEY": "cpu"}')
    with pytest.raises(UserError, match=r"other\.pt2: is code that another program has compiled, which does not say"):
        exported.read(other)
    half = tmp_path / "half.pt2"
    half.write_bytes(package.read_bytes()[: package.stat().st_size // 2])
    with pytest.raises(UserError, match=r"half\.pt2: cannot be read as torch.export \(.*\): export it again"):
        exported.read(half)


@pytest.mark.parametrize("installed", [False, True])
def test_without_a_compiler_that_works_nothing_is_written(trained, tmp_path, monkeypatch, installed):
    def fail(*arguments, **options):
        raise RuntimeError("C++ compile error\n\nerror: no such header")

    monkeypatch.setenv("CXX", "true" if installed else "no-such-compiler")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(UserError) as caught:
        export.run(session(tmp_path, trained))
    remedy = r"cannot compile the model here \(RuntimeError: .*\): use openvino" if installed else r"install g\+\+"
    assert re.match(rf"config\.export\.format: aoti.*{remedy}", str(caught.value)) and "\n" not in str(caught.value)
    assert not list((tmp_path / "export").iterdir())


@pytest.mark.slow  # float32, from normalised images: test_a_package_is_evaluated_as_the_checkpoint
@pytest.mark.skipif(not cpu_kernels.usable(torch.bfloat16), reason="no bfloat16 on this processor")
def test_bfloat16_from_pixels_to_probabilities(trained, tmp_path):
    fields = {"precision": "bfloat16", "export.preprocess": True, "export.output": str(tmp_path / "a.pt2")}
    export.run(session(tmp_path, trained, **fields))
    images = torch.from_numpy(sources.digits("val", (32, 32)).images[:40])
    loaded = load_model(trained)
    with torch.no_grad():
        found = torch._inductor.aoti_load_package(str(tmp_path / "a.pt2"))(images)
        wanted = make_predict(loaded.model)(loaded.params, images).softmax(-1)
    assert found.dtype == torch.float32 and 1e-6 < (found - wanted).abs().max() < 0.03
    runner = open_configured(session(tmp_path, trained)._replace(config=with_checkpoint(tmp_path / "a.pt2")))
    assert runner.precision.endswith(", bfloat16")
    torch.testing.assert_close(runner.predict(images).softmax(-1), found)


def test_the_limit_of_the_comparison_is_twice_the_rounding_of_the_precision(package, trained, tmp_path, monkeypatch):
    """A package that computes another model is not kept, whatever the precision."""
    other = exported.start(package, exported.read(package), torch.float32)[0]
    monkeypatch.setattr(compiling, "compile_graph", lambda *_: lambda images: other(images) + 0.05 * images.mean())
    with pytest.raises(UserError, match="the package, with batch 1 at 32x32 px, differs from the model by"):
        export.run(session(tmp_path, trained, precision="float32"))
