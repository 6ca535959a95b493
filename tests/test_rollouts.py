"""What PPO and GRPO share: answers, divergence, minibatches, early stop, LoRA, ranks, samples, and that they learn."""

import json
import shlex
import statistics
from functools import partial

import pytest
import torch
from on_ranks import run_on_ranks
from policy_loops import ALGORITHMS, COMMON, PROMPTS, fixed_rollout, letters, make_loop, two_steps
from test_gpu_step import StandIn, graphs  # noqa: F401

import finetune
from alignment import rollouts
from alignment.reward_model import RewardModel
from alignment.rollouts import kl_terms, masked_mean, select, write_answers
from checkpoint import load_checkpoint, load_model
from command_line import UserError, complaints_about
from inference.engine import Engine
from inference.gpu_cache import GpuCache
from lora import lora_layers
from training.run_log import read_metrics

both = pytest.mark.parametrize("algorithm", ALGORITHMS)


@pytest.fixture
def loop(algorithm, tmp_path, tokenizer):
    return make_loop(algorithm, tmp_path, tokenizer)


def batch_of(loop):
    """What the loss is computed of, after a first rollout."""
    batches = []
    loop.update = lambda batch, n_epochs: batches.append(batch) or {}
    loop.learn_from(fixed_rollout(loop))
    return batches[0]


# -- figures -----------------------------------------------------------------------------------------------------------


def test_moments_of_values_that_lie_close_together(tmp_path, tokenizer):
    """A spread far smaller than the mean is measured, and that of one value is none (by Python's statistics)."""
    loop = make_loop("ppo", tmp_path, tokenizer)
    values = (1000 + torch.randn(50, generator=torch.Generator().manual_seed(0)) * 1e-3).tolist()
    x = torch.tensor(values)
    mean, std = loop.moments(x)
    assert mean == pytest.approx(statistics.fmean(x.tolist()), rel=1e-12)
    assert std == pytest.approx(statistics.pstdev(x.tolist()), rel=1e-9)
    assert loop.moments(torch.tensor([7.123456])) == (pytest.approx(7.123456), 0.0)


# -- answers and divergence --------------------------------------------------------------------------------------------


def test_answers_stand_behind_their_prompts_and_are_cut_at_the_stop_token(tokenizer, random_model):
    """Masks and ends are those that a plain look at the tokens finds; what follows an end is padding."""
    model = random_model("modern", vocab_size=len(tokenizer), max_seq_len=48)
    prompts = {"input_ids": torch.tensor([[1, 5, 6], [7, 8, 9]] * 20), "attention_mask": torch.ones(40, 3).long()}
    prompts["attention_mask"][::2, 0] = 0
    model.lm_head.weight.data[2] *= 3  # some rows end early, some do not
    torch.manual_seed(0)
    answers = write_answers(Engine(model, None), prompts, end_token_ids=(2,), max_gen_len=6)
    assert torch.equal(answers["input_ids"][:, :3], prompts["input_ids"])
    assert torch.equal(answers["attention_mask"][:, :3], prompts["attention_mask"])
    assert 0 < answers["ended"].float().mean() < 1
    for row, written in enumerate(answers["input_ids"][:, 3:].tolist()):
        length = written.index(2) + 1 if 2 in written else len(written)
        assert answers["answer_mask"][row].tolist() == [True] * length + [False] * (len(written) - length)
        assert answers["attention_mask"][row, 3:].tolist() == answers["answer_mask"][row].int().tolist()
        assert set(written[length:]) <= {1}
        assert bool(answers["ended"][row]) == (2 in written)


def test_answers_are_drawn_from_the_policys_whole_distribution(tokenizer, random_model):
    """First tokens of many answers, at a temperature of 0.5, are as frequent as the policy finds them likely."""
    model = random_model("modern", vocab_size=len(tokenizer), max_seq_len=48)
    prompts = {"input_ids": torch.tensor([[5, 6, 7]] * 4000), "attention_mask": torch.ones(4000, 3).long()}
    torch.manual_seed(0)
    answers = write_answers(Engine(model, None), prompts, end_token_ids=(2,), max_gen_len=1, temperature=0.5)
    first = answers["input_ids"][:, 3]
    expected = (model(prompts["input_ids"][:1])["logits"][0, -1] / 0.5).softmax(-1)
    frequencies = torch.bincount(first, minlength=len(tokenizer)) / 4000
    assert (frequencies - expected).abs().sum() < 0.15, "total variation of chance alone is about 0.1"
    assert (frequencies - expected).abs().max() < 4 * (expected.max() / 4000) ** 0.5


def test_weights_that_are_not_finite_are_reported(tokenizer, random_model):
    model = random_model("gpt2", vocab_size=len(tokenizer), max_seq_len=48, seed=7)
    model.final_norm.weight.data.fill_(float("nan"))
    prompts = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2).long()}
    with pytest.raises(UserError, match="the policy cannot write answers: .*not finite.*lower --lr"):
        write_answers(Engine(model, None), prompts, end_token_ids=(2,), max_gen_len=3)


@both
@pytest.mark.usefixtures("graphs")
def test_one_engine_writes_all_answers_as_new_ones_would(algorithm, tmp_path, tokenizer, monkeypatch):
    """While the weights change; the cache is allocated once, and a GPU's steps are recorded once for each shape."""
    made = []
    monkeypatch.setattr(GpuCache, "_allocate", lambda *args, usual=GpuCache._allocate: made.append(1) or usual(*args))
    monkeypatch.setattr(rollouts, "Engine", partial(Engine, gpu_step=True))
    written, counts = [], []
    for is_kept in (True, False):
        loop = make_loop(algorithm, tmp_path / str(is_kept), tokenizer, lr=3e-3, warmup_steps=0)
        written.append([])
        for seed in range(3):
            rollout = fixed_rollout(loop, seed)
            written[-1].append(rollout["input_ids"].tolist())
            loop.learn_from(rollout)
            if not is_kept:
                del loop.engine
        counts.append((len(made), StandIn.made))
    assert written[0] == written[1]
    assert written[0][0] != written[0][1]
    assert counts[0][0] == 1 and counts[1][0] == 1 + 3
    assert 1 <= counts[0][1] <= 4, "of 1, 2, 4 and 8 answers"


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_estimators_of_divergence_are_right_on_average(estimator):
    """Σ π(token) k(token) is KL(π ‖ π_ref) as torch.distributions has it; k3 is never negative."""
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 10).log_softmax(-1)
    terms = kl_terms(policy, reference, estimator)
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (policy, reference)))
    assert (policy.exp() * terms).sum().item() == pytest.approx(kl.item(), abs=1e-6)
    assert (terms.min() >= 0) == (estimator == "k3")


def test_means_count_tokens_and_not_padding():
    x, mask = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert masked_mean(x, mask) == 3.0
    assert masked_mean(x, torch.zeros_like(mask)) == 0.0


# -- updates -----------------------------------------------------------------------------------------------------------


@both
def test_the_first_minibatch_has_ratio_1_and_no_divergence(loop, algorithm):
    """Nothing has been learned yet: the policy is the one that wrote, and the reference."""
    rollout = fixed_rollout(loop)
    assert len(set(rollout["answer_mask"].sum(1).tolist())) > 2, "answers of different lengths"
    assert rollout["kl"].abs().max() < 1e-5
    batch = batch_of(loop)
    for rows in torch.arange(8).split(4):
        figures = loop.model(**select(batch, rows))
        assert figures["val/ratio"].item() == pytest.approx(1.0, abs=1e-5)
        assert figures["policy/approxkl_avg"].item() == pytest.approx(0.0, abs=1e-6)
        assert figures["policy/clipfrac_avg"].item() == 0.0
        if algorithm == "grpo":
            assert figures["loss/kl_avg"].item() == pytest.approx(0.0, abs=1e-6)


@both
def test_more_padding_on_either_side_changes_nothing(loop):
    """Three columns before the prompts, two behind the answers: every figure stays, and so does the gradient."""
    batch = batch_of(loop)
    batch["old_log_probs"] = batch["old_log_probs"] + 0.2 * torch.randn_like(batch["old_log_probs"])
    wider = {}
    for name, value in batch.items():
        left = 3 if name in ("input_ids", "attention_mask") else 0
        padding = 7.0 if value.is_floating_point() else 1 if name == "input_ids" else 0  # garbage must not count
        wider[name] = value if value.ndim == 1 else torch.nn.functional.pad(value, (left, 2), value=padding)
    results = []
    for inputs in (batch, wider):
        loop.model.zero_grad()
        figures = loop.model(**inputs)
        figures["loss"].backward()
        results.append((figures, [p.grad.clone() for p in loop.model.parameters() if p.grad is not None]))
    (narrow, gradients), (wide, wide_gradients) = results
    for name in narrow:
        assert wide[name].item() == pytest.approx(narrow[name].item(), abs=1e-5), name
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, wide_gradients, strict=True))


@both
def test_micro_batches_of_1_2_and_4_give_the_same_step(algorithm, tmp_path, tokenizer):
    """Answers differ in length and every token weighs the same: figures and weights agree."""
    outcomes = []
    for size in (8, 4, 2, 1):
        settings = dict(batch_size=size, grad_accum_steps=8 // size, lr=1e-3, warmup_steps=0)
        loop = make_loop(algorithm, tmp_path, tokenizer, **settings)
        rollout = fixed_rollout(loop)
        torch.manual_seed(5)
        assert len(set(rollout["answer_mask"].sum(1).tolist())) > 2
        before = torch.nn.utils.parameters_to_vector(loop.model.parameters())
        figures = loop.learn_from(rollout)
        outcomes.append((figures, torch.nn.utils.parameters_to_vector(loop.model.parameters()) - before))
    figures, step = outcomes[0]
    for other_figures, other_step in outcomes[1:]:
        for name in figures:
            assert other_figures[name] == pytest.approx(figures[name], rel=1e-3, abs=1e-5), name
        # Adam divides by the size of a gradient, so that rounding shows where one is next to nothing
        assert (other_step - step).norm() < 0.02 * step.norm()


@both
def test_recomputed_activations_give_the_same_step(algorithm, tmp_path, tokenizer):
    """Every layer runs once more in the backward pass, of policy and critic, and nothing else changes."""
    outcomes, passes = [], {True: 0, False: 0}
    for recompute in (False, True):
        loop = make_loop(algorithm, tmp_path, tokenizer, recompute_activations=recompute, batch_size=8)
        rollout = fixed_rollout(loop)
        for network in (getattr(loop.model, "critic", None), loop.model.policy):
            backbone = getattr(network, "backbone", network)
            for layer in backbone.layers if backbone else ():
                layer.register_forward_pre_hook(lambda *_, kind=recompute: passes.update({kind: passes[kind] + 1}))
        torch.manual_seed(5)
        outcomes.append(loop.learn_from(rollout))
    assert passes[True] == 2 * passes[False]
    for name in outcomes[0]:
        assert outcomes[1][name] == pytest.approx(outcomes[0][name], rel=1e-4, abs=1e-6), name


@both
def test_two_ranks_make_the_steps_of_one(algorithm, tmp_path, tokenizer, on_two_ranks):
    """Half of the answers on each: advantages, losses, gradient norms and what follows in a second step."""
    alone = two_steps(algorithm, tmp_path, tokenizer, 1)
    together = on_two_ranks[algorithm]
    for step, other in zip(alone, together, strict=True):
        for name in step:
            assert other[name] == pytest.approx(step[name], rel=1e-3, abs=1e-5), name


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Figures of `policy_loops.two_steps` on two processes over gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(2, "policy_loops", folder)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@both
def test_too_much_divergence_stops_the_updates_before_the_step(algorithm, tmp_path, tokenizer):
    """The update that would start beyond `--target_kl` is not made: the weights are those after the one before."""
    weights = []
    for epochs, target_kl in ((1, 0.0), (5, 1e-9), (5, 0.0)):
        settings = dict(batch_size=8, target_kl=target_kl, lr=1e-2, warmup_steps=0, **{f"{algorithm}_epochs": epochs})
        loop = make_loop(algorithm, tmp_path, tokenizer, **settings)
        figures = loop.learn_from(fixed_rollout(loop))
        weights.append(list(loop.model.parameters()))
        assert figures["policy/updates"] == (1 if target_kl else epochs)
        assert all(parameter.grad is None for parameter in loop.model.parameters())
    assert all(torch.allclose(one, stopped, atol=1e-6) for one, stopped in zip(*weights[:2], strict=True))
    assert not all(torch.allclose(one, five, atol=1e-3) for one, five in zip(*weights[::2], strict=True))


# -- LoRA --------------------------------------------------------------------------------------------------------------


@both
def test_with_lora_only_adapters_move_and_the_reference_is_the_policy_without_them(algorithm, tmp_path, tokenizer):
    """Frozen parameters stay bit for bit; divergence is measured from them; the file left is the policy's adapters."""
    loop = make_loop(algorithm, tmp_path, tokenizer, lora_rank=4, lr=3e-3, warmup_steps=0, max_steps=3)
    assert loop.reference is None
    first = fixed_rollout(loop)
    assert first["kl"].abs().max() < 1e-6
    reference = loop.reference_log_probs(first)
    before = {name: parameter.clone() for name, parameter in loop.model.named_parameters()}
    loop.train()
    moved = {name for name, parameter in loop.model.named_parameters() if not torch.equal(parameter, before[name])}
    trained = {name for name, parameter in loop.model.named_parameters() if parameter.requires_grad}
    assert moved
    assert moved <= trained
    assert all("lora" in name or "reward_head" in name for name in trained)
    assert torch.equal(loop.reference_log_probs(first), reference)
    assert not torch.allclose(loop.log_probs(first), reference, atol=1e-4)
    policy, _, _ = load_model(loop.best_path)
    assert not lora_layers(policy)
    content = load_checkpoint(loop.best_path)
    assert all("lora" in name for name in content["model"])


@pytest.mark.parametrize("frozen_weights", ["fp32", "int8"])
def test_with_lora_the_critic_stands_on_the_reward_models_own_weights(frozen_weights, tmp_path, tokenizer):
    """No second copy, and the reward model judges as before."""
    settings = dict(lora_rank=4, frozen_weights=frozen_weights, lr=3e-3, warmup_steps=0, max_steps=2)
    loop = make_loop("ppo", tmp_path, tokenizer, **settings)
    rollout = fixed_rollout(loop)
    ids, mask = rollout["input_ids"], rollout["attention_mask"]
    before = loop.reward_model.rewards(ids, mask)
    theirs = {parameter.data_ptr() for parameter in loop.reward_model.backbone.parameters()}
    assert {p.data_ptr() for n, p in loop.model.critic.backbone.named_parameters() if "lora" not in n} == theirs
    assert loop.model.critic.reward_head.weight.data_ptr() != loop.reward_model.reward_head.weight.data_ptr()
    loop.train()
    assert torch.equal(loop.reward_model.rewards(ids, mask), before)
    assert not torch.allclose(loop.model.critic.rewards(ids, mask), before, atol=1e-4)


@both
def test_with_lora_a_run_continues_exactly(algorithm, tmp_path, tokenizer):
    """Adapters, their optimisers' state and, of PPO, the critic's head: two steps and two more are four."""
    settings = dict(lora_rank=2, max_steps=4, eval_interval=2, save_interval=2, lr=1e-3, warmup_steps=0)
    whole = make_loop(algorithm, tmp_path, tokenizer, **settings)
    whole.train()
    (tmp_path / "checkpoints" / "step_00000004.pth").unlink()
    resumed = make_loop(algorithm, tmp_path, tokenizer, **settings, resume="auto")
    resumed.train()
    assert resumed.step == whole.step == 4
    theirs = resumed.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in whole.model.state_dict().items())


# -- samples -----------------------------------------------------------------------------------------------------------


@both
def test_every_evaluation_shows_some_answers(loop, tmp_path, capsys):
    """Printed and added to `samples.jsonl`, the SFT model's first; what is evaluated twice stands there once."""
    loop.train()
    out = capsys.readouterr().out
    samples = read_metrics(tmp_path / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 0, 0, 2, 2, 2]
    for sample in samples:
        assert any(text in sample["prompt"] for text in PROMPTS)
        assert " ".join(sample["answer"].split()) in out
        assert set(sample) == {"step", "prompt", "answer", "score", "ended"}
    loop.evaluate()
    assert read_metrics(tmp_path / "samples.jsonl") == samples


# -- that they learn, and go on ----------------------------------------------------------------------------------------


class LikesE(RewardModel):
    """The reward model that counts what `letters` counts."""

    def __init__(self, backbone):
        super().__init__(backbone)
        torch.nn.init.zeros_(self.reward_head.weight)

    def rewards(self, input_ids, attention_mask):
        texts = [
            self.tokenizer.decode(ids[mask.bool()][-6:]) for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        return torch.tensor(letters(None, texts, None))


@both
def test_a_reward_for_a_letter_is_learned_steeply(algorithm, tmp_path, tokenizer, monkeypatch):
    """Within 30 steps of 32 answers, answers hold several times as many of the letter e."""
    monkeypatch.setattr(LikesE, "tokenizer", tokenizer, raising=False)
    settings = dict(rollout_batch_size=32, batch_size=32, max_steps=30, lr=1e-2, warmup_steps=0)
    settings |= dict(kl_coef=0.01, missing_eos_penalty=0.0, **({"group_size": 8} if algorithm == "grpo" else {}))
    loop = make_loop(algorithm, tmp_path, tokenizer, LikesE if algorithm == "ppo" else letters, **settings)

    def count():
        rollout = fixed_rollout(loop, repeat=32)
        rows = zip(rollout["input_ids"][:, -6:], rollout["answer_mask"], strict=True)
        return sum(tokenizer.decode(ids[wrote]).count("e") for ids, wrote in rows) / 64

    before = count()
    for _ in range(30):
        loop.train_step()
    assert before < 0.5
    assert count() > 3.0


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A working folder with an SFT model, prompts and a reward function."""
    monkeypatch.chdir(tmp_path)
    make_loop("grpo", tmp_path, tokenizer, lora_rank=1)  # leaves sft.pth
    (tmp_path / "records.json").write_text(json.dumps([{"instruction": text} for text in PROMPTS * 2]))
    (tmp_path / "rewards.py").write_text(
        "def length(prompts, responses, records):\n    return list(map(len, responses))\n"
    )
    return tmp_path


OPTIONS = shlex.split(
    "--mode grpo --sft_model sft.pth --data_path records.json --val_data_path records.json --reward rewards.py:length "
    "--max_steps 4 --max_gen_len 4 --rollout_batch_size 8 --batch_size 4 --group_size 4 --eval_interval 2 "
    "--save_interval 2 --num_threads 1 --device cpu --precision fp32"
)


def test_grpo_continues_exactly(folder, capsys):
    """Two steps and two more after `--resume auto` are four steps, metrics, samples and weights."""
    finetune.main([*OPTIONS, "--output_dir", "whole"])
    assert "aligned: whole/grpo_best.pth, held-out reward" in capsys.readouterr().out
    finetune.main([*OPTIONS, "--output_dir", "parts"])
    (folder / "parts" / "checkpoints" / "step_00000004.pth").unlink()
    finetune.main([*OPTIONS, "--output_dir", "parts", "--resume", "auto"])
    assert "continuing from parts/checkpoints/step_00000002.pth, step 2 of 4" in capsys.readouterr().out
    clock = {"tokens_per_second", "mfu", "memory_mib", "seconds"}
    for name in ("metrics.jsonl", "samples.jsonl"):
        stories = [
            [{key: value for key, value in record.items() if key not in clock} for record in read_metrics(path)]
            for path in (folder / "whole" / name, folder / "parts" / name)
        ]
        assert stories[0] == stories[1]
        assert len(stories[0]) == (6 if name == "metrics.jsonl" else 9)
    states = [load_checkpoint(f"{run}/checkpoints/step_00000004.pth")["model"] for run in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    policy, tokenizer, content = load_model("whole/grpo_best.pth")
    assert content["stage"] == "grpo"
    assert policy.generate(torch.tensor([tokenizer.encode("hi")["input_ids"]]), 3).size(1) >= 4


def test_the_common_settings_are_checked():
    complaints = " ".join(
        complaints_about(
            finetune.GRPOConfig(
                **COMMON, max_gen_len=0, temperature=0.0, target_kl=-1.0, rollout_batch_size=100, n_samples=-1
            )
        )
    )
    for named in ("--max_gen_len must be at least 1", "--temperature must be above 0", "--target_kl must be",
                  "--rollout_batch_size 100 must be a multiple of --batch_size", "--n_samples must"):  # fmt: skip
        assert named in complaints
