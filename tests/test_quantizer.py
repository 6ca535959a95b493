"""INT8 weights: close to the model they came from, small, the same in a batch as alone, and safely stored."""

import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, load_model, save_checkpoint
from command_line import UserError
from gpt_model import GPTConfig, GPTModel
from inference import quantizer
from inference.kv_cache_infer import generate_texts
from inference.quantizer import (
    TINY_LAYER,
    Int8Embedding,
    Int8Linear,
    compare_logits,
    expanding_linear,
    integer_kernel_works,
    integer_linear,
    load_any,
    load_quantized_model,
    pack_weights,
    quantize_model_int8,
    quantize_rows,
    save_quantized_model,
    weight_bytes,
)

PROMPTS = ["hello", "你好", "a", "The quick brown fox jumps"]
needs_integer_kernel = pytest.mark.skipif(not integer_kernel_works(), reason="this CPU has no exact integer kernel")


@pytest.fixture(scope="module")
def tokenizer():
    return ByteLevelBPETokenizer(300)  # knows the bytes only: a token is a byte


def random_model(architecture="modern", **switches):
    """With some layers above the size from which the integer kernel computes, and weights that make logits differ."""
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


# -- the numbers -------------------------------------------------------------------------------------------------------


def test_rows_are_rounded_to_the_nearest_of_255_steps():
    """No weight is off by more than half a step of its own row, and rows of very different size do not disturb each
    other; a row of zeros stays zero."""
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 16).unsqueeze(1)
    weight[3] = 0
    rows, scale = quantize_rows(weight)
    assert (rows.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert rows.abs().max() == 127
    error = (rows * scale.unsqueeze(1) - weight).abs()
    assert (error <= 0.5001 * scale.unsqueeze(1)).all()
    assert (rows[3] * scale[3]).eq(0).all()


@needs_integer_kernel
@pytest.mark.parametrize("n_rows", [1, 4, 33])
def test_integer_kernel_is_the_exact_product_of_the_quantized_weights(n_rows):
    """Activations lose next to nothing to the integers, even where one feature is a hundred times the others."""
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantize_rows(torch.randn(96, 256, generator=generator))
    x = torch.randn(n_rows, 256, generator=generator) * torch.logspace(-6, 6, n_rows).unsqueeze(1)
    x[:, 5] *= 100
    expected = x.double() @ (weight.double() * scale.double().unsqueeze(1)).T
    error = (integer_linear(x, pack_weights(weight, scale)) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 1e-3


@needs_integer_kernel
def test_integer_kernel_does_not_saturate():
    """The largest sums there can be, of either sign, are exact; on processors without VNNI they overflow easily."""
    weight = torch.full((64, 1024), 127, dtype=torch.int8)
    weight[1::2] = -127
    x = torch.tensor([[1.0], [-1.0]]).expand(2, 1024)
    product = integer_linear(x, pack_weights(weight, torch.ones(64)))
    torch.testing.assert_close(product, x @ weight.float().T, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(32, 48), (1024, 320)], ids=["tiny", "large"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("integers", [False, True], ids=["expanding", "integers"])
def test_every_kernel_is_near_the_float_layer(shape, bias, integers, monkeypatch):
    """Each way to compute is within 1 % of the float layer, for any shape of input, zeros included."""
    monkeypatch.setattr(quantizer, "integer_kernel_works", lambda: integers and integer_kernel_works())
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    layer = Int8Linear(linear)
    with torch.no_grad():
        for batch in [(), (1,), (5,), (2, 3)]:
            x = torch.randn(*batch, shape[1])
            expected = linear(x)
            assert layer(x).shape == expected.shape
            assert (layer(x) - expected).norm() < 0.01 * expected.norm()
        assert torch.equal(layer(torch.zeros(2, shape[1])), linear(torch.zeros(2, shape[1])))


@needs_integer_kernel
def test_rows_are_independent():
    """What a row gives does not depend on its neighbours, to the last bit, though one of them is enormous."""
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(640, 1000))
    assert layer.weight.numel() > TINY_LAYER
    x = torch.randn(40, 640)
    x[7] *= 1e6
    together = layer(x)
    for start, end in [(0, 1), (6, 7), (8, 9), (3, 12), (30, 40)]:
        assert torch.equal(layer(x[start:end]), together[start:end])


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_logits_are_near_those_of_the_float_model(architecture, tie_embeddings):
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
            if isinstance(module, Int8Linear):
                model.get_submodule(name).weight.copy_(module.weight * module.scale.unsqueeze(1))
        table = quantized.token_embedding
        model.token_embedding.weight.copy_(table.rows * table.scale.unsqueeze(1))
    error, _ = compare_logits(model, quantized, ids)
    assert error < 1e-3


def test_every_matrix_is_int8_in_memory(model):
    """No linear layer and no token embedding keeps floating-point weights: the model is a quarter of its size."""
    quantized = quantize_model_int8(model)
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
    assert isinstance(quantized.token_embedding, Int8Embedding)
    matrices = {name: tensor.dtype for name, tensor in quantized.state_dict().items() if tensor.dim() > 1}
    matrices.pop("position_embedding.weight", None)
    assert set(matrices.values()) == {torch.int8}
    assert weight_bytes(quantized) < 0.28 * weight_bytes(model)


def test_a_tied_head_shares_the_integers_of_the_embedding(model):
    """With tied embeddings there is one table, not two; the looked-up rows are the head's rows times their scales."""
    quantized = quantize_model_int8(model)
    head, embedding = quantized.lm_head, quantized.token_embedding
    assert embedding.rows.data_ptr() == head.weight.data_ptr()
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
    assert loaded.token_embedding.rows.data_ptr() == loaded.lm_head.weight.data_ptr()
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
    assert content["tokenizer"] == source["tokenizer"]
    assert "training_state" not in content


def test_load_any_takes_float_and_quantized_checkpoints(model, checkpoint_path, tokenizer, tmp_path):
    """One call for both; a quantized model brings its tokenizer and generates."""
    source = load_checkpoint(checkpoint_path)
    int8_path = save_quantized_model(quantize_model_int8(model), tmp_path / "int8.pth", source)
    for path, quantization in ((checkpoint_path, None), (int8_path, "int8")):
        loaded, its_tokenizer, content = load_any(path)
        assert content.get("quantization") == quantization
        assert any(isinstance(module, Int8Linear) for module in loaded.modules()) == bool(quantization)
        assert its_tokenizer.fingerprint == tokenizer.fingerprint
        generate_texts(loaded, its_tokenizer, PROMPTS, chat=True, max_gen_len=4)


def test_a_model_alone_can_be_saved_and_loaded(model, tmp_path):
    """Without a checkpoint to inherit from, the file holds the model; `load_any` misses the tokenizer."""
    quantized = quantize_model_int8(model)
    path = save_quantized_model(quantized, tmp_path / "int8.pth")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_quantized_model(path)(ids)["logits"], quantized(ids)["logits"])
    with pytest.raises(UserError, match="no tokenizer"):
        load_any(path)


def test_command_line_writes_the_file_and_says_what_it_brought(checkpoint_path, capsys):
    """The default output stands beside the input with `_int8` in its name; size, error and speed are printed."""
    quantizer.main(["--model_path", str(checkpoint_path)])
    path = checkpoint_path.with_name("sft_best_int8.pth")
    output = capsys.readouterr().out
    assert load_any(path)[2]["stage"] == "sft"
    assert str(path) in output
    assert re.search(r"weights +[\d.]+ → [\d.]+ MiB \(2\d%\)", output)
    assert re.search(r"relative error [\d.]+%", output)
    assert re.search(r"\d+ → \d+ tokens/s", output)


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


def test_the_fallback_needs_no_special_operator():
    """Where no integer kernel is exact, the product with expanded weights takes its place, in the type of x."""
    weight, scale = quantize_rows(torch.randn(8, 16))
    x = torch.randn(3, 16)
    torch.testing.assert_close(expanding_linear(x, weight, scale), x @ (weight * scale.unsqueeze(1)).T)
