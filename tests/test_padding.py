"""Image sizes that 32 does not divide: every patch step pads with zeros at the bottom and right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import images, nano, timm_model, written_out

from pcpvt.models import pcpvt


@pytest.mark.parametrize("size", [(64, 96), (50, 70), (33, 31), (7, 5)])
def test_logits_equal_those_of_convolutions_over_explicitly_padded_maps(size):
    """50x70 gives 13x18, 7x9, 4x5 and 2x3 tokens with 2x3 keys in each stage: embeddings and reductions are padded."""
    model, _ = nano()
    generator = torch.Generator().manual_seed(0)  # init's zeros and ones would hide a parameter that is not used
    params = {
        n: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for n, shape in pcpvt.shapes(model).items()
    }
    x = images(2, *size, 3, dtype=torch.float64)
    expected = written_out(model.spec, params, x)
    torch.testing.assert_close(pcpvt.apply(model, params, x), expected, rtol=1e-10, atol=1e-10)
    assert expected.std() > 0.1


@pytest.mark.full
@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
def test_logits_of_the_full_size_equal_those_of_convolutions(size):
    theirs = timm_model("pcpvt_s").double()
    params = {n: p.detach() for n, p in theirs.named_parameters()}
    x = images(1, *size, 3, dtype=torch.float64)
    expected = written_out(pcpvt.SPECS["pcpvt_s"], params, x)
    found = pcpvt.apply(pcpvt.build("pcpvt_s", 1000), params, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(64, 96), (50, 70), (33, 31), (224, 160), (7, 5)])
def test_with_padding_every_pixel_influences_the_logits(size):
    """Also those of the last row and column."""
    model, params = nano()
    x = images(1, *size, 3, dtype=torch.float64).requires_grad_()
    logits = pcpvt.apply(model, params, x)
    (grad,) = torch.autograd.grad((logits * torch.arange(1, 11)).sum(), x)
    assert logits.isfinite().all()
    assert (grad.abs().amax(-1) > 0).all()


def test_padding_is_zeros_at_the_bottom_and_right_at_every_patch_step():
    """50x70 gives 13x18, 7x9, 4x5, 2x3 tokens: the first step equals explicit padding of the image to 52x72."""
    model, params = nano()
    x = images(1, 50, 70, 3, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 2, 0, 2))
    maps = pcpvt.features(model, params, x)
    assert [tuple(m.shape[2:]) for m in maps] == [(13, 18), (7, 9), (4, 5), (2, 3)]
    assert torch.equal(maps[0], pcpvt.features(model, params, padded)[0])


def test_divisible_sizes_give_the_same_bits_with_pad_and_error():
    model, params = nano()
    strict, _ = nano(pad="error")
    x = images(2, 64, 96, 3, dtype=torch.float64)
    assert torch.equal(pcpvt.apply(model, params, x), pcpvt.apply(strict, params, x))
    with pytest.raises(ValueError, match="not divisible by 32"):
        pcpvt.apply(strict, params, images(1, 50, 64, 3, dtype=torch.float64))
