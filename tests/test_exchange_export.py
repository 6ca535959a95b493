"""What goes out computes the same in `transformers`, and comes back bit by bit."""

import json

import pytest
import torch
from exchange_models import FAMILIES, SCALINGS, TEXTS, make, random_ids, save
from test_exchange_hugging_face import CLOSE, take_in, transformers  # noqa: F401

from checkpoint import load_checkpoint, load_model, save_checkpoint
from command_line import UserError
from exchange import export_model
from lora import LoRAOptions, apply_lora, lora_settings, trained_state


def send_out(path, folder, **options):
    words = [f"--{name}={value}" for name, value in options.items()]
    export_model.main([f"--model_path={path}", f"--output_dir={folder}", *words])
    return folder


def in_transformers(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)


def assert_equal_checkpoints(path, other):
    ours, theirs = load_checkpoint(path), load_checkpoint(other)
    assert ours["config"] == theirs["config"]
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in ours["model"].items():
        assert value.dtype == theirs["model"][name].dtype and torch.equal(value, theirs["model"][name]), name
    assert ours["tokenizer"]["fingerprint"] == theirs["tokenizer"]["fingerprint"]


CASES = [(name, None) for name in FAMILIES] + [("llama", scaling) for scaling in SCALINGS]


@pytest.mark.parametrize("name, scaling", CASES)
def test_out_and_back_again(name, scaling, tmp_path):
    """Shards, tied and untied heads, biases, every kind of positions."""
    save(name, tmp_path / "theirs", **({"rope_scaling": SCALINGS[scaling]} if scaling else {}))
    model, tokenizer, _ = take_in(tmp_path / "theirs")
    (tmp_path / "taken.pth").rename(tmp_path / "first.pth")
    theirs, their_tokenizer = in_transformers(send_out(tmp_path / "first.pth", tmp_path / "out"))
    ids = random_ids(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids)["logits"], **CLOSE)
    for text in TEXTS:
        assert tokenizer.encode(text)["input_ids"] == their_tokenizer(text)["input_ids"]
    take_in(tmp_path / "out")
    assert_equal_checkpoints(tmp_path / "first.pth", tmp_path / "taken.pth")


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_a_model_that_was_born_here(architecture, random_model, tokenizer, tmp_path):
    """With its tokenizer and its prompts, in several shards, over an earlier export."""
    model, path = random_model(architecture, vocab_size=len(tokenizer), max_seq_len=64), tmp_path / "born.pth"
    save_checkpoint(path, model_state=model.state_dict(), config=model.config, tokenizer=tokenizer, stage="sft", step=7,
                    metrics={"val_loss": 1.25})  # fmt: skip
    (tmp_path / "born_eval.json").write_text(json.dumps({"scores": {"exact": 0.75}}))
    folder = send_out(path, tmp_path / "out", max_shard_mib=1)
    assert (folder / "model.safetensors").is_file()
    export_model.export_folder(export_model.open_checkpoint(path), folder, max_shard_mib=0)  # each tensor its own
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 10 and not (folder / "model.safetensors").exists()
    theirs, their_tokenizer = in_transformers(folder)
    messages = [{"role": "user", "content": "法国的首都是哪里？"}]
    ids = tokenizer.encode_chat(messages, add_generation_prompt=True)["input_ids"]
    assert their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, model(torch.tensor([ids]))["logits"], **CLOSE)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    card = (folder / "README.md").read_text()
    assert "7 optimiser steps" in card and "| val_loss | 1.25 |" in card and "| exact | 0.75 |" in card
    take_in(folder)
    assert_equal_checkpoints(path, tmp_path / "taken.pth")


def test_half_precision_goes_out_as_it_came_or_as_asked(tmp_path):
    save("qwen2", tmp_path / "theirs", make("qwen2").bfloat16())
    take_in(tmp_path / "theirs")
    (tmp_path / "taken.pth").rename(tmp_path / "first.pth")
    theirs, _ = in_transformers(send_out(tmp_path / "first.pth", tmp_path / "out"))
    assert theirs.dtype == torch.bfloat16
    take_in(tmp_path / "out")
    assert_equal_checkpoints(tmp_path / "first.pth", tmp_path / "taken.pth")
    theirs, _ = in_transformers(send_out(tmp_path / "first.pth", tmp_path / "out", weights="fp16"))
    assert theirs.dtype == torch.float16


def test_several_end_tokens_and_sampling_go_along(tmp_path):
    save("qwen2", tmp_path / "theirs")
    generation = {"eos_token_id": [1, 5], "do_sample": True, "temperature": 0.6, "top_k": 20}
    (tmp_path / "theirs/generation_config.json").write_text(json.dumps(generation))
    _, tokenizer, _ = take_in(tmp_path / "theirs")
    folder = send_out(tmp_path / "taken.pth", tmp_path / "out")
    theirs, _ = in_transformers(folder)
    assert theirs.generation_config.eos_token_id == list(tokenizer.end_token_ids) == [tokenizer.eos_token_id, 1, 5]
    assert theirs.generation_config.temperature == 0.6
    _, again, _ = take_in(folder)
    assert again.end_token_ids == tokenizer.end_token_ids
    assert again.generation_defaults == tokenizer.generation_defaults == {"temperature": 0.6, "top_k": 20}


def test_adapters_go_out_merged(tmp_path):
    save("llama", tmp_path / "theirs")
    model, tokenizer, _ = take_in(tmp_path / "theirs")
    config = LoRAOptions(lora_rank=2, lora_targets="query_proj,up_proj")
    apply_lora(model, config, base=str(tmp_path / "taken.pth"))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.3)
    from checkpoint import weight_fingerprint

    lora = {**lora_settings(model), "base_fingerprint": weight_fingerprint(load_checkpoint(tmp_path / "taken.pth"))}
    state = trained_state(model, model.state_dict())
    save_checkpoint(tmp_path / "lora.pth", model_state=state, config=model.config, tokenizer=tokenizer, stage="sft",
                    lora=lora)  # fmt: skip
    theirs, _ = in_transformers(send_out(tmp_path / "lora.pth", tmp_path / "out"))
    ids = random_ids(1, 12)
    with torch.no_grad():
        expected = model.eval()(ids)["logits"]
        torch.testing.assert_close(theirs(ids).logits, expected, **CLOSE)
        assert not torch.allclose(load_model(tmp_path / "taken.pth")[0](ids)["logits"], expected, atol=0.1)


def test_what_cannot_go_out_is_refused(random_model, tokenizer, tmp_path):
    model = random_model("gpt2", vocab_size=len(tokenizer), position="sinusoidal")
    save_checkpoint(tmp_path / "m.pth", model_state=model.state_dict(), config=model.config, tokenizer=tokenizer,
                    stage="sft")  # fmt: skip
    with pytest.raises(UserError, match="transformers has no such model"):
        send_out(tmp_path / "m.pth", tmp_path / "out")
    save("llama", tmp_path / "theirs")
    from exchange import import_model

    import_model.main([f"--from={tmp_path / 'theirs'}", f"--output_path={tmp_path / 'int8.pth'}", "--weights=int8"])
    with pytest.raises(UserError, match="is quantized .int8.; export the checkpoint it was made from"):
        send_out(tmp_path / "int8.pth", tmp_path / "out")
    take_in(tmp_path / "theirs")
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match="a file cannot be a folder"):
        send_out(tmp_path / "taken.pth", tmp_path / "a file")
