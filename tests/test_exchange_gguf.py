"""GGUF files come in and go out: every architecture, type of weights and kind of tokenizer."""

import json
import re

import gguf
import numpy as np
import pytest
import torch
from exchange_models import CHATML, FAMILIES, SCALINGS, TEXTS, random_ids, save, save_tokenizer
from test_exchange_export import assert_equal_checkpoints, send_out
from test_exchange_hugging_face import take_in, transformers  # noqa: F401

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_model, save_checkpoint
from command_line import UserError
from exchange import import_model
from exchange.gguf_files import permuted
from exchange.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer_name, read_tokenizer, write_tokenizer
from exchange.modelfile import adds_bos, bos_string, modelfile, probes
from gpt_model import GPTConfig, GPTModel
from inference.quantizer import load_any
from text.chat_template import DEFAULT_CHAT_TEMPLATE

CASES = [(name, None) for name in FAMILIES if name != "qwen3 with biases"]
CASES += [("llama", scaling) for scaling in ("linear", "llama3", "yarn")]
WIDE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)


def taken(path, output, **options):
    words = [f"--{name}={value}" for name, value in options.items()]
    import_model.main([f"--from={path}", f"--output_path={output}", *words])
    return output


def first(name, tmp_path, **changes):
    """A checkpoint of a family."""
    save(name, tmp_path / "theirs", **changes)
    take_in(tmp_path / "theirs")
    return (tmp_path / "taken.pth").rename(tmp_path / "first.pth")


def gguf_of(path, folder, precision="F32"):
    send_out(path, folder, gguf=precision)
    return next(folder.glob("*.gguf"))


@pytest.mark.parametrize("name, scaling", CASES)
def test_out_and_back_again(name, scaling, tmp_path):
    """Bit by bit in F32: permuted rows, fused layers, biases, stretched positions, the tokenizer."""
    changes = dict(rope_scaling=SCALINGS[scaling]) if scaling else {}
    path = first(name, tmp_path, **changes)
    again = taken(gguf_of(path, tmp_path / "out"), tmp_path / "again.pth")
    assert_equal_checkpoints(path, again)


def test_permuted_rows_are_those_of_llama_cpps_converter():
    weight = torch.arange(24.0).view(12, 2)
    theirs = weight.reshape(2, 2, 3, 2).swapaxes(1, 2).reshape(12, 2)  # LlamaModel.permute in convert_hf_to_gguf.py
    assert torch.equal(permuted(weight, 2), theirs)
    assert torch.equal(permuted(theirs, 2, back=True), weight)


def test_a_yarn_of_ones_own_scale(tmp_path):
    scaling = {name: value for name, value in SCALINGS["yarn of one's own"].items() if name != "truncate"}
    path = first("llama", tmp_path, rope_scaling=scaling)
    again = taken(gguf_of(path, tmp_path / "out"), tmp_path / "again.pth")
    assert load_model(again)[0].config.rope_scaling["attention_factor"] == pytest.approx(0.7)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
def test_every_type_of_weights_is_unpacked(kind, tmp_path):
    """As the library packs it; all matrices but one."""
    path = first("smollm", tmp_path, **WIDE)
    source, target = gguf_of(path, tmp_path / "out"), tmp_path / "packed.gguf"
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    expected, qtype = {}, gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if data.ndim == 2:
            packed = gguf.quantize(data, qtype)
            expected[tensor.name] = torch.from_numpy(gguf.dequantize(packed, qtype).astype(np.float32))
            writer.add_tensor(tensor.name, packed, raw_dtype=qtype)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, _, content = load_model(taken(target, tmp_path / "again.pth"))
    assert torch.equal(model.token_embedding.weight, expected["token_embd.weight"])
    query = permuted(model.layers[1].attention.query_proj.weight, 2)
    assert torch.equal(query, expected["blk.1.attn_q.weight"])
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert content["model"]["token_embedding.weight"].dtype == stored


def test_k_quants_are_unpacked():
    """The library cannot pack them: a block of known bytes."""
    from exchange.gguf_files import read_tensor

    for name in ("Q4_K", "Q5_K", "Q6_K"):
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.random.default_rng(0).integers(0, 40, (3, 2 * size), dtype=np.uint8)
        tensor = gguf.ReaderTensor("x", kind, np.array([2 * block, 3]), 6 * block, data.nbytes, 0, data, None)
        expected = torch.from_numpy(gguf.dequantize(data, kind))
        assert torch.equal(read_tensor(tensor), expected) and expected.abs().max() > 0


def test_q8_0_goes_straight_into_int8(tmp_path):
    """Within the rounding of one scale a row in place of one in 32 numbers."""
    path = first("smollm", tmp_path, **WIDE)
    packed = gguf_of(path, tmp_path / "out", "Q8_0")
    int8 = load_any(taken(packed, tmp_path / "int8.pth", weights="int8"))[0]
    full = load_model(taken(packed, tmp_path / "full.pth"))[0]
    assert int8.lm_head.weight.dtype == torch.int8
    ids = random_ids(1, 20)
    with torch.no_grad():
        expected, logits = full(ids)["logits"], int8(ids)["logits"]
    assert (logits - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_the_tokenizer_is_read_from_llama_cpps_own_terms(kind, tmp_path):
    """Without the tokenizer.json that our own files have beside them; the template and all ids are the same."""
    save_tokenizer(tmp_path, kind)
    tokenizer = ByteLevelBPETokenizer.from_pretrained(tmp_path)
    assert pre_tokenizer_name(tokenizer) == kind
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    write_tokenizer(writer, tokenizer, len(tokenizer) + 9, bool(tokenizer.prefix_ids))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "t.gguf").fields
    metadata = {name: field.contents() for name, field in fields.items() if name != gguf.Keys.Tokenizer.HF_JSON}
    again = read_tokenizer(metadata, "t.gguf")
    assert again.vocab == tokenizer.vocab and again.chat_template == CHATML
    roles = ("bos", "eos", "pad", "unk")
    assert [getattr(again, f"{r}_token_id") for r in roles] == [getattr(tokenizer, f"{r}_token_id") for r in roles]
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text), text
    messages = [{"role": "user", "content": "<|im_end|> x"}, {"role": "assistant", "content": "y"}]
    assert again.encode_chat(messages) == tokenizer.encode_chat(messages)


# -- Ollama ------------------------------------------------------------------------------------------------------------

LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe \"kind\".<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def in_ollama(template, messages):
    """What Go's text/template makes of the few things that our Modelfiles say, the prompt for an answer included."""
    parts = [part for part in re.split(r"(\{\{.*?\}\}(?!\}))", template, flags=re.DOTALL) if part]
    system = any(message["role"] == "system" for message in messages)

    def run(start, message, shown):
        """Output from part `start` to the end of the block; where that is."""
        text, place, done, in_role = "", start, False, False
        while place < len(parts):
            action = parts[place][2:-2].strip()
            assert parts[place].startswith("{{"), "text outside of quotes"
            if action == "end" and not in_role:
                return text, place
            if action == "end":
                shown, done, in_role = True, False, False
            elif action == "range .Messages":
                for each in messages:
                    piece, end = run(place + 1, each, True)
                    text += piece
                place = end
            elif action == "if not .System":
                piece, place = run(place + 1, message, not system)
                text += piece
            elif match := re.fullmatch(r'(else )?if eq \.Role "(\w+)"', action):
                shown = message is not None and message["role"] == match[2] and not done
                done = done or shown
                in_role = True
            elif action == ".Content":
                text += message["content"] if shown else ""
            else:
                text += json.loads(action) if shown else ""
            place += 1
        return text, place

    return run(0, None, True)[0]


@pytest.mark.parametrize("template", [DEFAULT_CHAT_TEMPLATE, CHATML, LLAMA3_CHAT, WITH_DEFAULT])
def test_the_modelfile_renders_the_same_ids(template, tmp_path):
    save_tokenizer(tmp_path, "llama-bpe", chat_template=template)
    tokenizer = ByteLevelBPETokenizer.from_pretrained(tmp_path)
    text, notes = modelfile("m.gguf", tokenizer, 2048, True)
    go = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    begins = bos_string(tokenizer) if adds_bos(tokenizer, True) else ""
    assert (begins != "") == (template == LLAMA3_CHAT)
    engine = tokenizer._engine
    engine.encode_special_tokens = False  # as llama.cpp reads a prompt
    for messages in probes():
        if messages[-1]["role"] == "user":
            ids = tokenizer.encode_chat(messages, add_generation_prompt=True)["input_ids"]
            assert engine.encode(begins + in_ollama(go, messages), add_special_tokens=False).ids == ids
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER num_ctx 2048" in text
    assert [("trims blanks" in note) for note in notes] == ([True] if template == LLAMA3_CHAT else [])


def test_a_template_that_cannot_be_said_in_go_is_left_out_and_said(tmp_path):
    twice = "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}"
    counted = "{% for m in messages %}{{ loop.index ~ m['role'] ~ m['content'] }}{% endfor %}"
    for template in (twice, counted):
        save_tokenizer(tmp_path, "smollm", chat_template=template)
        text, notes = modelfile("m.gguf", ByteLevelBPETokenizer.from_pretrained(tmp_path), 9, True)
        assert "TEMPLATE" not in text and "cannot be said in Ollama's terms: it does" in notes[0]


# -- bad files ---------------------------------------------------------------------------------------------------------


def test_bad_files_are_refused_in_a_sentence(tmp_path):
    good = gguf_of(first("smollm", tmp_path), tmp_path / "out")
    content, bad = good.read_bytes(), tmp_path / "bad.gguf"

    def refused(data, sentence):
        bad.write_bytes(data)
        with pytest.raises(UserError, match=sentence):
            taken(bad, tmp_path / "again.pth")
        assert not (tmp_path / "again.pth").exists()

    for size in (0, 3, 40, 2000, len(content) // 2, len(content) - 400):
        refused(content[:size], "is no GGUF file, or is damaged or cut off")
    refused(content.replace(b"llama", b"mamba"), "holds a mamba; .* known are gpt2, llama, qwen2, qwen3")
    refused(content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"), "lacks the tensor blk.1.ffn_up.weight")
    refused(content.replace(b"llama.rope.freq_base", b"llama.rope.freq_bose"), "has rope.freq_bose .* may change")
    refused(content.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.prx"), "texts as 'default' does, .* not known")


def test_what_llama_cpp_does_not_have_is_refused(random_model, tokenizer, tmp_path):
    config = GPTConfig.for_architecture(
        "modern", vocab_size=len(tokenizer), d_model=32, n_layers=1, n_heads=2,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
    )  # fmt: skip
    save_checkpoint(tmp_path / "m.pth", model_state=GPTModel.from_config(config).state_dict(), config=config,
                    tokenizer=tokenizer, stage="sft")  # fmt: skip
    with pytest.raises(UserError, match="llama.cpp's qwen3 has no rope scaling of the type dynamic"):
        send_out(tmp_path / "m.pth", tmp_path / "out", gguf="F32")
    assert not (tmp_path / "out").exists()
