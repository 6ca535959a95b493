"""A public model, for real: SmolLM2-135M-Instruct, whose file the variable SMOLLM2_GGUF names.

    bash tests/with_public_model.sh    # fetches it, 93 MB, and runs these tests
"""

import os
from pathlib import Path

import pytest
import torch

from checkpoint import load_model
from exchange import export_model, import_model
from gpt_model import IGNORED_LABEL
from inference.engine import Engine
from inference.quantizer import perplexity_and_choices, prepare_for_inference
from inference.sampling import SamplingParams

FILE = Path(os.environ.get("SMOLLM2_GGUF", "missing"))
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="SMOLLM2_GGUF names no file of SmolLM2-135M-Instruct")

PROMPTS = [
    "What is the capital of France?", "Why is the sky blue?", "Write a haiku about rain.", "What is 17 + 25?",
    "Name three noble gases.", "Explain gravity to a child.", "What is 'thank you' in Spanish?", "Who wrote Hamlet?",
    "List the primary colours.", "What does a compiler do?", "How do plants drink?", "Give me a synonym of 'happy'.",
    "def add(a, b):", "What is the boiling point of water?", "Tell me a joke.", "What is a prime number?",
    "Name a large river in Africa.", "Why do we sleep?", "How many days has a leap year?", "Say hello in Italian.",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """Folder, model and tokenizer."""
    folder = tmp_path_factory.mktemp("smollm")
    import_model.main([f"--from={FILE}", f"--output_path={folder / 'smollm2.pth'}"])
    model, tokenizer, _ = load_model(folder / "smollm2.pth")
    return folder, model, tokenizer


def prompt_ids(tokenizer):
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return [tokenizer.encode_chat(each, add_generation_prompt=True)["input_ids"] for each in conversations]


def test_it_answers(smollm):
    _, model, tokenizer = smollm
    (answer,) = Engine(model, tokenizer).run(PROMPTS[:1], SamplingParams(30, temperature=0), True)
    assert answer.ended and "Paris" in answer.text


def test_int8_keeps_what_it_says(smollm):
    """Of the answers that the model itself writes the tokens; of a text that it does not, the perplexity."""
    _, model, tokenizer = smollm
    prompts = prompt_ids(tokenizer)
    answers = Engine(model, tokenizer).run(prompts, SamplingParams(48, temperature=0))
    pairs = [(ids, answer.token_ids) for ids, answer in zip(prompts, answers, strict=True)]
    samples = [([*ids, *written], [*[IGNORED_LABEL] * len(ids), *written]) for ids, written in pairs]
    int8 = prepare_for_inference(model, "int8")
    _, choices = perplexity_and_choices(int8, samples)
    # At each position, the token that follows there
    followers = torch.cat([torch.tensor([*labels[1:], IGNORED_LABEL]) for _, labels in samples])
    written = followers != IGNORED_LABEL
    same = (choices == followers)[written].float().mean().item()
    text = (Path(import_model.__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    ids = tokenizer.encode(text)["input_ids"][:1024]
    (before, _), (after, _) = (perplexity_and_choices(each, [(ids, ids)]) for each in (model, int8))
    print(f"perplexity {before:.4f} → {after:.4f}, the same token at {same:.1%} of {int(written.sum())}")
    assert same >= 0.965 and after <= 1.005 * before


def test_transformers_computes_the_same_from_the_export(smollm):
    transformers = pytest.importorskip("transformers")
    folder, model, tokenizer = smollm
    export_model.main([f"--model_path={folder / 'smollm2.pth'}", f"--output_dir={folder / 'out'}"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", dtype="auto")
    ids = torch.tensor([prompt_ids(tokenizer)[1]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids)["logits"], atol=1e-3, rtol=0)


def test_llama_cpp_writes_the_same_greedy_tokens(smollm):
    """From an F32 copy of the same weights, token by token up to the first tie, which the logits show."""
    xllamacpp = pytest.importorskip("xllamacpp")
    folder, model, tokenizer = smollm
    export_model.main([f"--model_path={folder / 'smollm2.pth'}", f"--output_dir={folder / 'gguf'}", "--gguf=F32"])
    (path,) = (folder / "gguf").glob("*.gguf")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(path), 512, 1, False
    settings.verbosity = 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    theirs = xllamacpp.Server(settings)
    prompts = prompt_ids(tokenizer)
    answers = Engine(model, tokenizer).run(prompts, SamplingParams(32, temperature=0))
    n_equal = n_tokens = ties = 0
    for ids, answer in zip(prompts, answers, strict=True):
        asked = {"prompt": ids, "n_predict": 32, "temperature": 0, "logprobs": 1, "cache_prompt": False}
        written = [token["id"] for token in theirs.handle_completions(asked)["choices"][0]["logprobs"]["content"]]
        pairs = enumerate(zip(written, answer.token_ids, strict=False))
        place = next((index for index, (one, other) in pairs if one != other), len(answer.token_ids))
        n_equal, n_tokens = n_equal + place, n_tokens + len(answer.token_ids)
        if place < len(answer.token_ids):
            logits = model(torch.tensor([[*ids, *answer.token_ids[:place]]]))["logits"][0, -1]
            assert logits[answer.token_ids[place]] - logits[written[place]] < 0.01, (PROMPTS, place)
            ties += 1
    print(f"{n_equal} of {n_tokens} greedy tokens equal llama.cpp's, {ties} of {len(prompts)} answers part at a tie")
