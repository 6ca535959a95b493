"""Generation with a KV cache: the same as without it, in batches as alone, and it ends when the model ends."""

import pytest
import torch

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError
from gpt_model import GPTConfig, GPTModel
from inference.kv_cache_infer import KVCache, generate_texts, generate_with_kv_cache
from text_generation import encode_prompt, left_pad

CONTEXT = 64
PROMPTS = ["hello world", "你好", "a", "The quick brown fox"]


@pytest.fixture(scope="module")
def tokenizer():
    return ByteLevelBPETokenizer(300)  # knows the bytes only: a token is a byte


def random_model(architecture, **switches):
    """Random weights, so large that attention and positions matter for the next token."""
    torch.manual_seed(0)
    config = GPTConfig.for_architecture(
        architecture,
        **{**dict(vocab_size=300, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, max_seq_len=CONTEXT), **switches},
    )
    model = GPTModel.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.05)
    return model


@pytest.fixture(scope="module", params=["gpt2", "modern"])
def model(request):
    return random_model(request.param)


@torch.no_grad()
def greedy_without_cache(model, ids, max_gen_len, eos_token_id):
    """The plainest loop: the whole text through the model for each new token."""
    produced = []
    while len(produced) < max_gen_len and len(ids) + len(produced) < model.config.max_seq_len:
        logits = model(torch.tensor([ids + produced]))["logits"]
        produced.append(logits[0, -1].argmax().item())
        if produced[-1] == eos_token_id:
            break
    return produced


def ending_model(architecture, eos_token_id):
    """A model that says </s> sooner or later: random weights, with </s> made likely."""
    model = random_model(architecture, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[eos_token_id] *= 2
    return model


@pytest.mark.parametrize("chat", [False, True])
def test_cached_is_uncached(model, tokenizer, chat):
    """Greedy generation with the cache gives exactly the tokens of the loop that recomputes everything."""
    for prompt in PROMPTS:
        (generation,) = generate_texts(model, tokenizer, [prompt], chat=chat, max_gen_len=20)
        ids = encode_prompt(tokenizer, prompt, chat)
        assert generation.token_ids == greedy_without_cache(model, ids, 20, tokenizer.eos_token_id)


@torch.no_grad()
def test_logits_token_by_token_are_those_of_one_pass(model):
    """Positions go on where the cache ends, the history stays visible, every layer has its own cells, and no token is
    fed twice: fed one token at a time, or in chunks, the logits are those of the full forward pass."""
    ids = torch.randint(3, 300, (2, 24))
    expected = model(ids)["logits"]  # (2, 24, V)
    for sizes in ([1] * 24, [10, 1, 1, 12], [23, 1]):
        cache = model.new_cache(2, 24)
        logits = torch.cat([model(chunk, cache=cache)["logits"] for chunk in ids.split(sizes, dim=1)], dim=1)
        assert cache.length == 24
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_feeds_every_token_once(model, tokenizer, monkeypatch):
    """The prompt goes in once, in one pass, then one token a step; the last token produced is not fed at all."""
    fed = []
    hidden_states = GPTModel.hidden_states

    def recording(self, input_ids, attention_mask=None, cache=None):
        fed.extend(input_ids[0].tolist())
        return hidden_states(self, input_ids, attention_mask, cache)

    monkeypatch.setattr(GPTModel, "hidden_states", recording)
    ids = encode_prompt(tokenizer, "hello", chat=False)
    output = model.generate(torch.tensor([ids]), max_gen_len=12, temperature=0)
    assert fed == output[0, :-1].tolist()


@torch.no_grad()
def test_positions_count_tokens_and_not_padding(model, tokenizer):
    """Padding on the left changes no logits, with and without the cache."""
    rows = [encode_prompt(tokenizer, prompt, chat=False) for prompt in PROMPTS]
    input_ids, mask = left_pad(rows, tokenizer.pad_token_id)
    cache = model.new_cache(*input_ids.shape)
    chunks = [slice(0, 5), slice(5, 6), slice(6, input_ids.size(1))]
    in_chunks = [model(input_ids[:, chunk], mask[:, : chunk.stop], cache=cache)["logits"] for chunk in chunks]
    for padded in (model(input_ids, mask)["logits"], torch.cat(in_chunks, dim=1)):
        for row, logits in zip(rows, padded, strict=True):
            alone = model(torch.tensor([row]))["logits"][0]  # (T, V)
            torch.testing.assert_close(logits[-len(row) :], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_batched_is_alone(tokenizer, architecture):
    """A prompt's answer does not depend on the prompts beside it, though these are shorter, longer or end earlier."""
    model = ending_model(architecture, tokenizer.eos_token_id)
    prompts = [*PROMPTS, "x" * 50, "二加三等于五。", "b", "zz"]
    batched = generate_texts(model, tokenizer, prompts, chat=False, max_gen_len=30, batch_size=8)
    alone = [generate_texts(model, tokenizer, [prompt], chat=False, max_gen_len=30)[0] for prompt in prompts]
    assert batched == alone
    assert len({len(generation.token_ids) for generation in alone}) > 1, "all answers are equally long: nothing shown"


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_ends_at_the_end_token(tokenizer, architecture):
    """`</s>` ends an answer and does not appear in the text; an answer that is cut off is reported as such."""
    model = ending_model(architecture, tokenizer.eos_token_id)
    answers = generate_texts(model, tokenizer, [chr(97 + i) for i in range(16)], chat=True, max_gen_len=25)
    assert {answer.ended for answer in answers} == {True, False}
    for answer in answers:
        assert answer.ended == (answer.token_ids[-1] == tokenizer.eos_token_id)
        assert answer.token_ids[:-1].count(tokenizer.eos_token_id) == 0
        assert answer.ended or len(answer.token_ids) == 25
        assert "</s>" not in answer.text
        assert "<pad>" not in answer.text


def test_returns_the_new_text_only(model, tokenizer):
    """One prompt gives a string, several give a list in their order, and neither repeats the prompt."""
    settings = dict(max_gen_len=12, temperature=0)
    texts = generate_with_kv_cache(model, tokenizer, PROMPTS, **settings)
    assert texts == [generate_with_kv_cache(model, tokenizer, prompt, **settings) for prompt in PROMPTS]
    ids = greedy_without_cache(model, encode_prompt(tokenizer, PROMPTS[0], chat=False), 12, tokenizer.eos_token_id)
    assert texts[0] == tokenizer.decode(ids)


def test_chat_uses_the_template_and_plain_text_does_not(model, tokenizer):
    """The same words are a question with `chat` and the beginning of a text without it."""
    question = tokenizer.encode_chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"]
    answer = tokenizer.decode(greedy_without_cache(model, question, 12, tokenizer.eos_token_id))
    settings = dict(max_gen_len=12, temperature=0)
    assert generate_with_kv_cache(model, tokenizer, "hi", chat=True, **settings) == answer
    assert generate_with_kv_cache(model, tokenizer, "hi", chat=False, **settings) != answer


def test_sampling_is_repeatable_and_heeds_top_k(model, tokenizer):
    """A seed gives the same text again, another seed another; top_k = 1 is greedy at any temperature."""
    first, again, other = (generate_with_kv_cache(model, tokenizer, "seed", 30, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    greedy = generate_with_kv_cache(model, tokenizer, "seed", 30, temperature=0)
    assert generate_with_kv_cache(model, tokenizer, "seed", 30, top_k=1, temperature=5.0) == greedy


def test_stops_where_the_context_ends(model, tokenizer):
    """A prompt near the end of the context gets what room there is; one that leaves none is refused in a sentence."""
    nearly_full = "x" * (CONTEXT - 3)  # and <s>
    ids = encode_prompt(tokenizer, nearly_full, chat=False)
    assert len(ids) == CONTEXT - 2
    generate_with_kv_cache(model, tokenizer, nearly_full, 50)
    with pytest.raises(UserError, match=f"{CONTEXT} tokens .* shorten it"):
        generate_with_kv_cache(model, tokenizer, "x" * (CONTEXT - 1))


def test_cache_holds_zeros_and_refuses_more_than_it_holds():
    """Cells that were never written are zeros (NaN would leak through a mask); a full cache is an error, not a wrap."""
    cache = KVCache(n_layers=1, batch_size=1, n_kv_heads=1, max_len=2, head_dim=4)
    assert cache.keys.eq(0).all() and cache.values.eq(0).all()
    with pytest.raises(ValueError, match="holds 2 positions"):
        cache.append(0, torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
