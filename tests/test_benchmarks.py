"""The benchmarks run, and their arithmetic is right. No time is asserted: these are not measurements."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
import cpu  # noqa: E402
import gpu  # noqa: E402
import peers  # noqa: E402
import race  # noqa: E402
import scaling  # noqa: E402

from ddpm_lit.ddpm import DDPM
from ddpm_lit.images import load_digits
from ddpm_lit.objective import simple_loss
from ddpm_lit.trainer import TrainConfig, Trainer


def test_works_take_turns_and_the_first_round_does_not_count(monkeypatch):
    order, clock = [], iter(range(100))
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(clock))
    works = {name: lambda name=name: order.append(name) for name in "abc"}
    monkeypatch.setattr(compare, "wait", lambda: order.append("wait"))
    took = compare.take_turns(works, 2)
    assert [name for name in order if name != "wait"] == list("abccbaabc") and order.count("wait") == 18
    assert took == {name: [1, 1] for name in "abc"}


def test_ratios_are_taken_round_by_round(capsys):
    compare.lines("work", {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0, 2.0]})
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == "| work | ours | 2 s (1–4) |  |"
    assert theirs == "| work | theirs | 2 s (2–2) | **1.00** (0.50–2.00) |"
    assert compare.seconds([0.0123]) == "12.3 ms (12.3–12.3)"


def test_several_gpus_on_paper(capsys):
    scaling.on_paper(16_000_000)  # 64 MB of gradient: 1 ms through PCIe for a whole copy
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "PCIe" in line]
    assert [row[2] for row in rows] == ["0.00 ms", "1.00 ms", "1.75 ms"]
    step = 1000 / scaling.GOAL
    wanted = [1, 2 * step / (step + 1), 8 * step / (step + 1.75)]
    assert [float(row[3]) for row in rows] == pytest.approx(wanted, abs=0.01)


def test_the_loop_of_diffusers_draws_what_ours_draws():
    "Else they would not do the same work."
    x_T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = {name: peers.PEERS[name]("digits").sample(x_T, "ddim", 20) for name in peers.NAMES[:2]}
    torch.testing.assert_close(drawn["ddpm_lit"], drawn["diffusers"], atol=1e-3, rtol=1e-3)


def test_the_plain_loop_trains_as_our_trainer_does():
    "The same network, batches and settings; other random numbers. A wrong learning rate or noise would show."
    images, c = load_digits(), TrainConfig(steps=60, batch_size=32, lr=3e-3, warmup=10, ema=0.9, progress=False)
    ours = Trainer(DDPM(peers.fresh("ddpm_lit", "digits"), race.SCHEDULE), images, c)
    losses, loop = ours.fit(), peers.PlainLoop("ddpm_lit", "digits", images, c, "scaled_linear")
    torch.testing.assert_close(loop.scheduler.alphas_cumprod.double(), race.SCHEDULE.alpha_bar, atol=1e-5, rtol=1e-4)
    for _ in range(60):
        loop.step()
    x0, draw = next(loop.batches), torch.Generator()
    nets = (ours.ema.net, loop.averaged())
    with torch.no_grad():
        found = [simple_loss(DDPM(net, race.SCHEDULE), x0, draw.manual_seed(1)).item() for net in nets]
    assert losses[0] == pytest.approx(1, abs=0.1) and found[1] == pytest.approx(found[0], rel=0.25)


def test_a_race_ends_at_its_goal():
    features = SimpleNamespace(distance=lambda drawn, real: float(len(drawn)))
    clock, net = race.Clock(load_digits(), features, goal=250, every=2, first=2), peers.fresh("ddpm_lit", "digits")
    clock.step(lambda: net)
    assert clock.seconds == 0
    with pytest.raises(race.Reached):
        clock.step(lambda: net)
    assert clock.steps == 2 and clock.seconds > 0 and clock.distance == 250


def test_unknown_parts_are_refused_by_name():
    "With or without a GPU; and every part of the README's list is one of the script's."
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(part in readme for part in (*cpu.PARTS, *gpu.PARTS))
    done = subprocess.run([sys.executable, FOLDER / "gpu.py", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 1 and "parts must be among" in done.stderr and "nonsense" in done.stderr
    assert "Traceback" not in done.stderr
