"""The folders are layers: nothing imports from above itself or in a circle, and each folder says what is in it."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Modules and folders, from the ground up. A file imports from its own layer and from those before it.
LAYERS = (
    # sampling: arithmetic on logits, which `GPTModel.generate` uses; int8_weights: layers beside which adapters train;
    # expert_products: those of experts, in training as in inference; attention_within_texts: a GPU's, for the model
    ("progress", "command_line", "cpu_level", "machine", "inference.sampling", "inference.kernels.int8_weights")
    + ("inference.kernels.expert_products", "training.attention_within_texts"),
    ("text",),
    ("byte_level_bpe", "transformer_components", "lora", "gpt_model", "seq2seq_model"),
    ("data_loader", "checkpoint"),
    ("training",),
    ("inference.kernels",),
    ("inference",),
    ("evaluation",),
    ("alignment",),
    ("pretrain_trainer", "seq2seq_trainer", "finetune", "evaluator", "ngram_baseline", "text.inspect", "api_demo")
    + ("machine.__main__", "evaluation.side_by_side"),
    ("exchange",),
    ("pipeline", "benchmarks", "data", "docs"),
)


def product_files():
    """{module: path} of every Python file but the tests; a package goes by its own name."""
    paths = [path.relative_to(ROOT) for pattern in ("*.py", "[!.]*/**/*.py") for path in ROOT.glob(pattern)]
    paths = [path for path in paths if path.parts[0] not in ("tests", "models")]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path for path in paths}


def imports_of(source, modules):
    """Those of `modules` that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module}
    return found & modules


def layer_of(module):
    """The number of the layer that a module, or the nearest folder around it, is in."""
    while module:
        for number, layer in enumerate(LAYERS):
            if module in layer:
                return number
        module = module.rpartition(".")[0]
    raise LookupError("not in LAYERS")


MODULES = product_files()
IMPORTS = {name: imports_of(path.read_text(encoding="utf-8"), set(MODULES)) for name, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_from_above_itself(module):
    """Also not inside a function, where it would show at call time only."""
    assert [name for name in IMPORTS[module] if layer_of(name) > layer_of(module)] == []


def test_there_is_no_import_circle():
    """Within a layer, too, there is an order in which the files can be read."""
    assert list(graphlib.TopologicalSorter(IMPORTS).static_order())


def test_sampling_needs_nothing_of_the_project():
    assert IMPORTS["inference.sampling"] == set()


def test_every_layer_is_there():
    """No entry is left over, and none stands in two layers."""
    entries = [name for layer in LAYERS for name in layer]
    assert len(entries) == len(set(entries))
    assert [name for name in entries if name not in MODULES and not (ROOT / name).is_dir()] == []


@pytest.mark.parametrize("package", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_a_folder_says_what_is_in_it(package):
    """Its `__init__.py` names every module, and the order to read them in."""
    about = ast.get_docstring(ast.parse(MODULES[package].read_text(encoding="utf-8")))
    inside = [name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package]
    assert [name for name in inside if name not in about] == []


def test_imports_are_found_wherever_they_stand():
    source = "import a\nfrom b import c\nfrom b.d import thing\nimport os\ndef f():\n    from e import x\n"
    assert imports_of(source, {"a", "b", "b.c", "b.d", "e", "f"}) == {"a", "b.c", "b.d", "e"}
