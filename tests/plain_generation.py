"""What the tests of the engine compare it with: the plainest loop, and prompts of all lengths."""

import torch

from inference.sampling import SamplingParams

CONTEXT = 128
GREEDY = SamplingParams(max_gen_len=20, temperature=0, ignore_eos=True)


def prompt(length, seed=0):
    """Random token ids without special tokens."""
    return torch.randint(10, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt(length, seed) for seed, length in enumerate((5, 1, 40, 17, 90, 16, 33, 3))]


@torch.no_grad()
def alone(model, ids, n_tokens):
    """The plainest greedy loop: no cache, no batch."""
    ids = list(ids)
    for _ in range(n_tokens):
        ids.append(int(model(torch.tensor([ids[-model.config.max_seq_len :]]))["logits"][0, -1].argmax()))
    return ids[-n_tokens:]


def tokens_of(generations):
    return [generation.token_ids for generation in generations]
