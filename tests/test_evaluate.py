"""Fréchet distance against scipy, bits/dim against a direct sum, features on real digits."""

import numpy as np
import pytest
import scipy.linalg
import torch

from ddpm_lit.bound import vlb_terms
from ddpm_lit.data import Images, load_images, to_network
from ddpm_lit.ddpm import DDPM
from ddpm_lit.evaluate import ClassifierFeatures, evaluate_bpd, feature_statistics, frechet_distance, generators
from ddpm_lit.forward import linear_schedule


def rng(seed):
    return torch.Generator().manual_seed(seed)


def law(d, seed, rank=None):
    a = torch.randn(d, rank or d, generator=rng(seed), dtype=torch.float64)
    return torch.randn(d, generator=rng(seed + 1), dtype=torch.float64), a @ a.T


@pytest.mark.parametrize("d", [1, 2, 32, 200])
def test_the_distance_is_that_of_scipys_matrix_root(d):
    (m1, c1), (m2, c2) = law(d, 0), law(d, 2)
    product = scipy.linalg.sqrtm((c1 @ c2).numpy())
    expected = ((m1 - m2) ** 2).sum().item() + np.trace(c1.numpy() + c2.numpy() - 2 * np.real(product))
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-8)


def test_singular_covariances_do_no_harm():
    m1, c1 = law(64, 0, rank=5)
    assert abs(frechet_distance(m1, c1, m1, c1)) < 1e-5
    assert frechet_distance(m1, c1, m1, 4 * c1) == pytest.approx(c1.trace().item(), rel=1e-6)  # (2 - 1)² tr C


def test_float32_input_is_computed_in_float64():
    m, c = law(16, 0)
    assert abs(frechet_distance(m.float(), c.float(), m.float(), c.float())) < 1e-9


@pytest.mark.parametrize("bad", [(1, [[1]], 1, [[1]]), ([1], [[1]], [1, 1], [[1]]), ([1], [1], [1], [[1]])])
def test_shapes_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(*bad)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        frechet_distance([float("nan")], [[1.0]], [0.0], [[1.0]])


def test_statistics_are_numpys():
    f = torch.randn(50, 7, generator=rng(0)) + 1000
    mean, cov = feature_statistics(f)
    np.testing.assert_allclose(mean, f.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(f.double().T), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="features must"):
        feature_statistics(f[:1])


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


@pytest.fixture(scope="module")
def features(digits):
    return ClassifierFeatures(digits)


def test_the_features_know_digits_and_their_scale_is_the_one_we_quote(digits, features):
    noise = torch.randint(256, (500, 1, 8, 8), generator=rng(0), dtype=torch.uint8)
    assert features.accuracy > 0.95
    assert features(digits.pixels[:3]).shape == (3, 32)
    assert features.distance(digits.pixels[features.test], digits.pixels) < 0.6
    assert 200 < features.distance(noise, digits.pixels) < 500
    turned = digits.pixels[:500].transpose(2, 3)
    assert 10 < features.distance(turned, digits.pixels) < 500


def test_images_held_out_are_not_trained_on(digits, features):
    assert len(features.test) == 500 and not set(features.test.tolist()) & set(features.train.tolist())
    assert len({*features.test.tolist(), *features.train.tolist()}) == len(digits)


def test_features_refuse_what_they_cannot_read(digits, features):
    with pytest.raises(ValueError, match=r"pixels must be \(n, 1, 8, 8\)"):
        features(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match="labels"):
        ClassifierFeatures(Images(digits.pixels))
    with pytest.raises(ValueError, match="held_out"):
        ClassifierFeatures(digits, held_out=1797)


def test_bits_per_dim_is_the_mean_of_the_bound(digits):
    m = DDPM(lambda x, t: x, linear_schedule(20, 0.01, 0.3))
    bits = evaluate_bpd(m, digits, n=30, batch_size=30, generator=rng(1))
    terms = vlb_terms(m, to_network(digits.pixels[:30]), *generators(rng(1), 1))
    assert bits.total == pytest.approx(terms.total.double().mean().item(), rel=1e-6)
    assert bits.error == pytest.approx(terms.total.double().std().item() / 30**0.5, rel=1e-4)
    assert bits.decoder == pytest.approx(terms.decoder.mean().item(), rel=1e-5)
    assert bits.prior == pytest.approx(terms.prior.mean().item(), rel=1e-5)
    torch.testing.assert_close(bits.kl.float(), terms.kl.mean(0))
    assert bits.n == 30


def test_bits_per_dim_needs_images(digits):
    m = DDPM(lambda x, t: x, linear_schedule(20))
    for n in (1, 1798):
        with pytest.raises(ValueError, match="n must"):
            evaluate_bpd(m, digits, n=n)
