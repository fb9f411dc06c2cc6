"""Metrics against SciPy's matrix root, NumPy, brute force, and cases known exactly."""

import hashlib
import math
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
from doubles import rng

from ddpm_lit import metrics
from ddpm_lit.images import Images
from ddpm_lit.metrics import (
    ClassifierFeatures,
    FeatureStatistics,
    InceptionFeatures,
    RecordingFeatures,
    RunningStatistics,
    compare_samples,
    evaluate_samples,
    extract_features,
    feature_statistics,
    frechet_distance,
    image_statistics,
    inception_score,
    make_reference,
)
from ddpm_lit.neighbours import precision_recall


def random_gaussian(d, seed, rank=None):
    a = torch.randn(d, rank or d, generator=rng(seed), dtype=torch.float64)
    return torch.randn(d, generator=rng(seed + 1), dtype=torch.float64), a @ a.T


@pytest.mark.parametrize("d", [1, 2, 32, 200])
def test_the_distance_is_that_of_scipys_matrix_root(d):
    (m1, c1), (m2, c2) = random_gaussian(d, 0), random_gaussian(d, 2)
    product = scipy.linalg.sqrtm((c1 @ c2).numpy())
    expected = ((m1 - m2) ** 2).sum().item() + np.trace(c1.numpy() + c2.numpy() - 2 * np.real(product))
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-8)


def test_singular_covariances_do_no_harm():
    m1, c1 = random_gaussian(64, 0, rank=5)
    assert 0 <= frechet_distance(m1, c1, m1, c1) < 1e-5
    assert frechet_distance(m1, c1, m1, 4 * c1) == pytest.approx(c1.trace().item(), rel=1e-6)  # (2 - 1)² tr C


def test_float32_input_is_computed_in_float64():
    m, c = random_gaussian(16, 0)
    assert 0 <= frechet_distance(m.float(), c.float(), m.float(), c.float()) < 1e-9


@pytest.mark.parametrize("bad", [(1, [[1]], 1, [[1]]), ([1], [[1]], [1, 1], [[1]]), ([1], [1], [1], [[1]])])
def test_shapes_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(*bad)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        frechet_distance([float("nan")], [[1.0]], [0.0], [[1.0]])


def close(got, expected, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=rtol, atol=atol)


def test_statistics_are_numpys():
    f = torch.randn(50, 7, generator=rng(0)) + 1000
    result = feature_statistics(f, "seven")
    close(result.mean, f.double().mean(0), rtol=1e-12)
    close(result.cov, np.cov(f.double().T))
    assert (result.n, result.name) == (50, "seven") and result.cov.dtype == torch.float64
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
        result = running.result()
        close(result.mean, f.mean(0), rtol=1e-13)
        close(result.cov, np.cov(f.T), rtol=1e-10)
        assert result.n == 60


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
        result = image_statistics(corners, images, batch_size=7)
        close(result.mean, expected.mean)
        close(result.cov, expected.cov)
        assert (result.n, result.name) == (23, "corners")
    assert [len(batch) for batch in extract_features(corners, Images(pixels), 10)] == [10, 10, 3]
    assert torch.equal(torch.cat(list(extract_features(corners, pixels, 10))), corners(pixels))


def test_too_few_images_are_warned_of_once_and_other_features_refused():
    f = torch.randn(40, 8, generator=rng(6), dtype=torch.float64)
    few, many = feature_statistics(f[:8], "a"), feature_statistics(f, "a")
    for pair in ((few, many), (many, few), (few, few)):
        with pytest.warns(UserWarning, match="8 features need more than 8 images: of 8 the Fr") as caught:
            pair[0].distance(pair[1])
        assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feature_statistics(f[:9]).distance(many), few._replace(n=None).distance(many)
        assert many.distance(many) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="one kind of features, got 'a' and 'b'"):
        many.distance(feature_statistics(f, "b"))


def test_a_file_of_statistics_is_ours_and_everybodys(tmp_path):
    result = feature_statistics(torch.randn(20, 4, generator=rng(7)), "net")
    result.save(tmp_path / "ours.npz")
    again = FeatureStatistics.load(tmp_path / "ours.npz")
    assert torch.equal(again.mean, result.mean) and torch.equal(again.cov, result.cov) and again[2:] == (20, "net")
    result._replace(n=None, name="").save(tmp_path / "bare.npz")
    assert FeatureStatistics.load(tmp_path / "bare.npz")[2:] == (None, "")
    with np.load(tmp_path / "ours.npz") as file:  # as pytorch-fid reads it
        close(file["mu"], result.mean), close(file["sigma"], result.cov)
    mu, sigma = np.arange(4, dtype=np.float32), np.eye(4, dtype=np.float32)
    np.savez_compressed(tmp_path / "theirs.npz", mu=mu, sigma=sigma)  # as pytorch-fid writes it
    theirs = FeatureStatistics.load(str(tmp_path / "theirs.npz"))
    assert theirs.mean.dtype == theirs.cov.dtype == torch.float64 and theirs[2:] == (None, "")
    close(theirs.mean, mu), close(theirs.cov, sigma)
    assert theirs.distance(result) == frechet_distance(mu, sigma, result.mean, result.cov)


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
    complete = tmp_path / "complete.npz"
    feature_statistics(torch.randn(20, 4, generator=rng(7))).save(complete)
    files["cut"] = tmp_path / "cut.npz"
    files["cut"].write_bytes(complete.read_bytes()[:200])
    files["folder"] = tmp_path
    for name, path in files.items():
        with pytest.raises(ValueError) as error:
            FeatureStatistics.load(path)
        message = str(error.value)
        assert message.startswith(str(path)) and "mu and sigma" in message and "\n" not in message, name
    with pytest.raises(ValueError, match="nowhere.npz does not exist$"):
        FeatureStatistics.load(tmp_path / "nowhere.npz")


BIG = """
import resource, sys, torch
from ddpm_lit.metrics import RunningStatistics
from ddpm_lit.neighbours import precision_recall
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


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the peak")
def test_two_thousand_features_of_any_number_of_images_fit_in_little_memory():
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, env=os.environ | PATHS)
    assert done.returncode == 0, done.stderr
    before, few, many, distance = map(float, done.stdout.split())  # in MiB
    assert few - before < 300, "some matrices of 2,048 x 2,048 numbers of 8 bytes, 32 MiB each"
    assert many - few < 40, "24 batches take what 3 take: their vectors alone would be 47 MiB, in float64 94"
    assert 250 < distance < 290  # 2000 vectors of 1,024: all of it is bias


PATHS = dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]), OMP_NUM_THREADS="1")


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
    for held_out in (0, 1797):
        with pytest.raises(ValueError, match="held_out"):
            ClassifierFeatures(digits, held_out=held_out)


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
    names = [ClassifierFeatures(images, **fast | kwargs).name for images, kwargs in made]
    assert (
        len(set(names)) == 5
        and {len(name) for name in names} == {len("classifier ") + 12}
        and ClassifierFeatures(some, **fast).name == names[0]
    )


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
    result = features(pixels)
    assert result.shape == (4, 2048) and result.dtype == torch.float32 and not result.requires_grad
    close(result[:, :3], pixels.double().mean((2, 3)) / 255, rtol=1e-5)
    grey = features(pixels[:, 1:2])
    close(grey[:, :3], result[:, 1:2].expand(-1, 3)), close(grey[:, 3:], result[:, 3:])
    for bad in (pixels.float(), pixels[:, :2], pixels[0], pixels.double() / 255):
        with pytest.raises(ValueError, match=r"pixels must be uint8 \(n, 1 or 3, h, w\), got torch"):
            features(bad)
    p = features.probabilities(result)
    logits = result.double().numpy() @ Stand().output.weight.detach().double().numpy().T  # without the bias
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
    def fail(url, path, **kwargs):
        raise error

    hub(fail)
    with pytest.raises(ValueError, match=f"^{URL} could not be") as caught:
        InceptionFeatures(url=URL)
    assert "\n" not in str(caught.value)


def test_a_good_download_is_cached_and_used_again(hub, network, tmp_path):
    path, checksum = network
    fetched = []

    def fetch(url, to, hash_prefix, progress):
        fetched.append((url, hash_prefix))
        Path(to).write_bytes(path.read_bytes())

    hub(fetch)
    for _ in range(2):
        assert InceptionFeatures(url=URL, sha256=checksum).net.output.weight.shape == (1008, 2048)
    assert fetched == [(URL, checksum)]
    cached = tmp_path / "home" / "hub" / "checkpoints" / "net.pt"
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{cached} must be the file of {URL}"):
        InceptionFeatures(url=URL, sha256=checksum)


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


def other_features():
    running = RunningStatistics()
    for d in (3, 1):
        running.add(torch.randn(5, d, generator=rng(60)))


NAN = torch.full((20, 2), torch.nan)


PASSED_OVER = {
    "features must be .* 3": other_features,
    "probabilities must be finite": lambda: inception_score(NAN),
}


@pytest.mark.parametrize("message", PASSED_OVER)
def test_what_makes_no_sense_is_refused(message):
    with pytest.raises(ValueError, match="^" + message.split()[0]):
        PASSED_OVER[message]()


def test_other_entries_of_anothers_file_do_not_matter(tmp_path):
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(2), sigma=np.eye(2), features=np.zeros((9, 2)), n=np.arange(3))
    assert FeatureStatistics.load(tmp_path / "theirs.npz")[2:] == (None, "")


# ------------------------------------------------------------------------------------------- samples against data


def test_the_distance_is_never_negative():
    below = 0
    for seed in range(60):
        m, c = random_gaussian(8, seed)
        root = metrics.matrix_sqrt(c)
        exact = (2 * c.trace() - 2 * torch.linalg.svdvals(root @ root).sum()).item()
        below += exact < 0
        distance = frechet_distance(m, c, m, c)
        assert distance == max(exact, 0) and math.copysign(1, distance) == 1
    assert below > 5, "the clamp is needed"


def corners(pixels):
    return pixels.flatten(1)[:, ::9].double()


def test_samples_are_scored_in_one_call(digits, features):
    pixels = digits.pixels[::3].flip(3)
    result = evaluate_samples(pixels, digits, features=features, seed=2, batch_size=70)
    both = features(pixels), features(digits.pixels)
    assert result["frechet_distance"] == pytest.approx(features.distance(pixels, digits.pixels), rel=1e-9)
    assert (result["precision"], result["recall"]) == pytest.approx(precision_recall(samples=both[0], real=both[1]))
    score, std = inception_score(features.probabilities(both[0]))
    assert (result["inception_score"], result["inception_score_std"]) == pytest.approx((score, std))
    real = features.distance(digits.pixels[features.test], digits.pixels)
    assert result["frechet_distance_real"] == pytest.approx(real, rel=1e-9) and real < 1
    assert result["frechet_distance_noise"] > 200
    assert (result["n"], result["features"], result["precision_recall_n"]) == (599, features.name, [599, 1797])
    assert list(result) == [
        "n", "features", "frechet_distance", "frechet_distance_real", "frechet_distance_noise", "precision", "recall",
        "precision_recall_n", "density", "coverage", "coverage_perfect", "kernel_distance",
        "kernel_distance_std", "kernel_distance_subset", "nearest_ratio", "inception_score", "inception_score_std",
    ]  # fmt: skip
    again = evaluate_samples(Images(pixels), digits, features=features, seed=2, batch_size=70)
    assert again == result, "a tensor is as good as images"


def test_features_are_trained_where_none_are_given(digits, features):
    result = evaluate_samples(digits.pixels[:50], digits)
    assert result["features"] == features.name
    assert result["frechet_distance"] == pytest.approx(features.distance(digits.pixels[:50], digits.pixels), rel=1e-9)


def test_a_part_of_the_data_is_a_random_one(digits, features):
    for seed in (0, 1):
        order = torch.randperm(1797, generator=rng(seed))[:600]
        result = evaluate_samples(digits.pixels[:90], digits, features=features, n_reference=600, seed=seed)
        expected = features.distance(digits.pixels[:90], digits.pixels[order])
        assert result["frechet_distance"] == pytest.approx(expected, rel=1e-9)
        assert result["precision_recall_n"] == [90, 600]


def test_the_scale_is_of_held_out_images_or_of_a_random_part(digits, features):
    other = digits.select(torch.arange(40))
    for images, n, part in ((digits, 30, features.test), (other, 30, 20), (other, 12, 12)):
        order = torch.randperm(len(images), generator=rng(5))[:part] if isinstance(part, int) else part
        reference = make_reference(features, images, n, 5, batch_size=64)
        expected = feature_statistics(features(images.pixels[order]))
        close(reference.scale["real"].mean, expected.mean), close(reference.scale["real"].cov, expected.cov, rtol=1e-8)
        assert reference.scale["noise"].n == n


def test_noise_has_a_generator_for_each_batch_and_a_limit(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_RECORDED", 9)
    parts = [torch.randint(256, (k, 1, 8, 8), generator=rng(3 + i * 0x9E3779B9), dtype=torch.uint8)
             for i, k in enumerate((4, 4, 1))]  # fmt: skip
    noise = metrics.noise_statistics(corners, (1, 8, 8), 100, 3, 4)
    close(noise.mean, corners(torch.cat(parts)).mean(0))
    assert noise.n == 9


@pytest.mark.parametrize("n,every", [(12, 1), (13, 2), (24, 2), (25, 3), (36, 3)])
@pytest.mark.parametrize("batch_size", [1, 5, 7, 100])
def test_every_kth_image_is_recorded(n, every, batch_size, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_RECORDED", 12)
    pixels = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    recording = RecordingFeatures(lambda x: x.flatten(1).double(), n, batch_size)
    for batch in pixels.split(batch_size):
        assert torch.equal(recording(batch).flatten(), batch.flatten().double())
    assert torch.cat(recording.recorded).flatten().tolist() == list(range(0, n, every))
    assert recording.probabilities == [] and len(torch.cat(recording.recorded)) <= 12


def test_features_without_probabilities_or_a_name_will_do(digits):
    result = evaluate_samples(digits.pixels[:40], digits.pixels, features=corners)
    assert "inception_score" not in result and result["features"] == "" and result["frechet_distance"] > 0
    statistics = make_reference(corners, digits, 40, 0)._replace(features=None)
    assert "precision" not in compare_samples(corners, digits, 1797, statistics)


@pytest.mark.filterwarnings("ignore:32 features need")
def test_the_score_of_few_samples_has_two_images_in_each_part(digits, features):
    for n, splits in ((5, 2), (19, 9), (40, 10)):
        result = evaluate_samples(digits.pixels[:n], digits, features=features)
        expected = inception_score(features.probabilities(features(digits.pixels[:n])), splits)
        assert (result["inception_score"], result["inception_score_std"]) == pytest.approx(expected)


def test_samples_that_cannot_be_scored_are_refused(digits):
    pixels = digits.pixels
    for samples, images, message, kwargs in (
        (pixels[:3], digits, "pixels and images must be 4 or more of one shape", {}),
        (pixels, digits.select(torch.arange(3)), "must be 4 or more", {}),
        (pixels[..., :7], digits, "one shape", {}),
        (pixels, digits, "n_reference must be from 4 to the number of images, 1797; got 3", dict(n_reference=3)),
        (pixels, digits, "n_reference must be from 4 to the number of images, 1797; got 1798", dict(n_reference=1798)),
        (pixels, pixels, "features must be given, .* must have labels", {}),
        (pixels, digits.select(torch.arange(999)), "must be at least 1,000 images for a classifier", {}),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_samples(samples, images, **kwargs)
    assert metrics.classifier_obstacle(digits.select(torch.arange(1000))) is None


@pytest.mark.filterwarnings("ignore:.*features need more")
def test_four_images_are_enough_and_three_are_not(digits):
    def features(pixels):
        return pixels.flatten(1)[:, 20:30].double()

    pixels = digits.pixels
    assert evaluate_samples(pixels[:4], digits, features=features, n_reference=4)["n"] == 4
    assert evaluate_samples(pixels[:4], pixels[4:8], features=features)["precision_recall_n"] == [4, 4]
    for samples, images, n in ((pixels[:3], digits, None), (pixels[:4], pixels[:3], None), (pixels[:4], digits, 3)):
        with pytest.raises(ValueError, match="4"):
            evaluate_samples(samples, images, features=features, n_reference=n)
