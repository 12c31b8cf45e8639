"""The Python API: its documented example runs, and its results agree with the program's."""

import contextlib
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from pcpvt import api
from pcpvt.data import sources


@pytest.fixture(scope="module")
def net(trained):
    return api.load(trained)


def test_the_documented_example_runs(trained, tmp_path, monkeypatch):
    lines = re.findall(r"^    (\S.*)$", api.__doc__, re.MULTILINE)
    assert len(lines) == 6 and lines[0] == "from pcpvt import api"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pcpvt_s").symlink_to(trained)
    Image.fromarray(sources.digits("val", (32, 32)).images[0]).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec("\n".join(lines), names)
    assert re.fullmatch(r"\[\[\('\d', 0\.\d+\), .*\]\]\n", out.getvalue())
    assert [m.shape[2:] for m in names["maps"]] == [(8, 8), (4, 4), (2, 2), (1, 1)]
    assert names["metrics"]["loss"] > 0 and int(names["state"].step) == 1


def test_the_package_alone_imports_no_torch():
    code = (
        "import sys, pcpvt, pcpvt.config.cli; assert 'torch' not in sys.modules;"
        "pcpvt.api.load; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loaded_weights_reproduce_the_accuracy_of_training(net, trained):
    source = sources.digits("val", net.size)
    images = torch.cat([api.read(image, net.size, net.crop) for image, _ in (source[i] for i in range(len(source)))])
    right = api.logits(net.model, net.params, images).argmax(-1) == torch.from_numpy(source.labels)
    result = json.loads((trained / "result.json").read_text())
    assert 100 * right.float().mean() == pytest.approx(result["acc1"], abs=1e-3)
    assert net.classes == [str(d) for d in range(10)] and net.size == (32, 32) and net.crop == 1.0


def test_steps_learn_and_do_not_change_the_given_params(net):
    before = {name: value.clone() for name, value in net.params.items()}
    image = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    step, state = api.train_step(net.model, lr=1e-2), api.train_state(net.params)
    losses = []
    for _ in range(6):
        state, metrics = step(state, {"image": image, "label": torch.tensor([0, 1, 2, 3])})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0] and int(state.step) == 6
    assert all(torch.equal(before[name], value) for name, value in net.params.items())


def test_features_are_differentiable(net):
    params = {name: value.clone().requires_grad_() for name, value in net.params.items()}
    api.features(net.model, params, api.read(Image.new("RGB", (50, 40), "red"), (64, 64)))[-1].sum().backward()
    assert params["patch_embeds.0.proj.weight"].grad.abs().sum() > 0


def test_unknown_attributes_are_attribute_errors():
    import pcpvt

    with pytest.raises(AttributeError, match="no attribute 'apy'"):
        pcpvt.apy  # noqa: B018
