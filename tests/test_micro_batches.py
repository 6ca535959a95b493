"""How many samples are computed at once is chosen by memory, and changes nothing but memory.

A hook stands in for a memory that is too small: it raises the error of PyTorch's allocator.
"""

import copy
import math

import policy_loops
import pytest
import torch
from test_gpu_training import SUPERVISED, make_loop

from alignment import rollouts
from alignment.sft import SFTConfig
from command_line import UserError, complaints_about
from training import ranks
from training.micro_batches import bytes_to_come, divisors, largest_within, measure, next_smaller
from training.optimization import Muon

CPU = torch.device("cpu")


class SmallMemory:
    """A memory in which a pass over n rows of the model takes `fixed` + n · `a_row` bytes.

    Attributes:
        rows: of the passes that were tried.
    """

    def __init__(self, loop, capacity, fixed=100.0, a_row=10.0):
        self.capacity, self.fixed, self.a_row, self.rows, self.n_bytes = capacity, fixed, a_row, [], 0.0
        loop.model.register_forward_pre_hook(self.take, with_kwargs=True)

    def take(self, model, arguments, batch):
        self.rows.append(len(batch["input_ids"]))
        needed = self.fixed + self.a_row * self.rows[-1]
        if needed > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.n_bytes = max(self.n_bytes, needed)

    def limit(self):
        return self.capacity

    def forget_peak(self):
        self.n_bytes = 0.0

    def peak(self):
        return self.n_bytes


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_sizes_are_divisors():
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert [next_smaller(size, 60) for size in (60, 30, 15, 5, 2)] == [30, 15, 6, 2, 1]


@pytest.mark.parametrize("guess", [0, 1, 3, 8, 16, 60, 1000])
def test_two_measured_sizes_give_the_largest_that_fits(guess):
    """Whatever the guess: 200 + 25 n bytes, of which 600 are there; 15 of 60 samples fit and 20 do not."""
    calls = []

    def peak_of(size):
        calls.append(size)
        return 200 + 25 * size if 200 + 25 * size <= 600 else math.inf

    measured = measure(divisors(60), guess, peak_of)
    assert largest_within(600, divisors(60), measured) == 15
    assert len(calls) == len(set(calls)) <= 5
    assert largest_within(450, divisors(60), measured) == 10
    assert largest_within(600, divisors(60), measured, stretch=2) == 6, "rows that may become twice as long"
    assert largest_within(0, divisors(60), measured) == 1, "less than one sample there is not"


def test_what_the_optimisers_will_add_is_counted():
    muon, adamw = torch.nn.Parameter(torch.zeros(4, 4)), torch.nn.Parameter(torch.zeros(5))
    optimizers = [Muon([muon]), torch.optim.AdamW([adamw])]
    assert bytes_to_come(optimizers) == 4 * 16 + 2 * 4 * 5
    muon.grad, adamw.grad = torch.ones(4, 4), torch.ones(5)
    for optimizer in optimizers:
        optimizer.step()
    assert bytes_to_come(optimizers) == 0


# -- the loop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", SUPERVISED)
def test_the_size_changes_no_figure_and_memory_that_runs_out_halves_it(
    trainer, tmp_path, tokenizer, random_model, capsys
):
    """Steps and evaluations of 8 samples at once, of one, and of 8 for which there is no memory."""
    results = []
    for size, capacity in ((8, math.inf), (1, math.inf), (8, 130.0)):
        folder = tmp_path / f"{size} {capacity}"
        loop = make_loop(trainer, folder, tokenizer, random_model, CPU, lr=1e-3, micro_batch_size=size)
        memory = SmallMemory(loop, capacity)
        results.append([loop.train_step() for _ in range(2)])
        results[-1].append(loop.within_memory(loop.evaluate, "evaluation_batch_size"))
    for figures, *others in zip(*results, strict=True):
        for other in others:
            assert other == pytest.approx(figures, rel=2e-4, abs=2e-5)
    assert loop.micro_batch_size in (1, 2)
    assert f"step 0: out of memory with micro-batches of 8; computing it again with {4}\n" in capsys.readouterr().out
    assert max(memory.rows[-4:]) <= 3


@pytest.mark.parametrize("trainer", policy_loops.ALGORITHMS)
def test_updates_with_fresh_answers_are_halved_too(trainer, tmp_path, tokenizer, monkeypatch, capsys):
    answers, results = policy_loops.fixed_rollout(policy_loops.make_loop(trainer, tmp_path, tokenizer)), []
    monkeypatch.setattr(rollouts, "write_answers", lambda *_, **__: {**answers})
    for capacity in (math.inf, 115.0):
        loop = policy_loops.make_loop(trainer, tmp_path / str(capacity), tokenizer, lr=1e-3)
        SmallMemory(loop, capacity)
        torch.manual_seed(0)
        results.append(loop.train_step())
    assert results[1] == pytest.approx(results[0], rel=2e-4, abs=2e-5)
    assert loop.micro_batch_size == 1
    assert "out of memory with micro-batches of 4; computing it again with 2" in capsys.readouterr().out


def test_dropout_draws_the_same_numbers_again(tmp_path, tokenizer, random_model):
    """A step that ran out of memory is that of a run which had its micro-batches from the beginning."""
    figures = []
    for size, capacity in ((4, math.inf), (8, 145.0)):
        loop = make_loop("sft", tmp_path / str(size), tokenizer, random_model, CPU, lr=1e-3, micro_batch_size=size)
        for layer in loop.model.layers:
            layer.dropout.p = 0.3
        SmallMemory(loop, capacity)
        torch.manual_seed(5)
        figures.append([loop.train_step() for _ in range(2)])
    assert figures[1] == figures[0]


def test_the_largest_size_is_measured_once_and_said(tmp_path, tokenizer, random_model, capsys):
    """Of 100 + 10 n bytes 170 are there, 8 % of which stay free: 5 rows would fit, and 8 samples are cut into twice 4.
    Neither weights nor random numbers are touched."""
    loop = make_loop("sft", tmp_path, tokenizer, random_model, CPU)
    before, random = copy.deepcopy(loop.model.state_dict()), torch.get_rng_state()
    loop.memory = SmallMemory(loop, 170.0 + bytes_to_come(loop.optimizers) / 0.92)
    loop.fit_memory(loop.largest_batch)
    said = capsys.readouterr().out
    assert loop.micro_batch_size == 4
    assert said.startswith("micro-batches of 4, 2 a step: measured ")
    assert said.endswith(" GiB with 8% in reserve\n")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())
    assert all(parameter.grad is None for parameter in loop.model.parameters())
    assert len(loop.memory.rows) <= 4


@pytest.mark.parametrize("trainer", policy_loops.ALGORITHMS)
def test_policies_are_measured_by_their_first_answers(trainer, tmp_path, tokenizer, monkeypatch, capsys):
    """Of answers of 4 in a minibatch, 2 fit if they become as long as the context; the figures are those of before."""
    answers, results = policy_loops.fixed_rollout(policy_loops.make_loop(trainer, tmp_path, tokenizer)), []
    monkeypatch.setattr(rollouts, "write_answers", lambda *_, **__: {**answers})
    for measures in (False, True):
        loop = policy_loops.make_loop(trainer, tmp_path / str(measures), tokenizer, lr=1e-3)
        if measures:
            stretch = 48 / answers["input_ids"].size(1)
            room = 100 + 10 * 2.5 * stretch + bytes_to_come(loop.optimizers)
            loop.memory = SmallMemory(loop, room / 0.92)
        torch.manual_seed(0)
        results.append(loop.train_step())
    assert results[1] == pytest.approx(results[0], rel=2e-4, abs=2e-5)
    assert loop.micro_batch_size == 2
    assert capsys.readouterr().out.count("micro-batches of 2, 2 a step: measured") == 1
    assert not loop.model.training, "where nothing is dropped, nothing is dropped afterwards"


def test_a_size_that_was_given_is_taken(tmp_path, tokenizer, random_model):
    loop = make_loop("sft", tmp_path, tokenizer, random_model, CPU, micro_batch_size=2)
    loop.memory = SmallMemory(loop, 1.0)
    loop.fit_memory(loop.largest_batch)
    assert (loop.micro_batch_size, loop.memory.rows) == (2, [])
    [complaint] = complaints_about(SFTConfig(batch_size=8, grad_accum_steps=2, micro_batch_size=3))
    assert complaint == "--micro_batch_size 3 must divide the 16 samples of --batch_size times --grad_accum_steps"


def test_all_ranks_take_the_size_of_the_smallest_memory(tmp_path, tokenizer, random_model, monkeypatch):
    """Here another rank has room for 2 only."""
    loop = make_loop("sft", tmp_path, tokenizer, random_model, CPU)
    loop.memory = SmallMemory(loop, 1e9)
    monkeypatch.setattr(ranks, "gather_objects", lambda value: [value, 2 if isinstance(value, int) else 0.0])
    loop.fit_memory(loop.largest_batch)
    assert (loop.micro_batch_size, loop.evaluation_batch_size) == (2, 2)


def test_one_of_several_ranks_that_runs_out_of_memory_says_which_size_to_give(
    tmp_path, tokenizer, random_model, monkeypatch
):
    """It cannot repeat a step that the others go on with."""
    loop = make_loop("sft", tmp_path, tokenizer, random_model, CPU, micro_batch_size=8)
    SmallMemory(loop, 145.0)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(loop.parallel_model, "sum", float)
    with pytest.raises(torch.OutOfMemoryError):
        loop.train_step()
    assert loop._memory_advice().startswith("with micro-batches of 8 and --max_seq_len 48; give --micro_batch_size 4")


def test_a_memory_for_not_even_one_sample_ends_with_advice(tmp_path, tokenizer, random_model):
    loop = make_loop("sft", tmp_path, tokenizer, random_model, CPU)
    SmallMemory(loop, 1.0)
    with pytest.raises(UserError, match="out of memory with micro-batches of 1 and --max_seq_len 48; add --recompute"):
        loop.train()


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("trainer", ["pretrain", "sft", "dpo"])
def test_on_a_gpu_the_size_is_measured_and_changes_no_figure(trainer, tmp_path, tokenizer, random_model, capsys):
    results = []
    for size in (1, 0):
        settings = dict(lr=1e-3, micro_batch_size=size)
        loop = make_loop(trainer, tmp_path / str(size), tokenizer, random_model, torch.device("cuda"), **settings)
        loop.fit_memory(loop.largest_batch)
        results.append([loop.train_step() for _ in range(2)])
    assert loop.micro_batch_size == 8
    assert "micro-batches of 8, 1 a step: measured" in capsys.readouterr().out
    for theirs, ours in zip(*results, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_with_less_memory_a_step_is_computed_in_smaller_parts(tmp_path, tokenizer, random_model, capsys):
    """The allocator's own error, of a process that may have a small part of the memory only."""
    loop = make_loop("sft", tmp_path, tokenizer, random_model, torch.device("cuda"), micro_batch_size=8)
    expected = loop.train_step()["loss"]
    loop = make_loop("sft", tmp_path / "again", tokenizer, random_model, torch.device("cuda"), micro_batch_size=8)
    room = 1 << 28

    def take(model, arguments, batch):
        if len(batch["input_ids"]) > 2:
            torch.empty(room, device="cuda")

    loop.model.register_forward_pre_hook(take, with_kwargs=True)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room // 2) / total)
    try:
        assert loop.train_step()["loss"] == pytest.approx(expected, rel=1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert loop.micro_batch_size == 2
    assert "out of memory with micro-batches of 8; computing it again with 4" in capsys.readouterr().out
