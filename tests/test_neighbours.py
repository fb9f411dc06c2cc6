"""Precision, recall, density, coverage, the kernel distance, copies, against their published definitions in NumPy."""

import inspect

import numpy as np
import pytest
import torch
from doubles import rng

from ddpm_lit import neighbours
from ddpm_lit.neighbours import density_coverage, expected_coverage, kernel_distance, nearest_ratio, precision_recall


def brute(samples, real, k):
    "Precision and recall, one pair of points at a time."

    def fraction(points, centres):
        radii = [np.sort([np.linalg.norm(c - other) for other in centres])[k] for c in centres]
        near = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return np.mean(near)

    return fraction(samples, real), fraction(real, samples)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_precision_and_recall_are_those_of_brute_force(k, offset, dtype):
    real = (torch.randn(60, 4, generator=rng(40)) + offset).to(dtype)
    samples = (0.6 * torch.randn(45, 4, generator=rng(41)) + 0.5 + offset).to(dtype)
    expected = brute(samples.double().numpy(), real.double().numpy(), k)
    assert precision_recall(samples=samples, real=real, k=k) == pytest.approx(expected)
    assert expected[0] > expected[1] + 0.1, "narrow samples: precise, but missing much"


def test_precision_and_recall_of_known_cases():
    a = torch.randn(300, 6, generator=rng(42))
    assert precision_recall(samples=a, real=a + 100) == (0, 0)
    assert precision_recall(samples=a, real=a) == (1, 1)
    modes = torch.tensor([[-50.0], [50.0]]).repeat_interleave(150, 0).expand(-1, 6) + a
    half, other = modes[:150][::2], modes[1::2]
    precision, recall = precision_recall(samples=half, real=other)
    assert precision > 0.85 and 0.4 < recall < 0.5, "what is drawn is real, and half of what is real is drawn"
    assert precision_recall(samples=other, real=half) == (recall, precision)
    junk = torch.cat([other[:75], other[:75] + 1000])
    assert precision_recall(samples=junk, real=other)[0] == 0.5


def test_precision_and_recall_in_blocks():
    a, b = (torch.randn(2300, 3, generator=rng(seed), dtype=torch.float64) for seed in (43, 44))
    away = torch.cdist(a, b)
    radii = torch.cdist(b, b).sort(1).values[:, 3]
    assert precision_recall(samples=a, real=b)[0] == pytest.approx((away <= radii).any(1).double().mean().item())


def test_precision_and_recall_refuse():
    a = torch.zeros(5, 2)
    for samples, real in ((a, torch.zeros(5, 3)), (a[0], a), (a, a[None])):
        with pytest.raises(ValueError, match=r"features must be \(n, d\), \(m, d\), got"):
            precision_recall(samples=samples, real=real)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k must be from 1 to less than the number of images, 5 and 9; got {k}"):
            precision_recall(samples=a, real=torch.zeros(9, 2), k=k)


def pair(n=45, m=60, d=4, seed=40):
    return torch.randn(n, d, generator=rng(seed)).double() * 0.8 + 0.4, torch.randn(
        m, d, generator=rng(seed + 1)
    ).double()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_density_and_coverage_are_those_of_prdc(k):
    "Its definitions: full distance matrices, `radii` from a partition that counts the point itself."
    samples, real = pair()
    away = np.linalg.norm(real.numpy()[:, None] - samples.numpy()[None], axis=-1)
    among = np.linalg.norm(real.numpy()[:, None] - real.numpy()[None], axis=-1)
    radii = np.partition(among, k, axis=-1)[:, k]
    density = (away < radii[:, None]).sum(axis=0).mean() / k
    coverage = (away.min(axis=1) < radii).mean()
    assert density_coverage(samples=samples, real=real, k=k) == pytest.approx((density, coverage))


@pytest.mark.parametrize("n, m, k", [(1, 2, 1), (4, 9, 3), (30, 4, 2)])
def test_the_expected_coverage_is_that_of_random_orders(n, m, k):
    draw = np.random.default_rng(0)
    kinds = np.array([0] * (m - 1) + [1] * n)  # real ones are 0, samples 1: covered, unless the first k are all real
    covered = [draw.permutation(kinds)[:k].any() for _ in range(20_000)]
    assert expected_coverage(n, m, k) == pytest.approx(np.mean(covered), abs=0.02)


def published_kid(x, y, subsets, size, draw):
    "torch-fidelity's: cubic kernel, gamma 1/d, and the unbiased estimate on random subsets."
    values = []
    for _ in range(subsets):
        f, g = (z[draw.choice(len(z), size, replace=False)] for z in (x, y))
        k_ff, k_gg, k_fg = (((u @ v.T) / x.shape[1] + 1) ** 3 for u, v in ((f, f), (g, g), (f, g)))
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (k_ff, k_gg))
        values.append(within - 2 * k_fg.sum() / size**2)
    return np.mean(values), np.std(values)


def test_the_kernel_distance_is_the_published_one():
    samples, real = pair(80, 80)
    full = published_kid(samples.numpy(), real.numpy(), 1, 80, np.random.default_rng(0))[0]
    assert kernel_distance(samples=samples, real=real) == pytest.approx((full, 0))
    ours = kernel_distance(samples=samples, real=real, size=20, subsets=400, generator=rng(0))
    theirs = published_kid(samples.numpy(), real.numpy(), 400, 20, np.random.default_rng(1))
    assert ours[0] == pytest.approx(theirs[0], abs=4 * theirs[1] / 400**0.5)
    assert ours[1] == pytest.approx(theirs[1], rel=0.15)
    again = kernel_distance(samples=samples, real=real, size=20, subsets=400, generator=rng(0))
    assert again == ours, "the same seed, the same subsets"
    fewer = kernel_distance(samples=samples[:10], real=real, size=20, subsets=3, generator=rng(0))
    assert np.isfinite(fewer).all(), "all of the smaller set, a part of the larger one"


def test_copies_and_new_ones():
    train, new = pair(60, 60, 3)
    assert nearest_ratio(samples=train[:9], train=train, held_out=new) == 0
    by_hand = torch.cdist(new, train).amin(1).mean() / (torch.cdist(train, train) + 1e9 * torch.eye(60)).amin(1).mean()
    assert nearest_ratio(samples=new, train=train) == pytest.approx(by_hand.item())


@pytest.mark.parametrize("function", [precision_recall, density_coverage, kernel_distance, nearest_ratio])
def test_the_two_sets_are_named_and_not_exchanged_by_position(function):
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match="positional"):
        function(*pair())


@pytest.mark.parametrize("name", sorted({*neighbours.__all__} - {"expected_coverage"}))
def test_bad_features_are_refused(name):
    second = "train" if name == "nearest_ratio" else "real"
    good = pair(9, 9, 2)
    for bad, text in ((torch.zeros(9, 3), "features must be .n, d., .m, d."), (good[0] / 0, "features must be finite")):
        with pytest.raises(ValueError, match=text):
            getattr(neighbours, name)(**{"samples": good[0], second: bad})
