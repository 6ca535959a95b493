"""Hugging Face folders come in: the same logits, the same ids, and a sentence where that cannot be had."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exchange_models import FAMILIES, SCALINGS, TEXTS, make, random_ids, save, save_tokenizer

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_model
from command_line import UserError
from exchange import import_model
from inference.engine import Engine
from inference.kernels.decoder_step import SOURCE, DecoderStep, load_native
from inference.paged_cache import PagedCache
from inference.quantizer import load_any
from inference.sampling import SamplingParams

CLOSE = dict(atol=1e-4, rtol=1e-4)
has_compiler = load_native(SOURCE) is not None


@pytest.fixture(autouse=True)
def transformers():
    """Not imported before it is needed: it changes `nn.Module`, which the compiled step notices."""
    return pytest.importorskip("transformers")


def take_in(folder, **options):
    """The model, tokenizer and content of the checkpoint that the command makes of a folder."""
    path = folder.parent / "taken.pth"
    words = [f"--{name}={value}" for name, value in options.items()]
    import_model.main([f"--from={folder}", f"--output_path={path}", *words])
    return load_model(path)


def through_the_engine(model, ids):
    """Logits (T, V) of one sequence through the engine's cache and the compiled step; None where there is none."""
    cache = PagedCache(model.config, 4 * model.config.max_seq_len, 2)
    step = DecoderStep.of(model, cache.native)
    if step is None:
        return None
    sequence, rows = cache.open([0] * len(ids)), []
    for piece in ids.split([5, *[1] * (len(ids) - 5)]):
        cache.begin_step([(sequence, len(piece))])
        rows.append(step(piece.tolist(), cache.slots, cache.positions, range(len(piece)))[1].clone())
        cache.stored(sequence, [], len(piece))
    return torch.cat(rows)


def assert_same(ours, theirs, ids, compiled=True):
    """Logits without a cache, with one token by token, with left padding, and through the compiled step."""
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.3  # a difference would show
        torch.testing.assert_close(ours(ids)["logits"], expected, **CLOSE)
        cache = ours.new_cache(len(ids), ids.size(1))
        pieces = [ours(piece, cache=cache)["logits"] for piece in ids.split([5, *[1] * (ids.size(1) - 5)], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **CLOSE)
        mask = torch.ones(len(ids), ids.size(1) + 4, dtype=torch.int64)
        mask[:, :4] = 0
        padded = torch.cat((torch.full((len(ids), 4), ours.config.pad_token_id), ids), dim=1)
        torch.testing.assert_close(ours(padded, attention_mask=mask)["logits"][:, 4:], expected, **CLOSE)
        compiled_logits = through_the_engine(ours.requires_grad_(False), ids[0])
        assert (compiled_logits is not None) == (compiled and has_compiler)
        if compiled_logits is not None:
            torch.testing.assert_close(compiled_logits, expected[0], **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name, tmp_path):
    theirs = save(name, tmp_path / "theirs")
    model, _, content = take_in(tmp_path / "theirs")
    assert content["stage"] == "sft" and content["imported"]["from"] == "theirs"
    assert_same(model, theirs, random_ids(2, 30))


@pytest.mark.parametrize("scaling", [name for name in SCALINGS if name != "dynamic"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rope_scaling_beyond_the_original_context(name, scaling, tmp_path):
    theirs = save(name, tmp_path / "theirs", rope_scaling=SCALINGS[scaling])
    model, _, _ = take_in(tmp_path / "theirs")
    assert model.config.rope_scaling["rope_type"] == SCALINGS[scaling]["rope_type"]
    assert_same(model, theirs, random_ids(2, 44))


def test_dynamic_rope_scaling_beyond_the_original_context(tmp_path):
    """There the angles of all tokens depend on the length: as it is in a single pass, and as it grows with a cache."""
    settings = dict(rope_scaling=SCALINGS["dynamic"], max_position_embeddings=16)
    theirs = save("llama", tmp_path / "theirs", **settings)
    model, _, _ = take_in(tmp_path / "theirs")
    assert model.config.max_seq_len == 48
    ids = random_ids(1, 44)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :9])["logits"], theirs(ids[:, :9]).logits, **CLOSE)
        shorter, longer = theirs(ids[:, :20]).logits[0], theirs(ids).logits  # in this order: theirs only grows
        torch.testing.assert_close(model(ids)["logits"], longer, **CLOSE)
        mask = torch.ones(2, 44, dtype=torch.int64)
        mask[1, :24] = 0  # the shorter row is what it is alone
        both = torch.cat((ids, ids.roll(24, dims=1)))
        logits = model(both, attention_mask=mask)["logits"]
        torch.testing.assert_close(logits[0], longer[0], **CLOSE)
        torch.testing.assert_close(logits[1, 24:], shorter, **CLOSE)
        theirs(ids[:, :9])  # and forgets
    expected = theirs.generate(ids[:, :10], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    params = SamplingParams(30, temperature=0)
    answers = Engine(model, None).run([ids[0, :10].tolist(), ids[0, :20].tolist()], params)
    assert answers[0].token_ids == expected[0, 10:].tolist()
    assert DecoderStep.of(model, PagedCache(model.config, 96, 1).native) is None


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "smollm", "qwen2"])
def test_token_ids_are_those_of_transformers(kind, tmp_path, transformers):
    save_tokenizer(tmp_path, kind)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = ByteLevelBPETokenizer.from_pretrained(tmp_path)
    again = ByteLevelBPETokenizer.from_files(ours.to_files())
    for text in TEXTS:
        assert ours.encode(text)["input_ids"] == theirs(text)["input_ids"], text
        assert again.encode(text)["input_ids"] == theirs(text)["input_ids"], text
    messages = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[1]}]
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert ours.encode_chat(messages)["input_ids"] == expected


def test_several_end_tokens_and_the_makers_sampling(tmp_path):
    """They come with the model, go through every stage with its tokenizer, and end an answer."""
    save("llama", tmp_path / "theirs")
    engine = save_tokenizer(tmp_path / "theirs", "llama-bpe")
    ends = [engine.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    generation = {"eos_token_id": ends, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "theirs/generation_config.json").write_text(json.dumps(generation))
    model, tokenizer, _ = take_in(tmp_path / "theirs")
    tokenizer = ByteLevelBPETokenizer.from_files(tokenizer.to_files())
    assert tokenizer.end_token_ids == tuple(ends)
    assert tokenizer.generation_defaults == {"temperature": 0.6, "top_p": 0.9}
    model.lm_head.weight.data.zero_()
    for end in ends:
        bias = {end: 50.0}
        (answer,) = Engine(model, tokenizer).run(["x"], SamplingParams(5, temperature=0, logit_bias=bias))
        assert answer.ended and answer.token_ids == [end]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_half_precision_stays_half_and_loses_nothing(name, dtype, tmp_path, transformers):


    theirs = make(name).to(dtype)
    save(name, tmp_path / "theirs", theirs)
    full, _, content = take_in(tmp_path / "theirs")
    assert content["model"]["lm_head.weight"].dtype == dtype and full.lm_head.weight.dtype == torch.float32
    half, _, _ = load_any(tmp_path / "taken.pth")
    assert half.layers[0].attention.query_proj.weight.dtype == dtype
    ids = random_ids(1, 20)
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
        expected = theirs(ids).logits
        torch.testing.assert_close(full(ids)["logits"], expected, **CLOSE)
        torch.testing.assert_close(half(ids)["logits"], expected, **CLOSE)


def test_straight_into_int8(tmp_path):
    """The same numbers as importing and then quantizing."""
    from inference.quantizer import prepare_for_inference

    save("qwen2", tmp_path / "theirs")
    plain, _, _ = take_in(tmp_path / "theirs")
    expected = prepare_for_inference(plain, "int8").state_dict()
    import_model.main([f"--from={tmp_path / 'theirs'}", f"--output_path={tmp_path / 'int8.pth'}", "--weights=int8"])
    model, _, _ = load_any(tmp_path / "int8.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", ["shards", "torch.save", "torch.save in shards", "without a head"])
def test_every_layout_of_the_weights(layout, tmp_path):


    name = "gpt2" if layout == "without a head" else "llama"
    theirs, folder = make(name), tmp_path / "theirs"
    save(name, folder, theirs)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    if layout == "shards":
        theirs.save_pretrained(folder, max_shard_size="30KB")
        (folder / "model.safetensors").unlink()
        assert len(list(folder.glob("*.safetensors"))) > 1
    elif layout == "without a head":
        from safetensors.torch import save_file

        bare = {k.removeprefix("transformer."): v for k, v in state.items() if k != "lm_head.weight"}
        save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, folder / "model.safetensors")
    else:
        (folder / "model.safetensors").unlink()
        names = sorted(state)
        parts = [names] if layout == "torch.save" else [names[::2], names[1::2]]
        files = ["pytorch_model.bin"] if len(parts) == 1 else ["pytorch_model-1.bin", "pytorch_model-2.bin"]
        for file, part in zip(files, parts, strict=True):
            torch.save({key: state[key] for key in part}, folder / file)
        if len(parts) > 1:
            index = {key: file for file, part in zip(files, parts, strict=True) for key in part}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    model, _, _ = take_in(folder)
    ids = random_ids(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)["logits"], theirs(ids).logits, **CLOSE)


def change_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    content |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}))


def spoil(folder, kind):
    """Do to a good folder what the test is about."""
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind in ("tensor missing", "tensor of another shape", "a tensor more", "not finite", "integers"):
        state, name = load_file(weights), "model.layers.1.mlp.up_proj.weight"
        if kind == "tensor missing":
            del state[name]
        elif kind == "a tensor more":
            state["model.layers.1.mlp.extra.weight"] = torch.ones(2)
        elif kind == "not finite":
            state[name][3, 4] = float("nan")
        elif kind == "integers":
            state[name] = state[name].to(torch.int8)
        else:
            state[name] = state[name][1:].clone()
        save_file(state, weights)
    elif kind == "shard missing":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "index of nothing":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    elif kind == "pickle":
        weights.unlink()
        torch.save({"a": print}, folder / "pytorch_model.bin")
    elif kind == "sentencepiece":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"x")
    elif kind == "sentencepiece in json":
        content = json.loads((folder / "tokenizer.json").read_text())
        content["decoder"] = {"type": "Fuse"}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        change_config(folder, **json.loads(kind))


@pytest.mark.parametrize(
    "kind, sentence",
    [
        ("no config", "theirs has no config.json; a Hugging Face folder has it"),
        ("no weights", "neither model.safetensors nor pytorch_model.bin"),
        ("cut off", "model.safetensors is damaged or cut off"),
        ("tensor missing", "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        ("tensor of another shape", r"up_proj.weight in .* has the shape \(51, 40\), and .* should have \(52, 40\)"),
        ("a tensor more", "does not have: model.layers.1.mlp.extra.weight"),
        ("not finite", "its layers.1.feed_forward.up_proj.weight holds NaN or infinity"),
        ("integers", "up_proj.weight in .* is stored as I8, .* take the model with weights of 16 or 32 bits"),
        ("index of nothing", "index.json is damaged .it has no weight_map.; fetch it again"),
        ("shard missing", "lacks model-00001-of-00002.safetensors, which model.safetensors.index.json names"),
        ("pickle", "cannot be read as weights alone, and nothing else in it is executed"),
        ("sentencepiece", "SentencePiece's kind .* this project reads byte-level BPE"),
        ("sentencepiece in json", "not a byte-level BPE tokenizer .* Llama 1 and 2, TinyLlama and Mistral"),
        ("no tokenizer", "has no tokenizer.json; say where .* --tokenizer_dir"),
        ('{"architectures": ["MambaForCausalLM"]}', "holds a MambaForCausalLM; .* GPT2LMHeadModel"),
        ('{"quantization_config": {"quant_method": "gptq"}}', "is quantized .GPTQ.* take the model that it was made"),
        ('{"logit_softcapping": 30.0}', "has logit_softcapping 30.0, which may change what the model computes"),
        ('{"auto_map": {"AutoModel": "x.py"}}', "has auto_map"),
        ('{"hidden_act": "gelu"}', "has hidden_act 'gelu'"),
        ('{"hidden_size": "gone"}', "lacks hidden_size"),
        ('{"num_attention_heads": 3}', "makes no model: .* n_heads 3 must be a multiple of n_kv_heads 2"),
        ('{"rope_parameters": {"rope_type": "longrope"}}', "rope_scaling must be of the type .*'longrope'"),
        ('{"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}', "type llama3 lacks high_freq_factor, low_"),
        ('{"rope_scaling": "long"}', "makes no model: "),
        ('{"num_hidden_layers": "two"}', "makes no model: "),
        ('{"num_hidden_layers": 1000000000}', "n_layers must be at least 1 and at most 4096"),
        ('{"vocab_size": 300}', r"the tokenizer has \d+ tokens and the model 300"),
        ('{"architectures": ["MistralForCausalLM"], "sliding_window": 12}', "sliding_window 12: .* --max_seq_len 12"),
    ],
)
def test_bad_folders_are_refused_in_a_sentence(kind, sentence, tmp_path):
    save("llama", tmp_path / "theirs")
    spoil(tmp_path / "theirs", kind)
    with pytest.raises(UserError, match=sentence):
        take_in(tmp_path / "theirs")
    assert not list(tmp_path.glob("*.pth"))


def test_a_field_that_is_known_to_change_nothing_and_a_window_that_is_never_full(tmp_path):
    theirs = save("mistral", tmp_path / "theirs")
    change_config(tmp_path / "theirs", sliding_window=12, colour="red")
    with pytest.raises(UserError, match='has colour "red"'):
        take_in(tmp_path / "theirs", max_seq_len=12)
    model, _, _ = take_in(tmp_path / "theirs", max_seq_len=12, ignore_fields="colour")
    ids = random_ids(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)["logits"], theirs(ids).logits, **CLOSE)


def test_too_little_memory_or_disk(tmp_path, monkeypatch):
    from exchange import sources

    save("llama", tmp_path / "theirs")
    monkeypatch.setattr(sources, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match="MiB of memory as fp32, and 0 are free; close other programs"):
        take_in(tmp_path / "theirs")


@pytest.mark.skipif(not hasattr(__import__("resource"), "RLIMIT_DATA"), reason="this system has no such limit")
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_memory_holds_the_result_and_one_tensor(weights, tmp_path):
    """The command runs within that, the mapped file and little for all else; twice the model would not fit."""
    sizes = dict(vocab_size=4096, n_embd=1024, n_head=16, n_layer=3, n_positions=64, initializer_range=0.02)
    theirs = make("gpt2", **{**sizes, "n_inner": None})
    save("gpt2", tmp_path / "theirs", theirs)
    n_bytes = (tmp_path / "theirs/model.safetensors").stat().st_size
    largest = 4 * 4096 * 1024
    share, other = (4, 160 << 20) if weights == "int8" else (1, 96 << 20)
    room = n_bytes + n_bytes // share + 2 * largest + other
    code = f"""
import resource
from exchange import import_model
import torch
torch.set_num_threads(1)
torch.ones(4) @ torch.ones(4)
used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData"))) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + {room}, used + {room}))
import_model.main(["--from={tmp_path / "theirs"}", "--output_path={tmp_path / "taken.pth"}", "--weights={weights}"])
"""
    root = Path(import_model.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)
    assert room < 3 * n_bytes and (tmp_path / "taken.pth").is_file()
