"""`python -m inference.inspect_model`: what the page shows is what the model computes; it runs nothing of a text."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

from alignment.reward_model import RewardModel
from alignment.transformers_names import in_transformers
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, save_checkpoint
from command_line import UserError
from gpt_model import GPTConfig, GPTModel
from inference.inspect_model import contents_of, distribution, label_of, look_inside, main, page_of, parts_of
from inference.quantizer import prepare_for_inference, save_quantized_model, weight_bytes
from inference.sampling import truncate
from seq2seq_model import Seq2SeqConfig, Transformer

IDS = list(range(5, 29))
SIZES = dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
DANGEROUS = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer one of whose tokens is a script, and a model in the checkpoints of every kind that people have."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("inside"), ByteLevelBPETokenizer(400)
    tokenizer.train([DANGEROUS, "你好 hello"] * 4, min_frequency=2)
    config = GPTConfig.for_architecture("modern", vocab_size=tokenizer.vocab_size, n_kv_heads=2, **SIZES)
    model, about = GPTModel.from_config(config), {"config": config, "tokenizer": tokenizer}
    content = {"stage": "sft", "step": 1, "metrics": {}, "model": model.state_dict(), "config": vars(config)}
    content["tokenizer"] = {"fingerprint": tokenizer.fingerprint, "files": tokenizer.to_files()}
    save_checkpoint(folder / "sft.pth", model_state=model.state_dict(), stage="sft", **about)
    half = {name: weight.half() for name, weight in model.state_dict().items()}
    save_checkpoint(folder / "half.pth", model_state=half, stage="pretrain", **about)  # as public models come in
    save_quantized_model(prepare_for_inference(model, "int8"), folder / "int8.pth", content)
    translator = Seq2SeqConfig(tokenizer.vocab_size, tokenizer.vocab_size, 32, 2, 1, 1)
    translator = Transformer.from_config(translator)
    about_it = dict(config=translator.config, tokenizer=tokenizer, stage="translate")
    save_checkpoint(folder / "translate.pth", model_state=translator.state_dict(), **about_it)
    translator = prepare_for_inference(translator, "int8")
    save_quantized_model(translator, folder / "translate_int8.pth", load_checkpoint(folder / "translate.pth"))
    reward = RewardModel(model)
    save_checkpoint(folder / "reward.pth", model_state=reward.state_dict(), stage="reward", **about)
    return folder


# -- what is computed --------------------------------------------------------------------------------------------------


def test_attention_and_streams_are_those_of_transformers(architecture, random_model):
    model = random_model(architecture)
    inside, theirs = look_inside(model, IDS), in_transformers(model)
    theirs.set_attn_implementation("eager")
    expected = theirs(torch.tensor([IDS]), output_attentions=True, output_hidden_states=True)
    for weights, their_weights in zip(inside.attention, expected.attentions, strict=True):
        torch.testing.assert_close(weights, their_weights[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, len(IDS)))
        assert not weights.triu(diagonal=1).any()
    streams = expected.hidden_states[:-1]  # their last one is normed already
    for logits, stream in zip(inside.lens, streams, strict=False):
        torch.testing.assert_close(logits, model.lm_head(model.final_norm(stream))[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_attention_equals_its_formula(position, random_model):
    """softmax(q kᵀ / √K) of the first layer, written out."""
    model = random_model("gpt2", position=position)
    layer, ids = model.layers[0], torch.tensor([IDS])
    x = layer.attention_norm(model.embed(ids, slice(0, len(IDS))))[0]  # (T, D)
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        query, key = (
            F.linear(x, projection.weight[part], projection.bias[part])
            for projection in (layer.attention.query_proj, layer.attention.key_proj)
        )
        scores = torch.einsum("tk,sk->ts", query, key) / math.sqrt(8)
        powers = scores.exp().tril()
        expected = powers / powers.sum(dim=1, keepdim=True)
        torch.testing.assert_close(look_inside(model, IDS).attention[0][head], expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("weights", [None, "int8"])
def test_experts_are_those_that_compute(weights, random_model, tokenizer):
    """Each layer's output is the weighted sum of what the chosen experts make of its input."""
    model = random_model("moe", vocab_size=len(tokenizer), n_experts=4)
    model = model if weights is None else prepare_for_inference(model, weights)
    passed = []
    for layer in model.layers:
        layer.feed_forward.register_forward_hook(lambda *step: passed.append(step))  # module, inputs, output
    contents = contents_of(model, tokenizer, IDS, len(IDS))
    assert len(contents["experts"]) == len(passed) == 2
    for shown, (mixture, (x,), output) in zip(contents["experts"], passed, strict=True):
        for place in range(len(IDS)):
            pairs = zip(shown["chosen"][place], shown["weights"][place], strict=True)
            expected = sum(weight * mixture.experts[number](x[:, place]) for number, weight in pairs)
            torch.testing.assert_close(output[:, place], expected, atol=1e-3, rtol=1e-3)
        assert sum(shown["used"]) == 2 * len(IDS)
    assert contents["active"] < contents["parameters"]
    assert contents_of(random_model("modern", vocab_size=len(tokenizer)), tokenizer, IDS, 3)["experts"] == []


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "dynamic", "int8"])
def test_last_lens_is_what_the_model_says(position, random_model):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    switches = {"dynamic": dict(position="rotary", rope_scaling=scaling), "int8": {}}
    model = random_model("modern", **switches.get(position, dict(position=position)))
    if position == "int8":
        model = prepare_for_inference(model, "int8")
    with torch.no_grad():
        expected = model(torch.tensor([IDS]))["logits"][0]
    torch.testing.assert_close(look_inside(model, IDS).lens[-1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", [None, "fp32", "int8", "fp16"])
def test_parts_sum_up_to_the_model(architecture, tied, weights, random_model):
    model = random_model(architecture, tie_embeddings=tied)
    count = model.num_parameters()
    model = model if weights is None else prepare_for_inference(model, weights)
    parts = {part["name"]: part for part in parts_of(model)}
    assert sum(part["parameters"] for part in parts.values()) == count == model.num_parameters()
    assert sum(part["bytes"] for part in parts.values()) == weight_bytes(model)
    assert parts["token_embedding"]["parameters"] == 64 * 32
    assert parts["lm_head"]["parameters"] == (0 if tied else 64 * 32)
    n_kv_heads = model.config.n_kv_heads
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 8 * n_kv_heads)
    assert matrices <= parts["layers.*.attention"]["parameters"] < matrices + 400  # biases and norms of heads


def test_cache_of_the_smallest_preset(random_model, tokenizer):
    """The first exercise of docs/look_inside.md."""
    sizes = dict(vocab_size=len(tokenizer), d_model=192, n_layers=4, n_heads=4, n_kv_heads=2, max_seq_len=128)
    contents = contents_of(random_model("modern", **sizes), tokenizer, IDS, 20)
    assert contents["cache_bytes_a_token"] == 3072


def test_rest_of_a_distribution_keeps_its_mass():
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3
    kept = distribution(logits)
    assert kept["ids"] == logits.sort(descending=True).indices[:100].tolist()
    assert sum(count for _, count in kept["rest"]) == 4900
    for temperature, close in ((1.0, 1e-4), (0.5, 0.01), (2.0, 0.01)):
        mass = sum(count * math.exp(value / temperature) for value, count in kept["rest"])
        expected = (logits.double().sort(descending=True).values[100:] / temperature).exp().sum()
        assert mass == pytest.approx(float(expected), rel=close)


def test_tokens_are_shown_with_their_bytes(tokenizer):
    ids = tokenizer.encode("首 a", add_special_tokens=False)["input_ids"]
    labels = [label_of(tokenizer, token) for token in ids]
    assert " ".join(label["bytes"] for label in labels) == "首 a".encode().hex(" ")
    assert not any(label["special"] for label in labels)
    assert label_of(tokenizer, tokenizer.eos_token_id) == {"text": "</s>", "bytes": "", "special": True}
    assert label_of(tokenizer, 9999) == {"text": "#9999", "bytes": "", "special": True}, "beyond the vocabulary"


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "half", "int8"])
def test_command_writes_one_page(folder, name, tmp_path, capsys):
    out = tmp_path / "page.html"
    paths = ["--model_path", f"{folder}/{name}.pth", "--output_path", f"{out}"]
    main([*paths, "--prompt", DANGEROUS, "--max_gen_len", "4"])
    page = out.read_text(encoding="utf-8")
    contents = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(contents["tokens"]) == contents["n_prompt"] + 4
    assert page.count("<script") == 2 and "<img" not in page
    assert not re.search(r'(src|href)="|url\(|@import|https?://', page)
    assert f"{contents['n_prompt']} tokens of the prompt and 4 of the answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model_path reward.pth --prompt a", "reward model, which writes no text"),
        ("--model_path translate.pth --prompt a", "is an encoder–decoder"),
        ("--model_path translate_int8.pth --prompt a", "is an encoder–decoder"),
        ("--model_path gone.pth --prompt a", "gone.pth does not exist"),
        ("--model_path sft.pth --prompt a --output_path sft.pth/x.html", "choose another --output_path"),
        ("--model_path sft.pth --prompt a --max_tokens 3", r"has \d+ tokens and the page takes 3"),
        ("--model_path half.pth --prompt=", "the prompt is empty"),
    ],
)
def test_mistakes_are_said_in_a_sentence(folder, arguments, said, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=said):
        main(arguments.split())
    assert not list(folder.glob("*.html"))


# -- the page, in a browser --------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    pytest.importorskip("websocket", reason="websocket-client is not installed (requirements-dev.txt)")
    from browser import CHROMIUM, Browser

    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def test_page_computes_what_sampling_computes(browser, random_model, tmp_path):
    """Probabilities for several settings as `inference.sampling` has them; no token runs; a phone is wide enough."""
    tokenizer = ByteLevelBPETokenizer(400)
    tokenizer.train([DANGEROUS] * 4, min_frequency=2)
    model = random_model("moe", vocab_size=tokenizer.vocab_size, max_seq_len=64, n_experts=4)
    ids = tokenizer.encode(DANGEROUS, add_special_tokens=False)["input_ids"]
    contents = {**contents_of(model, tokenizer, ids, len(ids)), "model": DANGEROUS}
    page = tmp_path / "page.html"
    page.write_text(page_of(contents), encoding="utf-8")
    metrics = dict(width=360, height=700, deviceScaleFactor=1, mobile=True)
    browser.call("Emulation.setDeviceMetricsOverride", **metrics)
    browser.open(page.as_uri())
    assert browser.evaluate("document.title") == "A look inside"
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    logits = look_inside(model, ids).lens[-1][-1:]  # (1, V)
    for temperature, top_k, top_p in ((1, 0, 1), (0.7, 0, 0.9), (1.5, 20, 1), (0.8, 40, 0.5), (0, 0, 1)):
        found = browser.evaluate(f"probabilities({len(ids) - 1}, {temperature}, {top_k}, {top_p})")[:100]
        if temperature:
            expected = truncate(logits / temperature, [top_k], [top_p], [0.0]).softmax(dim=-1)[0]
        else:
            expected = F.one_hot(logits.argmax(), logits.size(-1)).float()
        expected = expected.sort(descending=True).values[:100]
        torch.testing.assert_close(torch.tensor(found).float(), expected, atol=1e-4, rtol=1e-2)
    assert browser.evaluate("document.querySelectorAll('#experts tbody tr').length") == 2
    browser.evaluate("choose(3)")
    browser.evaluate("document.querySelector('#heads').scrollIntoView()")
    browser.click("#heads button:last-child")
    assert browser.evaluate("document.getElementById('row').textContent").startswith("Layer 2, head 4: where token 4")
    shown = browser.evaluate("[...document.querySelectorAll('#bars .bar')].length")
    browser.evaluate("(() => { const k = $('top-k'); k.value = 1; k.dispatchEvent(new Event('input')) })()")
    assert shown == 20 and browser.evaluate("$('left').textContent").startswith("1 token is left")
    assert browser.complaints == [] and browser.hosts <= {""}
