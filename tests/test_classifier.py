"""Models with weights that stay the same compute what the plain functions compute."""

from __future__ import annotations

import pytest
import torch
from reference import images, nano

from pcpvt.config import recipes
from pcpvt.functional.objective import make_predict
from pcpvt.runners.classifier import classifier
from pcpvt.runtime import session as sessions


def session(folder, **fields) -> sessions.Session:
    config = recipes.from_arg("cpu,digits", "pcpvt_nano", 0.0)
    config.update_from_flattened_dict({"precision": "float32", "image_size": 32, "image_width": 64, **fields})
    return sessions.start(config, folder)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_a_bound_model_computes_what_the_model_computes_with_the_weights_of_its_making(tmp_path, kernels):
    model, params = nano()
    params = {name: value.float() for name, value in params.items()}
    pixels = (images(64, 32, 64, 3) * 40 + 128).clamp(0, 255).to(torch.uint8)
    expected = make_predict(model)(params, pixels)
    bound = classifier(session(tmp_path, kernels=kernels), model, params)
    first = bound(pixels)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(*(logits.argmax(-1).bincount(minlength=10) for logits in (first, expected)))
    other = classifier(session(tmp_path, kernels=kernels), model, {n: 2 * v for n, v in params.items()})
    assert not torch.allclose(other(pixels), expected)
    assert torch.equal(bound(pixels), first)
    assert all(p.is_meta for p in model.parameters())
