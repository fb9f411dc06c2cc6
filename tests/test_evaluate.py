"""Evaluation against the paper's formulas in NumPy, SciPy's matrix root, brute force, and laws known exactly."""

import hashlib
import os
import subprocess
import sys
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import norm
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_lit.bound import vlb_terms
from ddpm_lit.ddpm import DDPM, PREDICTS, VARIANCES, first_step_patched
from ddpm_lit.evaluation import bound_sums, evaluate_bpd, means_and_errors, rate_distortion, sample_terms
from ddpm_lit.exact import GaussianData, MixtureData, error_floor, exact_ddpm, expected_bound, optimal_variance
from ddpm_lit.forward import linear_schedule
from ddpm_lit.images import Images, to_network, to_pixels
from ddpm_lit.loading import load_images
from ddpm_lit.metrics import (
    ClassifierFeatures,
    InceptionFeatures,
    RunningStatistics,
    extract_features,
    feature_statistics,
    frechet_distance,
    image_statistics,
    inception_score,
    precision_recall,
)
from ddpm_lit.processes import spawn_generators


def rng(seed):
    return torch.Generator().manual_seed(seed)


def law(d, seed, rank=None):
    a = torch.randn(d, rank or d, generator=rng(seed), dtype=torch.float64)
    return torch.randn(d, generator=rng(seed + 1), dtype=torch.float64), a @ a.T


# ------------------------------------------------------------------------------------------- the distance


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


# ------------------------------------------------------------------------------------------- statistics


def close(got, expected, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=rtol, atol=atol)


def test_statistics_are_numpys():
    f = torch.randn(50, 7, generator=rng(0)) + 1000
    found = feature_statistics(f, "seven")
    close(found.mean, f.double().mean(0), rtol=1e-12)
    close(found.cov, np.cov(f.double().T))
    assert (found.n, found.name) == (50, "seven") and found.cov.dtype == torch.float64
    with pytest.raises(ValueError, match="features must.*got n = 1"):
        feature_statistics(f[:1])
    with pytest.raises(ValueError, match="finite"):
        feature_statistics(f.log() * torch.tensor(float("nan")))
    with pytest.raises(ValueError, match=r"features must be \(n, d\), got \(50,\)"):
        feature_statistics(f[:, 0])


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [1, 59], [59, 1], [7, 13, 40], [30, 30]])
def test_statistics_do_not_depend_on_the_batches_or_their_order(sizes):
    f = torch.randn(60, 5, generator=rng(1), dtype=torch.float64) * torch.arange(1, 6) + 300
    for rows in (f, f[torch.randperm(60, generator=rng(2))]):
        running = RunningStatistics()
        for batch in rows.split(sizes):
            running.add(batch)
        found = running.result()
        close(found.mean, f.mean(0), rtol=1e-13)
        close(found.cov, np.cov(f.T), rtol=1e-10)
        assert found.n == 60


def test_parts_may_be_joined_and_a_part_may_be_empty():
    f = torch.randn(30, 4, generator=rng(3), dtype=torch.float64) - 7
    parts = [RunningStatistics() for _ in range(4)]  # the first and the third get nothing
    parts[1].add(f[:11]), parts[3].add(f[11:])
    joined = RunningStatistics()
    for part in parts:
        joined.join(part.n, part.mean, part.scatter)
    close(joined.result().mean, f.mean(0))
    close(joined.result().cov, np.cov(f.T))


def test_an_empty_batch_changes_nothing():
    f = torch.randn(9, 3, generator=rng(4))
    running = RunningStatistics()
    for batch in (f[:4], f[:0], f[4:]):
        running.add(batch)
    close(running.result().cov, np.cov(f.double().T))


def test_features_come_from_images_tensors_and_batches():
    pixels = torch.randint(256, (23, 1, 2, 2), generator=rng(5), dtype=torch.uint8)

    def corners(x):
        return x.flatten(1)[:, :3].double()

    corners.name = "corners"
    expected = feature_statistics(corners(pixels), "corners")
    for images in (Images(pixels), pixels, pixels.split(4), iter(pixels.split(10))):
        found = image_statistics(corners, images, batch_size=7)
        close(found.mean, expected.mean)
        close(found.cov, expected.cov)
        assert (found.n, found.name) == (23, "corners")
    assert [len(batch) for batch in extract_features(corners, Images(pixels), 10)] == [10, 10, 3]
    assert torch.equal(torch.cat(list(extract_features(corners, pixels, 10))), corners(pixels))


def test_too_few_images_are_warned_of_once_and_other_features_refused():
    f = torch.randn(40, 8, generator=rng(6), dtype=torch.float64)
    few, many = feature_statistics(f[:8], "a"), feature_statistics(f, "a")
    for pair in ((few, many), (many, few), (few, few)):
        with pytest.warns(UserWarning, match="8 features need more than 8 images: of 8 the Fr") as told:
            pair[0].distance(pair[1])
        assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feature_statistics(f[:9]).distance(many), few._replace(n=None).distance(many)
        assert many.distance(many) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="one kind of features, got 'a' and 'b'"):
        many.distance(feature_statistics(f, "b"))


def test_a_file_of_statistics_is_ours_and_everybodys(tmp_path):
    found = feature_statistics(torch.randn(20, 4, generator=rng(7)), "net")
    found.save(tmp_path / "ours.npz")
    again = FeatureStatistics.load(tmp_path / "ours.npz")
    assert torch.equal(again.mean, found.mean) and torch.equal(again.cov, found.cov) and again[2:] == (20, "net")
    found._replace(n=None, name="").save(tmp_path / "bare.npz")
    assert FeatureStatistics.load(tmp_path / "bare.npz")[2:] == (None, "")
    with np.load(tmp_path / "ours.npz") as file:  # as pytorch-fid reads it
        close(file["mu"], found.mean), close(file["sigma"], found.cov)
    mu, sigma = np.arange(4, dtype=np.float32), np.eye(4, dtype=np.float32)
    np.savez_compressed(tmp_path / "theirs.npz", mu=mu, sigma=sigma)  # as pytorch-fid writes it
    theirs = FeatureStatistics.load(str(tmp_path / "theirs.npz"))
    assert theirs.mean.dtype == theirs.cov.dtype == torch.float64 and theirs[2:] == (None, "")
    close(theirs.mean, mu), close(theirs.cov, sigma)
    assert theirs.distance(found) == frechet_distance(mu, sigma, found.mean, found.cov)


def test_a_file_of_statistics_is_found_under_the_name_it_was_given(tmp_path):
    feature_statistics(torch.randn(20, 4, generator=rng(7))).save(tmp_path / "stats")
    assert FeatureStatistics.load(tmp_path / "stats").n == 20


def test_what_holds_no_statistics_is_named(tmp_path):
    files = {name: tmp_path / f"{name}.npz" for name in ("keys", "flat", "shapes", "words", "text", "array", "objects")}
    np.savez(files["keys"], mean=np.zeros(3), cov=np.eye(3))
    np.savez(files["flat"], mu=np.zeros(3), sigma=np.zeros(3))
    np.savez(files["shapes"], mu=np.zeros((1, 3)), sigma=np.eye(3))
    np.savez(files["words"], mu=np.array(["a"]), sigma=np.eye(1))
    files["text"].write_text("mu sigma")
    with open(files["array"], "wb") as file:
        np.save(file, np.eye(3))
    np.savez(files["objects"], mu=np.array([None]), sigma=np.eye(1))
    whole = tmp_path / "whole.npz"
    feature_statistics(torch.randn(20, 4, generator=rng(7))).save(whole)
    files["cut"] = tmp_path / "cut.npz"
    files["cut"].write_bytes(whole.read_bytes()[:200])
    files["folder"] = tmp_path
    for name, path in files.items():
        with pytest.raises(ValueError) as error:
            FeatureStatistics.load(path)
        said = str(error.value)
        assert said.startswith(str(path)) and "mu and sigma" in said and "\n" not in said, name
    with pytest.raises(ValueError, match="nowhere.npz does not exist$"):
        FeatureStatistics.load(tmp_path / "nowhere.npz")


BIG = """
import resource, sys, torch
from ddpm_lit.metrics import RunningStatistics
from ddpm_lit.processes import this_process
torch.set_num_threads(1)
g, d, unit = torch.Generator().manual_seed(0), 2048, 2**20 if sys.platform == "darwin" else 2**10
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
def counted(d, batches):
    running = RunningStatistics()
    for _ in range(batches):
        running.add(torch.randn(250, d, generator=g))
    return running.result()
before = peak()
counted(2048, 3)
few = peak()
assert counted(2048, 24).n == 6000
many = peak()
distance = counted(1024, 8).distance(counted(1024, 8))
print(before, few, many, distance)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the peak")
def test_two_thousand_features_of_any_number_of_images_fit_in_little_memory():
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, env=os.environ | PATHS)
    assert done.returncode == 0, done.stderr
    before, few, many, distance = map(float, done.stdout.split())  # in MiB
    assert few - before < 300, "some matrices of 2,048 x 2,048 numbers of 8 bytes, 32 MiB each"
    assert many - few < 40, "24 batches take what 3 take: their vectors alone would be 47 MiB, in float64 94"
    assert 250 < distance < 290  # 2000 vectors of 1,024: all of it is bias


PATHS = dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]), OMP_NUM_THREADS="1")


# ------------------------------------------------------------------------------------------- bits/dim


def both(lib, x, t):
    "A network that NumPy and torch compute alike: bends, depends on t, leaves [-1, 1]; and a variance in (-1, 1)."
    return 1.3 * lib.sin(2 * x + 0.3 * t) - 0.2 * x, lib.cos(3 * x - t)


def model(s, predicts="eps", variance="beta_tilde", clip=True):
    def net(x, t):
        t = t.to(x).reshape(-1, *[1] * (x.ndim - 1))
        out = both(torch, x, t)
        return torch.cat(out, dim=1) if variance == "learned" else out[0]

    return DDPM(net, s, predicts, variance, clip)


def by_hand(beta, x0, noise, predicts, variance, clip):
    """The bound of images (n, d) by the paper's formulas: prior (n,), terms and squared errors (n, T), in NumPy.

    `noise[i]` (n, d) is that of the i-th term in the order in which they are computed: t = 1 … T-1, then 0.
    """
    T, (n, d) = len(beta), x0.shape
    alpha, ab = 1 - beta, np.cumprod(1 - beta)
    nats, errors, bits = np.zeros((n, T)), np.zeros((n, T)), np.log(2) * d
    mean_T, var_T = np.sqrt(ab[-1]) * x0, 1 - ab[-1]
    prior = 0.5 * (var_T + mean_T**2 - 1 - np.log(var_T)).sum(1) / bits  # KL to N(0, I)
    tilde = [beta[t] * (1 - ab[t - 1]) / (1 - ab[t]) for t in range(1, T)]  # Eq. 7; t = 0 has none
    low = np.array([tilde[0], *tilde])
    for eps, t in zip(noise, [*range(1, T), 0], strict=True):
        before = ab[t - 1] if t else 1.0
        x_t = np.sqrt(ab[t]) * x0 + np.sqrt(1 - ab[t]) * eps  # Eq. 4
        a, b = np.sqrt(before) * beta[t] / (1 - ab[t]), np.sqrt(alpha[t]) * (1 - before) / (1 - ab[t])  # Eq. 7
        out, v = both(np, x_t, float(t))
        guess = {
            "eps": (x_t - np.sqrt(1 - ab[t]) * out) / np.sqrt(ab[t]),  # Eq. 15
            "x0": out,
            "mean": (out - b * x_t) / a,
            "v": np.sqrt(ab[t]) * x_t - np.sqrt(1 - ab[t]) * out,
        }[predicts]
        guess = np.clip(guess, -1, 1) if clip else guess
        share = (v + 1) / 2  # Nichol & Dhariwal 2021, Eq. 15
        var = {"beta": beta[t], "beta_tilde": low[t], "learned": beta[t] ** share * low[t] ** (1 - share)}[variance]
        mean = a * guess + b * x_t
        errors[:, t] = ((guess - x0) ** 2).mean(1)
        if predicts == "eps" and not clip:  # Eq. 11
            close(mean, (x_t - beta[t] / np.sqrt(1 - ab[t]) * out) / np.sqrt(alpha[t]))
        if t:  # Eq. 8, for any variance
            q = a * x0 + b * x_t
            nats[:, t] = 0.5 * (np.log(var / low[t]) + (low[t] + (q - mean) ** 2) / var - 1).sum(1)
        else:  # Eq. 13
            lo, hi = ((x0 + side / 255 - mean) / np.sqrt(var) for side in (-1, 1))
            lo, hi = np.where(x0 < -0.999, -np.inf, lo), np.where(x0 > 0.999, np.inf, hi)
            left = lo + hi < 0  # there the lower tails are small, on the other side the upper ones
            big = np.where(left, norm.logcdf(hi), norm.logsf(lo))
            small = np.where(left, norm.logcdf(lo), norm.logsf(hi))
            nats[:, t] = -(big + np.log1p(-np.exp(small - big))).sum(1)
    return prior, nats / bits, errors


def noise_of(seed, shape, T, dtype=torch.float64):
    draw = rng(seed)
    return [torch.randn(shape, generator=draw, dtype=dtype).double().numpy() for _ in range(T)]


S = linear_schedule(9, 0.003, 0.4)
PIXELS = torch.randint(256, (11, 5), generator=rng(10), dtype=torch.uint8)
PIXELS[0], PIXELS[1] = 0, 255  # the outer bins reach to infinity


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("predicts", PREDICTS)
def test_every_term_is_the_papers(predicts, variance, clip):
    x0 = to_network(PIXELS, torch.float64)
    prior, terms, errors = by_hand(S.beta.numpy(), x0.numpy(), noise_of(1, (11, 5), 9), predicts, variance, clip)
    total = prior + terms.sum(1)
    assert len(np.unique(terms.sum(0).round(6))) == 9, "terms that are alike would hide a wrong order"
    m = model(S, predicts, variance, clip)
    sums = bound_sums(m, x0, None, rng(1))
    close(sums["prior"], prior.sum())
    close(sums["terms"], terms.sum(0), rtol=1e-8)
    close(sums["error"], errors.sum(0), rtol=1e-8)
    bits = means_and_errors(sums, 11, None)
    close(bits.total, total.mean(), rtol=1e-8)
    close(bits.error, total.std(ddof=1) / 11**0.5, rtol=1e-6)
    close(bits.terms_error, terms.std(0, ddof=1) / 11**0.5, rtol=1e-6)
    close(bits.squared_error, errors.mean(0), rtol=1e-8)
    close(bits.prior + bits.kl.sum() + bits.decoder, bits.total)
    assert bits.decoder == bits.terms[0] and len(bits.kl) == 8 and (bits.n, bits.calls) == (11, 9)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_a_data_set_in_batches_of_any_size_has_the_means_and_errors_of_numpy(batch_size):
    images, turns = Images(PIXELS[:, None, None]), torch.arange(11).split(batch_size)
    seeds = torch.randint(2**31, (len(turns),), generator=rng(2)).tolist()  # each batch has numbers of its own
    x0 = to_network(PIXELS).double().numpy()
    parts = [
        by_hand(S.beta.numpy(), x0[turn.numpy()], noise_of(seed, (len(turn), 5), 9, torch.float32), "eps", "beta", True)
        for turn, seed in zip(turns, seeds, strict=True)
    ]
    prior, terms, errors = (np.concatenate(part) for part in zip(*parts, strict=True))
    bits = evaluate_bpd(model(S, variance="beta"), images, batch_size=batch_size, generator=rng(2))
    total = prior + terms.sum(1)
    close(bits.prior, prior.mean(), rtol=1e-4)
    close(bits.terms, terms.mean(0), rtol=1e-4)
    close(bits.terms_error, terms.std(0, ddof=1) / 11**0.5, rtol=1e-3)
    close([bits.total, bits.error], [total.mean(), total.std(ddof=1) / 11**0.5], rtol=1e-4)
    close(bits.squared_error, errors.mean(0), rtol=1e-4)


def test_bits_per_dim_is_the_mean_of_the_bound(digits):
    m = DDPM(lambda x, t: x, linear_schedule(20, 0.01, 0.3))
    bits = evaluate_bpd(m, digits, n=30, batch_size=30, generator=rng(1))
    terms = vlb_terms(m, to_network(digits.pixels[:30]), *spawn_generators(rng(1), 1))
    assert bits.total == pytest.approx(terms.total.double().mean().item(), rel=1e-6)
    assert bits.error == pytest.approx(terms.total.double().std().item() / 30**0.5, rel=1e-4)
    assert bits.decoder == pytest.approx(terms.decoder.mean().item(), rel=1e-5)
    assert bits.prior == pytest.approx(terms.prior.mean().item(), rel=1e-5)
    torch.testing.assert_close(bits.kl.float(), terms.kl.mean(0))
    assert bits.n == 30


def test_bits_per_dim_needs_images_and_terms(digits):
    m = DDPM(lambda x, t: x, linear_schedule(20))
    for n in (1, 1798):
        with pytest.raises(ValueError, match=f"n must be from 2 to the number of images, 1797; got {n}"):
            evaluate_bpd(m, digits, n=n)
    for calls in (-1, 0, 1, 21):
        with pytest.raises(ValueError, match=f"calls must be from 2 to T = 20, got {calls}"):
            evaluate_bpd(m, digits, n=4, calls=calls)


def test_a_bound_that_is_not_finite_names_its_t(digits):
    def net(x, t):
        return x * torch.where((t == 3) | (t == 0), torch.nan, 1.0)[:, None, None, None]

    with pytest.raises(FloatingPointError, match="not finite: first at t = 0, and at 2 t in all"):
        evaluate_bpd(DDPM(net, linear_schedule(6)), digits, n=4)


# ------------------------------------------------------------------------------------------- some of the terms


@pytest.mark.parametrize("calls", [2, 3, 7])
def test_the_times_that_are_asked_are_weighted_by_their_probability(calls):
    b, T = 20_000, 6
    asked = list(sample_terms(linear_schedule(T, 0.01, 0.3), calls, b, rng(3)))
    assert len(asked) == calls and all(t.shape == weight.shape == (b,) for t, weight, _ in asked)
    assert [last for *_, last in asked] == [False] * (calls - 1) + [True]
    assert asked[-1][0].eq(0).all() and asked[-1][1].eq(1).all()
    assert all(1 <= t.min() and t.max() <= T - 1 for t, *_ in asked[:-1])
    weights = torch.zeros(b, T, dtype=torch.float64)
    for t, weight, _ in asked[:-1]:
        weights.scatter_add_(1, t[:, None], weight[:, None])
    z = (weights.mean(0) - 1)[1:] / (weights.std(0)[1:] / b**0.5)
    assert z.abs().max() < 4.5, "every term counts once, on average"
    every = list(sample_terms(linear_schedule(T), None, 3, None))
    assert [t.tolist() for t, *_ in every] == [[t] * 3 for t in (1, 2, 3, 4, 5, 0)]
    assert all(weight.eq(1).all() for _, weight, _ in every)


ALIKE = Images(torch.tensor([3, 100, 200, 255], dtype=torch.uint8).expand(40, 1, 1, 4))  # no spread between images
SILENT = DDPM(lambda x, t: 0 * x, linear_schedule(15, 0.01, 0.3), "x0", "beta")  # whose terms depend on no noise


@pytest.mark.parametrize("calls", [2, 5, 15])
def test_a_few_calls_give_the_same_on_average_and_their_error_is_honest(calls):
    full = evaluate_bpd(SILENT, ALIKE)
    assert full.error < 1e-6
    draw = rng(4)
    few = [evaluate_bpd(SILENT, ALIKE, calls=calls, generator=draw, batch_size=40) for _ in range(200)]
    z = np.array([(bits.total - full.total) / bits.error for bits in few])
    assert abs(z.mean()) < 4.5 / 200**0.5 and 0.8 < z.std() < 1.25
    terms = torch.stack([bits.terms for bits in few])
    spread = terms.std(0).clamp(min=1e-9) / 200**0.5
    assert ((terms.mean(0) - full.terms).abs() < 5 * spread + 1e-6).all()
    for bits in few:
        assert bits.total == pytest.approx(bits.prior + bits.terms.sum().item(), rel=1e-6)
        assert bits.terms_error.isnan().all() and bits.terms_error.shape == (15,)
        known = bits.squared_error.isfinite()
        assert known[0] and torch.allclose(bits.squared_error[known], full.squared_error[known])


def test_a_few_calls_are_that_many_and_what_was_not_asked_is_not_known(digits):
    seen = []
    m = DDPM(lambda x, t: seen.append(t) or 0.1 * x, linear_schedule(1000))
    bits = evaluate_bpd(m, digits, n=20, calls=4, generator=rng(5), batch_size=7)
    assert len(seen) == 3 * 4 and bits.calls == 4
    asked = torch.cat(seen).unique()
    assert torch.equal(bits.squared_error.isfinite().nonzero().flatten(), asked) and len(asked) <= 61
    assert bits.terms[bits.squared_error.isnan()].eq(0).all()


def test_a_few_calls_on_real_images_agree_with_all(digits):
    m = model(linear_schedule(40, 0.002, 0.2), variance="learned")
    full = evaluate_bpd(m, digits, n=300, generator=rng(6))
    for calls in (2, 8, 40):
        few = evaluate_bpd(m, digits, n=300, calls=calls, generator=rng(calls))
        assert abs(few.total - full.total) < 5 * (few.error**2 + full.error**2) ** 0.5
        assert few.error > full.error or calls > 2


@pytest.mark.parametrize("calls", [14, 15])
def test_a_curve_over_t_wants_all_terms(calls):
    with pytest.raises(ValueError, match="bits must hold all T = 15 terms"):
        rate_distortion(evaluate_bpd(SILENT, ALIKE, calls=calls))


def test_rate_and_distortion_are_running_sums():
    bits = evaluate_bpd(model(S), Images(PIXELS[:, None, None]), generator=rng(7))
    curve = rate_distortion(bits)
    assert len(curve.rate) == len(curve.distortion) == 10
    for t in range(10):  # what was sent before x_t is known: the prior, and the terms from the last down to t
        close(curve.rate[t], bits.prior + sum(bits.terms[t:].tolist()))
    close(curve.distortion, [0, *(127.5 * e**0.5 for e in bits.squared_error.tolist())])
    assert curve.rate[0] == pytest.approx(bits.total) and curve.rate[9] == pytest.approx(bits.prior)


# ------------------------------------------------------------------------------------------- memory, interruption


class Largest(TorchDispatchMode):
    "Notes the entries of the largest tensor of numbers that any operation returns."

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.entries = max(self.entries, x.numel())
        return out


@pytest.mark.parametrize("calls", [None, 3])
def test_memory_depends_on_the_batch_and_not_on_the_number_of_images_or_steps(calls):
    pixels, largest = torch.randint(256, (300, 1, 4, 4), generator=rng(8), dtype=torch.uint8), {}
    for n, T in ((8, 4), (300, 4), (8, 60)):
        with Largest() as found:
            evaluate_bpd(model(linear_schedule(T), variance="beta"), Images(pixels), n, batch_size=8, calls=calls)
        largest[n, T] = found.entries
    assert set(largest.values()) == {8 * 16}, "a batch, and nothing larger"


def test_an_evaluation_that_was_interrupted_goes_on_where_it_was(digits):
    calls = []

    def net(x, t, broken=None):
        calls.append(len(x))
        if len(calls) == broken:
            raise RuntimeError("the power is off")
        return 0.2 * x

    def run(broken=None, **words):
        calls.clear()
        m = DDPM(lambda x, t: net(x, t, broken), linear_schedule(10))
        return evaluate_bpd(m, digits, n=23, batch_size=5, generator=rng(9), **words)

    for some in (None, 4):
        whole, T, kept = run(calls=some), some or 10, {}
        with pytest.raises(RuntimeError, match="power"):
            run(2 * T + 2, kept=kept, calls=some)
        assert sorted(kept) == [0, 1]
        resumed = run(kept=kept, calls=some)
        assert len(calls) == 3 * T and sum(calls) == (5 + 5 + 3) * T and sorted(kept) == [0, 1, 2, 3, 4]
        for a, b in zip(resumed, whole, strict=True):
            assert torch.equal(torch.as_tensor(a).nan_to_num(-1), torch.as_tensor(b).nan_to_num(-1))
        again = run(kept={i: {k: v.clone() for k, v in sums.items()} for i, sums in kept.items()}, calls=some)
        assert not calls and again.total == whole.total


# ------------------------------------------------------------------------------------------- laws known exactly


def mixture(d):
    "A law inside [-1, 1], of two parts with covariances of full rank."
    means, roots = torch.rand(2, d, generator=rng(d)) - 0.5, torch.randn(2, d, d, generator=rng(d + 1)) / (6 * d**0.5)
    return MixtureData([0.3, 0.7], means.double(), (roots @ roots.mT).double() + 0.002 * torch.eye(d).double())


LAWS = {
    "gauss": lambda d: GaussianData(torch.linspace(-0.4, 0.4, d), torch.diag(torch.linspace(0.005, 0.06, d))),
    "mixture": mixture,
}


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", LAWS)
def test_of_a_known_law_every_term_is_known(name, variance):
    d, n, c, data = 16, 1500, linear_schedule(25, 0.01, 0.5), LAWS[name](16)
    floor = error_floor(data, c, 3000, rng(20))
    best = optimal_variance(c, floor)
    m = exact_ddpm(data, c, "v", variance, floor if variance == "learned" else None)
    var = {"beta": c.beta, "beta_tilde": first_step_patched(c), "learned": best}[variance]
    pixels = to_pixels(data.sample(n, rng(21)).reshape(-1, 1, 4, 4))
    bits = evaluate_bpd(m, Images(pixels), generator=rng(22))
    x0, bins = to_network(pixels, torch.float64).flatten(1), -np.log2(2 / 255)
    nll = data.nll(x0) / (d * np.log(2)) + bins
    # the bound: above the truth, by what was foreseen
    predicted = (expected_bound(data, c, floor, var) / d / np.log(2) + bins).item()
    assert abs(bits.total - predicted) < 5 * bits.error + 0.003
    assert bits.total > nll.mean().item() - 5 * bits.error
    assert predicted > nll.mean().item() - 5 * nll.std().item() / n**0.5
    # each divergence: between the two variances, and that of x_0 which is still unknown
    kl = 0.5 * (best / var - 1 + (var / c.beta).log() - (1 - c.alpha_bar_prev).log() + (1 - c.alpha_bar).log())
    assert ((bits.kl - kl[1:] / np.log(2)).abs() < 5 * bits.terms_error[1:] + 2e-4).all()
    # distortion: what is still unknown of x_0, and half a grey level
    distortion = rate_distortion(bits).distortion[1:]
    expected = 127.5 * (floor + (2 / 255) ** 2 / 12).sqrt()
    torch.testing.assert_close(distortion, expected, rtol=5 * (0.5 / (n * d)) ** 0.5 + 0.02, atol=0)
    assert (distortion.diff()[:9] > 0).all() and distortion[-1] > 2 * distortion[0]


# ------------------------------------------------------------------------------------------- features


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


def test_probabilities_are_those_of_the_classifier(digits, features):
    p = features.probabilities(features(digits.pixels))
    close(p.sum(1), np.ones(1797))
    right = (p.argmax(1) == digits.labels)[features.test].double().mean().item()
    assert right == pytest.approx(features.accuracy)
    two = Images(digits.pixels[digits.labels < 2], digits.labels[digits.labels < 2])
    of_two = ClassifierFeatures(two, hidden=(8,), held_out=60)
    p = of_two.probabilities(of_two(two.pixels))
    assert p.shape == (len(two), 2) and (p.argmax(1) == two.labels).double().mean() > 0.9
    close(p.sum(1), np.ones(len(two)))


def test_the_name_of_features_changes_with_what_they_are_made_of(digits):
    some = Images(digits.pixels[:200], digits.labels[:200])
    changed = Images(some.pixels.clone(), some.labels)
    changed.pixels[0, 0, 0, 0] += 1
    fast = dict(hidden=(4,), held_out=50)
    made = [(some, {}), (some, dict(seed=1)), (some, dict(held_out=51)), (some, dict(hidden=(5,))), (changed, {})]
    names = [ClassifierFeatures(images, **fast | words).name for images, words in made]
    assert len(set(names)) == 5 and ClassifierFeatures(some, **fast).name == names[0]


# ------------------------------------------------------------------------------------------- Inception's


class Stand(torch.nn.Module):
    "Takes and gives what the published network does; its features are means over each colour, and sizes."

    def __init__(self):
        super().__init__()
        self.output = torch.nn.Linear(2048, 1008)
        torch.nn.init.normal_(self.output.weight, std=0.01, generator=rng(30))
        torch.nn.init.constant_(self.output.bias, 5.0)
        self.output.bias.data[0] = -5.0

    def forward(self, x, return_features: bool = False):
        means = x.float().mean([2, 3]) / 255
        features = torch.cat([means, torch.full((len(x), 2045), float(x.shape[1]))], dim=1)
        return features if return_features else self.output(features)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    "The file of a network of this kind, and its checksum."
    path = tmp_path_factory.mktemp("net") / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Stand()), str(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


URL = "https://example.org/some/net.pt"


def test_inception_reads_grey_and_colour_and_nothing_else(network):
    path, checksum = network
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = InceptionFeatures(path, sha256=checksum)
    pixels = torch.randint(256, (4, 3, 5, 6), generator=rng(31), dtype=torch.uint8)
    found = features(pixels)
    assert found.shape == (4, 2048) and found.dtype == torch.float32 and not found.requires_grad
    close(found[:, :3], pixels.double().mean((2, 3)) / 255, rtol=1e-5)
    grey = features(pixels[:, 1:2])
    close(grey[:, :3], found[:, 1:2].expand(-1, 3)), close(grey[:, 3:], found[:, 3:])
    for bad in (pixels.float(), pixels[:, :2], pixels[0], pixels.double() / 255):
        with pytest.raises(ValueError, match=r"pixels must be uint8 \(n, 1 or 3, h, w\), got torch"):
            features(bad)
    p = features.probabilities(found)
    logits = found.double().numpy() @ Stand().output.weight.detach().double().numpy().T  # without the bias
    logits = np.exp(logits - logits.max(1, keepdims=True))
    close(p, logits / logits.sum(1, keepdims=True), rtol=1e-4)
    assert image_statistics(features, pixels).name == "inception-2015-12-05"


def test_another_file_than_inceptions_is_named(network, tmp_path):
    path, checksum = network
    with pytest.raises(ValueError, match=f"{path} must be the file of https.*SHA-256 is {checksum[:12]}"):
        InceptionFeatures(path)
    with pytest.raises(ValueError, match="nowhere.pt does not exist"):
        InceptionFeatures(tmp_path / "nowhere.pt", sha256=checksum)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty folder of torch.hub, and what a download there does: to be filled in."
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return lambda download: monkeypatch.setattr(torch.hub, "download_url_to_file", download)


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), TimeoutError("timed out"), RuntimeError("invalid hash value")]
)
def test_a_download_that_fails_is_one_line_with_its_address(hub, error):
    def fail(url, path, **words):
        raise error

    hub(fail)
    with pytest.raises(ValueError, match=f"^{URL} could not be fetched") as told:
        InceptionFeatures(url=URL)
    assert "\n" not in str(told.value) and "name the file" in str(told.value)


def test_a_good_download_is_kept_and_used_again(hub, network, tmp_path):
    path, checksum = network
    fetched = []

    def fetch(url, to, hash_prefix, progress):
        fetched.append((url, hash_prefix))
        Path(to).write_bytes(path.read_bytes())

    hub(fetch)
    for _ in range(2):
        assert InceptionFeatures(url=URL, sha256=checksum).net.output.weight.shape == (1008, 2048)
    assert fetched == [(URL, checksum)]
    kept = tmp_path / "home" / "hub" / "checkpoints" / "net.pt"
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{kept} must be the file of {URL}"):
        InceptionFeatures(url=URL, sha256=checksum)


# ------------------------------------------------------------------------------------------- other measures


def brute(samples, real, k):
    "Precision and recall, one pair of points at a time."

    def share(points, centres):
        radii = [np.sort([np.linalg.norm(c - other) for other in centres])[k] for c in centres]
        near = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return np.mean(near)

    return share(samples, real), share(real, samples)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_precision_and_recall_are_those_of_brute_force(k, offset, dtype):
    real = (torch.randn(60, 4, generator=rng(40)) + offset).to(dtype)
    samples = (0.6 * torch.randn(45, 4, generator=rng(41)) + 0.5 + offset).to(dtype)
    expected = brute(samples.double().numpy(), real.double().numpy(), k)
    assert precision_recall(samples, real, k) == pytest.approx(expected)
    assert expected[0] > expected[1] + 0.1, "narrow samples: precise, but missing much"


def test_precision_and_recall_of_known_cases():
    a = torch.randn(300, 6, generator=rng(42))
    assert precision_recall(a, a + 100) == (0, 0)
    assert precision_recall(a, a) == (1, 1)
    modes = torch.tensor([[-50.0], [50.0]]).repeat_interleave(150, 0).expand(-1, 6) + a
    half, other = modes[:150][::2], modes[1::2]
    precision, recall = precision_recall(half, other)
    assert precision > 0.85 and 0.4 < recall < 0.5, "what is drawn is real, and half of what is real is drawn"
    assert precision_recall(other, half) == (recall, precision)
    junk = torch.cat([other[:75], other[:75] + 1000])
    assert precision_recall(junk, other)[0] == 0.5


def test_precision_and_recall_in_blocks():
    a, b = (torch.randn(2300, 3, generator=rng(seed), dtype=torch.float64) for seed in (43, 44))
    away = torch.cdist(a, b)
    radii = torch.cdist(b, b).sort(1).values[:, 3]
    assert precision_recall(a, b)[0] == pytest.approx((away <= radii).any(1).double().mean().item())


def test_precision_and_recall_refuse():
    a = torch.zeros(5, 2)
    for samples, real in ((a, torch.zeros(5, 3)), (a[0], a), (a, a[None])):
        with pytest.raises(ValueError, match=r"features must be \(n, d\), \(m, d\), got"):
            precision_recall(samples, real)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k must be from 1 to less than the number of images, 5 and 9; got {k}"):
            precision_recall(a, torch.zeros(9, 2), k)


def test_the_inception_score_is_numpys():
    p = torch.randn(57, 10, generator=rng(45)).mul(2).softmax(1)
    scores = []
    for part in np.array_split(p.double().numpy(), 5):
        divergence = (part * (np.log(part) - np.log(part.mean(0)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    assert inception_score(p, 5) == pytest.approx((np.mean(scores), np.std(scores)))
    same = torch.full((20, 4), 0.25)
    assert inception_score(same, 10) == pytest.approx((1, 0))
    sure = torch.eye(4).repeat(10, 1)  # certain, of every class as often: the most there is; zeros do no harm
    assert inception_score(sure, 10) == pytest.approx((4, 0))
    for splits in (0, 11):
        with pytest.raises(ValueError, match=f"splits must leave two images or more in each part, got {splits} of 20"):
            inception_score(same, splits)


# ------------------------------------------------------------------------------------------- what should be refused


def other_kept(change):
    "What another evaluation kept, given to one with a `change`."
    images, words = Images(PIXELS[:, None, None]), dict(m=model(S), batch_size=5, kept={})
    evaluate_bpd(images=images, **words)
    evaluate_bpd(images=images, **words | change)


def other_features():
    running = RunningStatistics()
    for d in (3, 1):
        running.add(torch.randn(5, d, generator=rng(60)))


NAN = torch.full((20, 2), torch.nan)
PASSED_OVER = {
    "kept must .* batch size": lambda: other_kept(dict(batch_size=11)),
    "kept must .* calls": lambda: other_kept(dict(calls=3)),
    "kept must .* T": lambda: other_kept(dict(m=model(linear_schedule(8)))),
    "batch_size must be at least 1, got 0": lambda: evaluate_bpd(model(S), Images(PIXELS[:, None, None]), batch_size=0),
    "features must be .* 3": other_features,
    "features must be finite": lambda: precision_recall(NAN, NAN),
    "probabilities must be finite": lambda: inception_score(NAN),
}


@pytest.mark.parametrize("message", PASSED_OVER)
def test_what_makes_no_sense_is_refused(message):
    with pytest.raises(ValueError, match="^" + message.split()[0]):
        PASSED_OVER[message]()


def test_other_entries_of_anothers_file_do_not_matter(tmp_path):
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(2), sigma=np.eye(2), features=np.zeros((9, 2)), n=np.arange(3))
    assert FeatureStatistics.load(tmp_path / "theirs.npz")[2:] == (None, "")


# ------------------------------------------------------------------------------------------- several processes

SHARED = """
import sys, torch
from test_evaluate import *
from ddpm_lit.processes import this_process
torch.set_num_threads(1)
here = this_process()
bits, statistics, small = shared()
assert small.n == 3
if here.is_main_process:
    torch.save([*bits, *statistics[:3]], sys.argv[1])
    print("processes:", here.num_processes)
"""


def corners(pixels):
    return pixels.flatten(1)[:, ::9].double()


def shared():
    "What several processes work out together; the last has nothing for the second of them to do."
    pixels = torch.randint(256, (37, 1, 8, 8), generator=rng(50), dtype=torch.uint8)
    bits = evaluate_bpd(model(S, variance="learned"), Images(pixels), batch_size=5, generator=rng(51))
    return bits, image_statistics(corners, pixels, batch_size=5), image_statistics(corners, pixels[:3], batch_size=5)


def test_two_processes_find_what_one_finds(tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = [*torchrun, str(tmp_path / "shared.py"), str(tmp_path / "found.pt")]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | PATHS, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "processes: 2" in done.stdout
    bits, statistics, _ = shared()
    found, expected = torch.load(tmp_path / "found.pt", weights_only=False), [*bits, *statistics[:3]]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=1e-12)
