"""A file of adapters finds its base, is taken like any other checkpoint, and can leave the house."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignment.lora_export import main
from alignment.reward_model import RewardModel
from alignment.transformers_names import in_transformers
from checkpoint import load_checkpoint, load_model, restore_model, save_checkpoint, weight_fingerprint
from command_line import UserError
from inference import quantizer
from inference.quantizer import load_any
from lora import LoRAOptions, apply_lora, lora_layers, lora_settings, lora_state, trained_state

ROOT = Path(__file__).resolve().parent.parent
CLOSE = dict(atol=2e-5, rtol=2e-5)


@pytest.fixture
def world(tmp_path, monkeypatch, tokenizer, random_model):
    """A function (architecture, stage, **options) → an adapted model, whose base and adapters lie in two folders."""
    monkeypatch.chdir(tmp_path)

    def make(architecture="modern", stage="sft", base="models/base/base.pth", **options):
        model = copy.deepcopy(random_model(architecture, vocab_size=len(tokenizer)))
        if not Path(base).exists():
            save(base, model, "pretrain")
        else:
            model = load_model(base)[0]
        apply_lora(model, LoRAOptions(**{"lora_rank": 3, "lora_alpha": 4.0, **options}), base)
        if stage == "reward":
            model = RewardModel(model).eval()
        with torch.no_grad():
            for value in lora_state(model).values():
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())) * 0.2)
        lora = {**lora_settings(model), "base_fingerprint": weight_fingerprint(load_checkpoint(base))}
        save("models/lora/best.pth", model, stage, lora=lora)
        return model

    def save(path, model, stage, **more):
        state = trained_state(model, model.state_dict())
        save_checkpoint(path, model_state=state, config=model.config, tokenizer=tokenizer, stage=stage, **more)

    return make


def random_ids(*shape):
    return torch.randint(4, 320, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids):
    return model(ids)["logits"]


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_are_loaded_like_any_checkpoint(architecture, rslora, world):
    """A plain model in full precision, with the adapters merged in; the file holds the adapters and nothing else."""
    model, ids = (
        world(architecture, lora_rslora=rslora, lora_alpha=2.0, lora_targets="mlp,query_proj,embedding"),
        random_ids(2, 9),
    )
    loaded, _, content = load_model("models/lora/best.pth")
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), **CLOSE)
    torch.testing.assert_close(logits(load_any("models/lora/best.pth")[0], ids), logits(model, ids), **CLOSE)
    assert not lora_layers(loaded)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert content["stage"] == "sft"
    assert "lora" not in content, "what is loaded is a plain model, and is quantized or saved as one"
    assert load_checkpoint("models/lora/best.pth")["model"].keys() == lora_state(model).keys()


def test_adapters_upon_merged_adapters(world):
    """The base of adapters may itself be a file of adapters, as when DPO follows SFT."""
    world()
    Path("models/lora/best.pth").rename("models/lora/sft.pth")
    second, ids = world(base="models/lora/sft.pth"), random_ids(2, 9)
    torch.testing.assert_close(logits(load_model("models/lora/best.pth")[0], ids), logits(second, ids), **CLOSE)


def test_a_reward_model_gets_its_head_back(world):
    model, ids = world(stage="reward", lora_targets="all,embedding"), random_ids(2, 9)
    path = "models/lora/best.pth"
    assert "reward_head.weight" in load_checkpoint(path)["model"]
    loaded = restore_model(load_checkpoint(path), path, RewardModel).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.rewards(ids, ids.ne(1)), model.rewards(ids, ids.ne(1)), **CLOSE)


def test_the_base_is_found_when_the_models_have_moved_together_or_the_adapters_alone(world, tmp_path, monkeypatch):
    ids = random_ids(2, 9)
    expected = logits(world(), ids)
    Path("models/lora/best.pth").rename("mine.pth")
    torch.testing.assert_close(logits(load_model("mine.pth")[0], ids), expected, **CLOSE)
    Path("mine.pth").rename("models/lora/best.pth")
    Path("models").rename("moved")
    monkeypatch.chdir("/")
    torch.testing.assert_close(logits(load_model(tmp_path / "moved/lora/best.pth")[0], ids), expected, **CLOSE)


def test_a_missing_base_is_named_with_the_remedy_which_works(world, capsys):
    ids = random_ids(2, 9)
    expected = logits(world(), ids)
    Path("models/base/base.pth").rename("elsewhere.pth")
    with pytest.raises(UserError) as error:
        load_model("models/lora/best.pth")
    assert str(error.value) == (
        "models/lora/best.pth holds adapters (LoRA) for models/base/base.pth, which is not there; bring that model "
        "back, or say where it is and merge the two: "
        "python -m alignment.lora_export --adapter models/lora/best.pth --base_model PATH --output_path MERGED"
    )
    remedy = str(error.value).partition("alignment.lora_export ")[2]
    main(remedy.replace("PATH", "elsewhere.pth").replace("MERGED", "merged.pth").split())
    assert capsys.readouterr().out == "merged with elsewhere.pth: merged.pth\n"
    Path("elsewhere.pth").unlink()
    torch.testing.assert_close(logits(load_model("merged.pth")[0], ids), expected, **CLOSE)


def test_a_base_with_other_weights_is_refused(world, random_model, tokenizer):
    """Its path is right, its weights have changed in one number."""
    model = world()
    base = load_model("models/base/base.pth")[0]
    with torch.no_grad():
        base.final_norm.weight[0] += 1e-3
    save_checkpoint(
        "models/base/base.pth", model_state=base.state_dict(), config=model.config, tokenizer=tokenizer, stage="sft"
    )
    with pytest.raises(UserError, match="for models/lora/../base/base.pth, whose weights have changed; bring that"):
        load_model("models/lora/best.pth")


def test_adapters_that_do_not_fit_are_refused(world, tokenizer):
    """A tensor too many, or one too few."""
    model = world()
    content = load_checkpoint("models/lora/best.pth")
    names = list(content["model"])
    for state in ({**content["model"], "more": torch.zeros(1)}, {name: content["model"][name] for name in names[1:]}):
        save_checkpoint(
            "models/lora/best.pth",
            model_state=state,
            config=model.config,
            tokenizer=tokenizer,
            stage="sft",
            lora=content["lora"],
        )
        with pytest.raises(UserError, match="another architecture than expected"):
            load_model("models/lora/best.pth")


# -- beside a quantized base -------------------------------------------------------------------------------------------


def test_adapters_trained_beside_int8_are_merged_with_what_they_saw(architecture, world, capsys):
    """With the rounded base, in full precision; the quantized base, which is the same, has them beside it."""
    model, ids = world(architecture, frozen_weights="int8"), random_ids(2, 9)
    expected = logits(model, ids)
    loaded, _, _ = load_model("models/lora/best.pth")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(loaded, ids), expected, **CLOSE)
    torch.testing.assert_close(logits(load_any("models/lora/best.pth")[0], ids), expected, **CLOSE)
    main(["--adapter", "models/lora/best.pth", "--output_path", "merged.pth"])
    said = "merged with models/lora/../base/base.pth, in full precision, its linear layers rounded to INT8 first"
    assert capsys.readouterr().out.startswith(said)
    torch.testing.assert_close(logits(load_model("merged.pth")[0], ids), expected, **CLOSE)
    quantizer.main(["--model_path", "models/base/base.pth", "--output_path", "int8.pth", "--num_threads", "1"])
    beside = load_any("models/lora/best.pth", base="int8.pth")[0]
    assert (logits(beside, ids) - expected).norm() < 0.02 * expected.norm()  # its embedding is of 8 bits, too


def test_adapters_are_attached_to_the_quantized_base_and_to_no_other(world):
    """Given the INT8 version of their base, adapters work beside it; exported so, their file alone says it all."""
    model, ids = world(lora_targets="all,embedding"), random_ids(2, 9)
    expected = logits(model, ids)
    quantizer.main(["--model_path", "models/base/base.pth", "--output_path", "int8.pth", "--num_threads", "1"])
    loaded, _, _ = load_any("models/lora/best.pth", base="int8.pth")
    assert lora_layers(loaded)
    assert isinstance(loaded.lm_head.base, quantizer.InferenceLinear)
    assert (logits(loaded, ids) - expected).norm() < 0.05 * expected.norm()
    assert (logits(load_any("int8.pth")[0], ids) - expected).norm() > 0.1 * expected.norm()
    with pytest.raises(UserError, match="int8.pth is quantized"):
        load_model("models/lora/best.pth", base="int8.pth")

    main(["--adapter", "models/lora/best.pth", "--base_model", "int8.pth", "--output_path", "models/lora/on_int8.pth"])
    assert torch.equal(logits(load_any("models/lora/on_int8.pth")[0], ids), logits(loaded, ids))
    quantizer.main(["--model_path", "models/lora/best.pth", "--output_path", "other.pth", "--num_threads", "1"])
    with pytest.raises(UserError, match="for other.pth, whose weights have changed"):
        load_any("models/lora/best.pth", base="other.pth")


def test_adapters_are_merged_and_then_quantized(world):
    """The quantizer takes a file of adapters like any model's; adapters upon adapters fit that result."""
    model, ids = world(), random_ids(2, 9)
    expected = logits(model, ids)
    Path("models/lora/best.pth").rename("models/lora/sft.pth")
    quantizer.main(["--model_path", "models/lora/sft.pth", "--output_path", "sft_int8.pth", "--num_threads", "1"])
    quantized = load_any("sft_int8.pth")[0]
    assert not lora_layers(quantized)
    assert (logits(quantized, ids) - expected).norm() < 0.05 * expected.norm()
    second = logits(world(base="models/lora/sft.pth"), ids)
    loaded = load_any("models/lora/best.pth", base="sft_int8.pth")[0]
    assert (logits(loaded, ids) - second).norm() < 0.05 * second.norm()


# -- merging -----------------------------------------------------------------------------------------------------------


def test_the_command_line_merges_a_reward_model(world):
    model, ids = world(stage="reward"), random_ids(2, 9)
    main(["--adapter", "models/lora/best.pth", "--output_path", "merged.pth"])
    content = load_checkpoint("merged.pth")
    loaded = restore_model(content, "merged.pth", RewardModel).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.rewards(ids, ids.ne(1)), model.rewards(ids, ids.ne(1)), **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--adapter", "models/base/base.pth", "--output_path", "x.pth"], "holds no adapters .* can be used as it is"),
        (["--adapter", "models/lora/best.pth"], "give --output_path for a plain checkpoint, or --peft_dir"),
        (["--adapter", "nothing.pth", "--output_path", "x.pth"], "nothing.pth does not exist"),
    ],
)
def test_mistakes_are_explained(arguments, complaint, world):
    world()
    with pytest.raises(UserError, match=complaint):
        main(arguments)


@pytest.mark.parametrize("module", ["alignment.lora_export", "alignment.lora"])
def test_the_module_runs_as_a_program(module, world):
    """`python -m alignment.lora_export`, or by its former name, is a process of its own."""
    world()
    command = [sys.executable, "-m", module, "--adapter", "models/lora/best.pth", "--output_path", "m.pth"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "lora" not in load_checkpoint("m.pth")


# -- peft --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "targets",
    ["all", "attention", "mlp", "query_proj,value_proj", "layers.1.attention.key_proj", "embedding", "all,embedding"],
)
def test_peft_computes_the_same_logits(architecture, targets, rslora, world):
    """`peft` loads the folder on the model that `transformers` makes of the base, and the logits agree."""
    peft = pytest.importorskip("peft")
    model = world(architecture, lora_targets=targets, lora_rslora=rslora, lora_alpha=5.0)
    main(["--adapter", "models/lora/best.pth", "--peft_dir", "peft"])
    theirs, ids = in_transformers(load_model("models/base/base.pth")[0]), random_ids(2, 9)
    with torch.no_grad():
        base_logits = theirs(ids).logits
        theirs = peft.PeftModel.from_pretrained(theirs, "peft").eval()
        expected = logits(model, ids)
        torch.testing.assert_close(theirs(ids).logits, expected, **CLOSE)
    assert (base_logits - expected).abs().max() > 0.05
    assert json.loads(Path("peft/adapter_config.json").read_text())["r"] == 3


def test_what_peft_has_no_place_for_is_refused(world):
    world(stage="reward")
    with pytest.raises(UserError, match="is a reward model, which peft has no place for"):
        main(["--adapter", "models/lora/best.pth", "--peft_dir", "peft"])
