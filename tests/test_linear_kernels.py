"""Linear layers for inference: every way to compute them is right, and the choice between the ways is sound."""

import copy
import ctypes
import json

import at_once
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import NO_COMPILER, shown_levels, stand_in_for

from inference.kernels import fastest_way, gpu_products, linear_products
from inference.kernels.int4_weights import expand_int4
from inference.kernels.linear_layers import InferenceEmbedding, InferenceLinear, quantize_rows
from inference.kernels.linear_products import (
    DTYPES,
    PRECISE,
    ROUGH,
    TINY_LAYER,
    integer_kernel_limit,
    integer_product,
    kind_of,
    native_knows,
    native_library,
    native_product,
    plain_linear,
    round_inputs,
    ways_to_multiply,
)
from machine import native_code

WEIGHT_ONLY = [name for name in DTYPES if name not in ("int8_dynamic", "int4")]
needs_native = pytest.mark.skipif(not native_knows("int8", 64), reason="no compiler")
needs_integer_kernel = pytest.mark.skipif(not integer_kernel_limit(), reason="no exact integer kernel")


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    """Measurements of the tests are not those of the user."""
    monkeypatch.setattr(fastest_way, "_memory", lambda: tmp_path / "cache" / "linear_kernels")


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine where nothing can be compiled."""
    monkeypatch.setenv("CC", "")


def layer_and_twin(weights, n_in=96, n_out=130, bias=True):
    """A layer with some kind of weights, and the exact (fp64) layer with the same, rounded, weights."""
    torch.manual_seed(0)
    layer = InferenceLinear.from_linear(nn.Linear(n_in, n_out, bias=bias), weights)
    twin = nn.Linear(n_in, n_out, bias=bias).double()
    if weights == "int4":
        twin.weight.data = expand_int4(layer.weight, layer.scale).double()
    else:
        twin.weight.data = layer.weight.double() * (1 if layer.scale is None else layer.scale.double().unsqueeze(1))
    if bias:
        twin.bias.data = layer.bias.double()
    return layer, twin


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", WEIGHT_ONLY)
def test_a_layer_is_the_exact_product_with_its_rounded_weights(weights, bias, cpu_level):
    """Every kind of weights, every bucket of rows, widths that fill no vector and no tile, on every kind of processor
    and without a compiler. The inputs lose nothing, even where one is a hundred times the others."""
    for n_in, n_out in [(96, 130), (7, 3), (1, 1), (259, 1031)]:
        layer, twin = layer_and_twin(weights, n_in, n_out, bias)
        for batch in [(), (1,), (3,), (2, 3), (17,), (70,)]:
            x = torch.randn(*batch, n_in)
            x[..., 0] *= 100
            y = layer(x)
            assert (y.shape, y.dtype) == ((*batch, n_out), torch.float32)
            assert relative_error(y, twin(x.double())) < 1e-6


@pytest.mark.parametrize("most", [ROUGH, PRECISE])
def test_inputs_lose_at_most_half_a_unit_each(most, cpu_level):
    """The bound that follows from the arithmetic: of a row's inputs each is off by at most scale / 2, and fp32 rounds
    each sum a few times more. It holds for every number of the result, on every kind of processor."""
    weights = "int8_dynamic" if most == ROUGH else "int8"
    for n_in, n_out in [(96, 130), (643, 517)]:
        layer, twin = layer_and_twin(weights, n_in, n_out)
        x = torch.randn(40, n_in)
        x[:, 3] *= torch.logspace(0, 3, 40)
        unit = x.abs().amax(dim=1, keepdim=True).double() / most  # (40, 1)
        magnitude = twin.weight.abs().sum(dim=1)  # (n_out,)
        largest_sum = x.double().abs() @ twin.weight.abs().T + twin.bias.abs()  # (40, n_out)
        bound = unit / 2 * magnitude + 8 * torch.finfo(torch.float32).eps * largest_sum
        assert ((layer(x) - twin(x.double())).abs() <= bound).all()


def test_rounded_inputs_give_the_same_numbers_on_every_processor(monkeypatch):
    """Integers are summed up exactly, so that no kind of processor, nor the want of a compiler, is worse than another:
    the results differ by the last rounding of a number at most."""
    x = torch.randn(21, 643)
    x[:, 5] *= 30
    x[7] *= 1e4

    def result():
        layer, _ = layer_and_twin("int8_dynamic", 643, 517)
        return layer(x)

    found = {}
    for level in [*shown_levels(), NO_COMPILER]:
        stand_in_for(level, monkeypatch)
        found[level] = result()
    expected = found.pop(NO_COMPILER)
    for level, y in found.items():
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item(), msg=level)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_native_kernels_read_every_number_of_their_type(dtype, native_level):
    """Subnormal and negative numbers, the largest and the smallest: one weight each, expanded exactly."""
    if dtype == torch.int8:
        weight = torch.arange(-128, 128).to(torch.int8)
    else:
        bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
        weight = bits.view(dtype) if dtype != torch.float32 else bits.view(torch.bfloat16).float()
        weight = weight[weight.isfinite()]
    weight = weight.repeat(20, 1).T.contiguous()[:, :16]  # 16 equal numbers a row
    x = torch.zeros(1, 16)
    x[0, 5] = 1
    y = native_product(weight, None, None, kind_of(weight))(x)
    assert torch.equal(y[0], weight[:, 0].float())


@pytest.mark.parametrize("weights", DTYPES)
def test_native_rows_are_independent_to_the_last_bit(weights, native_level):
    """What a row gives depends neither on its neighbours, one of which is enormous, nor on the number of threads."""
    n_in = 608 if weights == "int4" else 643
    layer, _ = layer_and_twin(weights, n_in, 517)
    product = native_product(layer.weight, layer.scale, layer.bias, weights)
    x = torch.randn(40, n_in)
    x[7] *= 1e6
    together = product(x)
    for start, end in [(0, 1), (6, 7), (8, 9), (3, 12), (30, 40)]:
        assert torch.equal(product(x[start:end].contiguous()), together[start:end])
    torch.set_num_threads(3)
    assert torch.equal(product(x), together)


@pytest.mark.parametrize("n_rows", [8, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("n_out", [7, 16, 33, 96])
@pytest.mark.parametrize("weights", ["int8", "int8_dynamic"])
def test_whole_numbers_give_the_same_in_any_count_of_rows(weights, n_out, n_rows, native_level):
    """Also where a processor multiplies tiles of 16 rows, which do not come out even; with and without a bias."""
    layer, _ = layer_and_twin(weights, 192, n_out)
    x = torch.randn(n_rows, 192)
    x[n_rows // 2] *= 1e6
    for bias in (layer.bias, None):
        product = native_product(layer.weight, layer.scale, bias, weights)
        assert torch.equal(product(x), torch.cat([product(row) for row in x.split(1)]))


@pytest.mark.skipif("amx" not in shown_levels(), reason="no AMX here")
def test_tiles_are_used_where_linux_lets_us(monkeypatch):
    """Or the test before this one would show nothing of them."""
    stand_in_for("amx", monkeypatch)
    is_refused = ctypes.CDLL(None).syscall(158, 0x1023, 18)  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    assert ctypes.c_int.in_dll(native_library(), "may_use_tiles").value == (not is_refused)


@pytest.mark.parametrize("weights", ["fp32", "int8", "int8_dynamic", "int4"])
def test_rows_that_do_not_fit_into_a_cache_are_computed_in_blocks(weights, native_level):
    """Which changes nothing, for blocks and groups that do not come out even."""
    n_in = 3104 if weights == "int4" else 3100
    layer, _ = layer_and_twin(weights, n_in, 39)
    product = native_product(layer.weight, layer.scale, layer.bias, weights)
    x = torch.randn(131, n_in)
    together = product(x)
    for row in (0, 40, 64, 65, 66, 130):
        assert torch.equal(product(x[row : row + 1]), together[row : row + 1])
    assert product(x[:0]).shape == (0, 39)


@pytest.mark.parametrize("weights", ["int8", "int8_dynamic"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_spoil_their_row_visibly_and_no_other(weights, bad, cpu_level):
    """As integers they would be some number."""
    layer, _ = layer_and_twin(weights)
    x = torch.randn(3, 96)
    x[1, 40] = bad
    finite = layer(x).isfinite()
    assert finite[[0, 2]].all() and not finite[1].any()


@pytest.mark.parametrize("n_in", [65536, 65600])
@pytest.mark.parametrize("int8_inputs", [False, True])
def test_sums_of_the_largest_integers_do_not_overflow(n_in, int8_inputs, cpu_level):
    """The longest row that integers sum up, and one that is left to floating point."""
    weight = torch.full((4, n_in), 127, dtype=torch.int8)
    weight[1] = -127
    x = torch.tensor([[1.0], [-1.0], [0.25]]).repeat(1, n_in)
    y = InferenceLinear(weight, torch.ones(4), int8_inputs=int8_inputs)(x)
    expected = (round_inputs(x) if int8_inputs else x) @ weight.float().T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=0)


def test_inputs_of_any_kind():
    """No rows at all, views that are not contiguous, and half precision, which comes back as half precision."""
    layer, twin = layer_and_twin("int8")
    assert layer(torch.zeros(0, 96)).shape == (0, 130)
    x = torch.randn(96, 6).T
    assert relative_error(layer(x), twin(x.double())) < 1e-6
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative_error(half.double(), twin(x.double())) < 0.01


def test_the_plain_way_expands_block_by_block(monkeypatch):
    """The blocks are put together in order, and no matrix of the weights' size is made on the way."""
    monkeypatch.setattr(linear_products, "EXPANDED_AT_ONCE", 1000)
    sizes, usual = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *bias: sizes.append(w.numel()) or usual(x, w, *bias))
    layer, twin = layer_and_twin("int8")
    x = torch.randn(3, 96)
    found = plain_linear(x, layer.weight, layer.scale, layer.bias)
    assert max(sizes) <= 1000 and sum(sizes) == layer.weight.numel()
    monkeypatch.undo()
    assert relative_error(found, twin(x.double())) < 1e-6


@pytest.mark.parametrize("weights", DTYPES)
def test_gradients_pass_to_the_input_and_not_to_the_weights(weights):
    """Adapters can be trained beside a quantized layer."""
    layer, twin = layer_and_twin(weights)
    x = torch.randn(4, 96, requires_grad=True)
    layer(x).square().sum().backward()
    exact = x.detach().double().requires_grad_()
    twin(exact).square().sum().backward()
    assert relative_error(x.grad, exact.grad) < 0.03
    assert layer.weight.grad is None and not layer.weight.requires_grad


# -- integer arithmetic ------------------------------------------------------------------------------------------------


@needs_integer_kernel
@pytest.mark.parametrize("most", [ROUGH, PRECISE])
@pytest.mark.parametrize("limit", [63, 127])
def test_integer_kernel_does_not_saturate(limit, most):
    """The largest sums there can be, of either sign, are exact with the digits that are used here."""
    if limit > integer_kernel_limit():
        pytest.skip("this processor needs smaller digits")
    weight = torch.full((64, 1024), 127, dtype=torch.int8)
    weight[1::2] = -127
    x = torch.tensor([[1.0], [-1.0]]).expand(2, 1024)
    product = integer_product(weight, torch.ones(64), None, most, limit=limit)(x)
    torch.testing.assert_close(product, x @ weight.float().T, rtol=1e-6, atol=0)


@needs_integer_kernel
@pytest.mark.parametrize("most", [ROUGH, PRECISE])
def test_digits_of_any_size_give_the_same_numbers(most):
    """Whichever digits a processor can take, they write the same integers."""
    layer, _ = layer_and_twin("int8", 640, 1000)
    x = torch.randn(40, 640)
    x[:, 9] *= 100
    limits = [limit for limit in (31, 63, 127) if limit <= integer_kernel_limit()]
    first, *others = (integer_product(layer.weight, layer.scale, layer.bias, most, limit)(x) for limit in limits)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-6, atol=1e-5)


@needs_integer_kernel
@pytest.mark.parametrize("most", [ROUGH, PRECISE])
def test_integer_rows_are_independent(most):
    """Each row has scales of its own: its result is the same to the last bit whatever stands beside it."""
    layer, _ = layer_and_twin("int8", 640, 1000)
    product = integer_product(layer.weight, layer.scale, layer.bias, most)
    x = torch.randn(40, 640)
    x[7] *= 1e6
    together = product(x)
    for start, end in [(0, 1), (6, 7), (8, 9), (3, 12)]:
        assert torch.equal(product(x[start:end]), together[start:end])


def test_int8_activations_cost_about_a_hundredth(cpu_level):
    """The mode rounds inputs to 8 bits, and does nothing else: it computes what the float product of the rounded inputs
    gives, on every processor."""
    layer, twin = layer_and_twin("int8_dynamic")
    x = torch.randn(20, 96)
    assert 1e-3 < relative_error(layer(x), twin(x.double())) < 0.02
    assert relative_error(layer(x), twin(round_inputs(x).double())) < 1e-6


# -- the choice --------------------------------------------------------------------------------------------------------


def choose(ways, layer=None):
    layer = layer or layer_and_twin("fp32")[0]
    return fastest_way.fastest_way(ways, layer.weights, layer.weight.shape, bucket=1)


def plain_ways(layer, **others):
    def plain():
        return lambda x: plain_linear(x, layer.weight, layer.scale, layer.bias)

    return {**others, "plain": plain}


def test_a_way_that_is_wrong_or_fails_is_out():
    """However fast: a result that differs from the plain one, NaN, or an operator that this PyTorch lacks."""
    layer, _ = layer_and_twin("fp32")

    def failing():
        raise RuntimeError("no such operator")

    ways = plain_ways(
        layer,
        zeros=lambda: lambda x: torch.zeros(len(x), 130),
        nan=lambda: lambda x: torch.full((len(x), 130), float("nan")),
        slightly=lambda: lambda x: 1.001 * plain_linear(x, layer.weight, None, layer.bias),
        failing=failing,
    )
    assert choose(ways, layer) == "plain"


def test_the_fastest_is_taken_and_remembered(monkeypatch):
    """A slow way loses to a fast one; the next process does not measure again, and other shapes are measured anew."""
    layer, _ = layer_and_twin("fp32")

    def slow():
        return lambda x: sum(plain_linear(x, layer.weight, None, layer.bias) for _ in range(20)) / 20

    ways = plain_ways(layer, slow=slow)
    assert choose(ways, layer) == "plain"
    monkeypatch.setattr(fastest_way, "_measure", lambda *_: pytest.fail("measured again"))
    assert choose(ways, layer) == "plain"
    monkeypatch.setattr(fastest_way, "_chosen", {})  # the next process
    assert choose(ways, layer) == "plain"
    with pytest.raises(pytest.fail.Exception):
        choose(plain_ways(layer, another=slow), layer)
    with pytest.raises(pytest.fail.Exception):
        choose(ways, layer_and_twin("fp32", n_in=64)[0])


def test_a_process_keeps_to_its_choice_whatever_others_measure():
    """Two processes that start at once may find different ways the fastest; neither changes the other's numbers."""
    layer, _ = layer_and_twin("fp32")

    def twice():
        return lambda x: plain_linear(x, layer.weight, None, layer.bias)

    ways = plain_ways(layer, twice=twice)
    chosen = choose(ways, layer)
    (path,) = fastest_way._memory().iterdir()
    (other,) = {"plain", "twice"} - {chosen}
    path.write_text(path.read_text().replace(f'"{chosen}"', f'"{other}"'))
    assert choose(ways, layer) == chosen


def test_of_two_that_measure_at_once_the_second_takes_what_the_first_has_found(monkeypatch):
    """Otherwise two processes of one machine would compute the same model in two ways."""
    layer, _ = layer_and_twin("fp32")
    ways = plain_ways(layer, twice=lambda: lambda x: plain_linear(x, layer.weight, None, layer.bias))
    assert choose(ways, layer) in ways
    (path,) = fastest_way._memory().iterdir()
    (key,) = json.loads(path.read_text())
    path.unlink()
    monkeypatch.setattr(fastest_way, "_chosen", {})

    def measured_meanwhile(*_):
        fastest_way._remember(fastest_way._memory(), key, "twice")
        return "plain"

    monkeypatch.setattr(fastest_way, "_measure", measured_meanwhile)
    assert choose(ways, layer) == "twice"


AT_ONCE = """
import os, sys
from pathlib import Path
import at_once
from inference.kernels import fastest_way
folder = Path(sys.argv[1])

def remember():
    for number in range(40):
        fastest_way._remember(folder, f"{os.getpid()} {number}", "plain")

def pause_in_the_middle():
    os.fsync = at_once.pause_instead

at_once.three_at_once(remember, pause_in_the_middle, lambda: any(folder.glob(".*.tmp")))
"""


def test_processes_that_measure_at_once_lose_nothing(tmp_path):
    """Each of two processes has 40 choices to remember; a third is killed in the middle of its first."""
    at_once.run_script(AT_ONCE, tmp_path / "memory")
    assert len([json.loads(path.read_text()) for path in (tmp_path / "memory").glob("[!.]*.json")]) == 80


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fp32 96x130": 3}'])
def test_a_damaged_memory_is_written_anew(content, monkeypatch):
    """Half a file, or one that someone else has written, is no reason to stop."""
    layer, _ = layer_and_twin("fp32")
    assert choose(plain_ways(layer), layer) == "plain"
    (path,) = fastest_way._memory().iterdir()
    path.write_text(content)
    monkeypatch.setattr(fastest_way, "_chosen", {})
    assert choose(plain_ways(layer), layer) == "plain"
    assert "plain" in json.loads(path.read_text()).values()


def test_weights_that_are_not_finite_prove_nothing():
    """They are computed in the plain way, and other models of that shape are measured all the same."""
    layer, _ = layer_and_twin("fp32")
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    assert layer(torch.randn(1, 96)).isnan().any()
    assert not fastest_way._memory().exists()


def test_it_never_disturbs_the_random_numbers_of_others():
    """Measuring at the first call must not change what is sampled next."""
    layer, _ = layer_and_twin("int8")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    layer(torch.ones(1, 96))
    assert torch.equal(torch.rand(3), expected)


# -- modules -----------------------------------------------------------------------------------------------------------


def test_fp32_shares_the_weights_and_int8_holds_them_once():
    """A layer in full precision is the original's memory; an INT8 layer keeps a quarter and nothing else."""
    linear = nn.Linear(640, 1000)
    assert InferenceLinear.from_linear(linear, "fp32").weight.data_ptr() == linear.weight.data_ptr()
    layer = InferenceLinear.from_linear(linear, "int8")
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == {
        "weight": torch.int8,
        "scale": torch.float32,
        "bias": torch.float32,
    }


@pytest.mark.parametrize("compiler", [True, False], ids=["native", "no compiler"])
def test_other_weights_take_effect_after_the_first_call(compiler, request):
    """Loaded into the layer, or taken over from a file: packed copies and addresses are renewed."""
    if not compiler:
        request.getfixturevalue("no_compiler")
    layer, _ = layer_and_twin("int8")
    other = InferenceLinear.from_linear(nn.Linear(96, 130), "int8")
    x = torch.randn(2, 96)
    before = layer(x)
    for assign in (False, True):
        changed = copy.deepcopy(layer)
        assert torch.equal(changed(x), before)
        changed.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(changed(x), other(x))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("weights", DTYPES)
def test_an_embedding_expands_the_rows_that_are_looked_up(weights):
    """They are the rows of the output layer that it is tied to, in fp32; the table is held once."""
    layer, twin = layer_and_twin(weights, bias=False)
    embedding = InferenceEmbedding(layer.weight, layer.scale)
    assert embedding.weight is layer.weight
    ids = torch.tensor([[0, 129], [7, 7]])
    found = embedding(ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), twin.weight[ids], rtol=1e-6, atol=0)


def test_without_a_compiler_tiny_layers_are_expanded_and_large_ones_are_not(no_compiler):
    """Reading four bytes in place of one costs nothing as long as they lie in the cache."""
    tiny, large = layer_and_twin("int8")[0], layer_and_twin("int8", 512, TINY_LAYER // 512 + 1)[0]
    ways = [ways_to_multiply(layer.weight, layer.scale, layer.bias, "int8") for layer in (tiny, large)]
    assert "expanded" in ways[0] and "expanded" not in ways[1]


def test_a_user_without_a_home_can_compute(monkeypatch):
    """In a container the user may be a mere number: nothing is remembered, and everything works."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.undo()  # the memory of the tests
    monkeypatch.setattr(native_code.Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    layer, twin = layer_and_twin("int8")
    x = torch.randn(3, layer.in_features)
    assert relative_error(layer(x), twin(x.double())) < 1e-5
    assert fastest_way._memory() is None


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_faster", [True, False])
def test_a_gpus_products_are_the_plain_ones(dtype, is_faster, monkeypatch):
    """With a kernel for INT8 where it is faster and rows are few, through the one that the CPU has of the same name."""
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantize_rows(torch.randn(48, 64, generator=generator))
    bias = torch.randn(48, generator=generator).to(dtype)
    used = []
    monkeypatch.setattr(gpu_products, "_is_faster", lambda *_: is_faster)
    product = gpu_products.int8_product
    monkeypatch.setattr(gpu_products, "int8_product", lambda *x: used.append(1) or product(*x))
    for shape in ((1, 1, 64), (2, 4, 64), (64,), (3, 30, 64)):
        x = torch.randn(shape, generator=generator).to(dtype)
        found = gpu_products.gpu_linear(x, weight, scale, bias)
        expected = plain_linear(x, weight, scale, bias)
        assert found.dtype == dtype and found.shape == expected.shape
        assert (found - expected).norm() < (1e-5 if dtype == torch.float32 else 0.01) * expected.norm()
    assert len(used) == 3 * is_faster
    x.requires_grad_()
    gpu_products.gpu_linear(x[:1, :1], weight, scale, None).sum().backward()
    assert x.grad is not None and len(used) == 3 * is_faster


def test_weights_of_the_inputs_type_are_read_as_they_are(monkeypatch):
    """In half precision a product is one call, without a copy of the weights."""
    weight, x = torch.randn(8, 16).bfloat16(), torch.randn(3, 16).bfloat16()
    monkeypatch.setattr(torch.Tensor, "to", lambda *_: pytest.fail("a copy"))
    assert torch.equal(gpu_products.gpu_linear(x, weight, None, None), x @ weight.T)


@pytest.mark.gpu
@pytest.mark.parametrize("n_rows", [1, 4, 8, 40])
@pytest.mark.parametrize("weights", ["int8", "bf16", "fp32", "int8_dynamic", "int4"])
def test_a_gpu_multiplies_as_the_cpu_does(weights, n_rows):
    layer = InferenceLinear.from_linear(torch.nn.Linear(256, 384), weights)
    x = torch.randn(n_rows, 256)
    expected = layer(x)
    found = layer.to("cuda", torch.bfloat16)(x.to("cuda", torch.bfloat16)).cpu().float()
    assert (found - expected).norm() < 0.02 * expected.norm()
