"""One process or several: which work falls to whom, what they exchange, signals, random states, the record of a run."""

import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from doubles import importance_steps, train_autoencoder
from torch import nn

import ddpm_lit.processes as processes
from ddpm_lit.autoencoder import Autoencoder
from ddpm_lit.processes import (
    Borrowed,
    TrainingLog,
    autocast,
    available_cores,
    batch_generator,
    catch_signals,
    free_memory,
    print_main,
    progress_bar,
    shard_batches,
    spawn_generators,
    trackers,
    undo_sharding,
)

CPU = torch.device("cpu")


# -- what this process may use


def test_free_memory_is_shared_among_the_processes_of_a_machine(monkeypatch):
    alone = free_memory()
    assert 2**20 < alone < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert 0.5 < free_memory() * 8 / alone < 2


def test_cores_are_shared_and_each_process_has_one(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    for local, cores in (("1", 12), ("4", 3), ("5", 2), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert available_cores() == cores


PEAK = """
import torch
from ddpm_lit import processes
from ddpm_lit.processes import peak_memory, reset_peak_memory
CPU = torch.device("cpu")
reset_peak_memory(CPU)
before = peak_memory(CPU)
torch.ones(100_000_000)
assert 350e6 < peak_memory(CPU) - before < 500e6
try:  # what this machine can do, without the function under test
    open("/proc/self/clear_refs", "w").write("5")
    can_reset = peak_memory(CPU) - before < 100e6
except OSError:
    can_reset = False
torch.ones(100_000_000)
reset_peak_memory(CPU)
assert (peak_memory(CPU) - before < 100e6) == can_reset
"""


def test_peak_memory_remembers_and_is_reset():
    subprocess.run([sys.executable, "-c", PEAK], check=True)  # a fresh process: not every kernel can forget a peak


def test_only_one_module_reads_the_environment():
    modules = Path(processes.__file__).parent.glob("*.py")
    readers = [path.name for path in modules if "os.environ" in path.read_text() or "getenv" in path.read_text()]
    assert readers == ["processes.py"] and "def environment" in Path(processes.__file__).read_text()


# -- who prints, in which precision


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_main_process_alone_prints_and_shows_a_bar(monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    print_main("a", "b")
    with progress_bar(False, "work", 10, "img", initial=4) as bar:
        bar.update(6)
    out, err = capsys.readouterr()
    assert out == ("a\nb\n" if rank == "0" else "") and ("work: 100%" in err) == (rank == "0")


def test_fp16_and_unknown_precisions_are_refused_on_a_cpu():
    with pytest.raises(ValueError, match="^precision must be no or bf16 on a CPU.*got fp16"):
        autocast("fp16", CPU)
    with pytest.raises(ValueError, match="^precision must be one of no, bf16, fp16; got 'fp8'"):
        autocast("fp8", CPU)


def test_where_a_tracker_is_missing_the_line_to_install_it_is_given(monkeypatch):
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    assert trackers("auto") == trackers("none") == []
    with pytest.raises(ImportError, match=r"pip install 'ddpm_lit\[tracking\]'"):
        trackers("tensorboard")
    with pytest.raises(ImportError, match="pip install wandb"):
        trackers("wandb")


@pytest.mark.parametrize("value, cpu", [("True", True), ("1", True), ("False", False), ("", False)])
def test_the_words_of_accelerates_variables_are_understood(monkeypatch, value, cpu):
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert processes.is_set("ACCELERATE_USE_CPU") == cpu and not processes.is_set("ACCELERATE_USE_NOTHING")


# -- work and random numbers


@pytest.mark.parametrize("n, batch_size, count", [(10, 3, 1), (10, 3, 2), (10, 3, 7), (1, 1, 2), (0, 4, 2)])
def test_batches_are_dealt_and_put_back_in_order(n, batch_size, count):
    dealt = [shard_batches(n, batch_size, process=(rank, count)) for rank in range(count)]
    assert sorted(k for batches in dealt for k, _ in batches) == list(range(-(-n // batch_size) or 1))
    together = undo_sharding([[images for _, images in batches] for batches in dealt])
    assert torch.equal(torch.cat(together), torch.arange(n))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_the_generator_of_a_batch_is_that_of_seed_and_stride():
    def state(generator):
        return generator.get_state()

    for seed, batch in ((0, 0), (7, 0), (7, 3), (2**63, 2**33)):
        wanted = torch.Generator().manual_seed((seed + batch * 0x9E3779B9) % 2**64)
        assert torch.equal(state(batch_generator(seed, batch)), state(wanted))
    assert not torch.equal(state(batch_generator(0, 1)), state(batch_generator(1, 0)))


def test_spawned_generators_are_drawn_from_one():
    draws = [torch.stack([torch.rand(4, generator=g) for g in spawn_generators(torch.Generator(), 3)]) for _ in "ab"]
    assert torch.equal(*draws) and len(draws[0].flatten().unique()) == 12


# -- what is borrowed


def test_modes_and_random_numbers_are_given_back_also_after_an_error():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.ReLU()).eval()
    net[1].train()
    borrowed, before = Borrowed(net, 3, CPU), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), borrowed.use():
        assert all(part.training for part in net.modules())
        first = torch.rand(2)
        assert torch.equal(borrowed.random()[0], torch.get_rng_state())
        1 / 0  # noqa: B018
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in net.modules()] == [False, False, True, False]
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), first) and torch.equal(borrowed.random()[0], torch.get_rng_state())


def test_what_mixed_precision_puts_into_the_network_is_taken_out_again():
    net = nn.Linear(2, 2)
    for before in ({}, {"forward": net.forward}):
        vars(net).update(before)
        with Borrowed(net, 3, CPU).use():
            net._original_forward, net.forward = net.forward, lambda x: x  # as accelerate does
        assert vars(net).get("forward") == before.get("forward") and "_original_forward" not in vars(net)


# -- signals


@pytest.fixture
def heeded():
    "Ctrl-C has its usual effect, also where the tests run in the background of a shell, which turns it off."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_was_ignored_stays_ignored_as_behind_nohup(heeded):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with catch_signals(False) as caught:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # that one is heeded
        assert caught == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_second_signal_is_let_through_unless_patient(heeded):
    before = signal.getsignal(signal.SIGINT)
    for patient in (False, True):
        with catch_signals(patient) as caught:
            signal.raise_signal(signal.SIGINT)
            assert caught == [signal.SIGINT]
            if patient:
                signal.raise_signal(signal.SIGINT)
                assert caught == [signal.SIGINT] * 2
            else:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before


# -- the record of a run


def test_the_log_finds_a_row_across_its_readings():
    log = TrainingLog(60, 7, CPU)
    with log.open_bar(1, 0, disable=True), pytest.raises(FloatingPointError, match="from step 5 on"):
        for step in range(1, 61):
            log.add(step, torch.tensor(math.inf if step >= 5 else 1.0), torch.tensor(1.0))


def test_the_log_returns_means_without_skipped_steps_and_continues_from_a_record(caplog):
    log, metrics = TrainingLog(8, 4, CPU), []
    losses = [1.0, math.nan, 3.0, 5.0, 2.0, 2.0, math.inf, 4.0]
    with caplog.at_level(logging.WARNING, "ddpm_lit"), log.open_bar(2, 0, disable=True):
        for step, loss in enumerate(losses, start=1):
            metrics.append(log.add(step, torch.tensor(loss), torch.tensor(2 * loss)))
    assert [step for step, read in enumerate(metrics, start=1) if read] == [4, 8]
    assert metrics[3] == dict(loss=3.0, gradient=6.0, skipped=1)
    assert metrics[7]["loss"] == pytest.approx(8 / 3) and metrics[7]["skipped"] == 2 and metrics[7]["images/s"] > 0
    assert "step 4: 1 of the last 4 updates skipped" in caplog.text
    again = TrainingLog(8, 4, CPU)
    again.restore(log.losses[:3], log.norms[:3])
    with again.open_bar(2, 3, disable=True):
        assert again.skipped == 1 and again.add(4, torch.tensor(7.0), torch.tensor(1.0))["loss"] == 7


# -- two processes

TOGETHER = """
import torch
from ddpm_lit.processes import *
from ddpm_lit.processes import (all_reduce_sum, any_signal, check_same_step, compute_once, gather_in_order,
    make_accelerator, print_main, raise_on_all_ranks, shard_batches, this_process)
here, a = this_process(), make_accelerator()
rank = here.process_index
assert here.num_processes == 2
mine = [images.double() for _, images in shard_batches(11, 2)]
assert torch.equal(gather_in_order(mine), torch.arange(11).double())
assert all_reduce_sum(torch.tensor([1.0, rank], dtype=torch.float64)).tolist() == [2, 1]
assert compute_once(lambda: f"by rank {rank}") == "by rank 0"
assert any_signal(a, [15] if rank == 1 else [], due=False) == 15 and any_signal(a, [], due=True) == 0
check_same_step(a, 3)
for text, call in (("they would begin at the steps [3, 4]", lambda: check_same_step(a, 3 + rank)),):
    try:
        call()
    except ValueError as error:
        assert text in str(error), error
    else:
        raise AssertionError("not refused")
for failing in (0, 1):
    try:
        with raise_on_all_ranks(a, "the file"):
            if rank == failing:
                raise OSError("disk full")
        raise AssertionError("the other one goes on")
    except OSError as error:
        assert "the file could not be written" in str(error)
print_main("once")
from pathlib import Path
from doubles import importance_steps, train_autoencoder
here = Path(__file__).parent
torch.save(importance_steps(rank, 2), here / f"importance{rank}.pt")
assert train_autoencoder(here / "two", 4) == 0
"""


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_exchange_what_they_have(tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "together.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once") == 1
    # the history of drawing t by importance is one for both processes
    losses, state = importance_steps(0, 1)
    results = [torch.load(tmp_path / f"importance{rank}.pt") for rank in (0, 1)]
    for step in range(5):
        assert (results[0][0][step] + results[1][0][step]) / 2 == pytest.approx(losses[step], rel=1e-4)
    for _, remembered in results:
        assert torch.equal(remembered["counts"], state["counts"])
        torch.testing.assert_close(remembered["terms"], state["terms"], rtol=1e-4, atol=1e-6)
    # and two processes train the autoencoder that one trains
    assert train_autoencoder(tmp_path / "one", 8) == 0
    one, two = (Autoencoder.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
