"""INT4 weights: packed and unpacked, multiplied by every kernel, rounded with compensation, in and out of files."""

import copy

import gguf
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import shown_levels
from test_decoder_step import largest_difference
from test_decoder_step import random_model as small_model
from test_quantizer import random_model

from checkpoint import load_checkpoint, load_model, save_checkpoint
from command_line import UserError
from exchange.export_model import main as export_model
from exchange.gguf_int4 import KINDS, int4_blocks, int4_from
from exchange.import_model import main as import_model
from inference.engine import Engine
from inference.error_aware_rounding import round_with_compensation, rounded_layers
from inference.kernels import gpu_products, linear_products
from inference.kernels.int4_tiles import expand_tiles, int4_product, tile_int4
from inference.kernels.int4_weights import expand_int4, pack_int4, quantize_int4, unpack_int4
from inference.kernels.linear_layers import InferenceLinear, tile_for_gpu
from inference.kernels.linear_products import native_product, plain_linear
from inference.quantizer import (
    load_any,
    load_quantized_model,
    place,
    prepare_for_inference,
    save_quantized_model,
    weight_bytes,
)
from inference.quantizer import main as quantize
from inference.sampling import SamplingParams

WIDTHS = (32, 96, 512, 576, 640, 768, 1568)  # groups that fill a block, several, a part of one, and a short last one


def int4_layer(n_in, n_out=13, has_minima=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    packed, scale = quantize_int4(torch.randn(n_out, n_in, generator=generator))
    minimum = torch.randn(n_out, n_in // 32, generator=generator).half() if has_minima else None
    return packed, scale, torch.randn(n_out, generator=generator), minimum


def in_8_bits(x):
    """Inputs as the kernels round them: 255 steps for each group of 32."""
    groups = x.unflatten(-1, (-1, 32)).double()
    unit = groups.abs().amax(dim=-1, keepdim=True) / 127
    return ((groups / unit).round() * unit).flatten(-2)


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_in", WIDTHS)
def test_packing_loses_nothing_and_takes_half_a_byte(n_in):
    numbers = torch.randint(0, 16, (2, 3, n_in), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_int4(numbers)
    assert (packed.dtype, packed.shape) == (torch.uint8, (2, 3, n_in // 2))
    assert torch.equal(unpack_int4(packed), numbers)


def test_a_weight_is_off_by_half_a_step_at_most_and_the_extreme_by_nothing():
    """But for those at the other end from a group's extreme, which have a step less. Zeros stay zeros."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 16).unsqueeze(1)
    weight[3, 32:] = 0
    packed, scale = quantize_int4(weight)
    made, step = expand_int4(packed, scale), scale.float().abs().repeat_interleave(32, dim=1)
    opposite = weight * -scale.float().sign().repeat_interleave(32, dim=1) < -7.5 * step
    assert ((made - weight).abs() <= torch.where(opposite, 1.01, 0.501) * step).all()
    assert made[3, 32:].eq(0).all()
    extreme = weight.abs().argmax(dim=1, keepdim=True)
    torch.testing.assert_close(made.gather(1, extreme), weight.gather(1, extreme), rtol=1e-3, atol=0)


@pytest.mark.parametrize("has_minima", [False, True])
@pytest.mark.parametrize("n_in", WIDTHS)
def test_kernels_give_the_exact_product_with_the_rounded_inputs(n_in, has_minima, native_level):
    """And a row gives the same alone and in a batch, to the last bit."""
    packed, scale, bias, minimum = int4_layer(n_in, has_minima=has_minima)
    product = native_product(packed, scale, bias, "int4", minimum)
    for n_rows in (1, 2, 3, 4, 5, 9, 40):
        x = torch.randn(n_rows, n_in, generator=torch.Generator().manual_seed(n_rows))
        x[:, ::7] *= 30
        x[0, :32] = 0
        y = product(x)
        expected = in_8_bits(x).nan_to_num() @ expand_int4(packed, scale, minimum).double().T + bias
        assert (y - expected).norm() < 1e-6 * expected.norm()
        assert torch.equal(y, torch.cat([product(row[None]) for row in x]))


@pytest.mark.parametrize("n_in", [64, 96])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_row_and_no_other(bad, n_in, native_level):
    packed, scale, bias, _ = int4_layer(n_in)
    x = torch.randn(3, n_in, generator=torch.Generator().manual_seed(0))
    expected = native_product(packed, scale, bias, "int4")(x)
    x[1, 40] = bad
    y = native_product(packed, scale, bias, "int4")(x)
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("has_minima", [False, True])
def test_without_a_compiler_and_for_gradients_weights_are_expanded(has_minima):
    packed, scale, bias, minimum = int4_layer(96, has_minima=has_minima)
    weight, x = expand_int4(packed, scale, minimum), torch.randn(5, 96, requires_grad=True)
    y = InferenceLinear(packed, scale, nn.Parameter(bias), minimum=minimum)(x)
    torch.testing.assert_close(y, x @ weight.T + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, plain_linear(x, packed, scale, bias, minimum))
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(5, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not shown_levels(), reason="no compiler")
@pytest.mark.parametrize("architecture", ["gpt2", "modern", "moe"])
def test_the_compiled_step_is_the_models_forward_pass(architecture, native_level):
    sizes = dict(d_model=64, n_heads=2, d_ff=96)
    model = prepare_for_inference(small_model(architecture, **sizes), "int4")
    assert largest_difference(model) < 0.02  # a last digit can decide between two numbers of 8 bits


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def tiles_of_the_kernel(numbers, n_together):
    """Whole numbers (N, K) of 0 … 15 as PyTorch's `_convert_weight_to_int4pack` lays them out, thread by thread."""
    n_rows, n_columns = numbers.shape
    tiles = np.zeros((-(-n_rows // 8), n_columns // (16 * n_together), 32, n_together // 2), dtype=np.uint32)
    for tile, outer, thread, pair in np.ndindex(tiles.shape):
        row, first = 8 * tile + thread // 4, 16 * (n_together * outer + 2 * pair) + 2 * (thread % 4)
        for digit, offset in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
            number = int(numbers[row, first + offset]) if row < n_rows else 0
            tiles[tile, outer, thread, pair] |= np.uint32(number << 4 * digit)
    return torch.from_numpy(tiles.view(np.int32))


def in_bf16(x, packed, scale, minimum=None):
    """x Wᵀ with what a GPU makes of INT4 weights, by the kernel of the same convention that PyTorch has for the CPU."""
    _, scales_and_zeros = tile_int4(packed, scale, minimum)
    in_pairs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_int4(packed).int(), 2)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), in_pairs, 32, scales_and_zeros)


@pytest.mark.parametrize("has_minima", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(32, 8), (96, 21), (192, 16), (384, 48)])
def test_tiles_are_those_of_pytorchs_kernel_and_hold_the_same_weights(n_in, n_out, has_minima):
    """The numbers exactly, scales and offsets rounded to bf16."""
    packed, scale, _, minimum = int4_layer(n_in, n_out, has_minima)
    tiles, scales_and_zeros = tile_int4(packed, scale, minimum)
    assert torch.equal(tiles, tiles_of_the_kernel(unpack_int4(packed), tiles.size(3) * 2))
    made, expected = expand_tiles(tiles, scales_and_zeros).float(), expand_int4(packed, scale, minimum)
    assert (made[:n_out] - expected).norm() < 2**-8 * expected.norm() and made[n_out:].eq(0).all()
    rows = torch.tensor([[0, n_out - 1], [5, 0]])
    assert torch.equal(expand_tiles(tiles, scales_and_zeros, rows).float(), made[rows])
    if n_out % 16 == 0:  # which the CPU's kernel asks for
        x = torch.randn(5, n_in, generator=torch.Generator().manual_seed(1)).bfloat16()
        found, product = in_bf16(x, packed, scale, minimum).float(), x.float() @ made.T
        assert (found - product).norm() < 2**-8 * product.norm()
    signature = str(torch.ops.aten._weight_int4pack_mm.default._schema)
    assert "(Tensor self, Tensor mat2, int qGroupSize, Tensor qScaleAndZeros) -> Tensor" in signature


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_a_model_in_tiles_computes_the_same(architecture, tmp_path, monkeypatch):
    """As with expanded weights: the CPU's own kernel would round activations. With a vocabulary that does not fill its
    last tile, tied to the embedding or not, with biases and minima."""
    model = prepare_for_inference(random_model(architecture, d_ff=96, vocab_size=517), "int4")
    model.layers[0].attention.query_proj.minimum = torch.full_like(model.layers[0].attention.query_proj.scale, 0.01)
    ids, n_bytes = torch.arange(40)[None], weight_bytes(model)
    tiled = copy.deepcopy(model)
    with torch.no_grad():
        tiled(ids)  # what was prepared for the other order is not used any more
        monkeypatch.setattr(linear_products, "native_knows", lambda *_: False)
        expected = model(ids)["logits"]
        tile_for_gpu(tiled)
        found = tiled(ids)["logits"], tiled.bfloat16()(ids)["logits"].float()
    assert tiled.lm_head.weight.dtype == torch.int32
    is_tied = [each.token_embedding.weight is each.lm_head.weight for each in (model, tiled)]
    assert is_tied[0] == is_tied[1]
    for logits, most in zip(found, (0.01, 0.03), strict=True):
        assert logits.shape == expected.shape and (logits - expected).norm() < most * expected.norm()
    assert weight_bytes(tiled) < 1.15 * n_bytes  # nothing is there twice; a scale comes with an offset
    with pytest.raises(UserError, match="lie as a GPU reads them"):
        save_quantized_model(tiled, tmp_path / "small.pth")


def test_few_rows_are_multiplied_without_a_copy_of_the_weights(monkeypatch):
    """Where that is faster; in bf16 alone, and not where gradients are wanted."""
    packed, scale, bias, _ = int4_layer(96, 16)
    tiles, scales_and_zeros = tile_int4(packed, scale)
    used = []
    monkeypatch.setattr(gpu_products, "_is_faster", lambda _, passes, *rest: passes < 8)
    monkeypatch.setattr(gpu_products, "int4_product", lambda x, *_: used.append(len(x)) or in_bf16(x, packed, scale))
    for n_rows in (1, 16, 60, 128, 129):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(n_rows, 1, 96, generator=torch.Generator().manual_seed(n_rows)).to(dtype)
            y = gpu_products.gpu_linear(x, tiles, scales_and_zeros, bias.to(dtype))
            expected = x.float() @ expand_int4(packed, scale).T + bias
            assert y.dtype == dtype and (y - expected).norm() < 0.01 * expected.norm()
    assert used == [1, 16, 60]
    x = torch.randn(2, 96).bfloat16().requires_grad_()
    gpu_products.gpu_linear(x, tiles, scales_and_zeros, None).sum().backward()
    assert x.grad is not None and used == [1, 16, 60]


@pytest.mark.parametrize(("times", "error", "chosen"), [((1, 2), 0, True), ((2, 1), 0, False), ((1, 2), 0.1, False)])
def test_what_is_faster_is_measured_once_and_said(times, error, chosen, monkeypatch, caplog):
    """A kernel that gives something else is not used at all."""
    packed, scale, _, _ = int4_layer(96, 16)
    tiles, scales_and_zeros = tile_int4(packed, scale)
    measured = []
    monkeypatch.setattr(gpu_products, "_choices", {})
    monkeypatch.setattr(gpu_products, "int4_product", lambda x, *_: in_bf16(x, packed, scale) * (1 + error))
    monkeypatch.setattr(gpu_products, "_time", lambda *_: measured.append(1) or float(times[len(measured) - 1]))
    x = torch.randn(3, 96).bfloat16()
    with caplog.at_level("INFO"):
        for rows in (x, x[:1], x):
            gpu_products.gpu_linear(rows, tiles, scales_and_zeros, None)
    (choice,) = gpu_products.choices()
    assert len(measured) == 2 and choice.reads_directly == chosen
    way = "read as they are" if chosen else "expanded at every call"
    (record,) = caplog.records
    assert record.message.startswith(f"int4 weights 96 → 16, 3 rows: {way} ({times[0]:.3f} ms directly")
    assert (record.levelname == "WARNING") == ("differ" in record.message) == bool(error)


@pytest.mark.gpu
@pytest.mark.parametrize("has_minima", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(96, 24), (192, 2051), (768, 3072)])
def test_a_gpus_kernel_multiplies_tiles(n_in, n_out, has_minima):
    """They are what PyTorch packs itself, and the product is that with the expanded weights."""
    packed, scale, _, minimum = (x if x is None else x.cuda() for x in int4_layer(n_in, n_out, has_minima))
    tiles, scales_and_zeros = tile_int4(packed, scale, minimum)
    numbers = unpack_int4(packed)
    in_pairs = numbers[:, ::2] << 4 | numbers[:, 1::2]  # as PyTorch wants them
    assert torch.equal(tiles, torch.ops.aten._convert_weight_to_int4pack(in_pairs, tiles.size(3) * 2))
    for n_rows in (1, 16, 17, 100):
        x = torch.randn(n_rows, n_in, device="cuda").bfloat16()
        found, expected = int4_product(x, tiles, scales_and_zeros), x @ expand_tiles(tiles, scales_and_zeros).T
        assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_a_model_on_a_gpu_has_the_cpus_logits(architecture):
    """And the graphs that are recorded give the tokens of steps from Python."""
    model = prepare_for_inference(random_model(architecture, d_ff=96, vocab_size=517), "int4")
    placed, ids = place(copy.deepcopy(model), torch.device("cuda"), torch.bfloat16), torch.arange(40)[None]
    with torch.no_grad():
        expected, found = model(ids)["logits"], placed(ids.cuda())["logits"].cpu().float()
    assert placed.lm_head.weight.dtype == torch.int32 and (found - expected).norm() < 0.05 * expected.norm()
    params = SamplingParams(12, temperature=0, ignore_eos=True)
    played, plain = (
        [each.token_ids for each in Engine(placed, None, cuda_graphs=graphs).run([[5, 6], [7]], params)]
        for graphs in (True, False)
    )
    assert played == plain


# -- rounding ----------------------------------------------------------------------------------------------------------


def test_compensation_halves_the_error_of_the_outputs():
    """Of a layer whose inputs depend on each other, against rounding to the nearest; the inputs are not those that it
    was rounded by."""
    torch.manual_seed(0)
    mixing, weight = torch.randn(24, 96), torch.randn(40, 96)
    known, others = (torch.randn(2000, 24) @ mixing + 0.1 * torch.randn(2000, 96) for _ in range(2))

    def error(made):
        return (others @ (expand_int4(*made) - weight).T).norm() / (others @ weight.T).norm()

    assert error(round_with_compensation(weight, known.T @ known)) < 0.5 * error(quantize_int4(weight))


def test_independent_inputs_need_no_compensation():
    """With Xᵀ X = 1 nothing can be made up for: each weight is rounded to the nearest."""
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(round_with_compensation(weight, torch.eye(64)), quantize_int4(weight), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("architecture", ["gpt2", "modern", "moe"])
def test_a_models_logits_are_nearer(architecture):
    """Than of one rounded to the nearest, on other text of the same kind; the model itself is as before."""
    model = random_model(architecture, d_ff=96, vocab_size=512)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 24, (60,), generator=generator).tolist() for _ in range(60)]
    made = rounded_layers(model, texts[:40])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    linears = {name for name, part in model.named_modules() if isinstance(part, nn.Linear) and "router" not in name}
    assert made.keys() == linears
    ids = torch.tensor(texts[40:])
    with torch.no_grad():
        expected = model(ids)["logits"]
        errors = [
            ((prepare_for_inference(model, "int4", rounding)(ids)["logits"] - expected).norm() / expected.norm()).item()
            for rounding in (made, None)
        ]
    assert errors[0] < errors[1] < 0.5


def test_it_takes_a_seventh_of_the_memory():
    model = random_model("modern")
    assert weight_bytes(prepare_for_inference(model, "int4")) < 0.145 * weight_bytes(model)


def test_rows_that_are_no_groups_of_32_are_refused():
    with pytest.raises(UserError, match="query_proj has rows of 48 numbers, no multiple of 32; take int8 weights"):
        prepare_for_inference(random_model("modern", d_model=48), "int4")


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A chat model in a file, with a tokenizer that knows the bytes only."""
    from byte_level_bpe import ByteLevelBPETokenizer

    model = random_model("modern", d_ff=96, vocab_size=512)
    path = tmp_path_factory.mktemp("int4") / "sft_best.pth"
    tokenizer = ByteLevelBPETokenizer(300)
    return save_checkpoint(path, model_state=model.state_dict(), config=model.config, tokenizer=tokenizer, stage="sft")


def test_the_quantizer_rounds_by_a_text_and_says_what_it_cost(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} and {number + 1} are neighbours.\n" for number in range(200)))
    small = tmp_path / "small.pth"
    options = ["--model_path", str(checkpoint), "--weights", "int4", "--output_path", str(small), "--text", str(text)]
    quantize([*options, "--calibration", str(text), "--calibration_tokens", "500", "--text_tokens", "300"])
    said = capsys.readouterr().out
    assert "rounding by 5" in said and f"tokens of {text}" in said and "int4 model" in said
    made = load_quantized_model(small)
    nearest = prepare_for_inference(load_model(checkpoint)[0], "int4")
    assert made.lm_head.weight is made.token_embedding.weight
    assert not torch.equal(made.lm_head.weight, nearest.lm_head.weight)
    with pytest.raises(UserError, match="--calibration is for --weights int4 only"):
        quantize(["--model_path", str(checkpoint), "--calibration", str(text)])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_blocks_of_gguf_come_in_as_they_are(kind):
    """As the reference of the library expands them: Q4_0 and Q4_1 exactly, Q4_K but for the rounding of its scales."""
    kind, random = KINDS[kind], np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (5, 1536 // block, size), dtype=np.uint8)
    n_factors = 1 if kind == KINDS.Q4_0 else 2
    factors = random.uniform(-0.1, 0.1, (*blocks.shape[:2], n_factors)).astype(np.float16)
    blocks[..., : 2 * n_factors] = factors.view(np.uint8)
    data = blocks.reshape(5, -1)
    made, expected = expand_int4(*int4_from(data, kind)), torch.from_numpy(gguf.dequantize(data, kind))
    if kind == KINDS.Q4_K:
        assert (made - expected).norm() < 1e-3 * expected.norm()
    else:
        assert torch.equal(made, expected)
        assert np.array_equal(int4_blocks(*int4_from(data, kind)), data)


def test_a_model_goes_out_to_gguf_and_comes_back_bit_for_bit(checkpoint, tmp_path, capsys):
    """And what llama.cpp's library reads in the file are the weights of the model here."""
    small = prepare_for_inference(load_model(checkpoint)[0], "int4")
    path = save_quantized_model(small, tmp_path / "small.pth", load_model(checkpoint)[2])
    export_model(["--model_path", str(path), "--gguf", "Q4_0", "--output_dir", str(tmp_path / "out")])
    file = next((tmp_path / "out").glob("*.gguf"))
    import_model(["--from", str(file), "--output_path", str(tmp_path / "back.pth"), "--weights", "int4"])
    ours, back = (load_checkpoint(each)["model"] for each in (path, tmp_path / "back.pth"))
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[name], back[name]) for name in ours)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    value = tensors["blk.1.attn_v.weight"]
    layer = small.layers[1].attention.value_proj
    assert torch.equal(
        torch.from_numpy(gguf.dequantize(value.data, value.tensor_type)), expand_int4(layer.weight, layer.scale)
    )
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(load_any(tmp_path / "back.pth")[0](ids)["logits"], load_any(path)[0](ids)["logits"])
    with pytest.raises(UserError, match="is quantized"):
        export_model(["--model_path", str(path), "--gguf", "Q8_0", "--output_dir", str(tmp_path / "out")])


def test_minima_stay_with_the_weights_through_files(tmp_path, checkpoint):
    small = prepare_for_inference(load_model(checkpoint)[0], "int4")
    layer = small.layers[0].feed_forward.up_proj
    layer.minimum = torch.randn(layer.scale.shape, generator=torch.Generator().manual_seed(0)).half()
    path = save_quantized_model(small, tmp_path / "small.pth", load_model(checkpoint)[2])
    back = load_quantized_model(path)
    assert torch.equal(back.layers[0].feed_forward.up_proj.minimum, layer.minimum)
    assert back.layers[1].feed_forward.up_proj.minimum is None
    export_model(["--model_path", str(path), "--gguf", "Q4_0", "--output_dir", str(tmp_path / "out")])
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf"))).tensors}
    assert (kinds["blk.0.ffn_up.weight"], kinds["blk.1.ffn_up.weight"]) == (KINDS.Q4_1, KINDS.Q4_0)
