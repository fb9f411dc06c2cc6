"""Saving and loading: the folders of diffusers in both directions, and every way in which a folder can be broken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from doubles import TINY, OwnNet, rng, tiny_model
from safetensors.torch import load_file, save_file

from ddpm_lit import cli, files
from ddpm_lit.ddpm import DDPM
from ddpm_lit.forward import Schedule, cosine_schedule, linear_schedule
from ddpm_lit.pretrained import find_model, load_ddpm, shipped_models, shipped_recipe
from ddpm_lit.sampler import ancestral_sample, ddim_sample
from ddpm_lit.unet import PRESETS, UNet

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def tiny(s=None, **changes) -> DDPM:
    return tiny_model(s, **changes)


def noise(n=3):
    return torch.randn(n, 1, 8, 8, generator=rng(9))


def same(a: DDPM, b: DDPM) -> bool:
    "Whether two models are the same one: schedule, words, configuration, and every weight, bit for bit."
    x, y = a.net.state_dict(), b.net.state_dict()
    return (
        torch.equal(a.s.beta, b.s.beta)
        and (a.predicts, a.variance, a.clip, a.net.config) == (b.predicts, b.variance, b.clip, b.net.config)
        and x.keys() == y.keys()
        and all(torch.equal(x[k], y[k]) for k in x)
    )


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reweigh(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def flatten(folder):
    "The older published layout: everything in the folder itself."
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            shutil.move(file, folder / file.name)
        (folder / part).rmdir()


@pytest.fixture
def saved(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", "learned"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "mean"])
def test_round_trip(tmp_path, predicts, variance):
    m = tiny(predicts=predicts, variance=variance)
    m.save_pretrained(tmp_path / "m")
    back = DDPM.from_pretrained(tmp_path / "m")
    assert same(m, back) and not back.training
    assert all(p.requires_grad and p.dtype == torch.float32 and not p.is_meta for p in back.parameters())
    with torch.no_grad():
        for mine, theirs in zip(m.p_step(noise(), 7), back.p_step(noise(), 7), strict=True):
            assert torch.equal(mine, theirs)


def test_round_trip_of_any_schedule(tmp_path):
    beta = 0.001 + 0.3 * torch.rand(20, dtype=torch.float64, generator=rng(1))
    m = tiny(Schedule(beta))
    m.save_pretrained(tmp_path / "m")
    assert same(m, load_ddpm(tmp_path / "m"))
    assert json.loads((tmp_path / "m/scheduler/scheduler_config.json").read_text())["trained_betas"] == beta.tolist()


def test_whether_x0_is_clipped_is_saved(tmp_path):
    m = tiny(clip=False)
    m.save_pretrained(tmp_path / "m")
    back = load_ddpm(tmp_path / "m")
    assert same(m, back) and not same(tiny(), back)
    with torch.no_grad():
        assert torch.equal(back.p_step(noise(), 19).mean, back.p_step(noise(), 19, clip=False).mean)
        assert not torch.equal(back.p_step(noise(), 19).mean, back.p_step(noise(), 19, clip=True).mean)
        assert torch.equal(tiny().p_step(noise(), 19).mean, back.p_step(noise(), 19, clip=True).mean)


def test_the_linear_schedule_is_written_as_three_numbers(saved):
    config = json.loads((saved / "scheduler/scheduler_config.json").read_text())
    assert config["trained_betas"] is None and config["beta_schedule"] == "linear"
    assert (config["num_train_timesteps"], config["beta_start"], config["beta_end"]) == (20, 1e-4, 0.02)


def test_saving_again_replaces_the_model_and_leaves_other_files_alone(saved):
    (saved / "samples.txt").write_text("mine")
    (saved / "unet/notes.txt").write_text("mine too")
    m = tiny(seed=1, variance="beta")
    m.save_pretrained(saved)
    assert same(m, load_ddpm(saved)) and not same(tiny(), load_ddpm(saved))
    assert (saved / "samples.txt").read_text() == "mine" and (saved / "unet/notes.txt").read_text() == "mine too"
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_folders_flat_and_nested_are_read_alike(saved):
    nested = load_ddpm(saved)
    flatten(saved)
    assert same(nested, load_ddpm(saved)) and same(nested, load_ddpm(str(saved)))
    (saved / "model_index.json").unlink()
    assert same(nested, load_ddpm(saved))


def test_attention_under_its_older_names_is_read(saved):
    old, expected = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}, load_ddpm(saved)

    def rename(tensors):
        for name in list(tensors):
            for new, former in old.items():
                if f".{new}." in name:
                    tensors[name.replace(f".{new}.", f".{former}.")] = tensors.pop(name)

    reweigh(saved, rename)
    assert any(".proj_attn." in name for name in load_file(saved / WEIGHTS))
    assert same(expected, load_ddpm(saved))


def test_half_precision_is_read_as_float32(saved):
    reweigh(saved, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    assert {p.dtype for p in load_ddpm(saved).parameters()} == {torch.float32}


# What diffusers makes of our folders, and we of its.


@pytest.fixture(scope="module")
def diffusers():
    module = pytest.importorskip("diffusers")
    module.utils.logging.disable_progress_bar()
    return module


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", "learned"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_diffusers_opens_our_folder_and_takes_the_same_steps(tmp_path, diffusers, predicts, variance):
    m = tiny(predicts=predicts, variance=variance)
    m.save_pretrained(tmp_path / "m")
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "m")
    x = noise()
    with torch.no_grad():
        for t in (19, 7, 1, 0):
            out = pipe.unet(x, t).sample
            step = pipe.scheduler.step(out, t, x, generator=rng(t)).prev_sample
            mean, var = m.p_step(x, t)
            noise_ = torch.randn(x.shape, generator=rng(t)) if t else torch.zeros_like(x)
            # 1 - alpha_bar is about 1e-4 at first, where the float32 tables of diffusers keep four digits.
            torch.testing.assert_close(step, mean + var.sqrt() * noise_, atol=1e-4, rtol=1e-4)


def test_diffusers_samples_from_our_folder_what_we_sample(tmp_path, diffusers):
    m = tiny()
    m.save_pretrained(tmp_path / "m")
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "m")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=20, generator=rng(4), output_type="np").images
    draw = rng(4)
    x = torch.randn(2, 1, 8, 8, generator=draw)
    with torch.no_grad():
        for t in range(19, -1, -1):
            mean, var = m.p_step(x, t)
            x = mean + var.sqrt() * torch.randn(x.shape, generator=draw) if t else mean
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(images), expected, atol=1e-4, rtol=0)


def test_diffusers_does_not_sample_silently_from_a_prediction_it_does_not_know(tmp_path, diffusers):
    tiny(predicts="mean").save_pretrained(tmp_path / "m")
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="prediction_type given as mean"):
        pipe.scheduler.step(noise(), 7, noise())


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_we_open_the_folder_of_a_diffusers_pipeline(tmp_path, diffusers, layout):
    model = diffusers.UNet2DModel(**TINY)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=20, beta_schedule="linear", variance_type="fixed_large")
    diffusers.DDPMPipeline(unet=model, scheduler=scheduler).save_pretrained(tmp_path)
    if layout == "flat":
        flatten(tmp_path)
    m = load_ddpm(tmp_path)
    assert (m.predicts, m.variance, m.s.T) == ("eps", "beta", 20)
    torch.testing.assert_close(m.s.beta.float(), scheduler.betas, atol=1e-8, rtol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(m.net(noise(), 3), model.eval()(noise(), 3).sample, atol=1e-5, rtol=1e-5)


def test_we_open_a_folder_with_the_papers_cifar10_configuration(tmp_path, diffusers):
    config = PRESETS["cifar10"].network | dict(dropout=0.0)
    model = diffusers.UNet2DModel(**config, center_input_sample=False, mid_block_scale_factor=1, act_fn="silu")
    diffusers.DDPMPipeline(unet=model, scheduler=diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    m = load_ddpm(tmp_path)
    mine, theirs = m.net.state_dict(), model.state_dict()
    assert sum(v.numel() for v in mine.values()) == 35_746_307
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)

    # The published folder: everything in one place, and JSON files with the fields that diffusers had in 2022.
    flatten(tmp_path)
    fields = "act_fn attention_head_dim block_out_channels center_input_sample down_block_types downsample_padding "
    fields += "flip_sin_to_cos freq_shift in_channels layers_per_block mid_block_scale_factor norm_eps norm_num_groups "
    fields += "out_channels sample_size time_embedding_type up_block_types _class_name _diffusers_version"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({name: config[name] for name in fields.split()}))
    scheduler = dict(_class_name="DDPMScheduler", _diffusers_version="0.1.1", beta_end=0.02, beta_schedule="linear")
    scheduler |= dict(beta_start=0.0001, clip_sample=True, num_train_timesteps=1000, trained_betas=None)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler | dict(variance_type="fixed_large")))
    old = DDPM.from_pretrained(tmp_path)
    assert (old.s.T, old.predicts, old.variance, old.clip) == (1000, "eps", "beta", True)
    assert old.net.config == m.net.config and all(torch.equal(mine[k], v) for k, v in old.net.state_dict().items())


KINDS = [
    dict(beta_schedule="linear", beta_start=2e-4, beta_end=0.03),
    dict(beta_schedule="scaled_linear", beta_start=1e-3, beta_end=0.2),
    dict(beta_schedule="squaredcos_cap_v2"),
    dict(beta_schedule="sigmoid", beta_start=1e-3, beta_end=0.2),
    dict(trained_betas=[0.01, 0.02, 0.5, 0.3, 0.1] * 4),
]


def pipeline(diffusers, folder, kind="DDPM", channels=1, classes=None, **settings):
    "Write the folder of a diffusers pipeline with a lively network, and return that pipeline."
    net = tiny(out_channels=channels, num_class_embeds=classes).net
    unet = diffusers.UNet2DModel(**net.config).eval()
    unet.load_state_dict(net.state_dict())
    scheduler = getattr(diffusers, f"{kind}Scheduler")(num_train_timesteps=20, **settings)
    pipe = getattr(diffusers, f"{kind}Pipeline")(unet=unet, scheduler=scheduler)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loop(m, pipe, steps=20, cond=None, **step):
    "Run both loops from the same noise, with the same draws: return the images after every step, ours and theirs."
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(2, 1, 8, 8, generator=rng(4))
    ours, theirs, draw = [], [], rng(5)
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            out = pipe.unet(x if not theirs else theirs[-1], t, **(cond or {})).sample
        theirs.append(pipe.scheduler.step(out, t, theirs[-1] if theirs else x, generator=draw, **step).prev_sample)
    sample = ddim_sample if step else ancestral_sample
    steps = dict(steps=steps) if step else dict()
    sample(m, x.shape, x_T=x, generator=rng(5), callback=lambda t, x, x0: ours.append(x.clone()), cond=cond, **steps)
    return ours, theirs


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.get("beta_schedule", "trained"))
def test_sampling_is_that_of_diffusers_step_for_step(tmp_path, diffusers, kind, prediction, clip):
    pipe = pipeline(diffusers, tmp_path, prediction_type=prediction, clip_sample=clip, **kind)
    m = load_ddpm(tmp_path)
    assert m.clip == clip
    # diffusers computes its tables in float32, we in float64.
    torch.testing.assert_close(m.s.beta.float(), pipe.scheduler.betas, atol=1e-6, rtol=2e-5)
    ours, theirs = loop(m, pipe)
    assert len(ours) == len(theirs) == 20
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4 * max(1, b.abs().max().item()), rtol=0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_every_variance_is_that_of_diffusers(tmp_path, diffusers, variance):
    pipe = pipeline(diffusers, tmp_path, variance_type=variance, channels=2 if variance == "learned_range" else 1)
    ours, theirs = loop(load_ddpm(tmp_path), pipe)
    torch.testing.assert_close(ours[-1], theirs[-1], atol=2e-4, rtol=0)


def test_the_variance_that_diffusers_names_and_cannot_compute(tmp_path, diffusers):
    pipe = pipeline(diffusers, tmp_path, variance_type="fixed_large_log")
    assert load_ddpm(tmp_path).variance == "beta"
    assert pipe.scheduler.step(noise(), 7, noise()).prev_sample.isnan().all()  # the root of a negative logarithm


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: kind["beta_schedule"])
def test_a_ddim_pipeline_is_read_and_sampled_alike(tmp_path, diffusers, kind, steps):
    pipe = pipeline(diffusers, tmp_path, "DDIM", timestep_spacing="trailing", clip_sample=False, **kind)
    m = load_ddpm(tmp_path)
    assert (m.predicts, m.variance, m.clip) == ("eps", "beta_tilde", False)
    ours, theirs = loop(m, pipe, steps, eta=0.0)
    assert len(ours) == len(theirs) == steps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4 * max(1, b.abs().max().item()), rtol=1e-4)


@pytest.mark.parametrize("kind, step", [("DDPM", dict()), ("DDIM", dict(eta=0.0))])
def test_a_class_conditional_folder_is_read_and_sampled_alike(tmp_path, diffusers, kind, step):
    spacing = dict(timestep_spacing="trailing", clip_sample=False) if kind == "DDIM" else {}
    pipe, labels = pipeline(diffusers, tmp_path, kind, classes=10, **spacing), torch.tensor([3, 7])
    m = load_ddpm(tmp_path)
    ours, theirs = loop(m, pipe, 10 if step else 20, dict(class_labels=labels), **step)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4 * max(1, b.abs().max().item()), rtol=1e-4)
    others, _ = loop(m, pipe, 10 if step else 20, dict(class_labels=labels.flip(0)), **step)
    assert (others[-1] - ours[-1]).abs().max() > 1e-3  # the labels matter


def test_a_network_of_ones_own_is_saved_and_read_back(tmp_path, diffusers):
    m = DDPM(OwnNet(), cosine_schedule(20), "v", clip=False).eval()
    m.image_shape = (1, 8, 8)
    m.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"holds a doubles.OwnNet, .*from_pretrained\(folder, net=OwnNet\(...\)\)"):
        load_ddpm(tmp_path / "m")
    back = load_ddpm(tmp_path / "m", OwnNet())
    assert (back.predicts, back.variance, back.clip, back.image_shape) == ("v", "beta_tilde", False, (1, 8, 8))
    with torch.no_grad():
        assert torch.equal(back.p_step(noise(), 7).mean, m.p_step(noise(), 7).mean)
    with pytest.raises((OSError, ValueError, AttributeError)):
        diffusers.DDPMPipeline.from_pretrained(tmp_path / "m")
    (tmp_path / "m/model_index.json").unlink()
    with pytest.raises(ValueError, match="holds no model, or half of one"):
        load_ddpm(tmp_path / "m", OwnNet())


@pytest.mark.parametrize("change", [dict(norm_eps=0.1), dict(attention_head_dim=4), dict(flip_sin_to_cos=False)])
def test_a_unet_that_computes_otherwise_is_not_filled_although_the_weights_fit(saved, change):
    (name,) = change
    with pytest.raises(ValueError, match=f"net must have {name}="):
        load_ddpm(saved, net=UNet(**TINY | change))


def test_a_unet_to_be_filled_may_differ_in_dropout_and_size(saved):
    net = UNet(**TINY | dict(dropout=0.3, sample_size=16))
    m = load_ddpm(saved, net=net)
    assert m.net is net and m.image_shape == (1, 16, 16) and not m.training
    with torch.no_grad():
        assert torch.equal(m.p_step(noise(), 7).mean, load_ddpm(saved).p_step(noise(), 7).mean)


@pytest.mark.parametrize("kind", ["unet", "own"])
def test_only_a_module_can_be_filled(tmp_path, kind):
    (tiny() if kind == "unet" else DDPM(OwnNet(), linear_schedule(20))).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="net must be an nn.Module, got function"):
        load_ddpm(tmp_path / "m", net=lambda x, t: x)


def test_a_folder_changes_its_kind_by_saving_the_other_kind_over_it(tmp_path):
    own = DDPM(OwnNet(), linear_schedule(20))
    for m, net in ((tiny(), None), (own, OwnNet()), (tiny(seed=1), None)):
        m.save_pretrained(tmp_path / "m")
        back = load_ddpm(tmp_path / "m", net)
        ours, theirs = m.net.state_dict(), back.net.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_settings_of_a_sampler_do_not_change_the_model(saved):
    expected = load_ddpm(saved)
    harmless = dict(timestep_spacing="linspace", steps_offset=1, set_alpha_to_one=False, dynamic_thresholding_ratio=0.9)
    edit(saved / "scheduler/scheduler_config.json", **harmless, tensor_format="pt", _diffusers_version="0.1")
    assert same(load_ddpm(saved), expected)


def test_weights_in_the_older_file_are_read_and_the_newer_file_comes_first(tmp_path, diffusers):
    pipe = pipeline(diffusers, tmp_path / "new")
    pipe.save_pretrained(tmp_path / "old", safe_serialization=False)
    old = tmp_path / "old/unet/diffusion_pytorch_model.bin"
    assert old.is_file() and not (tmp_path / "old" / WEIGHTS).exists()
    assert same(load_ddpm(tmp_path / "old"), load_ddpm(tmp_path / "new"))
    flatten(tmp_path / "old")
    assert same(load_ddpm(tmp_path / "old"), load_ddpm(tmp_path / "new"))
    (tmp_path / "new/unet/diffusion_pytorch_model.bin").write_bytes(b"not read where there is a safetensors file")
    assert same(load_ddpm(tmp_path / "old"), load_ddpm(tmp_path / "new"))


class Trap:
    "A pickle that would leave a file behind, were it executed."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("content", ["trap", "cut short", "no tensors", "empty"])
def test_nothing_in_the_older_file_is_executed_and_a_broken_one_is_named(saved, content):
    old, sprung = saved / "unet/diffusion_pytorch_model.bin", saved / "sprung"
    tensors = load_file(saved / WEIGHTS)
    torch.save({"conv_in.weight": Trap(sprung)} if content == "trap" else tensors, old)
    if content == "no tensors":
        torch.save({"conv_in.weight": 3}, old)
    old.write_bytes({"cut short": old.read_bytes()[:-100], "empty": b""}.get(content, old.read_bytes()))
    (saved / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin (cannot be read|must hold tensors)"):
        load_ddpm(saved)
    assert not sprung.exists()


# What is refused, and how.


def test_a_function_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="m.net must be an nn.Module to be saved, got function"):
        DDPM(lambda x, t: x, linear_schedule(20)).save_pretrained(tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", WEIGHTS, "scheduler/scheduler_config.json"])
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    with pytest.raises(ValueError, match=file):
        load_ddpm(saved)


@pytest.mark.parametrize("file", ["unet/config.json", WEIGHTS, "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999])
def test_a_file_cut_short_is_named(saved, file, fraction):
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[: int(fraction * (len(content) - 2))])
    with pytest.raises(ValueError, match=f"{file} cannot be read"):
        load_ddpm(saved)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda w: w.pop("conv_in.bias"), "conv_in.bias is missing"),
        (lambda w: w.update(extra=torch.zeros(2)), "extra is not expected"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(9)}), r"conv_in.bias must be \(8,\), got \(9,\)"),
        (lambda w: [w.pop(k) for k in list(w) if "down" in k], "is missing.*and [0-9]+ more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, change, named):
    reweigh(saved, change)
    with pytest.raises(ValueError, match=named):
        load_ddpm(saved)


@pytest.mark.parametrize(
    "file, change, named",
    [
        ("scheduler/scheduler_config.json", dict(beta_schedule="laplace"), "beta_schedule must be .*; got 'laplace'"),
        ("scheduler/scheduler_config.json", dict(clip_sample="no"), "clip_sample must be true or false, got 'no'"),
        ("scheduler/scheduler_config.json", dict(trained_betas=[0.1, 2]), r"beta must lie in \(0, 1\)"),
        ("scheduler/scheduler_config.json", dict(trained_betas="many"), "scheduler_config.json: "),
        ("scheduler/scheduler_config.json", dict(timestep_spacing="odd"), "timestep_spacing='odd' is not implemented"),
        ("scheduler/scheduler_config.json", dict(predict_epsilon=False), "predict_epsilon=False is not implemented"),
        ("scheduler/scheduler_config.json", dict(brand_new=1), "brand_new=1 is not known"),
        ("scheduler/scheduler_config.json", dict(_class_name="EulerDiscreteScheduler"), "_class_name='EulerDiscrete"),
        ("scheduler/scheduler_config.json", dict(thresholding=True), "thresholding=True is not implemented"),
        ("scheduler/scheduler_config.json", dict(clip_sample_range=2.0), "clip_sample_range=2.0"),
        ("scheduler/scheduler_config.json", dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=True"),
        ("scheduler/scheduler_config.json", dict(prediction_type="flow"), "prediction_type must be one of .*'flow'"),
        ("scheduler/scheduler_config.json", dict(variance_type="learned"), "variance_type must be one of .*'learned'"),
        ("scheduler/scheduler_config.json", dict(beta_end=1.5), r"beta_T must lie in \(0, 1\), got 1.5"),
        ("unet/config.json", dict(act_fn="mish"), "act_fn='mish' is not implemented"),
        ("unet/config.json", dict(brand_new=1), "UNet has no keyword brand_new"),
        ("unet/config.json", dict(_class_name="UNet3DConditionModel"), "must describe a UNet2DModel or a UNet2DCondi"),
    ],
)
def test_a_field_that_is_not_implemented_is_named(saved, file, change, named):
    edit(saved / file, **change)
    with pytest.raises(ValueError, match=named):
        load_ddpm(saved)


@pytest.mark.parametrize("survivors", range(4))
def test_a_save_that_is_cut_short_leaves_nothing_that_loads_as_a_mixture(saved, monkeypatch, survivors):
    moves, replace = [], files.os.replace

    def dying(source, target):
        if Path(target).is_relative_to(saved):  # not the files that are still being written beside it
            if len(moves) == survivors:
                raise KeyboardInterrupt
            moves.append(target)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        tiny(seed=1, block_out_channels=(8, 32)).save_pretrained(saved)
    with pytest.raises(ValueError, match="model_index.json is missing"):
        load_ddpm(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_save_that_fails_while_writing_leaves_the_former_model(saved, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        tiny(seed=1).save_pretrained(saved)
    assert same(tiny(), load_ddpm(saved))
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_a_hub_id_downloads_only_what_is_read(saved, tmp_path, monkeypatch, weights):
    names, hub, expected = [], tmp_path / "hub", load_ddpm(saved)
    old = "unet/diffusion_pytorch_model.bin"
    torch.save(load_file(saved / WEIGHTS), saved / old)  # the Hub may have both
    if weights == "bin":
        (saved / WEIGHTS).unlink()

    def download(name, allow_patterns):
        names.append(name)
        for file in set(allow_patterns) & {str(p.relative_to(saved)) for p in saved.rglob("*")}:
            (hub / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(saved / file, hub / file)
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert same(load_ddpm("google/ddpm-cifar10-32"), expected)
    assert set(names) == {"google/ddpm-cifar10-32"}
    assert (hub / old).exists() == (weights == "bin"), "the older file is fetched only where there is no other"


@pytest.mark.parametrize("source", ["/no/such/folder", "no such thing", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_refused(source):
    with pytest.raises(ValueError, match="is not a folder, and cannot be downloaded"):
        load_ddpm(source)


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match="'google/ddpm-cifar10-32' is not a folder.*no connection"):
        load_ddpm("google/ddpm-cifar10-32")


# What is there instead, and what a network of another kind becomes.


@pytest.mark.parametrize(
    "file", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.bin", "model.ckpt"]
)
def test_where_the_weights_are_missing_the_error_names_what_is_there(saved, file):
    (saved / WEIGHTS).rename((saved / WEIGHTS).with_name(file))
    with pytest.raises(
        ValueError, match=f"{WEIGHTS} cannot be read: it is not there; rename the one that fits: {file}$"
    ):
        load_ddpm(saved)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "ema_model."])
def test_names_with_a_prefix_are_shown_beside_the_names_that_lack(saved, prefix):
    def rename(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    reweigh(saved, rename)
    with pytest.raises(ValueError, match=f"conv_in.bias is missing; {prefix}conv_in.bias is not expected"):
        load_ddpm(saved)


def test_the_folder_of_a_run_names_the_model_in_it(tmp_path):
    tiny().save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="folder of a run, not of a model: its newest model is .*run/model"):
        load_ddpm(tmp_path / "run")


@pytest.mark.parametrize("shape, size", [((1, 16, 16), 16), ((1, 8, 16), [8, 16]), ((1, 8, 8), 8)])
def test_a_shape_set_by_hand_is_saved(tmp_path, shape, size):
    m = tiny()
    m.image_shape = shape
    m.save_pretrained(tmp_path)
    assert load_ddpm(tmp_path).image_shape == shape
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["sample_size"] == size


class Doubled(UNet):
    def forward(self, x_t, t, **cond):
        return 2 * super().forward(x_t, t, **cond)


def extended():
    net = UNet(**TINY)
    net.extra = torch.nn.Linear(2, 2)  # as adapters add layers
    return net


def normed():
    net = OwnNet()
    torch.nn.utils.parametrizations.weight_norm(net.first)
    return net


@pytest.mark.parametrize("make", [lambda: Doubled(**TINY), extended, normed])
def test_what_is_no_plain_unet_is_saved_as_a_network_of_ones_own(tmp_path, make):
    m = DDPM(make(), linear_schedule(20)).eval()
    m.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="which no file can build"):
        load_ddpm(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_ddpm(tmp_path, net=make()).p_step(noise(), 7).mean, m.p_step(noise(), 7).mean)


def test_a_network_of_ones_own_with_another_configuration_is_not_filled(tmp_path):
    DDPM(Doubled(**TINY), linear_schedule(20)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="net must have norm_eps=1e-05"):
        load_ddpm(tmp_path, net=Doubled(**TINY | dict(norm_eps=0.1)))
    net = Doubled(**TINY)
    net.config["table"] = torch.zeros(3)  # what JSON cannot hold is no part of it
    DDPM(net, linear_schedule(20)).save_pretrained(tmp_path)
    load_ddpm(tmp_path, net=Doubled(**TINY))


def test_double_precision_is_kept_and_shared_weights_are_written(tmp_path):
    m = DDPM(tiny().net.double(), linear_schedule(20))
    m.net.mid_block.resnets[0].conv1.weight = m.net.mid_block.resnets[0].conv2.weight
    m.save_pretrained(tmp_path)
    back = load_ddpm(tmp_path)
    assert back.net.conv_in.weight.dtype == torch.float64 and same(back, m)


# ---------------------------------------------------------------------------------------------- models of the package


@pytest.mark.parametrize("name", sorted(shipped_models()))
def test_a_model_of_the_package_is_small_and_says_how_it_was_made(name):
    folder, recipe = shipped_models()[name], shipped_recipe(name)
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 8e6
    assert {"command", "seed", "seconds", "machine"} <= recipe.keys() and name in recipe["command"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: ") and recipe["command"] in card


@pytest.mark.parametrize("name", ["digits", "digits-labels", "digits-improved"])
def test_digits_of_the_package_are_drawn_without_a_network(name, tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    m = DDPM.from_pretrained(name)
    assert all(p.dtype == torch.float32 for p in m.net.parameters()) and not m.net.training
    classes = m.net.config["num_class_embeds"]
    cond = classes and dict(class_labels=torch.arange(20) % (classes - 1))
    x = m.sample(20, steps=10, cond=cond, generator=rng(0))
    distance = torch.cdist(x.flatten(1).double(), digits.pixels.flatten(1).double()).amin(1).mean() / 8
    assert distance < 40  # root mean square of 255; noise is farther than 70 from every digit
    assert cli.main(["sample", name, "-n", "3", "--steps", "2", "--no-progress"]) == 0
    assert (tmp_path / "samples.png").is_file() and not list(shipped_models()[name].rglob("*.png"))


def test_a_folder_with_the_name_of_a_model_is_never_passed_over_silently(tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.warns(UserWarning, match="model 'digits' is read as the model of ddpm_lit, not ./digits, which holds"):
        assert find_model("digits") == shipped_models()["digits"]
    shutil.copytree(saved, tmp_path / "digits", dirs_exist_ok=True)
    with pytest.warns(UserWarning, match="model 'digits' is read as the folder here, not .*digits"):
        assert same(DDPM.from_pretrained("digits"), DDPM.from_pretrained(saved))
    assert find_model("./digits") == Path("digits") and find_model("no-such-model") is None


def test_the_scores_of_a_model_of_the_package_are_written_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = set(shipped_models()["digits"].rglob("*"))
    assert cli.main(["evaluate", "digits", "--bpd", "--bpd-calls", "2", "-n", "4", "--no-progress"]) == 0
    assert (tmp_path / "digits-evaluation.json").is_file() and set(shipped_models()["digits"].rglob("*")) == before
