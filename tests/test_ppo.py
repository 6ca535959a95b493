"""PPO: the ratio starts at 1, advantages are what their definition says, frozen models stay frozen, rewards rise."""

import json
import math
import shlex

import pytest
import torch
from policy_loops import COMMON, PROMPTS, make_loop

import finetune
from alignment import ppo
from alignment.ppo import PPOConfig, adapted_kl_coef, answer_values, generalized_advantages, rlhf_ppo
from alignment.reward_model import RewardModel
from alignment.rollouts import answer_token_log_probs
from alignment.stage import Instructions
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, load_model, save_checkpoint
from command_line import UserError, complaints_about
from data_loader import GPTPPODataset, GPTSFTDataset
from gpt_model import GPTConfig, GPTModel
from training.run_log import read_metrics


class LikesSmallNumbers(RewardModel):
    """A scripted reward: how many tokens of the answer have an id from 3 to 99. Its critic expects nothing at first."""

    def __init__(self, backbone):
        super().__init__(backbone)
        torch.nn.init.zeros_(self.reward_head.weight)

    def rewards(self, input_ids, attention_mask):
        return (input_ids.gt(2) & input_ids.lt(100) & attention_mask.bool())[:, -6:].float().sum(1)


@pytest.fixture
def loop(tmp_path, tokenizer):
    return make_loop("ppo", tmp_path, tokenizer)


def rollout_of(loop):
    torch.manual_seed(3)
    return loop.rollout(loop.train_data, [index % len(loop.train_data) for index in range(8)])


def advantages_of(loop, rollout):
    return loop.estimate_advantages(rollout, loop.token_rewards(rollout, float(loop.model.kl_coef)))


# -- the first minibatch -----------------------------------------------------------------------------------------------


def test_log_probabilities_of_a_padded_batch_are_those_of_each_answer_alone(loop):
    """Prompts of different lengths do not touch each other (by a forward pass for each row, without padding)."""
    rollout = rollout_of(loop)
    n_answer = rollout["answer_mask"].size(1)
    for row in range(8):
        ids = rollout["input_ids"][row][rollout["attention_mask"][row].bool()]
        n_written = int(rollout["answer_mask"][row].sum())
        log_probs = loop.model.policy(ids[None])["logits"][0].log_softmax(-1)
        alone = log_probs[-n_written - 1 : -1].gather(1, ids[-n_written:, None]).squeeze(1)
        assert torch.allclose(rollout["old_log_probs"][row, :n_written], alone, atol=1e-4)
        values = loop.model.critic.token_values(ids[None], torch.ones_like(ids)[None])[0, -n_written - 1 : -1]
        assert torch.allclose(rollout["old_values"][row, :n_written], values, atol=1e-4)
        assert rollout["scores"][row] == pytest.approx(
            loop.reward_model.rewards(ids[None], torch.ones_like(ids)[None]).item(), abs=1e-4
        )
    assert n_answer <= 6


def test_probabilities_are_taken_at_the_temperature_of_sampling(tmp_path, tokenizer):
    loop = make_loop("ppo", tmp_path, tokenizer, temperature=0.5)
    rollout = rollout_of(loop)
    ids = rollout["input_ids"][:1]
    logits = loop.model.policy(ids, rollout["attention_mask"][:1])["logits"][0]
    first = ids.size(1) - rollout["answer_mask"].size(1)
    expected = (logits[first - 1] / 0.5).log_softmax(-1)[ids[0, first]]
    assert rollout["old_log_probs"][0, 0] == pytest.approx(expected.item(), abs=1e-4)


# -- answers and advantages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_advantages_are_gaes_by_brute_force_from_the_definition(gae_lambda, gamma):
    """Â_t = Σ_l (γλ)ˡ (r_{t+l} + γ V_{t+l+1} − V_{t+l}), with V = 0 after the last token of the answer."""
    torch.manual_seed(0)
    rewards, values = torch.randn(5, 7), torch.randn(5, 7)
    lengths = [7, 1, 4, 6, 3]
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    advantages = generalized_advantages(rewards * mask, values, mask, gae_lambda, gamma)
    for row, n in enumerate(lengths):
        v = [*values[row, :n].tolist(), 0.0]
        for t in range(7):
            deltas = [rewards[row, k].item() + gamma * v[k + 1] - v[k] for k in range(t, n)]
            by_definition = sum((gamma * gae_lambda) ** power * delta for power, delta in enumerate(deltas))
            assert advantages[row, t].item() == pytest.approx(by_definition, abs=1e-5)


def test_the_score_stands_at_the_last_token_and_divergence_costs_at_every_one(tmp_path, tokenizer):
    """With λ = 1 a return is the sum of all rewards still to come; an answer without an end pays for it."""
    loop = make_loop("ppo", tmp_path, tokenizer, gae_lambda=1.0, kl_coef=0.1, missing_eos_penalty=2.0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    kl = torch.tensor([[0.5, 0.25, 1.0, 0.0], [0.0, 2.0, 0.0, 1.0]])
    values = torch.randn(2, 4)
    rollout = dict(scores=torch.tensor([3.0, 1.0]), ended=torch.tensor([True, False]), kl=kl, answer_mask=mask)
    rollout |= dict(input_ids=None, attention_mask=None, old_log_probs=None, old_values=values)
    result = advantages_of(loop, rollout)
    returns = [[3 - 0.175, 3 - 0.125, 3 - 0.1], [-1 - 0.3, -1 - 0.3, -1 - 0.1, -1 - 0.1]]
    for row, expected in enumerate(returns):
        assert result["returns"][row][mask[row]].tolist() == pytest.approx(expected, abs=1e-5)
    raw = (result["returns"] - values)[mask]
    whitened = result["advantages"][mask]
    assert torch.allclose(whitened, (raw - raw.mean()) / raw.std(unbiased=False), atol=1e-5)
    assert whitened.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert whitened.square().mean().item() == pytest.approx(1.0, abs=1e-4)


def test_the_loss_is_the_clipped_one_by_hand(loop):
    """Policy and value losses as sums over single tokens, at ratios on both sides of the clip."""
    batch = advantages_of(loop, rollout_of(loop))
    torch.manual_seed(0)
    with torch.no_grad():
        batch["old_log_probs"] = batch["old_log_probs"] + 0.4 * torch.randn_like(batch["old_log_probs"])
        batch["old_values"] = batch["old_values"] + 0.4 * torch.randn_like(batch["old_values"])
        output = loop.model(**batch)
        new, _ = answer_token_log_probs(loop.model.policy, batch, 1.0)
        values = answer_values(loop.model.critic, batch)
    policy_terms, value_terms, clipped, value_clipped = [], [], 0, 0
    for row, t in batch["answer_mask"].nonzero().tolist():
        ratio = math.exp(new[row, t] - batch["old_log_probs"][row, t])
        advantage = batch["advantages"][row, t].item()
        policy_terms.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
        clipped += abs(ratio - 1) > 0.2
        value, old, goal = (x[row, t].item() for x in (values, batch["old_values"], batch["returns"]))
        near = min(max(value, old - 0.2), old + 0.2)
        value_terms.append(0.5 * max((value - goal) ** 2, (near - goal) ** 2))
        value_clipped += (near - goal) ** 2 > (value - goal) ** 2
    n = len(policy_terms)
    assert output["val/clipfrac_avg"].item() == pytest.approx(value_clipped / n)
    assert 0 < value_clipped < n
    assert output["loss/policy_avg"].item() == pytest.approx(sum(policy_terms) / n, abs=1e-5)
    assert output["loss/value_avg"].item() == pytest.approx(sum(value_terms) / n, rel=1e-4)
    assert output["policy/clipfrac_avg"].item() == pytest.approx(clipped / n)
    expected = output["loss/policy_avg"] + 0.5 * output["loss/value_avg"]
    assert output["loss"].item() == pytest.approx(expected.item())
    assert 0 < clipped < n


def test_every_step_is_told_in_figures_that_add_up(tmp_path, tokenizer):
    """`objective/rlhf_reward` is the score less the penalty for a missing end and β times the divergence."""
    loop = make_loop("ppo", tmp_path, tokenizer, kl_coef=0.3, missing_eos_penalty=2.0, lr=3e-3, max_steps=2)
    loop.train()
    first, second = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    for record in (first, second):
        missing = 2.0 * (1 - record["objective/ended"])
        assert record["objective/non_score_reward"] == pytest.approx(-0.3 * record["objective/kl"], abs=1e-6)
        assert record["objective/rlhf_reward"] == pytest.approx(
            record["objective/scores"] - missing + record["objective/non_score_reward"], abs=1e-5
        )
        assert record["objective/entropy"] > 0
        assert record["val/explained_variance"] < 1
        assert record["policy/updates"] == 4
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert second["objective/kl"] != pytest.approx(0.0, abs=1e-5)


def test_explained_variance_says_how_much_the_critic_foresaw(tmp_path, tokenizer):
    """1 − Var(returns − values) / Var(returns): 1 for a critic that is never wrong, 0 for one that says nothing."""
    loop = make_loop("ppo", tmp_path, tokenizer, gae_lambda=1.0, kl_coef=0.0, missing_eos_penalty=0.0)
    loop.update = lambda batch, n_epochs: {}
    rollout = rollout_of(loop)
    scores = rollout["scores"].unsqueeze(1).expand_as(rollout["old_values"])  # with λ = 1 the returns
    for share in (0.0, 0.5, 1.0):
        figures = loop.learn_from({**rollout, "old_values": share * scores})
        assert figures["val/explained_variance"] == pytest.approx(1 - (1 - share) ** 2, abs=1e-4)


def test_one_held_out_prompt_still_measures_the_spread_of_rewards(tmp_path, tokenizer):
    """Answers to training prompts join those to few held-out ones: no score is thousands of deviations away."""
    loop = make_loop("ppo", tmp_path, tokenizer)
    loop.val_data = GPTPPODataset([[{"role": "user", "content": "a"}]], tokenizer, 42)
    many = torch.cat([rollout_of(loop)["scores"] for _ in range(8)])
    loop.before_first_step()
    assert loop.model.reward_std.item() == pytest.approx(many.std().item(), rel=0.5)
    assert rollout_of(loop)["scores"].abs().max() < 6


def test_a_reward_model_that_finds_all_answers_alike_is_named(tmp_path, tokenizer, capsys):
    """Rounding is not taken for a spread: rewards stay what they are, and a sentence says so."""

    class FindsAllAlike(LikesSmallNumbers):
        def rewards(self, input_ids, attention_mask):
            return 100 + 1e-5 * super().rewards(input_ids, attention_mask)

    loop = make_loop("ppo", tmp_path, tokenizer, FindsAllAlike)
    loop.before_first_step()
    assert loop.model.reward_std.item() == 1.0
    assert "finds all of the SFT model's answers alike" in capsys.readouterr().out
    assert rollout_of(loop)["scores"].abs().max() < 1e-3


def test_advantages_that_are_alike_do_not_become_large(tmp_path, tokenizer):
    """Whitening does not blow up what is rounding, and returns that are all alike leave nothing to explain."""
    loop = make_loop("ppo", tmp_path, tokenizer, gae_lambda=1.0, kl_coef=0.0, missing_eos_penalty=0.0)
    rollout = rollout_of(loop)
    rollout = {**rollout, "scores": torch.full((8,), 3.0), "old_values": torch.zeros_like(rollout["old_values"])}
    rollout["scores"][0] += 1e-6
    assert advantages_of(loop, rollout)["advantages"].abs().max() < 0.01
    loop.update = lambda batch, n_epochs: {}
    assert "val/explained_variance" not in loop.learn_from(rollout)


# -- β -----------------------------------------------------------------------------------------------------------------


def test_beta_adapts_by_zieglers_rule():
    """β (1 + 0.1 clip(KL / target − 1, ± 0.2)), by hand."""
    assert adapted_kl_coef(0.5, 6.0, 6.0) == 0.5
    assert adapted_kl_coef(0.5, 6.6, 6.0) == pytest.approx(0.5 * 1.01)
    assert adapted_kl_coef(0.5, 60.0, 6.0) == pytest.approx(0.5 * 1.02)
    assert adapted_kl_coef(0.5, 0.0, 6.0) == pytest.approx(0.5 * 0.98)


def test_an_adaptive_beta_is_part_of_what_a_run_resumes(tmp_path, tokenizer):
    """It moves at every step, is logged, is the price that rewards are computed with, and survives a checkpoint."""
    settings = dict(kl_target=5.0, kl_coef=0.2, max_steps=3, save_interval=1, eval_interval=3)
    make_loop("ppo", tmp_path, tokenizer, **settings).train()
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert [r["objective/kl_coef"] for r in records] == pytest.approx([0.2, 0.2 * 0.98, 0.2 * 0.98**2], rel=1e-5)
    resumed = make_loop("ppo", tmp_path, tokenizer, **settings)
    resumed.resume("auto")
    assert resumed.model.kl_coef.item() == pytest.approx(0.2 * 0.98**3, rel=1e-5)
    rollout = {**rollout_of(resumed), "ended": torch.ones(8, dtype=torch.bool)}
    kl = torch.ones_like(rollout["kl"])
    costs = rollout["scores"] - resumed.token_rewards({**rollout, "kl": kl}, float(resumed.model.kl_coef)).sum(1)
    assert torch.allclose(costs, 0.2 * 0.98**3 * rollout["answer_mask"].sum(1), atol=1e-4)


def test_policy_and_critic_are_clipped_each_by_itself(loop):
    """A critic whose gradient is a hundred times larger leaves the policy's as it is."""
    for network, size in ((loop.model.policy, 0.5), (loop.model.critic, 50.0)):
        parameters = list(network.parameters())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        for parameter in parameters:
            parameter.grad *= size / norm
    norm = loop.updater.clip(loop.updater.parameters, 1.0)
    assert norm.item() == pytest.approx(math.hypot(0.5, 50.0), rel=1e-4)
    for network, size in ((loop.model.policy, 0.5), (loop.model.critic, 1.0)):
        total = torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
        assert total.item() == pytest.approx(size, rel=1e-4)


# -- the four networks -------------------------------------------------------------------------------------------------


def test_training_moves_policy_and_critic_and_leaves_reference_and_reward_model(loop):
    """Four networks without a shared weight; two of them are frozen."""
    networks = dict(policy=loop.model.policy, critic=loop.model.critic)
    networks |= dict(reference=loop.reference, reward=loop.reward_model)
    pointers = [parameter.data_ptr() for network in networks.values() for parameter in network.parameters()]
    assert len(pointers) == len(set(pointers))
    before = {
        name: {key: value.clone() for key, value in network.state_dict().items()} for name, network in networks.items()
    }
    loop.train()
    changed = {
        name: any(not torch.equal(before[name][key], value) for key, value in network.state_dict().items())
        for name, network in networks.items()
    }
    assert changed == {"policy": True, "critic": True, "reference": False, "reward": False}


def test_rewards_are_measured_in_standard_deviations_of_the_sft_models(tmp_path, tokenizer, monkeypatch):
    """`val_reward` begins at 0 with spread 1; a reward model of another scale would give the same."""
    monkeypatch.setattr(ppo, "ANSWERS_TO_MEASURE", len(PROMPTS))  # as many as there are held-out prompts
    loop = make_loop("ppo", tmp_path, tokenizer)
    loop.before_first_step()
    rewards = torch.cat([rollout["scores"] for rollout in loop.validation_rollouts()])
    assert rewards.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert rewards.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-3)
    metrics = loop.evaluate()
    assert metrics["val_reward"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["val_kl"] == pytest.approx(0.0, abs=1e-4)


# -- that it learns, and goes on ---------------------------------------------------------------------------------------


def test_the_reward_rises_and_the_price_of_divergence_holds_it_back(tmp_path, tokenizer):
    """A scripted reward likes a third of the tokens: within a few steps the policy writes hardly anything else.

    With a high β it stays near the reference instead.
    """
    best, shares = [], []
    for kl_coef in (0.01, 5.0):
        loop = make_loop(
            "ppo", tmp_path, tokenizer, LikesSmallNumbers, max_steps=15, rollout_batch_size=32, batch_size=32,
            lr=1.5e-2, kl_coef=kl_coef, missing_eos_penalty=0.0, eval_interval=15, warmup_steps=0,
        )  # fmt: skip
        prompts = loop.train_data.collate([loop.train_data[index % len(PROMPTS)] for index in range(60)])
        for policy in (loop.reference, loop.model.policy):
            if policy is loop.model.policy:
                best.append(loop.train())
            torch.manual_seed(0)
            answers = policy.generate(**prompts, max_gen_len=6)[:, prompts["input_ids"].size(1) :]
            shares.append((answers.gt(2) & answers.lt(100)).float().mean().item())
    before, after, _, held_back = shares
    assert before < 0.45
    assert after > 0.75
    assert best[0]["val_reward"] > 2.0, "standard deviations above the reference"
    assert best[1]["val_kl"] < 0.4 * best[0]["val_kl"]
    assert held_back < after - 0.2


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A working folder with an SFT model and preferences, as `--mode rlhf` needs them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = GPTConfig.for_architecture(
        "modern", vocab_size=len(tokenizer), d_model=16, n_layers=1, n_heads=2, max_seq_len=48, dropout=0.1
    )
    model = GPTModel.from_config(config)
    save_checkpoint("sft.pth", model_state=model.state_dict(), config=config, tokenizer=tokenizer, stage="sft")
    records = [{"instruction": text, "chosen": f"{text} yes", "rejected": "no"} for text in PROMPTS * 2]
    (tmp_path / "pairs.json").write_text(json.dumps(records), encoding="utf-8")
    return tmp_path


OPTIONS = shlex.split(
    "--pairwise_data pairs.json --val_pairwise_data pairs.json --sft_model sft.pth --max_steps 4 --max_gen_len 4 "
    "--rollout_batch_size 4 --batch_size 2 --ppo_epochs 2 --eval_interval 2 --save_interval 2 --log_interval 1 "
    "--num_threads 1 --device cpu --precision fp32"
)


def test_from_preferences_to_an_aligned_model_and_an_exact_continuation(folder, capsys):
    """`--mode rlhf` trains the reward model, then PPO; what it publishes is a plain language model.

    A run that was cut off and continues with `--resume auto`, dropout and all, tells the same story; so does one that
    has `--resume auto` from its beginning.
    """
    finetune.main(["--mode", "rlhf", *OPTIONS, "--output_dir", "whole"])
    out = capsys.readouterr().out
    assert "reward model: whole/reward/reward_best.pth, right on" in out
    assert "aligned: whole/ppo_best.pth, held-out reward" in out
    policy, tokenizer, content = load_model("whole/ppo_best.pth")
    sft, _, _ = load_model("sft.pth")
    assert content["stage"] == "ppo"
    assert set(content["model"]) == set(sft.state_dict())
    assert policy.generate(torch.tensor([tokenizer.encode("hi")["input_ids"]]), 3).size(1) >= 4

    ppo_options = ["--mode", "ppo", "--reward_model", "whole/reward/reward_best.pth", *OPTIONS, "--output_dir", "parts"]
    finetune.main([*ppo_options, "--resume", "auto"])  # there is nothing yet to resume from
    assert "no checkpoint in parts/checkpoints, starting from step 0" in capsys.readouterr().out
    (folder / "parts" / "checkpoints" / "step_00000004.pth").unlink()
    finetune.main([*ppo_options, "--resume", "auto"])
    assert "continuing from parts/checkpoints/step_00000002.pth, step 2 of 4" in capsys.readouterr().out
    clock = {"tokens_per_second", "mfu", "memory_mib", "seconds"}
    runs = [
        [{key: value for key, value in record.items() if key not in clock} for record in read_metrics(path)]
        for path in ("whole/metrics.jsonl", "parts/metrics.jsonl")
    ]
    assert len(runs[0]) == 6
    assert runs[0] == runs[1]
    states = [load_checkpoint(f"{name}/checkpoints/step_00000004.pth")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_path_to_resume_ppo_from_does_not_disturb_its_reward_model(folder, capsys):
    """In `--mode rlhf` the path is PPO's; the finished reward model is taken as it is."""
    finetune.main(["--mode", "rlhf", *OPTIONS, "--output_dir", "run"])
    before = (folder / "run" / "reward" / "reward_best.pth").read_bytes()
    finetune.main(["--mode", "rlhf", *OPTIONS, "--output_dir", "run", "--resume", "run/checkpoints/step_00000002.pth"])
    assert "continuing from run/checkpoints/step_00000002.pth, step 2 of 4" in capsys.readouterr().out
    assert (folder / "run" / "reward" / "reward_best.pth").read_bytes() == before


def test_models_that_do_not_fit_together_are_refused(folder, tokenizer):
    """Another tokenizer, a shorter context, a language model in the reward model's place."""

    def save_reward(path, tokenizer, max_seq_len):
        config = GPTConfig.for_architecture(
            "gpt2", vocab_size=len(tokenizer), d_model=16, n_layers=1, n_heads=2, max_seq_len=max_seq_len
        )
        model = RewardModel(GPTModel.from_config(config))
        save_checkpoint(path, model_state=model.state_dict(), config=config, tokenizer=tokenizer, stage="reward")

    settings = dict(pairwise_data="pairs.json", val_pairwise_data="pairs.json", sft_model="sft.pth", max_gen_len=4)
    save_reward("bytes.pth", ByteLevelBPETokenizer(260), 48)
    with pytest.raises(UserError, match="bytes.pth and sft.pth have different tokenizers"):
        rlhf_ppo(reward_model="bytes.pth", **settings, **COMMON)
    save_reward("short.pth", tokenizer, 32)
    with pytest.raises(UserError, match="short.pth reads at most 32 tokens, .*--max_seq_len 32"):
        rlhf_ppo(reward_model="short.pth", **settings, **COMMON)
    with pytest.raises(UserError, match="sft.pth is a sft model; give one that finetune.py --mode reward wrote"):
        rlhf_ppo(reward_model="sft.pth", **settings, **COMMON)
    with pytest.raises(UserError, match="leaves no room for a prompt in [0-9]+ tokens; lower it"):
        save_reward("reward.pth", tokenizer, 48)
        rlhf_ppo(reward_model="reward.pth", **{**settings, "max_gen_len": 50}, **COMMON)


def test_settings_that_make_no_sense_are_refused():
    complaints = " ".join(
        complaints_about(
            PPOConfig(
                ppo_epochs=0, temperature=0.0, rollout_batch_size=100, batch_size=64, clip_range=0.0, gae_lambda=1.5,
                kl_coef=-1.0,
            )
        )
    )  # fmt: skip
    for named in ("--ppo_epochs must", "--temperature must", "--rollout_batch_size 100 must be a multiple",
                  "--clip_range must", "--gae_lambda must", "--kl_coef must"):  # fmt: skip
        assert named in complaints


def test_while_the_critic_warms_up_the_policy_stays_as_it_is(tmp_path, tokenizer):
    loop = make_loop("ppo", tmp_path, tokenizer, critic_warmup_steps=1)
    policy = {name: value.clone() for name, value in loop.model.policy.state_dict().items()}
    critic = {name: value.clone() for name, value in loop.model.critic.state_dict().items()}
    loop.train_step()
    assert all(torch.equal(value, policy[name]) for name, value in loop.model.policy.state_dict().items())
    assert any(not torch.equal(value, critic[name]) for name, value in loop.model.critic.state_dict().items())
    loop.train_step()
    assert any(not torch.equal(value, policy[name]) for name, value in loop.model.policy.state_dict().items())


def test_the_critic_has_a_learning_rate_of_its_own_and_every_parameter_one_optimiser(tmp_path, tokenizer):
    loop = make_loop("ppo", tmp_path, tokenizer, critic_lr_scale=5.0, lr=1e-4, schedule="constant")
    loop.warmup_steps = 0
    loop.train_step()
    rate = {id(p): group["lr"] for o in loop.optimizers for group in o.param_groups for p in group["params"]}
    assert len(rate) == sum(len(group["params"]) for o in loop.optimizers for group in o.param_groups)
    assert all(rate[id(parameter)] == pytest.approx(1e-4) for parameter in loop.model.policy.parameters())
    assert all(rate[id(parameter)] == pytest.approx(5e-4) for parameter in loop.model.critic.parameters())


def test_mixed_in_instructions_keep_the_policy_from_forgetting_them(tmp_path, tokenizer):
    """With a reward that pulls elsewhere, the supervised loss of the mixed-in data falls only if it is mixed in."""
    talk = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in PROMPTS]
    data = GPTSFTDataset(talk, tokenizer, 48)
    batch = data.collate([data[index] for index in range(len(data))])
    losses = {}
    for coefficient in (0.0, 2.0):
        loop = make_loop("ppo", tmp_path / str(coefficient), tokenizer, sft_coef=coefficient, lr=3e-3)
        loop.instructions = Instructions(loop.config, data, loop.global_batch())
        for _ in range(8):
            figures = loop.train_step()
        assert "loss/sft_avg" in figures
        losses[coefficient] = loop.model.policy(**batch)["loss"].item()
    assert losses[2.0] < losses[0.0] - 0.5
