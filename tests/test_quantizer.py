"""Models for inference: close to the model they came from, small, the same in a batch as alone, and safely stored."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import NO_COMPILER, shown_levels, stand_in_for
from torch.utils._python_dispatch import TorchDispatchMode

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, load_model, save_checkpoint
from command_line import UserError
from gpt_model import IGNORED_LABEL, GPTConfig, GPTModel
from inference import quantizer
from inference.engine import Engine
from inference.kernels.linear_layers import InferenceEmbedding, InferenceLinear
from inference.kernels.linear_products import DTYPES
from inference.quantizer import (
    QUANTIZED,
    held_out_samples,
    load_any,
    load_quantized_model,
    perplexity_and_choices,
    prepare_for_inference,
    quantization_of,
    quantize_model_int8,
    save_quantized_model,
    weight_bytes,
)
from inference.sampling import SamplingParams
from inference.text_generation import generate_texts
from machine import inference_dtype

PROMPTS = ["hello", "你好", "a", "The quick brown fox jumps"]


@pytest.fixture(scope="module")
def tokenizer():
    return ByteLevelBPETokenizer(300)  # knows the bytes only: a token is a byte


def random_model(architecture="modern", **switches):
    """With some layers above the size that counts as tiny, and weights that make logits differ."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=2048, d_model=192, n_layers=2, n_heads=4, d_ff=1536, max_seq_len=64)
    model = GPTModel.from_config(GPTConfig.for_architecture(architecture, **{**sizes, **switches})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08)
    return model


@pytest.fixture(scope="module", params=["gpt2", "modern"])
def model(request):
    return random_model(request.param)


@pytest.fixture
def checkpoint_path(model, tokenizer, tmp_path):
    return save_checkpoint(
        tmp_path / "sft_best.pth",
        model_state=model.state_dict(),
        config=model.config,
        tokenizer=tokenizer,
        stage="sft",
        step=7,
        metrics={"val_loss": 1.5},
        training_state={"optimizer": torch.zeros(1000)},
    )


# -- the model ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def compare_logits(model, quantized, input_ids):
    """The relative error of the logits, and the share of positions where both have the same likeliest token."""
    reference, logits = model(input_ids)["logits"], quantized(input_ids)["logits"]  # (B, T, V)
    error = (logits - reference).norm() / reference.norm()
    return error.item(), (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_logits_are_near_those_of_the_float_model(architecture, tie_embeddings, cpu_level):
    """Of the float model's logits they miss a few per cent; of those of a float model with the rounded weights, next to
    nothing: the activations lose nothing to the integers."""
    model = random_model(architecture, tie_embeddings=tie_embeddings)
    quantized = quantize_model_int8(model)
    ids = torch.randint(0, 2048, (4, 48), generator=torch.Generator().manual_seed(1))
    error, agreement = compare_logits(model, quantized, ids)
    assert error < 0.04
    assert agreement > 0.8  # random logits have many near ties
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, InferenceLinear):
                model.get_submodule(name).weight.copy_(module.weight * module.scale.unsqueeze(1))
        table = quantized.token_embedding
        model.token_embedding.weight.copy_(table.weight * table.scale.unsqueeze(1))
    if model.config.position == "learned":
        model.position_embedding.weight.data = quantized.position_embedding.weight.data.float()
    error, _ = compare_logits(model, quantized, ids)
    assert error < 1e-4


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize(("weights", "limit"), [("fp32", 1e-5), ("fp16", 2e-3), ("bf16", 0.02), ("int8_dynamic", 0.06)])
def test_other_kinds_of_weights(model, weights, limit, tie_embeddings, cpu_level):
    """Each stays as near to the model as its rounding lets it, and says what it is."""
    model = random_model("gpt2" if model.config.bias else "modern", tie_embeddings=tie_embeddings)
    prepared = prepare_for_inference(model, weights)
    ids = torch.randint(0, 2048, (4, 48), generator=torch.Generator().manual_seed(1))
    error, _ = compare_logits(model, prepared, ids)
    assert error < limit
    assert quantization_of(prepared) == (None if weights == "fp32" else weights)


def test_full_precision_shares_every_weight(model):
    """Preparing costs no memory, what training changes later is seen, and training goes on undisturbed."""
    prepared = prepare_for_inference(model)
    shared = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in prepared.state_dict().values()} == shared
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in prepared.parameters())


def test_the_compiler_is_not_needed(model, monkeypatch):
    """Without native kernels every kind of weights gives the same logits, but for roundings: of inputs that are rounded
    to 8 bits, a last digit can decide between two, and beside INT4 weights they are not rounded."""
    ids = torch.randint(0, 2048, (2, 20), generator=torch.Generator().manual_seed(1))
    for weights in DTYPES:
        prepared = prepare_for_inference(model, weights)
        with torch.no_grad():
            expected = prepared(ids)["logits"]
            with monkeypatch.context() as patched:
                patched.setenv("CC", "")
                logits = prepare_for_inference(model, weights)(ids)["logits"]
        assert (logits - expected).norm() < {"int8_dynamic": 1e-2, "int4": 3e-2}.get(weights, 1e-5) * expected.norm()


def test_rounding_costs_the_same_on_every_processor(monkeypatch):
    """INT8 weights, with and without INT8 inputs, on each kind of processor and without a compiler: the error of the
    logits is the same within a twentieth, and far more with rounded inputs than without."""
    model = random_model("modern")
    ids = torch.randint(0, 2048, (4, 48), generator=torch.Generator().manual_seed(1))
    errors = {}
    for weights in ("int8", "int8_dynamic"):
        errors[weights] = []
        for level in [*shown_levels(), NO_COMPILER]:
            with monkeypatch.context() as patched:
                stand_in_for(level, patched)
                errors[weights].append(compare_logits(model, prepare_for_inference(model, weights), ids)[0])
        assert max(errors[weights]) < 1.05 * min(errors[weights])
    assert min(errors["int8_dynamic"]) > 1.2 * max(errors["int8"])


def test_every_matrix_is_int8_in_memory(model):
    """No linear layer and no token embedding keeps floating-point weights: the model is a quarter of its size."""
    quantized = quantize_model_int8(model)
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
    assert isinstance(quantized.token_embedding, InferenceEmbedding)
    matrices = {name: tensor.dtype for name, tensor in quantized.state_dict().items() if tensor.dim() > 1}
    assert matrices.pop("position_embedding.weight", torch.float16) == torch.float16
    assert set(matrices.values()) == {torch.int8}
    assert weight_bytes(quantized) < 0.265 * weight_bytes(model)


def test_a_tied_head_shares_the_integers_of_the_embedding(model):
    """With tied embeddings there is one table, not two; the looked-up rows are the head's rows times their scales."""
    quantized = quantize_model_int8(model)
    head, embedding = quantized.lm_head, quantized.token_embedding
    assert embedding.weight.data_ptr() == head.weight.data_ptr()
    ids = torch.tensor([[0, 5, 2047]])
    assert torch.equal(embedding(ids), F.embedding(ids, head.weight * head.scale.unsqueeze(1)))
    error = (embedding(ids) - model.token_embedding(ids)).norm() / model.token_embedding(ids).norm()
    assert error < 0.01


def test_an_untied_head_has_a_table_of_its_own():
    """Without tying, the embedding is quantized from its own weights."""
    model = random_model(tie_embeddings=False)
    quantized = quantize_model_int8(model)
    ids = torch.arange(100)
    error = (quantized.token_embedding(ids) - model.token_embedding(ids)).norm() / model.token_embedding(ids).norm()
    assert error < 0.01


def test_the_model_it_came_from_is_unchanged(model):
    """Quantizing makes a copy."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_model_int8(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.token_embedding.weight


def test_generates_in_batches_as_alone(model, tokenizer):
    """The cache, left padding and INT8 together: a prompt's greedy answer is the same alone and in a batch."""
    quantized = quantize_model_int8(model)
    settings = dict(chat=False, max_gen_len=16)
    batched = generate_texts(quantized, tokenizer, PROMPTS, **settings)
    assert batched == [generate_texts(quantized, tokenizer, [prompt], **settings)[0] for prompt in PROMPTS]


def test_new_weights_take_effect_after_the_first_call(model):
    """The kernel's own copy of the weights is renewed when others are loaded."""
    torch.manual_seed(1)
    other = random_model("gpt2" if model.config.bias else "modern")
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.05)
    quantized, expected = quantize_model_int8(model), quantize_model_int8(other)
    ids = torch.tensor([[1, 2, 3]])
    quantized(ids)
    quantized.load_state_dict(expected.state_dict())
    assert torch.equal(quantized(ids)["logits"], expected(ids)["logits"])


# -- files -------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same_to_the_last_bit(model, checkpoint_path, tmp_path):
    """Scales, integers and tying survive; the file is a quarter of the float weights and needs nothing else."""
    quantized = quantize_model_int8(model)
    path = save_quantized_model(quantized, tmp_path / "int8.pth", load_model(checkpoint_path)[2])
    loaded = load_quantized_model(path)
    assert not loaded.training
    assert loaded.state_dict().keys() == quantized.state_dict().keys()
    assert all(torch.equal(tensor, quantized.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.token_embedding.weight.data_ptr() == loaded.lm_head.weight.data_ptr()
    ids = torch.randint(0, 2048, (2, 20))
    assert torch.equal(loaded(ids)["logits"], quantized(ids)["logits"])
    assert path.stat().st_size < 0.3 * weight_bytes(model)


def test_the_file_is_a_safe_and_self_describing_checkpoint(model, checkpoint_path, tmp_path):
    """`torch.load` accepts it with weights_only and mmap; stage, step, metrics and tokenizer are those of the source,
    and the optimiser's state is left behind."""
    source = load_model(checkpoint_path)[2]
    path = save_quantized_model(quantize_model_int8(model), tmp_path / "int8.pth", source)
    content = torch.load(path, weights_only=True, mmap=True)
    assert content["quantization"] == "int8"
    assert (content["stage"], content["step"], content["metrics"]) == ("sft", 7, {"val_loss": 1.5})
    assert content["tokenizer"]["fingerprint"] == source["tokenizer"]["fingerprint"]
    assert "training_state" not in content


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_kind_is_saved_and_loaded(model, kind, tmp_path):
    """The file says of which kind it is, and gives the same logits."""
    prepared = prepare_for_inference(model, kind)
    path = save_quantized_model(prepared, tmp_path / "q.pth")
    loaded = load_quantized_model(path)
    ids = torch.randint(0, 2048, (2, 20))
    assert quantization_of(loaded) == load_checkpoint(path)["quantization"] == kind
    assert torch.equal(loaded(ids)["logits"], prepared(ids)["logits"])


class LargestFloat(TorchDispatchMode):
    """Notes the size of the largest tensor of floating-point numbers that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point() and not result.is_meta:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("kind", ["int8", "int8_dynamic"])
def test_loading_never_builds_the_model_in_full_precision(model, kind, tmp_path):
    """While it loads, no tensor of floating-point numbers is made that is as large as a weight matrix."""
    path = save_quantized_model(prepare_for_inference(model, kind), tmp_path / "q.pth")
    with LargestFloat() as largest:
        load_quantized_model(path)
    assert 0 < largest.numel <= max(2048, 2 * 64 * 192)  # scales; tables of positions
    with LargestFloat() as largest:
        prepare_for_inference(model, kind)
    assert largest.numel >= 1536 * 192, "the way through full precision is noticed"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stay_in_the_file(model, tmp_path):
    """They are mapped into memory, not read: two processes that serve one file hold it once."""
    path = save_quantized_model(quantize_model_int8(model), tmp_path / "q.pth")
    loaded = load_quantized_model(path)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    places = [[int(address, 16) for address in line[0].split("-")] for line in lines]
    address = loaded.layers[0].feed_forward.up_proj.weight.data_ptr()
    assert any(start <= address < end for start, end in places)


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_the_file_is_at_most_26_5_per_cent(architecture, tmp_path):
    """Tokenizer, names and scales included, of a model of the size that is trained on the sample data."""
    tokenizer = ByteLevelBPETokenizer(512)
    tokenizer.train([f"{a}{b} {a * b} " for a in "abcdefgh" for b in range(200)])
    model = random_model(architecture, n_layers=4, d_ff=512 if architecture == "modern" else 768, max_seq_len=128)
    state = model.state_dict()
    settings = dict(model_state=state, config=model.config, tokenizer=tokenizer, stage="sft")
    path = save_checkpoint(tmp_path / "sft.pth", **settings)
    small = save_quantized_model(quantize_model_int8(model), tmp_path / "int8.pth", load_checkpoint(path))
    assert small.stat().st_size <= 0.265 * path.stat().st_size


def test_tied_tables_stay_one_when_the_model_moves(model, tmp_path):
    """Also after loading, and after a change of device or type."""
    path = save_quantized_model(quantize_model_int8(model), tmp_path / "int8.pth")
    loaded = load_quantized_model(path).to("cpu", torch.float32)
    assert loaded.token_embedding.weight is loaded.lm_head.weight
    assert str(loaded.device) == "cpu" and loaded.dtype == torch.float32


def test_load_any_takes_float_and_quantized_checkpoints(model, checkpoint_path, tokenizer, tmp_path):
    """One call for both; a quantized model brings its tokenizer and generates."""
    source = load_checkpoint(checkpoint_path)
    int8_path = save_quantized_model(quantize_model_int8(model), tmp_path / "int8.pth", source)
    for path, quantization in ((checkpoint_path, None), (int8_path, "int8")):
        loaded, its_tokenizer, content = load_any(path)
        assert content.get("quantization") == quantization
        assert quantization_of(loaded) == quantization
        assert isinstance(loaded.lm_head, InferenceLinear)
        assert its_tokenizer.fingerprint == tokenizer.fingerprint
        generate_texts(loaded, its_tokenizer, PROMPTS, chat=True, max_gen_len=4)


@pytest.mark.parametrize("weights", [None, "int8", "fp16"])
def test_what_a_gpu_computes_in_half_precision_stays_near_fp32(model, weights, checkpoint_path, tmp_path):
    """The very types that a GPU gets, on the CPU: everything but INT8 weights and their scales is bf16."""
    path = checkpoint_path
    if weights:
        source = load_checkpoint(path)
        path = save_quantized_model(prepare_for_inference(model, weights), tmp_path / "small.pth", source)
    exact, _, _ = load_any(path)
    half, _, _ = load_any(path, precision="bf16")
    kept = {"weight": torch.int8, "scale": torch.float32} if weights == "int8" else {}
    for name, tensor in half.state_dict().items():
        is_matrix = name.endswith(("_proj.weight", "lm_head.weight", "token_embedding.weight", "scale"))
        assert tensor.dtype == (kept.get(name.rpartition(".")[2], torch.bfloat16) if is_matrix else torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.token_embedding.weight is half.lm_head.weight
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = exact(ids)["logits"], half(ids)["logits"]
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.03 * expected.norm()
    engine = Engine(half, None)
    assert engine.cache.keys.dtype == torch.bfloat16
    (answer,) = engine.run([ids[0].tolist()], SamplingParams(3, temperature=0, logprobs=1))
    assert found[0, -1].max() - found[0, -1, answer.token_ids[0]] < 0.05 * found[0, -1].std()  # a tie may turn in bf16


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_prepared_goes_elsewhere_alone(weights, tied):
    """The model that it was made from keeps its types, also where it does not learn."""
    model = random_model("gpt2", tie_embeddings=tied).requires_grad_(False)
    prepare_for_inference(model, weights).to(torch.float16)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_a_gpu_takes_bf16_unless_it_is_older_than_ampere(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert inference_dtype("auto", cpu) is inference_dtype("fp32", cpu) is inference_dtype("auto", torch.device("mps"))
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert inference_dtype("auto", cuda) == dtype
    assert inference_dtype("fp32", cuda) == torch.float32
    with pytest.raises(UserError, match="--precision fp16 needs a GPU"):
        inference_dtype("fp16", cpu)


def test_a_model_alone_can_be_saved_and_loaded(model, tmp_path):
    """Without a checkpoint to inherit from, the file holds the model; `load_any` misses the tokenizer."""
    quantized = quantize_model_int8(model)
    path = save_quantized_model(quantized, tmp_path / "int8.pth")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_quantized_model(path)(ids)["logits"], quantized(ids)["logits"])
    with pytest.raises(UserError, match="no tokenizer"):
        load_any(path)


def test_command_line_writes_the_file_and_says_what_it_brought(checkpoint_path, tmp_path, capsys):
    """The default output stands beside the input with the kind in its name; size, speed, perplexity and agreement are
    printed, and for INT8 activations what they cost."""
    (tmp_path / "text.txt").write_text("One line.\nAnother one.\n" * 20)
    options = ["--model_path", str(checkpoint_path), "--text", str(tmp_path / "text"), "--text_tokens", "200"]
    for kind in ("int8", "int8_dynamic"):
        quantizer.main([*options, "--weights", kind])
        path = checkpoint_path.with_name(f"sft_best_{kind}.pth")
        output = capsys.readouterr().out
        assert load_any(path)[2]["stage"] == "sft"
        assert str(path) in output
        assert re.search(r"weights +[\d.]+ → [\d.]+ MiB \(2\d\.\d%\)", output)
        assert re.search(r"decoding +[\d.]+ → [\d.]+ tokens/s", output)
        assert re.search(r"perplexity [\d.]+ → [\d.]+ \([+-][\d.]+%\) on 2\d\d tokens", output)
        assert re.search(r"same likeliest token at [\d.]+%", output)
        assert ("INT8 activations" in output) == (kind == "int8_dynamic")


def test_it_warns_where_it_does_not_pay(checkpoint_path, tmp_path, monkeypatch, capsys):
    """No speed, or a perplexity that rises by more than 0.5 %: each is said; where it pays, there is no warning."""
    (tmp_path / "text.txt").write_text("One line.\n")
    options = ["--model_path", str(checkpoint_path), "--text", str(tmp_path / "text.txt")]
    agreeing = torch.zeros(9)
    for speeds, perplexities, warnings in [((100, 90), (5.0, 5.1), 2), ((100, 300), (5.0, 5.001), 0)]:
        found = {None: (speeds[0], perplexities[0]), "int8": (speeds[1], perplexities[1])}
        with monkeypatch.context() as patched:
            patched.setattr(quantizer, "decode_speed", lambda model, seconds, f=found: f[quantization_of(model)][0])
            patched.setattr(
                quantizer, "perplexity_and_choices", lambda model, _, f=found: (f[quantization_of(model)][1], agreeing)
            )
            quantizer.main(options)
        assert capsys.readouterr().out.count("warning: ") == warnings


def test_perplexity_is_that_of_the_evaluator(model, tokenizer, tmp_path):
    """On texts that fit into the context the two, written independently, agree."""
    from evaluator import GPTEvaluator

    texts = ["One line.", "Another line, which is longer.", "短"]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    samples = held_out_samples(tmp_path / "text", tokenizer, 64, 1000)
    assert len(samples) == 3
    expected = GPTEvaluator(model, tokenizer).compute_perplexity(texts, as_documents=True)
    found, choices = perplexity_and_choices(model, samples)
    assert found == pytest.approx(expected["perplexity"], rel=1e-4)
    assert len(choices) == expected["tokens"] + 3  # the token after the last is not known


def test_conversations_are_scored_on_their_answers(tokenizer, tmp_path):
    """A .json file is read like the data of fine-tuning, and no more of it than asked for."""
    path = tmp_path / "test.json"
    path.write_text('[{"instruction": "2 + 3 = ?", "response": "5"}, {"instruction": "1 + 1 = ?", "response": "2"}]')
    samples = held_out_samples(path, tokenizer, 64, 10)
    assert len(samples) == 1
    scored = [label for label in samples[0][1] if label != IGNORED_LABEL]
    assert tokenizer.decode(scored).strip() == "5"


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_quantizing_twice_is_refused(model, checkpoint_path):
    """Neither a quantized model nor its file is taken for one in full precision, and nothing is written."""
    quantized = quantize_model_int8(model)
    with pytest.raises(UserError, match="quantized already"):
        quantize_model_int8(quantized)
    path = save_quantized_model(quantized, checkpoint_path.with_name("q.pth"), load_checkpoint(checkpoint_path))
    with pytest.raises(UserError, match="is quantized"):
        quantizer.main(["--model_path", str(path)])
    assert not path.with_name("q_int8.pth").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_damaged_weights_are_named(number, checkpoint_path, tokenizer):
    """In a checkpoint to be quantized, to be served, or quantized already: one sentence that says where."""
    content = load_checkpoint(checkpoint_path)
    state = {name: tensor.clone() for name, tensor in content["model"].items()}
    state["layers.1.feed_forward.up_proj.weight"][3, 5] = number
    path = checkpoint_path.with_name("damaged.pth")
    config = GPTConfig(**content["config"])
    save_checkpoint(path, model_state=state, config=config, tokenizer=tokenizer, stage="sft")
    for read in (lambda: quantizer.main(["--model_path", str(path)]), lambda: load_any(path)):
        with pytest.raises(UserError, match=r"damaged.pth is damaged: layers.1.feed_forward.up_proj.weight"):
            read()
    quantized = quantize_model_int8(load_model(checkpoint_path)[0])
    quantized.layers[1].feed_forward.up_proj.scale[3] = number
    path = save_quantized_model(quantized, path)
    with pytest.raises(UserError, match=r"damaged.pth is damaged: layers.1.feed_forward.up_proj.scale"):
        load_quantized_model(path)


def test_weights_beyond_fp16_are_named(model):
    """They would become infinite; the sentence names another kind of weights as the remedy."""
    large = random_model("gpt2" if model.config.bias else "modern")
    with torch.no_grad():
        large.layers[0].feed_forward.up_proj.weight[0, 0] = 1e6
    with pytest.raises(UserError, match="up_proj is too large for fp16; use another kind"):
        prepare_for_inference(large, "fp16")
    prepare_for_inference(large, "bf16")


def test_held_out_text_that_is_not_there_is_named_if_it_was_asked_for(checkpoint_path, tmp_path, monkeypatch, capsys):
    """A missing default is no reason to stop, a missing file that the user named is."""
    monkeypatch.chdir(tmp_path)
    quantizer.main(["--model_path", str(checkpoint_path)])
    assert "give held-out text with --text" in capsys.readouterr().out
    with pytest.raises(UserError, match="no data at nowhere"):
        quantizer.main(["--model_path", str(checkpoint_path), "--text", "nowhere"])


def test_wrong_files_are_named(model, checkpoint_path, tokenizer, tmp_path):
    """A float checkpoint, a reward model, a damaged and a missing file: each gives a sentence, not a traceback."""
    with pytest.raises(UserError, match="is not quantized"):
        load_quantized_model(checkpoint_path)
    with pytest.raises(UserError, match="is not quantized"):
        save_quantized_model(model, tmp_path / "x.pth")
    reward = save_checkpoint(
        tmp_path / "reward_best.pth",
        model_state=model.state_dict(),
        config=model.config,
        tokenizer=tokenizer,
        stage="reward",
    )
    with pytest.raises(UserError, match="reward model"):
        quantizer.main(["--model_path", str(reward)])
    path = save_quantized_model(quantize_model_int8(model), tmp_path / "int8.pth")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_quantized_model(path)
    with pytest.raises(UserError, match="does not exist"):
        load_any(tmp_path / "missing.pth")


def test_the_model_itself_is_not_overwritten(checkpoint_path):
    """An output path that is the input is refused before any work."""
    with pytest.raises(UserError, match="choose another name"):
        quantizer.main(["--model_path", str(checkpoint_path), "--output_path", str(checkpoint_path)])
