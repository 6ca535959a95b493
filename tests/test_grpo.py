"""GRPO: advantages within groups, the loss by hand and as TRL has it, and reward functions that may be wrong."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from policy_loops import fixed_rollout, make_loop

import finetune
from alignment.grpo import GRPOConfig, RecordDataset, group_advantages, train_grpo
from alignment.reward_function import call_reward, load_reward
from alignment.rollouts import answer_token_log_probs
from command_line import UserError, complaints_about
from text.account import REPEATED
from text.conversation_data import parse_task
from training.run_log import read_metrics


def random_batch(loop, spread=0.4):
    """What the loss takes, with old log-probabilities at some distance so that ratios lie on both sides of the clip."""
    rollout = fixed_rollout(loop)
    torch.manual_seed(0)
    batch = {name: rollout[name] for name in ("input_ids", "attention_mask", "answer_mask")}
    for name in ("old_log_probs", "reference_log_probs"):
        batch[name] = rollout["old_log_probs"] + spread * torch.randn_like(rollout["old_log_probs"])
    batch["answer_mask"][0, 3:] = batch["answer_mask"][5, 1:] = False  # answers of different lengths
    batch["attention_mask"][:, -6:] = batch["answer_mask"]
    return {**batch, "advantages": torch.randn(8)}


# -- advantages --------------------------------------------------------------------------------------------------------


def test_advantages_compare_an_answer_with_its_group():
    """By hand, for each way of scaling; a group whose answers are all alike teaches nothing."""
    scores = torch.tensor([1.0, 3.0, 5.0, 5.0])
    std = math.sqrt(2.0)  # of (1, 3), with n − 1
    expected = {"none": [-1, 1, 0, 0], "batch": [-0.5, 0.5, 0, 0], "group": [-1 / std, 1 / std, 0, 0]}
    for scale, values in expected.items():
        advantages = group_advantages(scores, 2, scale, batch_std=2.0).tolist()
        assert advantages == pytest.approx(values, abs=1e-3), scale


def test_scores_that_differ_by_rounding_are_equal(tmp_path, tokenizer):
    """A group whose large scores differ in the last bit teaches nothing; scores keep Python's precision."""
    scores = torch.tensor([1e6, 1e6 + 0.0625, 1e6, 1e6, 1.0, 2.0, 3.0, 4.0])
    advantages = group_advantages(scores, 4, "group")
    assert advantages[:4].tolist() == [0.0] * 4
    assert advantages[7] > 1
    loop = make_loop("grpo", tmp_path, tokenizer, lambda prompts, responses, records: [1e9 + len(r) for r in responses])
    rollout = fixed_rollout(loop)
    assert len(set((rollout["scores"] - 1e9).tolist())) > 2


def test_the_penalty_for_a_missing_end_counts_within_the_group(tmp_path, tokenizer):
    """Two answers of the same score, of which one was cut off: the other one is the better."""
    loop = make_loop("grpo", tmp_path, tokenizer, missing_eos_penalty=2.0, group_size=2, advantage_scale="none")
    rollout = {name: value[:2] for name, value in fixed_rollout(loop).items()}
    rollout |= {"scores": torch.tensor([1.0, 1.0]), "ended": torch.tensor([True, False])}
    batches = []
    loop.update = lambda batch, n_epochs: batches.append(batch) or {}
    figures = loop.learn_from(rollout)
    assert batches[0]["advantages"].tolist() == [1.0, -1.0]
    assert figures["objective/scores"] == 1.0
    assert figures["objective/ended"] == 0.5


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_mean", ["tokens", "answers", "constant"])
def test_the_loss_is_the_clipped_one_by_hand(tmp_path, tokenizer, loss_mean):
    """Token by token, with different clips below and above, and k3 against the reference."""
    settings = dict(clip_low=0.1, clip_high=0.3, kl_coef=0.5)
    loop = make_loop("grpo", tmp_path, tokenizer, loss_mean=loss_mean, **settings)
    batch = random_batch(loop)
    with torch.no_grad():
        output = loop.model(**batch)
        log_probs, _ = answer_token_log_probs(loop.model.policy, batch, 1.0)
    policy, kl, clipped = ([[] for _ in range(8)] for _ in range(3))
    for row, t in batch["answer_mask"].nonzero().tolist():
        ratio = math.exp(log_probs[row, t] - batch["old_log_probs"][row, t])
        advantage = batch["advantages"][row].item()
        policy[row].append(-min(ratio * advantage, min(max(ratio, 0.9), 1.3) * advantage))
        to_reference = math.exp(batch["reference_log_probs"][row, t] - log_probs[row, t])
        kl[row].append(to_reference - 1 - math.log(to_reference))
        clipped[row].append(policy[row][-1] != pytest.approx(-ratio * advantage, abs=1e-9))
    n_tokens = sum(map(len, policy))
    mean = {
        "tokens": lambda rows: sum(map(sum, rows)) / n_tokens,
        "answers": lambda rows: sum(sum(row) / len(row) for row in rows) / 8,
        "constant": lambda rows: sum(map(sum, rows)) / (8 * 6),
    }[loss_mean]
    assert output["loss/policy_avg"].item() == pytest.approx(mean(policy), abs=1e-5)
    assert output["loss/kl_avg"].item() == pytest.approx(mean(kl), abs=1e-5)
    assert output["loss"].item() == pytest.approx(mean(policy) + 0.5 * mean(kl), abs=1e-5)
    assert output["policy/clipfrac_avg"].item() == pytest.approx(sum(map(sum, clipped)) / n_tokens)
    assert 0 < sum(map(sum, clipped)) < n_tokens


@pytest.mark.parametrize(("loss_mean", "loss_type"), [("tokens", "bnpo"), ("answers", "grpo"), ("constant", "dr_grpo")])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_the_loss_is_trls(tmp_path, tokenizer, loss_mean, loss_type, kl_coef):
    """`GRPOTrainer._compute_loss`, given our log-probabilities: loss and gradient."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    loop = make_loop("grpo", tmp_path, tokenizer, loss_mean=loss_mean, kl_coef=kl_coef, clip_high=0.28)
    batch = random_batch(loop)
    if not kl_coef:
        del batch["reference_log_probs"]
    gradients = []

    def log_probs_and_entropies(model, *args, **kwargs):
        return *answer_token_log_probs(loop.model.policy, batch, 1.0, with_entropy=True), None

    theirs = SimpleNamespace(
        _get_per_token_logps_and_entropies=log_probs_and_entropies, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level="token", beta=kl_coef, loss_type=loss_type,
        epsilon_low=0.2, epsilon_high=0.28, use_vllm=False, max_completion_length=6, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, model=loop.model, _metrics=MetricSink(), _log_metric=lambda *_: None,
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, **_: x, num_processes=1),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
    )  # fmt: skip
    n_answer = batch["answer_mask"].size(1)
    inputs = {
        "prompt_ids": batch["input_ids"][:, :-n_answer], "prompt_mask": batch["attention_mask"][:, :-n_answer],
        "completion_ids": batch["input_ids"][:, -n_answer:], "completion_mask": batch["answer_mask"].long(),
        "advantages": batch["advantages"], "old_per_token_logps": batch["old_log_probs"],
        "ref_per_token_logps": batch.get("reference_log_probs"),
    }  # fmt: skip
    losses = [loop.model(**batch)["loss"], trainer._compute_loss(theirs, None, inputs)]
    for loss in losses:
        loop.model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in loop.model.parameters()]))
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    assert torch.allclose(*gradients, atol=1e-6)


class MetricSink(dict):
    """Takes whatever TRL wants to log."""

    def __missing__(self, key):
        self[key] = MetricSink()
        return self[key]

    def append(self, value):
        pass


def test_without_a_price_for_divergence_there_is_no_reference(tmp_path, tokenizer):
    """β = 0: no second model, no figures of divergence."""
    loop = make_loop("grpo", tmp_path, tokenizer, kl_coef=0.0)
    assert loop.reference is None
    best = loop.train()
    assert "val_kl" not in best
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records
    assert not any("kl" in name.split("/")[-1].split("_") for record in records for name in record)


# -- reward functions --------------------------------------------------------------------------------------------------


def test_the_reward_function_sees_prompts_answers_and_records(tmp_path, tokenizer):
    """In one call for all answers of a step, each beside the record of its own prompt, without special tokens."""
    calls = []

    def reward(prompts, responses, records):
        calls.append((prompts, responses, records))
        return [float(len(response)) for response in responses]

    loop = make_loop("grpo", tmp_path, tokenizer, reward, batch_size=8)
    rollout = fixed_rollout(loop)
    ((prompts, responses, records),) = calls
    assert prompts == ["a"] * 4 + ["What is the capital of France?"] * 4
    assert [record["instruction"] for record in records] == prompts
    assert rollout["scores"].tolist() == [float(len(response)) for response in responses]
    for response, ids, wrote in zip(responses, rollout["input_ids"][:, -6:], rollout["answer_mask"], strict=True):
        assert response == tokenizer.decode(ids[wrote])
        assert "</s>" not in response


def test_records_stay_beside_their_prompts(tokenizer):
    """Where prompts repeat or are too long, the records go with them; answers are not needed, system messages stay."""
    records = [
        {"instruction": "x" * 200},
        {"instruction": "hi", "answer": "one"},
        {"instruction": "hi", "answer": "two"},
    ]
    records += [{"messages": [{"role": "user", "content": "bye"}, {"role": "assistant", "content": "ok"}], "n": 3}]
    data = RecordDataset([parse_task(record, f"record {i}") for i, record in enumerate(records)], tokenizer, 40)
    assert data.questions == ["hi", "bye"]
    assert data.account.left_out == {"longer than the 40 tokens that are left for a prompt": 1, REPEATED: 1}
    assert [record.get("answer", record.get("n")) for record in data.records] == ["one", 3]
    assert [tokenizer.decode(ids).count("ok") for ids in data.samples] == [0, 0]
    with pytest.raises(UserError, match='record 0: the field "instruction" is missing'):
        parse_task({"text": "hi"}, "record 0")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("rewards.py", "--reward rewards.py must be a file and a function in it, such as my_rewards.py:reward"),
        ("missing.py:reward", "the file of --reward missing.py does not exist; give PATH.py:FUNCTION"),
        ("answer_checker.py:preference_reward", "not exist; .* such as evaluation/answer_checker.py:preference_reward"),
        ("rewards.py:absent", "rewards.py has no function absent; it has good, broken"),
        ("syntax.py:reward", r"syntax.py cannot be imported: SyntaxError: .* \(syntax.py, line 1\); mend it"),
        ("raises.py:reward", r"raises.py cannot be imported: KeyError: 'no' \(raises.py, line 2\); mend it"),
        ("notes.txt:reward", "notes.txt is no Python file; its name must end in .py"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_named(tmp_path, monkeypatch, place, message):
    """In one sentence with what would be right."""
    monkeypatch.chdir(tmp_path)
    files = {"rewards.py": "number = 3\ndef good(p, a, r): ...\ndef broken(p, a, r): ...\n", "syntax.py": "def (\n",
             "raises.py": "\n{}['no']\n", "notes.txt": ""}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_reward(place)


def test_a_reward_is_found_from_the_working_folder_or_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_reward("evaluation/answer_checker.py:preference_reward")([], [], []) == []
    (tmp_path / "mine.py").write_text("def reward(prompts, responses, records):\n    return [3]\n")
    assert load_reward("mine.py:reward")([], [], []) == [3]
    assert load_reward(f"{tmp_path}/mine.py:reward")([], [], []) == [3]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 scores for 2 responses"),
        (None, "must return a list of numbers, not None"),
        (["good", "bad"], r"must return a list of numbers, not \['good', 'bad'\]"),
        ([0.5, math.nan], "gave nan to the response 'b'; it must be finite"),
        ([math.inf, 0.0], "gave inf to the response 'a'; it must be finite"),
        (KeyError("answer"), r"failed: KeyError: 'answer' \(test_grpo.py, line \d+\); mend it"),
    ],
)
def test_what_is_wrong_with_a_reward_is_said(returned, message):
    """A wrong number of scores, what is no number, what is not finite, an exception."""

    def my_reward(prompts, responses, records):
        if isinstance(returned, Exception):
            raise returned
        return returned

    with pytest.raises(UserError, match=f"the reward function my_reward {message}"):
        call_reward(my_reward, ["p", "q"], ["a", "b"], [{}, {}])


def test_scores_may_come_as_tensors():
    assert call_reward(lambda p, a, r: torch.tensor([1, 0]), ["p", "q"], ["a", "b"], [{}, {}]) == [1.0, 0.0]


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_that_make_no_sense_are_refused(tmp_path, tokenizer):
    complaints = " ".join(
        complaints_about(
            GRPOConfig(grpo_epochs=0, group_size=1, kl_coef=-1.0, clip_low=1.5, clip_high=math.nan, val_fraction=0.0)
        )
    )  # fmt: skip
    for named in ("--grpo_epochs must", "--group_size must be at least 2", "--kl_coef must", "--clip_low must",
                  "--clip_high must", "--val_fraction must"):  # fmt: skip
        assert named in complaints
    assert "must be a multiple of --group_size 7" in " ".join(complaints_about(GRPOConfig(group_size=7)))
    with pytest.raises(UserError, match="the SFT model missing.pth does not exist"):
        finetune.main(["--mode", "grpo", "--sft_model", "missing.pth"])
    make_loop("grpo", tmp_path, tokenizer, lora_rank=1)  # leaves sft.pth
    (tmp_path / "one.json").write_text(json.dumps([{"instruction": "hi"}]))
    with pytest.raises(UserError, match="one.json has 1 .* can be used, too few .*; give --val_data_path"):
        train_grpo(
            sft_model=str(tmp_path / "sft.pth"), data_path=str(tmp_path / "one.json"), device="cpu", max_gen_len=8
        )
