"""Every stage, the evaluator, the quantizer and the service work on a model that came in.

Its ids are not ours: the token that pads also ends turns, the first token of a text is none that is put there, several
tokens end an answer, the template is ChatML.
"""

import json
import shutil

import pytest
import torch
from exchange_models import save
from fastapi.testclient import TestClient
from test_api_service import ready
from test_exchange_hugging_face import take_in, transformers  # noqa: F401

import evaluator
import finetune
import pretrain_trainer
from checkpoint import load_checkpoint, load_model
from command_line import UserError, parse_config
from inference import kv_cache_infer, quantizer
from inference.chat import ChatConfig, LocalModel
from inference.quantizer import load_any
from text.token_shards import tokenize_to_shards

QUESTIONS = ["2 + 3 = ?", "法国的首都是哪里？", "Name a noble gas.", "Say <|im_end|> twice."] * 4
SFT = [{"instruction": question, "response": f"It is {index}."} for index, question in enumerate(QUESTIONS)]
PAIRS = [{"instruction": question, "chosen": "Yes.", "rejected": "No, no."} for question in QUESTIONS]
SHORT = dict(rollout_batch_size=8, max_gen_len=4)
GENERATION = {"eos_token_id": [2, 0], "do_sample": True, "top_k": 1, "temperature": 0.7}
REWARD = "def reward(prompts, responses, records):\n    return [float(len(text)) for text in responses]\n"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with such a model, and data."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("house")
    save("smollm", folder / "theirs", max_position_embeddings=128, initializer_range=0.02)
    (folder / "theirs/generation_config.json").write_text(json.dumps(GENERATION))
    take_in(folder / "theirs")
    (folder / "taken.pth").rename(folder / "model.pth")
    for name, records in (("sft", SFT), ("pairs", PAIRS)):
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(QUESTIONS * 20), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD)
    return folder


def run(house, mode, **options):
    """A stage of two steps; the content of what it leaves."""
    start = {"sft": "pretrained_model", "distill": "teacher_model"}.get(mode, "sft_model")
    settings = {start: house / "model.pth", "output_dir": house / "out" / mode, "max_steps": 2, "batch_size": 4,
                "val_fraction": 0.25, "num_threads": 1, "eval_interval": 2, **options}  # fmt: skip
    finetune.main(["--mode", mode, *(f"--{name}={value}" for name, value in settings.items())])
    (path,) = [path for path in (house / "out" / mode).glob("*_best.pth")]
    return path, load_checkpoint(path)


@pytest.mark.parametrize(
    "mode, options",
    [
        ("sft", dict(data_path="sft.json", lora_rank=2, neftune_alpha=1.0)),
        ("reward", dict(pairwise_data="pairs.json")),
        ("dpo", dict(pairwise_data="pairs.json", lora_rank=2)),
        ("kto", dict(pairwise_data="pairs.json")),
        ("grpo", dict(data_path="sft.json", reward="reward.py:reward", group_size=2, **SHORT)),
        ("ppo", dict(pairwise_data="pairs.json", reward_model="out/reward/reward_best.pth", **SHORT)),
        ("distill", dict(data_path="sft.json")),
    ],
)
def test_every_stage(house, mode, options):
    """What it leaves is a model with the same tokenizer, template and end tokens, which goes on from there."""
    files = ("data_path", "pairwise_data", "reward", "reward_model")
    if mode == "ppo" and not (house / options["reward_model"]).exists():
        run(house, "reward", pairwise_data=house / "pairs.json")
    options = {name: house / value if name in files else value for name, value in options.items()}
    path, content = run(house, mode, **options)
    assert content["tokenizer"]["fingerprint"] == load_checkpoint(house / "model.pth")["tokenizer"]["fingerprint"]
    if mode != "reward":
        model, tokenizer, _ = load_model(path)
        assert tokenizer.end_token_ids == (2, 0) and model.config.pad_token_id == 2


def test_answers_are_those_of_the_model_itself(house, capsys):
    """The turns' ends inside a prompt, which is the padding token, are seen."""
    model, tokenizer, _ = load_model(house / "model.pth")
    ids = tokenizer.encode_chat([{"role": "user", "content": QUESTIONS[2]}], add_generation_prompt=True)["input_ids"]
    assert model.config.pad_token_id in ids
    words = [f"--model_path={house / 'model.pth'}", "--temperature=0", "--max_gen_len=9", "--ignore_eos=true"]
    kv_cache_infer.main([*words, f"--prompt={QUESTIONS[2]}"])
    answer = capsys.readouterr().out
    for mask in (None, torch.ones(1, len(ids))):
        generated = model.generate(torch.tensor([ids]), 9, temperature=0, attention_mask=mask)[0, len(ids) :]
        assert answer.startswith(tokenizer.decode(generated))


def test_a_text_begins_with_no_token_where_the_tokenizer_puts_none(house):
    """It has a token of the name, but `transformers` does not put it before a text either."""
    _, tokenizer, _ = load_model(house / "model.pth")
    assert tokenizer.bos_token_id == 1 and tokenizer.prefix_ids == []
    shards = tokenize_to_shards(house / "text.txt", tokenizer, house / "shards")
    ids = tokenizer.encode(QUESTIONS[0])["input_ids"]
    assert shards.slice(0, len(ids) + 1).tolist() == [*ids, tokenizer.eos_token_id]


def test_evaluator_and_quantizer(house, capsys):
    evaluator.main([f"--model_path={house / 'model.pth'}", f"--test_data_path={house / 'sft.json'}", "--model_type=sft",
                    "--max_gen_len=4"])  # fmt: skip
    quantizer.main([f"--model_path={house / 'model.pth'}", f"--output_path={house / 'int8.pth'}",
                    f"--text={house / 'sft.json'}"])  # fmt: skip
    assert "greedy" in capsys.readouterr().out
    assert load_any(house / "int8.pth")[1].end_token_ids == (2, 0)


def test_the_service(house, monkeypatch):
    from inference.api_service import app

    monkeypatch.setenv("MODEL_PATH", str(house / "model.pth"))
    with TestClient(app) as client:
        body = {"prefix": QUESTIONS[0], "max_gen_len": 9, "ignore_eos": True}
        greedy = ready(client).post("/generate", json={**body, "temperature": 0}).json()
        assert greedy.get("prefix") == QUESTIONS[0], greedy
        # What a request leaves out is what the model's makers recommend, here the likeliest token always
        assert client.get("/v1/models").json()["data"][0]["sampling"] == {"top_k": 1, "temperature": 0.7}
        text = {"prompt": QUESTIONS[0], "max_tokens": 9, "ignore_eos": True}
        talk = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 9, "ignore_eos": True}
        for path, asked in (("/generate", body), ("/v1/completions", text), ("/v1/chat/completions", talk)):
            ways = ({}, {"temperature": 0}, {"temperature": 2, "top_k": 0, "seed": 1})
            answers = [client.post(path, json={**asked, **way}).json() for way in ways]
            open_, greedy, hot = (answer.get("generated_text") or answer["choices"] for answer in answers)
            assert open_ == greedy != hot


def test_a_conversation_is_sampled_as_the_makers_recommend(house):
    words = ["--model_path", str(house / "model.pth"), "--max_tokens=9"]

    def said(*options):
        partner = LocalModel(parse_config(ChatConfig, [*words, *options], description=""))
        try:
            return partner.recommended, "".join(partner.answer([{"role": "user", "content": QUESTIONS[0]}]))
        finally:
            partner.engine.close()

    recommended, text = said()
    assert recommended == {"top_k": 1, "temperature": 0.7}
    assert said("--temperature=0") == ({"top_k": 1}, text)


def test_sampling_that_is_impossible_is_refused(house, tmp_path):
    shutil.copytree(house / "theirs", tmp_path / "theirs")
    (tmp_path / "theirs/generation_config.json").write_text(json.dumps({**GENERATION, "temperature": "hot"}))
    with pytest.raises(UserError, match="generation_config.json is wrong: temperature must be a number of at least 0"):
        take_in(tmp_path / "theirs")


def test_a_student_of_texts_may_have_another_tokenizer(house, tokenizer, random_model, tmp_path):
    from checkpoint import save_checkpoint

    model = random_model("modern", vocab_size=len(tokenizer), max_seq_len=96)
    path = save_checkpoint(tmp_path / "student.pth", model_state=model.state_dict(), config=model.config,
                           tokenizer=tokenizer, stage="sft")  # fmt: skip
    options = dict(data_path=house / "sft.json", student_model=path, output_dir=tmp_path / "out")
    with pytest.raises(UserError, match="have different tokenizers, .*; add --from_text"):
        run(house, "distill", **options)


def test_pretraining_with_its_tokenizer(house):
    """A new model; the folder that `transformers` reads is a tokenizer's folder here, too."""
    pretrain_trainer.main([f"--train_data_dir={house / 'text.txt'}", f"--tokenizer_dir={house / 'theirs'}",
                           f"--output_dir={house / 'pretrain'}", "--max_steps=2", "--batch_size=2", "--max_seq_len=32",
                           "--d_model=16", "--n_layers=1", "--n_heads=2", f"--shard_dir={house / 'shards'}",
                           "--num_threads=1", "--val_fraction=0.1"])  # fmt: skip
    assert load_model(house / "pretrain/pretrain_best.pth")[1].end_token_ids == (2, 0)
