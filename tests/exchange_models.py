"""Small models and tokenizers as other programs write them, with random weights and odd sizes."""

import json

import torch
from conftest import CORPUS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Ten scripts, code, emoji, spaces, numbers
TEXTS = [
    "The capital of France is Paris, isn't it? It'LL do.",
    "法国的首都是巴黎。机器学习",
    "Столица Франции — Париж.",
    "عاصمة فرنسا هي باريس",
    "फ्रांस की राजधानी पेरिस है",
    "フランスの首都はパリです。",
    "프랑스의 수도는 파리입니다.",
    "Η πρωτεύουσα της Γαλλίας",
    "เมืองหลวงของฝรั่งเศส",
    "בירת צרפת היא פריז",
    "Ελλάδα café",
    "def f(x):\n\treturn x**2  # 12345\n\n\n    pass",
    "👩\u200d👩\u200d👧\u200d👦🇫🇷 ok 🙂",
    "  two  spaces\t\ttabs \r\n lines\n\n",
    " ",
    "",
    "1234567890 3.14 ⅔ ²",
    "<div class='a'>&amp;</div>",
    "e\u0301 = \xe9",
    "\u017f \ufb01 \u200b\xa0x",
]


def splitter(kind):
    """How the tokenizers of a family cut a text."""
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pattern = LLAMA3 if kind == "llama-bpe" else LLAMA3.replace("{1,3}", "")
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_alone])


def save_tokenizer(folder, kind="smollm", **config):
    """A tokenizer's folder as the family publishes it; its special tokens stand behind the others or before them."""
    engine = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    if kind == "qwen2":
        engine.normalizer = normalizers.NFC()
    engine.pre_tokenizer, engine.decoder = splitter(kind), decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    first = kind == "smollm"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=names if first else [], show_progress=False
    )
    engine.train_from_iterator(CORPUS + TEXTS, trainer)
    engine.add_special_tokens(names)
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML, "tokenizer_class": "PreTrainedTokenizerFast"}
    if kind == "qwen2":
        engine.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    elif kind == "llama-bpe":
        engine.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", engine.token_to_id("<|endoftext|>"))]
        )
        settings["bos_token"] = "<|endoftext|>"
    elif kind == "smollm":
        settings |= {"bos_token": "<|im_start|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    settings = {name: value for name, value in {**settings, **config}.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return engine


COMMON = dict(
    vocab_size=353, hidden_size=40, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.3,
)  # fmt: skip
SCALINGS = {
    "linear": dict(rope_type="linear", factor=3.0),
    "dynamic": dict(rope_type="dynamic", factor=3.0),
    "llama3": dict(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "yarn": dict(rope_type="yarn", factor=3.0, original_max_position_embeddings=16),
    "yarn of one's own": dict(
        rope_type="yarn", factor=3.0, original_max_position_embeddings=16, attention_factor=0.7, beta_fast=8.0,
        beta_slow=2.0, truncate=False,
    ),
}  # fmt: skip
# name → (class, its configuration, its tokenizer)
FAMILIES = {
    "gpt2": ("GPT2", dict(vocab_size=353, n_positions=48, n_embd=36, n_layer=2, n_head=3, n_inner=52), "gpt-2"),
    "gpt2 untied": (
        "GPT2", dict(vocab_size=347, n_positions=48, n_embd=36, n_layer=2, n_head=3, tie_word_embeddings=False), "gpt-2"
    ),
    "llama": ("Llama", dict(COMMON, tie_word_embeddings=False), "llama-bpe"),
    "llama with biases": ("Llama", dict(COMMON, attention_bias=True, mlp_bias=True, head_dim=6), "smollm"),
    "smollm": ("Llama", dict(COMMON, tie_word_embeddings=True, num_key_value_heads=1, rope_theta=5000.0), "smollm"),
    "mistral": ("Mistral", dict(COMMON, head_dim=14, sliding_window=None), "llama-bpe"),
    "qwen2": ("Qwen2", dict(COMMON, tie_word_embeddings=True), "qwen2"),
    "qwen2 untied": ("Qwen2", dict(COMMON, num_key_value_heads=4), "qwen2"),
    "qwen3": ("Qwen3", dict(COMMON, head_dim=18, tie_word_embeddings=True), "qwen2"),
    "qwen3 with biases": ("Qwen3", dict(COMMON, head_dim=8, attention_bias=True), "qwen2"),
}  # fmt: skip


def make(name, **changes):
    """A model of a family in `transformers`, whose every part shows in its logits."""
    import transformers

    kind, settings, _ = FAMILIES[name]
    settings = {**settings, **changes}
    config = getattr(transformers, f"{kind}Config")(**settings, bos_token_id=None, eos_token_id=1, pad_token_id=None)
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, kind + suffix)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and parameter_name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(is_norm + noise * (0.25 if parameter.ndim > 1 else 0.1))
    return model.eval()


def save(name, folder, model=None, **changes):
    """A folder with such a model and its family's tokenizer; returns the model."""
    model = model or make(name, **changes)
    model.save_pretrained(folder)
    save_tokenizer(folder, FAMILIES[name][2])
    return model


def random_ids(*shape, seed=0):
    return torch.randint(2, 340, shape, generator=torch.Generator().manual_seed(seed))
