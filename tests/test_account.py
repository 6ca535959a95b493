"""Every stage says what it read, left out and cut, and what that costs: in words, metrics and checkpoint."""

import json
import math

import pytest
import torch

import finetune
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, save_checkpoint
from command_line import UserError
from data_loader import GPTSFTDataset, PreferenceDataset, UnpairedDataset
from evaluator import main as evaluate
from gpt_model import GPTConfig, GPTModel
from inference.sampling import SamplingParams
from text.account import CALLED_BAD, REPEATED, Account
from text.conversation_data import parse_preference, parse_unpaired
from text.text_files import iter_documents
from training.run_log import read_metrics

CONTEXT = 48
COMMON = "--max_steps 1 --batch_size 4 --num_threads 1 --device cpu --precision fp32 --val_fraction 0.3"
COMMON += " --output_dir out"


def talk(question, answer, **more):
    return {"instruction": question, "response": answer, **more}


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes alone, so that lengths are easily counted: a prompt of n letters has n + 23 tokens."""
    return ByteLevelBPETokenizer(260)


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A small model, and records of which the first ones are too long."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = dict(d_model=16, n_layers=1, n_heads=2, max_seq_len=CONTEXT)
    config = GPTConfig.for_architecture("modern", vocab_size=len(tokenizer), **sizes)
    state = GPTModel.from_config(config).state_dict()
    save_checkpoint("sft.pth", model_state=state, config=config, tokenizer=tokenizer, stage="sft")
    long = "x" * 100
    data = [talk(long, "a"), *(talk(f"q{k}", long[:60]) for k in range(3)), *(talk(f"p{k}", "yes") for k in range(8))]
    data.append(talk("bad", "no", label=False))
    pairs = [{"instruction": f"p{k}", "chosen": long if k < 4 else "yes", "rejected": "no"} for k in range(12)]
    asked = [talk(long, "a"), *(talk(f"p{k % 6}", "yes") for k in range(12))]
    ranked = [{"prompt": record["instruction"], "chosen": "yes", "rejected": "no"} for record in asked]
    for name, records in {"data": data, "pairs": pairs, "asked": asked, "ranked": ranked}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    return tmp_path


N_ANSWERS = [2, 61, 61, 61] + [4] * 8  # tokens of data.json's answers with their ends, the bad one apart
LOST = 2 + 3 * (61 - (CONTEXT - 25))
TOO_LONG = f"longer than {CONTEXT} tokens"
NO_ROOM = "longer than the 44 tokens that are left for a prompt"
OF_DATA = {"read": 13, "left_out": {CALLED_BAD: 1, f"no answer within {CONTEXT} tokens": 1}, "cut": 3,
           "answer_tokens": sum(N_ANSWERS), "answer_tokens_lost": LOST}  # fmt: skip
OF_PAIRS = {"read": 12, "left_out": {TOO_LONG: 4}, "cut": 0, "answer_tokens": 4 * 101 + 8 * 4 + 12 * 3,
            "answer_tokens_lost": 4 * 104}  # fmt: skip
OF_UNPAIRED = {**OF_PAIRS, "left_out": {}, "cut": 4, "answer_tokens_lost": 4 * 101}
OF_PROMPTS = {"read": 13, "left_out": {NO_ROOM: 1, REPEATED: 6}, "cut": 0}
ROLLOUTS = "--rollout_batch_size 8 --max_gen_len 4"
STAGES = {
    "sft": ("--data_path data.json --pretrained_model sft.pth", OF_DATA, "conversations", True),
    "distill": ("--data_path data.json --teacher_model sft.pth --n_layers 1", OF_DATA, "conversations", True),
    "reward": ("--pairwise_data pairs.json --sft_model sft.pth", OF_PAIRS, "preferences", True),
    "dpo": ("--pairwise_data pairs.json --sft_model sft.pth", OF_PAIRS, "preferences", True),
    "kto": ("--pairwise_data pairs.json --sft_model sft.pth", OF_UNPAIRED, "records", True),
    "rlhf": (f"--pairwise_data ranked.json --sft_model sft.pth {ROLLOUTS}", OF_PROMPTS, "prompts", True),
    "grpo": (f"--data_path asked.json --sft_model sft.pth {ROLLOUTS} --group_size 4", OF_PROMPTS, "prompts", True),
}


@pytest.mark.parametrize("mode", STAGES)
def test_a_stage_says_what_became_of_the_records(mode, folder, capsys):
    options, expected, kind, warned = STAGES[mode]
    finetune.main(f"--mode {mode} {options} {COMMON}".split())
    said = capsys.readouterr().out
    assert f"{expected['read']} {kind} read; " in said
    for reason, count in expected["left_out"].items():
        assert f"{count} left out ({reason})" in said
    assert ("is lost" in said) == warned
    assert "context of 48 tokens was fixed in pretraining" in said

    first = read_metrics("out/metrics.jsonl")[0]
    assert first["step"] == 1
    (best,) = folder.glob("out/*_best.pth")
    recorded = load_checkpoint(best)["data"]["data"]
    for name, value in expected.items():
        assert recorded[name] == value
        assert first[f"data/{name}"] == (sum(value.values()) if name == "left_out" else value)
    kept = expected["read"] - sum(expected["left_out"].values())
    assert 0 < recorded["held_out"] == first["data/held_out"] < (2 * kept if mode == "kto" else kept)


def test_instructions_that_are_mixed_in_have_an_account_of_their_own(folder, capsys):
    options = "--mode dpo --pairwise_data pairs.json --sft_model sft.pth --sft_data data.json"
    finetune.main(f"{options} {COMMON}".split())
    assert "data.json: 13 conversations read; 1 left out" in capsys.readouterr().out
    assert read_metrics("out/metrics.jsonl")[0]["sft_data/cut"] == 3
    assert load_checkpoint("out/dpo_best.pth")["data"]["sft_data"]["answer_tokens_lost"] == LOST


def test_the_evaluation_says_it_too(folder, capsys):
    options = "--num_threads 1 --device cpu --max_gen_len 2 --model_type"
    evaluate(f"--model_path sft.pth --test_data_path asked.json {options} sft".split())
    assert "asked.json: 13 questions read; 1 cut" in capsys.readouterr().out
    assert json.loads((folder / "sft_eval.json").read_text())["data"]["cut"] == 1
    finetune.main(f"--mode reward --pairwise_data pairs.json --sft_model sft.pth {COMMON}".split())
    capsys.readouterr()
    evaluate(f"--model_path out/reward_best.pth --test_data_path pairs.json {options} reward".split())
    assert f"pairs.json: 12 preferences read; 4 left out ({TOO_LONG})" in capsys.readouterr().out


def test_what_is_lost_by_intention_or_in_small_parts_is_no_reason_to_warn():
    account = Account("a.json", "conversations", read=100, cut=2, answer_tokens=1000, answer_tokens_lost=40)
    account.leave_out(REPEATED, 60)
    (sentence,) = account.sentences()
    assert sentence == (
        "a.json: 100 conversations read; 60 left out (the same prompt as an earlier record); 2 cut; "
        "4.0% of the answers' 1,000 tokens lost"
    )
    account.answer_tokens_lost = 60
    assert account.sentences()[1].startswith("warning: 6.0% of a.json is lost, and an answer that is cut does")


# ----------------------------------------------------------------------------------------- first what fits, then split


def test_the_validation_part_is_taken_of_what_fits(folder):
    """The first record, which is always held out, may be too long: the others still are enough."""
    records = [talk("x" * 100, "a"), *(talk(f"p{k}", "yes") for k in range(11))]
    (folder / "first.json").write_text(json.dumps(records))
    options = "--mode sft --data_path first.json --pretrained_model sft.pth"
    finetune.main(f"{options} {COMMON} --val_fraction 0.05".split())
    assert load_checkpoint("out/sft_best.pth")["data"]["data"]["held_out"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("sft --data_path one.json --pretrained_model sft.pth", "one.json has 3 conversations, of which 1 can be used"),
        ("dpo --pairwise_data none.json --sft_model sft.pth", "none of the 2 preferences of none.json can be used"),
        ("rlhf --pairwise_data none.json --sft_model sft.pth", "none of the 2 prompts of none.json can be used"),
    ],
)
def test_too_few_that_fit_are_counted_and_the_remedy_is_possible(folder, options, words):
    """`--max_seq_len` cannot be raised beyond the context, so that is not what is advised; nothing has been trained."""
    long = "x" * 100
    (folder / "one.json").write_text(json.dumps([talk(long, "a"), talk(long, "b"), talk("c", "d")]))
    (folder / "none.json").write_text(json.dumps([{"instruction": long, "chosen": "a", "rejected": "b"}] * 2))
    with pytest.raises(UserError, match=words) as caught:
        finetune.main(f"--mode {options} {COMMON}".split())
    assert "the model's context of 48 tokens was fixed in pretraining" in str(caught.value)
    assert not (folder / "out").exists()


def test_a_short_limit_can_be_raised(folder):
    with pytest.raises(UserError, match="raise --max_seq_len .now 8; the model's context is 48"):
        finetune.main(f"--mode sft --data_path data.json --pretrained_model sft.pth --max_seq_len 8 {COMMON}".split())


def test_answers_of_a_record_stay_on_one_side(tokenizer):
    pairs = [{"instruction": f"p{k}", "chosen": "yes", "rejected": "no"} for k in range(10)]
    data = UnpairedDataset([parse_unpaired(pair, "record") for pair in pairs], tokenizer, CONTEXT)
    train, val = data.split(0.3)
    sides = [{answer["prompt"][0]["content"] for answer in part.fitting} for part in (train, val)]
    assert sides[0].isdisjoint(sides[1]) and (len(train), len(val)) == (14, 6)
    own = {tuple(sample["answers"][0][0]) for sample in val.samples}
    assert len(own) == 6


def test_answers_of_one_score_are_not_compared(tokenizer):
    record = {"instruction": "x", "responses": ["a", "b", "c"], "scores": [1, 5, 1]}
    equal = {"instruction": "y", "responses": ["a", "b"], "scores": [3, 3]}
    data = PreferenceDataset([parse_preference(r, "record") for r in (record, equal)], tokenizer, CONTEXT)
    assert data[0]["pairs"] == [(0, 1), (0, 2)] and len(data) == 1
    assert data.account.left_out == {"all answers of the same score": 1}
    batch = data.collate([data[0]])
    assert batch["pairs"].tolist() == [[0, 1], [0, 2]] and batch["weights"].tolist() == [0.5, 0.5]


def test_an_answer_of_weight_0_is_context(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "no", "weight": 0},
                {"role": "user", "content": "b"}, {"role": "assistant", "content": "yes"}]  # fmt: skip
    ((_, labels),) = GPTSFTDataset([messages], tokenizer, 96).samples
    assert tokenizer.decode([label for label in labels if label >= 0], skip_special_tokens=False) == "yes</s>"
    data = GPTSFTDataset([messages, messages[:2]], tokenizer, 96)
    assert data.account.left_out == {"no answer to learn from": 1}


# ------------------------------------------------------------------------------------------ advice that can be followed


def test_a_run_that_has_made_more_steps_than_asked_for_is_not_step_10_of_2(folder):
    command = f"--mode sft --data_path data.json --pretrained_model sft.pth {COMMON}".split()
    finetune.main([*command, "--max_steps", "2"])
    with pytest.raises(UserError, match="has made 2 steps and this run is to end after 1; raise --max_steps"):
        finetune.main([*command, "--resume", "auto"])


def test_a_reward_that_needs_answers_says_so(folder):
    (folder / "questions.json").write_text(json.dumps([{"prompt": f"p{k}"} for k in range(8)]))
    options = f"--mode grpo --data_path questions.json --sft_model sft.pth {ROLLOUTS} --group_size 4 {COMMON}"
    with pytest.raises(UserError, match="this reward compares with the right answer, and .* a --reward of your own"):
        finetune.main(options.split())


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_bias": dict.fromkeys(range(8), -math.inf)},
        {"logit_bias": dict.fromkeys(range(8), -1e300)},
        {"logit_bias": dict.fromkeys(range(4), -math.inf), "banned_tokens": (4, 5, 6, 7)},
        {"banned_tokens": tuple(range(8))},
    ],
)
def test_forbidding_every_token_is_no_damage_to_the_weights(settings):
    (complaint,) = SamplingParams(**settings).complaints(8)
    assert complaint == "banned_tokens and logit_bias ban the whole vocabulary: leave at least one token"
    assert SamplingParams(**settings).complaints(9) == []


def test_documents_that_are_records_are_sent_to_the_right_command(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "x", "output": "y"}')
    with pytest.raises(UserError, match='no field "text" .*; its fields are instruction, output' ):
        list(iter_documents(tmp_path / "a.jsonl"))


def test_other_names_of_fields_are_an_option_of_every_stage(folder):
    records = [{"query": f"p{k}", "reply": "yes"} for k in range(8)]
    (folder / "named.json").write_text(json.dumps([*records, {"query": ""}]))
    options = "--mode sft --data_path named.json --pretrained_model sft.pth --columns instruction=query,response=reply"
    with pytest.raises(UserError, match='record 9 of named.json: the field "instruction" is empty'):
        finetune.main(f"{options} {COMMON}".split())
    finetune.main(f"{options} --skip_bad_records {COMMON}".split())
    assert load_checkpoint("out/sft_best.pth")["data"]["data"]["left_out"] == {"malformed": 1}
    assert "record 9 of named.json" in (folder / "out" / "left_out_of_named.jsonl").read_text()
