"""Whatever is changed in a model, the engine answers as `GPTModel.generate` does, or says that it cannot.

The parts, their methods and the settings are found by looking at models of both architectures: what is added to them
later is tested, too.
"""

import dataclasses
import sys

import pytest
import torch
import torch.nn as nn
from conftest import TINY, randomize
from torch.nn.utils import parametrizations, parametrize, prune

import transformer_components
from command_line import UserError
from gpt_model import GPTConfig, GPTModel
from inference.engine import Engine
from inference.kernels import decoder_step, known_parts
from inference.kernels.decoder_step import DecoderStep
from inference.kernels.known_parts import UnknownPart, check_numbers, facts_of
from inference.paged_cache import PagedCache
from inference.sampling import SamplingParams
from transformer_components import FeedForwardNetwork, MultiHeadAttention

COMPILED = ("gpt2", "modern", "moe")  # architectures that the step computes
PROMPT = [11, 12, 40, 13, 11, 29]
GREEDY = SamplingParams(12, temperature=0, ignore_eos=True)
WAYS_TO_LOGITS = ("forward", "hidden_states")  # of the whole model: those that the engine goes past

has_compiler = decoder_step.load_native(decoder_step.SOURCE) is not None
needs_compiler = pytest.mark.skipif(not has_compiler, reason="no C compiler")


def make(architecture):
    """A small model that seldom says a token twice, and whose every part tells."""
    sizes = {**TINY, "n_kv_heads": 2 if architecture == "modern" else 4, "tie_embeddings": False}
    if architecture == "moe":  # each expert computes each token
        sizes |= {"n_experts": 2, "experts_per_token": 2}
    model = GPTModel.from_config(GPTConfig.for_architecture(architecture, **sizes))
    randomize(model)
    return model.eval().requires_grad_(False)


def generated(model):
    return model.generate(torch.tensor([PROMPT]), 12, temperature=0)[0, len(PROMPT) :].tolist()


def answered(model):
    return Engine(model, None).run([PROMPT], GREEDY)[0].token_ids


def reason(model):
    """Why the compiled step does not compute a model; None if it does."""
    cache = PagedCache(model.config, 64, 1)
    try:
        assert facts_of(model)
        check_numbers(model, cache.sizes)
    except UnknownPart as unknown:
        assert DecoderStep.of(model, cache.native) is None
        return str(unknown)
    return None


@needs_compiler
def test_what_libraries_do_to_all_modules_off_the_way_of_a_forward_pass_changes_nothing(monkeypatch):
    """`transformers` gives `nn.Module` a method as soon as it makes a model, others replace `__init__`."""
    model, usual = make("modern"), nn.Module.__init__
    monkeypatch.setattr(nn.Module, "smart_apply", lambda module: None, raising=False)
    monkeypatch.setattr(nn.Module, "__init__", lambda module, *rest, **named: usual(module, *rest, **named))
    assert reason(model) is None
    monkeypatch.setattr(nn.Module, "__getattribute__", lambda module, name: object.__getattribute__(module, name))
    assert reason(model) == "Module.__getattribute__ has been replaced"


def methods_called(model):
    """(path, method) of all methods of the model's parts that return a tensor on the way to its logits."""
    paths, found = {id(module): path for path, module in model.named_modules()}, {}

    def record(frame, event, result):
        path, name = paths.get(id(frame.f_locals.get("self"))), frame.f_code.co_name
        of_our_own = not frame.f_code.co_filename.endswith("module.py")  # not those of nn.Module
        if event == "return" and isinstance(result, torch.Tensor) and path is not None and of_our_own:
            found[path, name] = None

    sys.setprofile(record)
    try:
        with torch.no_grad():
            model.lm_head(model.hidden_states(torch.tensor([PROMPT]), cache=model.new_cache(1, 9)))
    finally:
        sys.setprofile(None)
    return list(found)


# The parts of the second layer stand for those of all layers
PARTS = [
    (architecture, path)
    for architecture in COMPILED
    for path, _ in make(architecture).named_modules()
    if not path.startswith("layers.0")
]
METHODS = [
    (architecture, path, method)
    for architecture in COMPILED
    for path, method in methods_called(make(architecture))
    if not path.startswith("layers.0")
]
CALLED = [(architecture, path) for architecture, path, method in METHODS if method == "forward"]
WEIGHTED = [(a, path) for a, path in CALLED if hasattr(make(a).get_submodule(path), "weight")]


def other(y):
    """Other mathematics."""
    return 1.5 * y.flip(-1)


def replaced(model, path, part):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)


def assert_computes_the_same(model, architecture):
    """Engine and model agree, about something else than what the unchanged model says."""
    expected = generated(model)
    assert expected != generated(make(architecture))
    assert answered(model) == expected


# -- parts with other mathematics --------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("architecture", COMPILED)
def test_the_compiled_step_computes_both_architectures(architecture):
    """Or all that follows would say nothing."""
    model = make(architecture)
    assert reason(model) is None
    assert answered(model) == generated(model)


@pytest.mark.parametrize("architecture, path, method", METHODS)
def test_a_method_is_replaced_on_an_instance(architecture, path, method):
    model = make(architecture)
    part = model.get_submodule(path)
    usual = getattr(part, method)
    setattr(part, method, lambda *args, **kwargs: other(usual(*args, **kwargs)))
    assert reason(model) is not None
    if method in WAYS_TO_LOGITS and part is model:
        with pytest.raises(UserError, match=f"the engine goes past the `{method}`"):
            answered(model)
    else:
        assert_computes_the_same(model, architecture)


@pytest.mark.parametrize("architecture, path, method", METHODS)
def test_a_method_is_replaced_in_the_class(architecture, path, method, monkeypatch):
    """After it was loaded; from then on, all instances have it."""
    model = make(architecture)
    part = type(model.get_submodule(path))
    owner = next(base for base in part.__mro__ if method in vars(base))
    usual = vars(owner)[method]
    before = generated(model)
    monkeypatch.setattr(owner, method, lambda *args, **kwargs: other(usual(*args, **kwargs)))
    assert reason(model) == f"{owner.__name__}.{method} has been replaced"
    if method in WAYS_TO_LOGITS and part is GPTModel:
        with pytest.raises(UserError, match=f"the engine goes past the `{method}`"):
            answered(model)
    else:
        assert answered(model) == generated(model) != before


@pytest.mark.parametrize("architecture, path", CALLED)
@pytest.mark.parametrize("kind", ["subclass", "another class", "hook", "hook on inputs", "of torch.compile"])
def test_a_part_computes_something_else(architecture, path, kind):
    model = make(architecture)
    part = model.get_submodule(path)
    usual = part.forward
    if kind == "subclass":
        forward = lambda self, *args, **kwargs: other(type(part).__mro__[1].forward(self, *args, **kwargs))  # noqa: E731
        part.__class__ = type("Other", (type(part),), {"forward": forward})
    elif kind == "another class":
        another = nn.Module()
        another.weight, another.bias = getattr(part, "weight", None), getattr(part, "bias", None)
        another.forward = lambda *args, **kwargs: other(usual(*args, **kwargs))
        replaced(model, path, another)
    elif kind == "hook":
        part.register_forward_hook(lambda part, inputs, output: other(output))
    elif kind == "hook on inputs":
        if path.endswith("embedding"):
            part.register_forward_pre_hook(lambda part, inputs: (inputs[0].flip(-1) ^ 1,))
        else:
            part.register_forward_pre_hook(lambda part, inputs: (other(inputs[0]), *inputs[1:]))
    else:
        part._call_impl = lambda *args, **kwargs: other(usual(*args, **kwargs))
    assert reason(model).startswith(path)
    assert_computes_the_same(model, architecture)


@pytest.mark.parametrize("architecture, path", PARTS)
@pytest.mark.parametrize("kind", ["buffer", "parameter", "submodule", "setting", "no such part"])
def test_a_part_holds_something_else(architecture, path, kind):
    """Its class may do something with it; or something is not there."""
    model = make(architecture)
    part = model.get_submodule(path)
    if kind == "buffer":
        part.register_buffer("extra", torch.ones(1))
    elif kind == "parameter":
        part.extra = nn.Parameter(torch.ones(1))
    elif kind == "submodule":
        part.add_module("extra", nn.Linear(2, 2))
    elif kind == "setting":
        part.extra = 3
    elif part is model:
        return
    else:
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)
        assert reason(model) is not None
        return
    assert path in reason(model)
    if path != "layers" or kind != "submodule":  # which would be a layer
        assert answered(model) == generated(model)


@pytest.mark.parametrize("architecture, path", WEIGHTED)
@pytest.mark.parametrize("kind", ["parametrization", "weight norm", "pruning"])
def test_a_weight_is_computed_from_others(architecture, path, kind):
    model = make(architecture)
    part = model.get_submodule(path)
    if kind == "parametrization":
        another = nn.Module()
        another.forward = other
        part.weight = nn.Parameter(part.weight.detach().clone())  # no longer shared
        parametrize.register_parametrization(part, "weight", another)
    elif kind == "weight norm" and part.weight.ndim > 1:
        parametrizations.weight_norm(part)
    else:
        prune.random_unstructured(part, "weight", 0.5)
    assert reason(model).startswith(path)
    assert answered(model) == generated(model)


@pytest.mark.parametrize("architecture, path", [(a, p) for a, p in CALLED if "norm" in p])
def test_a_norm_of_another_kind(architecture, path):
    """One that the compiled step knows it may compute, another one not."""
    model = make(architecture)
    (size,) = getattr(model.get_submodule(path), "normalized_shape", (8,))
    for norm in (nn.LayerNorm(size), transformer_components.RMSNorm(size, eps=0.1), nn.RMSNorm(size), nn.Identity()):
        if path == "final_norm" and type(norm) is nn.Identity:
            continue  # the model asks it for its device
        replaced(model, path, norm.requires_grad_(False).eval())
        assert answered(model) == generated(model)
    replaced(model, path, nn.RMSNorm(size))
    assert reason(model) == f"{path} is of the class RMSNorm"


def test_another_activation():
    class SquaredReLU(FeedForwardNetwork):
        def forward(self, x):
            return self.down_proj(self.up_proj(x).relu().square())

    for architecture in COMPILED:
        model = make(architecture)
        for module in model.modules():
            if type(module) is FeedForwardNetwork:
                module.__class__ = SquaredReLU
        assert reason(model).endswith(" is of the class SquaredReLU")
        assert_computes_the_same(model, architecture)


def test_attention_with_a_window_is_refused():
    """`generate` computes it; the engine's cache would attend to everything."""

    class Window(MultiHeadAttention):
        def forward(self, x, mask=None, rotary=None, cache=None, layer=0):
            if mask is None and x.size(1) > 1:
                near = torch.ones(x.size(1), x.size(1), dtype=torch.bool)
                mask = near.tril() & ~near.tril(-3)
            return super().forward(x, mask, rotary, cache, layer)

    model = make("modern")
    model.layers[1].attention.__class__ = Window
    generated(model)
    with pytest.raises(UserError, match="takes no mask; use GPTModel.generate"):
        answered(model)


def test_functions_and_hooks_for_all_modules(monkeypatch):
    model = make("modern")
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert reason(model) == "there are hooks on all modules"
        assert answered(model) == generated(model)
    finally:
        handle.remove()
    usual, before = transformer_components.apply_rotary, generated(model)
    monkeypatch.setattr(transformer_components, "apply_rotary", lambda x, rotary: 2 * usual(x, rotary))
    assert reason(model) == "apply_rotary has been replaced"
    assert answered(model) == generated(model) != before


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", COMPILED)
def test_positions_of_a_new_kind(architecture, monkeypatch):
    """As somebody would add them to the model's file."""
    model = make(architecture)
    before = generated(model)
    model.config.position = "halved"
    halved = lambda ids, positions=None, start=0: model.token_embedding(ids) / 2  # noqa: E731
    monkeypatch.setattr(GPTModel, "embed", lambda self, *args: halved(*args))
    assert reason(model) is not None
    assert answered(model) == generated(model) != before
    monkeypatch.undo()
    assert reason(model) == "the configuration has position 'halved'"


@pytest.mark.parametrize("architecture", COMPILED)
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(GPTConfig) if field.name != "position"])
def test_the_configuration_changes_afterwards(architecture, name):
    """The modules say what is computed. Where the cache no longer fits to them, the engine says so."""
    model = make(architecture)
    value = getattr(model.config, name)
    if value is None:
        changed = {"rope_type": "linear", "factor": 3.0}
    else:
        changed = not value if isinstance(value, bool) else "new" if isinstance(value, str) else 2 * value
    setattr(model.config, name, changed)
    try:
        expected = generated(model)
    except RuntimeError:  # a cache of these sizes does not fit to the model's attention
        expected = None
    if expected is None or name == "n_heads":  # as many as `generate` finds in the weights
        with pytest.raises(UserError, match="from this model's configuration, and a layer gives it"):
            answered(model)
    else:
        assert answered(model) == expected
    if isinstance(value, str):
        assert name in reason(model)


@needs_compiler
@pytest.mark.parametrize("name", sorted(known_parts.FIELDS - set(known_parts.CHOICES) - {"vocab_size"}))
def test_a_new_field_of_the_configuration_is_unknown_unless_it_has_its_default(name, monkeypatch):
    monkeypatch.setattr(known_parts, "FIELDS", known_parts.FIELDS - {name})
    model = make("modern")
    default = GPTConfig.__dataclass_fields__[name].default
    is_default = getattr(model.config, name) == default
    assert (reason(model) is None) == is_default
    if not is_default:
        assert reason(model).startswith(f"the configuration has {name}")


@pytest.mark.parametrize("architecture", COMPILED)
def test_settings_of_parts_change_between_requests(architecture):
    """The engine looks at the model when a request comes."""
    model = make(architecture)
    engine = Engine(model, None, reuse_prefixes=False)

    def answer():
        (generation,) = engine.run([PROMPT], GREEDY)
        assert generation.token_ids == generated(model)
        return generation.token_ids

    before, step = answer(), engine.model_step.decoder_step
    answer()
    assert engine.model_step.decoder_step is step
    model.layers[0].attention_norm.eps = 9.0
    assert answer() != before
    model.layers[0].attention_norm.eps = model.config.norm_eps
    assert answer() == before
    usual = model.layers[1].feed_forward.forward
    model.layers[1].feed_forward.forward = lambda x: other(usual(x))
    assert answer() != before
    del model.layers[1].feed_forward.forward
    assert answer() == before
    assert (engine.model_step.decoder_step is None) == (not has_compiler)
    model.token_embedding.max_norm = 0.5  # PyTorch's embedding writes into its own weights
    answer()
    assert engine.model_step.decoder_step is None
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(UserError, match="goes past the `forward` that this GPTModel has of its own"):
        answer()


def test_dropout_that_is_on_is_not_ignored():
    model = make("gpt2")
    model.layers[1].dropout.p = 0.5
    assert reason(model) is None or not has_compiler
    model.layers[1].dropout.train()
    assert reason(model) == "layers.1.dropout is in training mode"


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_the_whole_model_are_refused(register):
    model = make("gpt2")
    getattr(model, register)(lambda *args: None)
    with pytest.raises(UserError, match="goes past the hooks on this model's `forward`"):
        answered(model)


def test_a_subclass_whose_parts_are_the_same_goes_its_own_way():
    class Softer(GPTModel):
        def hidden_states_at(self, *args, **kwargs):
            return other(super().hidden_states_at(*args, **kwargs))

    model = make("gpt2")
    model.__class__ = Softer
    assert reason(model) == "the model is of the class Softer"
    assert_computes_the_same(model, "gpt2")
