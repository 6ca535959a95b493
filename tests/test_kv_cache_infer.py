"""Generation with a KV cache: the same as without it, in batches as alone, and it ends when the model ends."""

import re
import shlex

import pytest
import torch

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import save_checkpoint
from command_line import UserError, run_main
from gpt_model import GPTConfig, GPTModel
from inference.beam_search import BeamSettings, beam_search
from inference.kv_cache_infer import KVCache, generate_with_kv_cache, main
from inference.request import encode_prompt
from inference.text_generation import generate_texts

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
    width = max(map(len, rows))
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])  # (B, T)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])  # (B, T)
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


def test_a_conversation_is_one_prompt_and_several_are_several(model, tokenizer):
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "?"},
    ]
    settings = dict(max_gen_len=8, temperature=0, chat=True)
    question = tokenizer.encode_chat(talk, add_generation_prompt=True)["input_ids"]
    answer = tokenizer.decode(greedy_without_cache(model, question, 8, tokenizer.eos_token_id))
    whole = generate_with_kv_cache(model, tokenizer, talk, **settings)
    assert whole.rstrip("\ufffd") == answer.rstrip("\ufffd")  # half a character at the end is cut off
    alone = generate_with_kv_cache(model, tokenizer, "hi", **settings)
    assert generate_with_kv_cache(model, tokenizer, [talk, talk[:1], "hi"], **settings) == [whole, alone, alone]


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


def test_all_settings_of_a_request_arrive(model, tokenizer):
    """Those of the signature and any other field of `SamplingParams`; a misspelt one is an error."""
    settings = dict(max_gen_len=30, temperature=0)
    plain = generate_with_kv_cache(model, tokenizer, "abc", **settings)
    for stop in (plain[3:5], ["no such", plain[2]]):
        expected = plain[: plain.index(stop if isinstance(stop, str) else stop[1])]
        assert generate_with_kv_cache(model, tokenizer, "abc", stop=stop, **settings) == expected
    z = tokenizer.encode("z", add_special_tokens=False)["input_ids"][0]
    assert generate_with_kv_cache(model, tokenizer, "abc", 5, logit_bias={z: 1e4}) == "zzzzz"
    assert generate_with_kv_cache(model, tokenizer, "abc", top_p=1e-9, max_gen_len=30) == plain
    with pytest.raises(TypeError, match="topp"):
        generate_with_kv_cache(model, tokenizer, "abc", topp=0.5)


def test_n_answers_and_several_prompts_have_random_numbers_of_their_own(model, tokenizer):
    """And an answer is the same in every company."""
    settings = dict(max_gen_len=12, top_k=0, temperature=1.5, seed=4)
    pairs = generate_with_kv_cache(model, tokenizer, ["same", "same", "other"], n=2, batch_size=2, **settings)
    assert [len(pair) for pair in pairs] == [2, 2, 2]
    assert len({text for pair in pairs for text in pair}) == 6
    assert generate_with_kv_cache(model, tokenizer, "same", n=2, **settings) == pairs[0]
    assert generate_with_kv_cache(model, tokenizer, "same", **settings) == pairs[0][0]


def test_sliding_goes_on_beyond_the_context(model, tokenizer):
    """As far as asked, and up to the context's end exactly as without sliding."""
    settings = dict(temperature=0, ignore_eos=True)
    within = generate_with_kv_cache(model, tokenizer, "abc", 1000, **settings)
    beyond = generate_with_kv_cache(model, tokenizer, "abc", 150, overflow="slide", **settings)
    assert len(tokenizer.encode(within)["input_ids"]) < len(tokenizer.encode(beyond)["input_ids"])
    assert beyond.startswith(within.rstrip("\ufffd"))
    long_prompt = "x" * (3 * CONTEXT)
    assert generate_with_kv_cache(model, tokenizer, long_prompt, 5, overflow="slide", **settings)


def test_beams_find_the_answers_of_beam_search(model, tokenizer):
    """Through the chat template as well, for several prompts, n of them each; none of the sampling settings matters."""
    texts = generate_with_kv_cache(model, tokenizer, ["ab", "c"], 10, num_beams=3, n=2, chat=True, length_penalty=0.5)
    for prompt, pair in zip(["ab", "c"], texts, strict=True):
        ids, ends = encode_prompt(tokenizer, prompt, chat=True), {tokenizer.eos_token_id}
        found = beam_search(model, ids, BeamSettings(3, 0.5), max_gen_len=10, end_token_ids=ends, n=2)
        assert pair == [tokenizer.decode(hypothesis.token_ids) for hypothesis in found]
    one = generate_with_kv_cache(model, tokenizer, "ab", 10, top_k=3, temperature=9.0, num_beams=3, chat=True)
    assert one == generate_with_kv_cache(model, tokenizer, "ab", 10, temperature=0, num_beams=3, chat=True)


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ("", {}, "the prompt is empty"),
        (["a", ""], {}, "the prompt is empty"),
        ("x" * 64, {}, "the prompt has 65 tokens and the model's context only 64"),
        ("a", dict(max_gen_len=0), "max_gen_len must be a whole number of at least 1, not 0"),
        ("a", dict(top_k=301), "top_k must be a whole number from 0 to 300, the size of the vocabulary, not 301"),
        ("a", dict(temperature=float("nan")), "temperature must be a number of at least 0, not nan"),
        ("a", dict(stop=""), "stop must be a tuple of strings of at least one character"),
        ("a", dict(stop=["b", ""]), "stop must be a tuple of strings of at least one character"),
        ("a", dict(overflow="wrap"), "overflow must be one of error, slide"),
        ("a", dict(batch_size=0), "must be at least 1, not 0"),
        ("", dict(num_beams=2), "the prompt is empty"),
        ("x" * 64, dict(num_beams=2), "the prompt has 65 tokens"),
        ("a", dict(num_beams=0), "num_beams must be at least 1, not 0"),
        ("a", dict(num_beams=2, n=3), "n must be from 1 to num_beams, 2, not 3"),
        ("a", dict(num_beams=2, top_k=301), "top_k must be"),
        ("a", dict(num_beams=2, stop="b"), "num_beams and stop do not go together"),
        ("a", dict(num_beams=2, overflow="slide"), "num_beams and overflow do not go together"),
    ],
    ids=str,
)
def test_bad_input_is_named_in_one_sentence(model, tokenizer, prompt, settings, words):
    with pytest.raises(UserError) as error:
        generate_with_kv_cache(model, tokenizer, prompt, **settings)
    assert words in str(error.value)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_damaged_weights_are_named_in_one_sentence(tokenizer, num_beams):
    model = random_model("modern")
    with torch.no_grad():
        model.layers[1].feed_forward.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite.* use another checkpoint"):
        generate_with_kv_cache(model, tokenizer, "abc", num_beams=num_beams)


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """A folder with the same model as a pretrained and as a fine-tuned one, and with a damaged one."""
    folder, model = tmp_path_factory.mktemp("checkpoints"), random_model("modern")
    for stage in ("pretrain", "sft", "damaged"):
        if stage == "damaged":
            with torch.no_grad():
                model.final_norm.weight[0] = float("nan")
        save_checkpoint(
            folder / f"{stage}.pth", model_state=model.state_dict(), config=model.config, tokenizer=tokenizer,
            stage="pretrain" if stage == "pretrain" else "sft",
        )  # fmt: skip
    return folder


def run(folder, options, capsys):
    """Exit status, what was printed, and what was reported."""
    with pytest.raises(SystemExit) as exit:
        run_main(lambda: main(shlex.split(f"--device cpu --num_threads 1 --model_path {folder}/{options}")))
    printed, reported = capsys.readouterr()
    return exit.value.code, printed, reported


def test_the_command_line_prints_the_answer_and_its_speed(checkpoints, tokenizer, capsys):
    """A fine-tuned model answers, a pretrained one continues, unless --chat says otherwise."""
    model = random_model("modern")
    for options, chat in (("sft.pth", True), ("pretrain.pth", False), ("pretrain.pth --chat", True)):
        status, printed, reported = run(checkpoints, f"{options} --prompt hi --temperature 0 --max_gen_len 9", capsys)
        text = generate_with_kv_cache(model, tokenizer, "hi", 9, temperature=0, chat=chat)
        assert (status, printed) == (0, text + "\n")
        speed = r"\n\d tokens in [\d.]+ s, \d+ tokens/s, the first after \d+ ms"
        assert re.fullmatch(speed + r"(; \d+ of \d+ drafted tokens were right)?\n", reported)


def test_the_command_line_has_the_other_ways_of_generating_too(checkpoints, tokenizer, capsys):
    model = random_model("modern")
    settings = dict(max_gen_len=9, chat=True)
    for options, expected in (
        ("--n 2 --seed 1", generate_with_kv_cache(model, tokenizer, "hi", n=2, seed=1, **settings)),
        ("--num_beams 3 --n 2", generate_with_kv_cache(model, tokenizer, "hi", num_beams=3, n=2, **settings)),
    ):
        status, printed, _ = run(checkpoints, f"sft.pth --prompt hi --max_gen_len 9 {options}", capsys)
        assert (status, printed) == (0, "".join(text + "\n" for text in expected))
    status, printed, _ = run(
        checkpoints, "sft.pth --prompt hi --max_gen_len 99 --overflow slide --ignore_eos --cache_dtype int8", capsys
    )
    assert status == 0 and printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("sft.pth", "--prompt is missing"),
        ("sft.pth --prompt ''", "--prompt is empty"),
        (
            "sft.pth --prompt a --temperature nan --top_k -1",
            "--temperature must be a number of at least 0, not nan; --top_k",
        ),
        ("sft.pth --prompt a --max_gen_len 0", "--max_gen_len must be a whole number of at least 1, not 0"),
        ("sft.pth --prompt a --stop ''", "--stop must be"),
        ("sft.pth --prompt a --top_k 301", "top_k must be a whole number from 0 to 300, the size of the vocabulary"),
        ("sft.pth --prompt a --num_beams 2 --stop b", "--num_beams and stop do not go together"),
        (f"sft.pth --prompt {'x' * 80}", "and the model's context only 64"),
        ("damaged.pth --prompt a", "NaN or infinity"),
        ("missing.pth --prompt a", "missing.pth does not exist"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line_are_named_in_one_sentence(checkpoints, capsys, options, words):
    status, printed, reported = run(checkpoints, options, capsys)
    (sentence,) = reported.strip().splitlines()
    assert (status, printed) == (2, "")
    assert sentence.startswith("error: ") and words in sentence


def test_cache_holds_zeros_and_refuses_more_than_it_holds():
    """Cells that were never written are zeros (NaN would leak through a mask); a full cache is an error, not a wrap."""
    cache = KVCache(n_layers=1, batch_size=1, n_kv_heads=1, max_len=2, head_dim=4)
    assert cache.keys.eq(0).all() and cache.values.eq(0).all()
    with pytest.raises(ValueError, match="holds 2 positions"):
        cache.append(0, torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
