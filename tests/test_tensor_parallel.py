"""Several processes serve one model as one does: the same tokens, and one end for all.

There is one start of two CPU processes over gloo; both run `work_as_a_rank`, all cases one after another, and rank 0
writes down what it saw beside what one process computes.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from conftest import TINY, randomize  # noqa: E402
from on_ranks import run_on_ranks  # noqa: E402
from plain_generation import CONTEXT, GREEDY, PROMPTS, prompt, tokens_of  # noqa: E402

from command_line import UserError  # noqa: E402
from gpt_model import GPTConfig, GPTModel  # noqa: E402
from inference.engine import Engine  # noqa: E402
from inference.gpu_step import GpuStep  # noqa: E402
from inference.quantizer import prepare_for_inference  # noqa: E402
from inference.request import RequestFailed  # noqa: E402
from inference.sampling import SamplingParams  # noqa: E402
from inference.speculation import PromptLookup  # noqa: E402
from inference.tensor_parallel import Ranks, cut, lost_sentence  # noqa: E402

DRAWN = [
    replace(SamplingParams(20, seed=seed, ignore_eos=True), **changes)
    for seed, changes in enumerate(
        [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1, "logprobs": 2},
         {"repetition_penalty": 1.3}, {"logit_bias": {5: 3.0}}, {"prompt_logprobs": 1}]
    )
]  # fmt: skip
WIDE = {"d_model": 64}  # so that half a row is a group of INT4 weights

# name → architecture, kind of weights, sizes of the model, settings of the engine
CASES = {
    "gpt2, drafted": ("gpt2", "fp32", {}, {"drafter": True}),
    "modern": ("modern", "fp32", {}, {}),
    "a head of its own, in chunks, put back": (
        *("modern", "fp32", {"vocab_size": 97, "tie_embeddings": False}),
        {"max_running": 3, "prefill_chunk": 30, "cache_tokens": CONTEXT},
    ),
    "int8, in the cache, too": ("modern", "int8", {}, {"cache_dtype": torch.int8}),
    "int4": ("gpt2", "int4", WIDE, {}),
}


def make_model(architecture, weights, **sizes):
    if architecture == "modern":
        sizes = {"n_kv_heads": 2, **sizes}
    model = GPTModel.from_config(GPTConfig.for_architecture(architecture, **TINY | {"max_seq_len": CONTEXT} | sizes))
    randomize(model)
    return prepare_for_inference(model, weights)


def make_engine(model, drafter=False, **settings):
    return Engine(model, None, drafter=PromptLookup() if drafter else None, **settings)


def answers(engine):
    """To all prompts at once, then to requests that come and go between steps."""
    found = [tokens_of(engine.run(PROMPTS, params)) for params in (GREEDY, DRAWN)]
    early = [engine.submit(ids, params) for ids, params in zip(PROMPTS[:4], DRAWN, strict=False)]
    for _ in range(4):
        engine.step()
    late = [engine.submit(ids, replace(params, n=2)) for ids, params in zip(PROMPTS[4:], DRAWN[4:7], strict=False)]
    early[2].cancel()
    for _ in range(3):
        engine.step()
    late[1].cancel()
    going = [sample for request in (*early[:2], early[3], late[0], late[2]) for sample in request.samples]
    found.append([request.result().token_ids for request in going])
    assert engine.cache.n_used == 0 or engine.running
    return found


def spoil(model):
    """One token's embedding is not finite."""
    model.token_embedding.weight.data[9] = torch.nan
    return model


def beside_a_failing_one(engine):
    """The answer beside a request that is not finite, and those after it, which get its cells."""
    good = next(ids for ids in PROMPTS if 9 not in ids and len(ids) > 1)
    failing, fine = engine.submit([3, 9, 4], GREEDY), engine.submit(good, GREEDY)
    with pytest.raises(RequestFailed, match="not finite"):
        failing.result()
    return [fine.result().token_ids, *tokens_of(engine.run([good] * 3, GREEDY))]


def work_as_a_rank(folder):
    torch.set_num_threads(1)
    cpu, found = torch.device("cpu"), {}

    def together(model, work, **settings):
        """What rank 0's engine finds; None on the other, which follows."""
        group = Ranks.start(cpu)
        share = cut(model, group.rank, group.n_ranks)
        if group.rank:
            return group.follow(share)
        engine = make_engine(share, ranks=group, **settings)
        result = work(engine)
        engine.close()
        return result

    for name, (architecture, weights, sizes, settings) in CASES.items():
        found[name] = together(make_model(architecture, weights, **sizes), answers, **settings)
    own_head = {"tie_embeddings": False}
    found["not finite"] = together(spoil(make_model("gpt2", "fp32", **own_head)), beside_a_failing_one)

    group = Ranks.start(cpu)
    try:
        group.agreed(lambda: cut(make_model("gpt2", "fp32", n_heads=1), group.rank, group.n_ranks))
    except (UserError, SystemExit) as end:
        found["misfit"] = str(end)
    share = cut(make_model("gpt2", "fp32"), group.rank, group.n_ranks)
    if group.rank:  # rank 0 ends without a word
        with pytest.raises(SystemExit, match=lost_sentence(0)):
            group.follow(share)
    else:
        group._others[0].close()

    group = Ranks.start(cpu)
    share = cut(make_model("gpt2", "fp32"), group.rank, group.n_ranks)
    if group.rank:  # rank 1 ends in the middle of a step
        repeat, n_steps = GpuStep.repeat, []

        def ending(step, arrays):
            n_steps.append(1)
            if len(n_steps) == 5:
                os._exit(0)
            repeat(step, arrays)

        GpuStep.repeat = ending
        group.follow(share)
    engine = make_engine(share, ranks=group)
    with engine:
        request = engine.submit(prompt(5), GREEDY)
        with pytest.raises(RequestFailed, match="out of step|process 1 of the model has ended"):
            request.result(timeout=60)
        assert engine.dead and len(request.token_ids) == 4
        found["lost"] = engine.failure
    Path(folder, "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(2, "test_tensor_parallel", folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_tokens_of_one(found, name):
    """Greedy and drawn in all ways, together and with others coming and leaving."""
    architecture, weights, sizes, settings = CASES[name]
    assert found[name] == answers(make_engine(make_model(architecture, weights, **sizes), **settings))


def test_what_is_not_finite_fails_alone(found):
    model = spoil(make_model("gpt2", "fp32", tie_embeddings=False))
    assert found["not finite"] == beside_a_failing_one(make_engine(model))


def test_one_end_for_all(found):
    """Where a model does not fit, rank 0 says it in a sentence; where a process ends, what the others say."""
    assert "2 processes cut each layer in 2, and the model's n_heads is 1" in found["misfit"]
    assert "out of step" in found["lost"] or found["lost"] == lost_sentence(1)


@pytest.mark.parametrize(
    ("sentence", "architecture", "weights", "sizes"),
    [
        ("the model's n_kv_heads is 2", "modern", "fp32", {}),
        ("a mixture of experts is not cut", "moe", "fp32", {}),
        ("share of 8 of a row's int4 weights", "gpt2", "int4", {}),
        ("has int8_dynamic weights", "gpt2", "int8_dynamic", {}),
    ],
)
def test_what_cannot_be_cut_is_refused(sentence, architecture, weights, sizes):
    with pytest.raises(UserError, match=sentence):
        cut(make_model(architecture, weights, **sizes), 0, 4)


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_a_share_is_a_part_of_the_model_and_of_its_memory(weights):
    """What is cut adds up to the whole; the rest, whole on each rank, are embeddings and norms."""
    whole = make_model("modern", weights, **WIDE, tie_embeddings=False)
    shares = [cut(make_model("modern", weights, **WIDE, tie_embeddings=False), rank, 2) for rank in (0, 1)]

    def n_bytes(model, cut_part):
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return sum(
            tensor.untyped_storage().nbytes() for name, tensor in tensors.items() if ("_proj" in name) == cut_part
        )

    assert sum(n_bytes(share, True) for share in shares) - n_bytes(whole, True) <= 2 * 4 * 64 * 2 * 2  # scales
    assert shares[0].config.n_kv_heads == 1 and shares[0].config.head_dim == whole.config.head_dim
    assert sum(len(share.lm_head.linear.weight) for share in shares) == whole.config.vocab_size
