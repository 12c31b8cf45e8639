"""Mixup, cutmix and image decoding: timm's distributions, exact labels, one compiled graph."""

import numpy as np
import pytest
import torch
from pictures import MEAN, STD, agree

from pcpvt.functional import mixing
from pcpvt.rng import generator


def our_lambdas(spec: mixing.MixSpec, draws: int, batch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample 0's lambda and the area of its box, over many draws."""
    lam, area = np.empty(draws), np.empty(draws)
    for i in range(draws):
        weights, boxes = mixing.mixing_draws(generator(0, "mix", i), batch, (size, size), spec)
        top, bottom, left, right = boxes[0]
        lam[i], area[i] = weights[0], (bottom - top) * (right - left) / size**2
    return lam, area


def timm_lambdas(spec: mixing.MixSpec, draws: int, batch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for timm's Mixup, measured on a batch whose first image is black and whose others are white."""
    from timm.data import Mixup

    mixup = Mixup(
        spec.mixup, spec.cutmix, prob=spec.prob, switch_prob=spec.switch_prob, mode=spec.mode,
        label_smoothing=0, num_classes=batch,
    )  # fmt: skip
    before = np.random.get_state()
    np.random.seed(0)
    lam, area = np.empty(draws), np.empty(draws)
    images = torch.ones(batch, 1, size, size)
    images[0] = 0
    for i in range(draws):
        x, target = mixup(images.clone(), torch.arange(batch))
        lam[i] = target[0, 0]
        cut = x[0].unique().tolist() == [0, 1]  # mixup gives a single grey
        area[i] = (x[0] == 1).float().mean() if cut else 0
    np.random.set_state(before)
    return lam, area


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param((0.8, 1.0, 1.0, 0.5), marks=pytest.mark.slow),
        (0.2, 1.0, 0.7, 0.3),
        (0.8, 0.0, 1.0, 0.5),
        (0.0, 1.0, 0.5, 0.5),
    ],
)
def test_draws_have_timms_distributions(mode, case):
    spec = mixing.MixSpec(*case, mode)
    ours, theirs = our_lambdas(spec, 3000, 4, 28), timm_lambdas(spec, 3000, 4, 28)
    for a, b in zip(ours, theirs, strict=True):
        assert agree(a, b)
    shares = [np.stack([area > 0, lam == 1, (lam < 1) & (area == 0)]).astype(float) for lam, area in (ours, theirs)]
    for a, b in zip(*shares, strict=True):
        assert agree(a, b)


@pytest.mark.parametrize("mode, distinct", [("batch", 1), ("pair", 8), ("elem", 16)])
def test_mode_selects_the_samples_that_share_a_draw(mode, distinct):
    lam, box = mixing.mixing_draws(generator(0, "mix"), 16, (32, 48), mixing.MixSpec(0.8, 0.0, mode=mode))
    assert len(np.unique(lam)) == distinct
    assert lam.dtype == np.float32 and box.dtype == np.int32 and not box.any()
    if mode == "pair":
        np.testing.assert_array_equal(lam[::2], lam[1::2])


def test_cutmix_lambda_is_the_exact_area_inside_the_image():
    height, width = 20, 33
    spec = mixing.MixSpec(0.0, 1.0, mode="elem")
    lam, box = mixing.mixing_draws(generator(1, "mix"), 2000, (height, width), spec)
    top, bottom, left, right = box.T
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= height).all() and (right <= width).all()
    assert (top == 0).any() and (bottom == height).any() and (left == 0).any() and (right == width).any()
    np.testing.assert_allclose(lam, 1 - (bottom - top) * (right - left) / (height * width), rtol=1e-6)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_stay_normalised(mode, smoothing):
    classes, batch = 1000, 64
    labels = torch.from_numpy(generator(0, "labels").integers(0, classes, batch))
    for seed in range(20):
        lam, _ = mixing.mixing_draws(generator(seed, "mix"), batch, (32, 32), mixing.MixSpec(mode=mode))
        targets = mixing.mix_targets(labels, torch.from_numpy(lam), classes, smoothing)
        assert targets.dtype == torch.float32 and (targets >= 0).all()
        # 1000 entries of 1e-4, each rounded by at most 2**-25 of itself, and two near 1
        np.testing.assert_allclose(targets.double().sum(1), 1, atol=3e-7)


def test_targets_are_timms_for_the_same_lambda():
    from timm.data.mixup import mixup_target

    labels = torch.tensor([3, 1, 4, 1])
    timm_order = labels[[0, 2, 3, 1]]  # timm pairs first with last: (0, 1) and (2, 3) here
    for lam in (0.0, 0.3, 1.0):
        ours = mixing.mix_targets(labels, torch.full((4,), lam), 5, 0.1)
        theirs = mixup_target(timm_order, 5, lam, 0.1)[[0, 3, 1, 2]]
        torch.testing.assert_close(ours, theirs)


def test_targets_accept_distributions_and_no_mixing():
    labels = torch.tensor([0, 2])
    one_hot = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
    lam = torch.tensor([0.7, 0.2])
    torch.testing.assert_close(mixing.mix_targets(one_hot, lam, 3), mixing.mix_targets(labels, lam, 3))
    torch.testing.assert_close(mixing.mix_targets(labels, None, 3), one_hot, rtol=0, atol=0)


def test_label_mass_equals_pixel_mass():
    """A black and a white image: the partner's share of the pixels equals its share of the label."""
    x = torch.stack([torch.zeros(24, 40, 3), torch.ones(24, 40, 3)])
    for seed in range(200):
        lam, box = mixing.mixing_draws(generator(seed, "mix"), 2, (24, 40), mixing.MixSpec(mode="elem"))
        mixed = mixing.mix_images(x, torch.from_numpy(lam), torch.from_numpy(box))
        targets = mixing.mix_targets(torch.tensor([0, 1]), torch.from_numpy(lam), 2)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets[:, 1], rtol=1e-5, atol=1e-6)


def test_mixed_images_follow_the_formula():
    x = torch.from_numpy(generator(0, "x").standard_normal((4, 6, 8, 3), np.float32))
    lam = torch.tensor([0.25, 0.25, 0.5, 1.0])
    box = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 4, 2, 8], [0, 0, 0, 0]], dtype=torch.int32)
    mixed = mixing.mix_images(x, lam, box)
    torch.testing.assert_close(mixed[0], 0.25 * x[0] + 0.75 * x[1])
    torch.testing.assert_close(mixed[1], 0.25 * x[1] + 0.75 * x[0])
    expected = x[2].clone()
    expected[1:4, 2:8] = x[3, 1:4, 2:8]
    assert torch.equal(mixed[2], expected)
    assert torch.equal(mixed[3], x[3])


def test_no_mixing_returns_the_input_bit_for_bit():
    x = torch.from_numpy(generator(0, "x").standard_normal((6, 5, 5, 3), np.float32))
    lam, box = mixing.mixing_draws(generator(0, "mix"), 6, (5, 5), mixing.MixSpec(prob=0.0))
    assert torch.equal(mixing.mix_images(x, torch.from_numpy(lam), torch.from_numpy(box)), x)


def test_mixing_does_not_depend_on_how_the_batch_is_split():
    x = torch.from_numpy(generator(0, "x").standard_normal((8, 6, 6, 3), np.float32))
    labels = torch.arange(8)
    draws = mixing.mixing_draws(generator(3, "mix"), 8, (6, 6), mixing.MixSpec(mode="pair"))
    lam, box = (torch.from_numpy(a) for a in draws)
    whole = mixing.mix_images(x, lam, box), mixing.mix_targets(labels, lam, 10, 0.1)
    for size in (2, 4):
        parts = [slice(i, i + size) for i in range(0, 8, size)]
        assert torch.equal(torch.cat([mixing.mix_images(x[p], lam[p], box[p]) for p in parts]), whole[0])
        assert torch.equal(torch.cat([mixing.mix_targets(labels[p], lam[p], 10, 0.1) for p in parts]), whole[1])


def test_odd_batches_are_refused():
    with pytest.raises(AssertionError, match="odd"):
        mixing.mixing_draws(generator(0, "mix"), 3, (8, 8), mixing.MixSpec())
    with pytest.raises(AssertionError, match="odd"):
        mixing.mix_targets(torch.arange(3), torch.ones(3), 5)


def test_decoding_normalises_like_torchvision():
    from torchvision.transforms.functional import normalize

    image = torch.from_numpy(generator(0, "x").integers(0, 256, (2, 16, 12, 3), dtype=np.uint8))
    ours = mixing.decode_images(image, None, MEAN, STD)
    theirs = normalize(image.permute(0, 3, 1, 2) / 255, MEAN, STD).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_erased_boxes_decode_to_their_noise():
    image = torch.full((2, 8, 8, 3), 7, dtype=torch.uint8)
    image[0, 2:5, 1:7] = 128 + 48
    image[0, 2, 1] = 0
    boxes = torch.tensor([[2, 5, 1, 7], [0, 0, 0, 0]], dtype=torch.int32)
    x = mixing.decode_images(image, boxes, MEAN, STD)
    plain = mixing.decode_images(image, None, MEAN, STD)
    assert (x[0, 3:5, 1:7] == 1.5).all() and (x[0, 2, 1] == -4).all()
    assert (
        torch.equal(x[1], plain[1])
        and torch.equal(x[0, 5:], plain[0, 5:])
        and torch.equal(x[0, :, 7:], plain[0, :, 7:])
    )


def test_one_graph_serves_all_draws():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def batch(seed):
        draws = generator(seed, "x")
        image = torch.from_numpy(draws.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
        erase = torch.tensor([[0, 3, 0, 4]] + 3 * [[0, 0, 0, 0]], dtype=torch.int32)
        mixes = mixing.mixing_draws(draws, 4, (8, 8), mixing.MixSpec(mode="elem"))
        lam, box = (torch.from_numpy(a) for a in mixes)
        return image, erase, lam, box, torch.arange(4)

    def head(image, erase, lam, box, label):
        x = mixing.mix_images(mixing.decode_images(image, erase, MEAN, STD), lam, box)
        return x, mixing.mix_targets(label, lam, 10, 0.1)

    torch._dynamo.reset()
    compiled = torch.compile(head, backend=backend, fullgraph=True, dynamic=False)
    for seed in range(4):
        for a, b in zip(compiled(*batch(seed)), head(*batch(seed)), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) == 1
