"""Adapters that `peft` has saved come in, and those that went out come back bit by bit."""

import json

import pytest
import torch
from exchange_models import make, random_ids, save
from test_exchange_hugging_face import CLOSE, take_in, transformers  # noqa: F401

from alignment import lora_export
from checkpoint import load_checkpoint, load_model, save_checkpoint, weight_fingerprint
from command_line import UserError
from exchange import import_model
from lora import LoRAOptions, apply_lora, lora_settings, trained_state

peft = pytest.importorskip("peft")


@pytest.fixture
def base(request, tmp_path):
    """A checkpoint of one of the families."""
    save(request.param, tmp_path / "theirs")
    take_in(tmp_path / "theirs")
    return (tmp_path / "taken.pth").rename(tmp_path / "base.pth")


def taken(folder, base):
    output = base.with_name("adapters.pth")
    import_model.main([f"--from={folder}", f"--output_path={output}", f"--base_model={base}"])
    return output


def saved_by_peft(name, folder, **settings):
    """A model with random adapters, and their folder."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(make(name), config)
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora" in parameter_name:
            parameter.data.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "base, settings",
    [
        ("llama", dict(target_modules=["q_proj", "v_proj", "down_proj"])),
        ("llama", dict(target_modules="all-linear", use_rslora=True)),
        ("qwen3", dict(target_modules=["k_proj", "up_proj"], rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 7})),
        ("smollm", dict(target_modules=["o_proj"], layers_to_transform=[1])),
        ("gpt2", dict(target_modules=["c_attn", "mlp.c_proj"])),
    ],
    indirect=["base"],
)
def test_logits_are_those_of_peft(base, settings, request, tmp_path):
    name = request.node.callspec.params["base"]
    theirs = saved_by_peft(name, tmp_path / "peft", **settings)
    model, _, _ = load_model(taken(tmp_path / "peft", base))
    ids = random_ids(2, 12)
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(model(ids)["logits"], expected, **CLOSE)
        assert not torch.allclose(load_model(base)[0](ids)["logits"], expected, atol=0.1)


@pytest.mark.parametrize("base", ["gpt2", "llama"], indirect=True)
def test_out_and_back_again(base, tmp_path):
    model, tokenizer, content = load_model(base)
    apply_lora(model, LoRAOptions(lora_rank=2, lora_targets="all,embedding"), base=str(base))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.3)
    lora = {**lora_settings(model), "base_fingerprint": weight_fingerprint(content)}
    path = save_checkpoint(tmp_path / "ours.pth", model_state=trained_state(model, model.state_dict()), stage="sft",
                           config=model.config, tokenizer=tokenizer, lora=lora)  # fmt: skip
    lora_export.main([f"--adapter={path}", f"--peft_dir={tmp_path / 'peft'}"])
    first, again = load_checkpoint(path), load_checkpoint(taken(tmp_path / "peft", base))
    assert first["model"].keys() == again["model"].keys()
    assert all(torch.equal(value, again["model"][name]) for name, value in first["model"].items())
    assert again["lora"]["lora_alpha"] == first["lora"]["lora_alpha"]


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_what_is_no_plain_adapter_is_refused(base, tmp_path):
    folder = tmp_path / "peft"
    saved_by_peft("llama", folder, target_modules=["q_proj"])
    settings = json.loads((folder / "adapter_config.json").read_text())

    def refused(sentence, **changes):
        (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(UserError, match=sentence):
            taken(folder, base)
        assert not base.with_name("adapters.pth").exists()

    refused("adapters with use_dora True, which is not known", use_dora=True)
    refused(r"with modules_to_save \['lm_head'\]", modules_to_save=["lm_head"])
    refused("with peft_type 'IA3'", peft_type="IA3")
    with pytest.raises(UserError, match="--base_model is missing; name the checkpoint"):
        import_model.main([f"--from={folder}", f"--output_path={tmp_path / 'a.pth'}"])
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    refused("adapter_model.safetensors is damaged or cut off")
    weights.unlink()
    refused("has no adapter_model.safetensors")
    saved_by_peft("qwen3", folder, target_modules=["q_proj"])
    with pytest.raises(UserError, match="holds adapters for another model"):
        taken(folder, base)
