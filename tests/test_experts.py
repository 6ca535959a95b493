"""The mixture of experts: equal to a plain loop and to Qwen3-MoE, trained with its own losses, served, quantized."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_gpu_step import Reads

import pretrain_trainer
from alignment.transformers_names import in_transformers
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, load_model, save_checkpoint
from command_line import UserError
from exchange import export_model, import_model
from gpt_model import GPTConfig, GPTModel
from inference.engine import Engine
from inference.kernels import stacked_experts
from inference.kernels.stacked_experts import StackedExperts, stack_experts
from inference.quantizer import load_any, load_quantized_model, prepare_for_inference, save_quantized_model
from inference.sampling import SamplingParams
from lora import LoRAOptions, apply_lora
from transformer_components import MixtureOfExperts, auxiliary_losses

SIZES = dict(vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64, d_ff=24)


def make(**fields):
    """A model of experts whose weights are large enough to matter."""
    torch.manual_seed(0)
    model = GPTModel.from_config(GPTConfig.for_architecture("moe", **{**SIZES, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = ByteLevelBPETokenizer(vocab_size=300)
    tokenizer.train(["红猫 red cat 黑狗 black dog\n"] * 8, min_frequency=2)
    return tokenizer


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A checkpoint of a model of experts."""
    path = tmp_path_factory.mktemp("moe") / "moe.pth"
    model = make()
    save_checkpoint(path, model_state=model.state_dict(), config=model.config, tokenizer=tokenizer, stage="pretrain")
    return path


def one_by_one(layer, x):
    """What the layer is to compute, a token at a time."""
    rows = []
    for token in x.flatten(0, 1):
        probabilities = F.softmax(layer.router(token), dim=-1)
        best = sorted(range(len(layer.experts)), key=lambda e: -probabilities[e].item())[: layer.experts_per_token]
        total = sum(probabilities[e] for e in best)
        rows.append(sum(probabilities[e] / total * layer.experts[e](token) for e in best))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("experts_per_token", [1, 2, 3])
def test_it_computes_what_a_loop_over_tokens_computes(experts_per_token):
    """Outputs and all gradients, in training and in evaluation."""
    torch.manual_seed(1)
    layer = MixtureOfExperts(16, n_experts=3, experts_per_token=experts_per_token, d_ff=24, activation="swiglu")
    x = torch.randn(2, 7, 16)
    for mode in (True, False):
        layer.train(mode)
        with auxiliary_losses():
            ours = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()), allow_unused=True)
        theirs = torch.autograd.grad(one_by_one(layer, x).square().sum(), list(layer.parameters()), allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            zeros = torch.zeros(())
            torch.testing.assert_close(zeros if a is None else a, zeros if b is None else b, rtol=1e-4, atol=1e-5)


def test_logits_are_those_of_qwen3_moe_both_ways(saved, tmp_path):
    """With a cache and padding, too; exported and taken in again, the weights are the same bits."""
    transformers = pytest.importorskip("transformers")
    model, _, _ = load_model(saved)
    ids = torch.randint(4, 300, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        theirs = in_transformers(model)(ids, attention_mask=mask).logits
        torch.testing.assert_close(model(ids, mask)["logits"][mask.bool()], theirs[mask.bool()], atol=1e-4, rtol=1e-4)
        export_model.main(["--model_path", str(saved), "--output_dir", str(tmp_path / "hf")])
        folder = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert type(folder).__name__ == "Qwen3MoeForCausalLM"
        torch.testing.assert_close(model(ids)["logits"], folder(ids).logits, atol=1e-4, rtol=1e-4)
        folder.save_pretrained(tmp_path / "again")  # as that library writes it
    for name in ("hf", "again"):
        import_model.main(["--from", str(tmp_path / name), "--output_path", str(tmp_path / f"{name}.pth"),
                           "--tokenizer_dir", str(tmp_path / "hf")])  # fmt: skip
        back, _, _ = load_model(tmp_path / f"{name}.pth")
        assert back.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))


def test_a_model_whose_weights_are_not_normalised_is_refused_by_name(saved, tmp_path):
    export_model.main(["--model_path", str(saved), "--output_dir", str(tmp_path / "hf")])
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    for field, value in {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [0]}.items():
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**about, field: value}))
        with pytest.raises(UserError, match=field):
            import_model.main(["--from", str(tmp_path / "hf"), "--output_path", str(tmp_path / "x.pth")])


def test_the_router_s_losses_are_those_of_the_papers():
    """The balance as `transformers` computes it, the z-loss by its formula, each by its weight; none in evaluation."""
    balancing = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe").load_balancing_loss_func
    layer = MixtureOfExperts(16, n_experts=5, experts_per_token=2, d_ff=8, balance_coef=0.3, router_z_coef=0.7)
    x = torch.randn(2, 9, 16)
    logits = layer.router(x.flatten(0, 1))
    with auxiliary_losses() as collected:
        layer.train()(x)
        layer.eval()(x)
    expected = 0.3 * balancing((logits,), 5, 2) / 2 + 0.7 * logits.logsumexp(dim=-1).square().mean()
    torch.testing.assert_close(torch.stack(collected), expected[None])  # theirs counts each token's choices, not shares


def test_the_engine_answers_as_the_model_does_and_computes_chosen_experts_only(monkeypatch):
    """Token by token, several requests at once; an expert that nothing chose is not called."""
    model = make(n_experts=16)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [40]]
    engine = Engine(prepare_for_inference(model), None, max_running=3)
    found = engine.run(prompts, SamplingParams(12, temperature=0))
    for prompt, completion in zip(prompts, found, strict=True):
        expected = model.generate(torch.tensor([prompt]), 12, temperature=0)[0, len(prompt) :].tolist()
        assert completion.token_ids == expected
    called = []
    for expert in model.layers[0].feed_forward.experts:
        expert.register_forward_hook(lambda module, inputs, output: called.append(len(inputs[0])))
    model(torch.tensor([[7]]))
    assert called == [1, 1]


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("fields", [{}, {"activation": "gelu", "mlp_bias": True}, {"experts_per_token": 3}])
def test_experts_at_one_place_compute_the_same_without_waiting(monkeypatch, weights, fields):
    """From one token to many more choices than experts, some of which nothing chooses; also where PyTorch's grouped
    product is to be had, which a CPU computes, too."""
    model = prepare_for_inference(make(n_experts=8, d_model=64, d_ff=32, **fields), weights)
    inputs = [torch.randn(1, n, 64) for n in (1, 2, 3, 9, 70)] + [torch.randn(1, 1, 64).expand(1, 40, 64)]
    layer = model.layers[0].feed_forward
    expected = [layer(x) for x in inputs]
    stack_experts(model)
    stacked = model.layers[0].feed_forward
    assert type(stacked) is StackedExperts
    with torch.inference_mode():
        for x, y in zip(inputs, expected, strict=True):
            # A CPU's kernel rounds inputs to INT4 weights, too
            tolerance = 5e-2 * float(y.abs().max()) if weights == "int4" else 1e-5
            torch.testing.assert_close(stacked(x), y, atol=tolerance, rtol=1e-4)
        if weights == "fp32":
            monkeypatch.setattr(stacked_experts, "has_grouped_product", lambda *_: True)
            for x, y in zip(inputs, expected, strict=True):
                torch.testing.assert_close(stacked(x), y, atol=1e-5, rtol=1e-4)


def test_on_a_cpu_a_layer_asks_once_for_its_counts(monkeypatch):
    layer, asked, tolist = make().train().layers[0].feed_forward, [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append(len(tensor)) or tolist(tensor))
    with Reads() as reads:
        layer(torch.randn(2, 9, 32))
    assert reads.found == [] and asked == [len(layer.experts)]


def test_experts_that_are_not_of_known_parts_stay_where_they_are():
    for change in (
        lambda mixture: mixture.experts[1].up_proj.register_forward_hook(lambda *_: None),
        lambda mixture: setattr(mixture.experts[0], "down_proj", nn.Linear(24, 32)),
        lambda mixture: setattr(mixture, "__class__", type("Other", (MixtureOfExperts,), {})),
    ):
        model = prepare_for_inference(make())
        change(model.layers[1].feed_forward)
        stack_experts(model)
        kinds = [type(layer.feed_forward) is StackedExperts for layer in model.layers]
        assert kinds == [True, False]
    with pytest.raises(UserError, match="experts lie as a GPU reads them"):
        model = prepare_for_inference(make(), "int8")
        stack_experts(model)
        save_quantized_model(model, "never.pth")


def test_experts_are_quantized_and_their_router_is_not(tmp_path):
    """INT8 and back from the file: the same choices but for near ties, a third of the size."""
    model = make()
    path = save_quantized_model(prepare_for_inference(model, "int8"), tmp_path / "int8.pth")
    quantized = load_quantized_model(path)
    layer = quantized.layers[0].feed_forward
    assert layer.router.weight.dtype == torch.float32 and layer.experts[3].up_proj.weight.dtype == torch.int8
    ids = torch.randint(4, 300, (4, 30))
    with torch.no_grad():
        choices = [m(ids)["logits"].argmax(dim=-1) for m in (model, quantized)]
    assert (choices[0] == choices[1]).float().mean() > 0.9


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_what_comes_in_as_small_weights_keeps_its_router(saved, tmp_path, weights):
    """As what the quantizer makes, and the engine computes it."""
    export_model.main(["--model_path", str(saved), "--output_dir", str(tmp_path / "hf"), "--weights", "bf16"])
    path = str(tmp_path / "in.pth")
    import_model.main(["--from", str(tmp_path / "hf"), "--output_path", path, "--weights", weights])
    model, _, _ = load_any(path)
    assert all(layer.feed_forward.router.weight.dtype == torch.float32 for layer in model.layers)
    assert model.layers[0].feed_forward.experts[0].up_proj.weights == weights
    prompt = [5, 6, 7]
    expected = model.generate(torch.tensor([prompt]), 6, temperature=0)[0, 3:].tolist()
    assert Engine(model, None).run([prompt], SamplingParams(6, temperature=0, ignore_eos=True))[0].token_ids == expected


def test_it_trains_resumes_and_tells_how_experts_are_used(tokenizer, tmp_path, monkeypatch):
    """The loss falls, the router's losses are in it; ten steps in two goes are ten steps; the picture is there."""
    monkeypatch.chdir(tmp_path)
    text = "\n".join(f"red cat {n} black dog 红猫黑狗" for n in range(300))
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    tokenizer.save("tokenizer")

    def train(folder, *more):
        pretrain_trainer.main(
            ["--preset", "moe", "--train_data_dir", "t.txt", "--val_data_dir", "t.txt", "--tokenizer_dir", "tokenizer",
             "--output_dir", folder, "--d_model", "32", "--n_layers", "2", "--max_seq_len", "32", "--batch_size", "8",
             "--num_threads", "1", "--precision", "fp32", "--log_interval", "5", "--eval_interval", "100",
             "--n_experts", "4", "--save_interval", "5", "--schedule", "constant", "--warmup_steps", "1", *more]
        )  # fmt: skip
        return load_checkpoint(f"{folder}/checkpoints/step_00000010.pth")["model"]

    whole = train("whole", "--max_steps", "10")
    with pytest.raises(UserError):
        train("parts", "--max_steps", "5")["there are but five"]
    resumed = train("parts", "--max_steps", "10", "--resume", "auto")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    records = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "aux_loss" in record]
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[0]["aux_loss"] > 0
    assert 0 <= steps[-1]["experts_least_used"] <= 1 <= steps[-1]["experts_most_used"] <= 4
    assert (tmp_path / "whole" / "experts.png").stat().st_size > 1000


def test_what_a_token_costs_is_counted_without_the_experts_that_it_passes_by():
    dense = GPTModel.from_config(GPTConfig.for_architecture("modern", **{**SIZES, "d_ff": 48}))
    model = make()
    routers = sum(layer.feed_forward.router.weight.numel() for layer in model.layers)
    assert model.num_active_parameters() - routers == dense.num_parameters() < model.num_parameters()


def test_adapters_go_beside_experts(saved):
    """LoRA trains them; with the adapters at zero nothing changes."""
    model, _, _ = load_model(saved)
    ids = torch.randint(4, 300, (1, 9))
    before = model(ids)["logits"]
    apply_lora(model, LoRAOptions(lora_rank=2), str(saved))
    torch.testing.assert_close(model(ids)["logits"], before)
    assert any(".experts." in name for name, p in model.named_parameters() if p.requires_grad)


def test_what_experts_cannot_do_is_said(saved, tmp_path):
    with pytest.raises(ValueError, match="experts_per_token 3 must be at most n_experts 2"):
        make(n_experts=2, experts_per_token=3)
    with pytest.raises(UserError, match="experts are not written to GGUF"):
        export_model.main(["--model_path", str(saved), "--output_dir", str(tmp_path / "x"), "--gguf", "F32"])
    assert not (tmp_path / "x").exists()
