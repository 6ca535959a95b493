"""The engine's cache: no block has two owners, prompts that begin alike share, attention reads the right cells."""

import random

import pytest
import torch

from command_line import UserError
from gpt_model import GPTConfig
from inference import paged_cache
from inference.cache_blocks import BlockPool, CachedSequence
from inference.kernels import paged_attention
from inference.kernels.paged_attention import BLOCK_SIZE
from inference.paged_cache import PagedCache

# -- blocks ------------------------------------------------------------------------------------------------------------


def stored(pool, tokens, slot=0):
    """A sequence of these tokens, all of them computed."""
    sequence = CachedSequence(slot)
    pool.share(sequence, tokens)
    while len(sequence.blocks) * BLOCK_SIZE < len(tokens):
        sequence.blocks.append(pool.take())
    pool.remember(sequence, tokens, len(tokens) - sequence.length)
    return sequence


def test_no_block_has_two_owners_and_none_is_lost():
    """A thousand random openings and closings: blocks in use are those of the open sequences, all others are free, and
    a block belongs to two sequences only where their tokens up to its end are equal."""
    chance, pool, open_ones = random.Random(0), BlockPool(24), []
    n_shared = 0
    for _ in range(1000):
        tokens = [chance.randrange(2)] * chance.randrange(1, 60) + [chance.randrange(3)] * chance.randrange(20)
        if len(open_ones) < 6 and -(-len(tokens) // BLOCK_SIZE) <= len(pool.free):
            open_ones.append((stored(pool, tokens), tokens))
        elif open_ones:
            pool.release(open_ones.pop(chance.randrange(len(open_ones)))[0].blocks)
        users = {}
        for sequence, tokens in open_ones:
            for index, block in enumerate(sequence.blocks):
                users.setdefault(block, []).append(tokens[: (index + 1) * BLOCK_SIZE])
        assert set(users).isdisjoint(pool.free)
        assert len(users) + len(pool.free) == 24
        for block, contents in users.items():
            assert pool.users[block] == len(contents)
            assert all(content == contents[0] for content in contents)
            n_shared += len(contents) > 1
    assert n_shared > 100


def test_a_block_is_found_after_its_own_prefix_only():
    """The same 16 tokens after other tokens are other keys and values."""
    pool = BlockPool(16)
    stored(pool, [1] * BLOCK_SIZE + [2] * BLOCK_SIZE + [3])
    assert len(pool.find([1] * BLOCK_SIZE + [2] * BLOCK_SIZE + [4])) == 2
    assert pool.find([2] * BLOCK_SIZE + [4]) == []
    assert len(pool.find([1] * BLOCK_SIZE + [1] * BLOCK_SIZE + [4])) == 1
    assert len(pool.find([1] * BLOCK_SIZE)) == 0, "the last token has to be computed"


def test_what_was_used_longest_ago_makes_room_first():
    pool = BlockPool(4)
    for token in (1, 2, 3):
        pool.release(stored(pool, [token] * BLOCK_SIZE + [0]).blocks)  # one full block; the other is free to be taken
    pool.release(stored(pool, [1] * BLOCK_SIZE + [0]).blocks)  # used again: now 2 is the oldest
    assert [pool.take() for _ in range(2)] and len(pool.find([2] * BLOCK_SIZE + [0])) == 0
    assert len(pool.find([1] * BLOCK_SIZE + [0])) == len(pool.find([3] * BLOCK_SIZE + [0])) == 1
    assert pool.take() is not None and pool.take() is not None and pool.take() is None


def test_a_forgotten_prefix_is_not_found_through_a_block_that_was_taken_again():
    """A chain of blocks is broken where one of them was handed out: what followed it is unreachable, not wrong."""
    pool = BlockPool(4)
    tokens = [5] * 3 * BLOCK_SIZE + [0]
    sequence = stored(pool, tokens)
    pool.release(sequence.blocks)
    pool.known.pop(pool.keys.pop(sequence.blocks[0]))
    assert pool.find(tokens) == []
    stored(pool, [5] * BLOCK_SIZE + [0])
    assert len(pool.find(tokens)) == 1


def test_forgetting_leaves_nothing_to_find():
    pool = BlockPool(4)
    sequence = stored(pool, [1] * 40)
    pool.forget()
    assert pool.find([1] * 40) == []
    pool.release(sequence.blocks)
    assert len(pool.free) == 4


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def way(cpu_level):
    """Both ways to attend: the C function, as each kind of processor runs it, or PyTorch's operations."""
    return "plain" if paged_attention.load_native(paged_attention.SOURCE) is None else "compiled"


def rows(config, n, generator):
    """Random queries, keys and values of n tokens, laid out as attention hands them over: heads are strided views."""

    def heads(count):
        return torch.randn(1, n, count, config.head_dim, generator=generator).transpose(1, 2)

    return heads(config.n_heads), heads(config.n_kv_heads), heads(config.n_kv_heads)


def by_hand(query, keys, values):
    """Attention of one token's query (H, K) to keys and values (S, G, K), head by head."""
    group = query.size(0) // keys.size(1)
    result = []
    for head, q in enumerate(query):
        k, v = keys[:, head // group], values[:, head // group]
        result.append((k @ q / q.numel() ** 0.5).softmax(dim=0) @ v)
    return torch.stack(result)


@pytest.mark.parametrize("n_kv_heads, head_dim", [(4, 8), (2, 16), (1, 37)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.int8, 2e-2)])
def test_every_token_attends_to_its_own_past(way, n_kv_heads, head_dim, dtype, tolerance):
    """Steps of single tokens, short and long chunks of several sequences at once, against a loop over heads."""
    config = GPTConfig(8, 32, 2, 4, max_seq_len=160, n_kv_heads=n_kv_heads, head_dim=head_dim)
    generator = torch.Generator().manual_seed(0)
    cache = PagedCache(config, 640, 4, dtype, reuse_prefixes=False)
    assert (cache.native is None) == (way == "plain")
    sequences = [cache.open([0] * 160) for _ in range(3)]
    history = {(layer, sequence.slot): ([], []) for layer in range(2) for sequence in sequences}
    for sizes in ([3, 40, 1], [1, 1, 33], [1, 2, 1], [1, 1, 1], [17, 60, 90], [1, 1, 1]):
        spans = sorted(zip(sequences, sizes, strict=True), key=lambda span: span[1])
        cache.begin_step(spans)
        assert list(cache.positions) == [s.length + i for s, size in spans for i in range(size)]
        for layer in range(2):
            query, key, value = rows(config, sum(sizes), generator)
            attended = cache.attend(layer, query, key, value, None)  # (1, H, N, K)
            row = 0
            for sequence, size in spans:
                keys, values = history[layer, sequence.slot]
                for _ in range(size):
                    keys.append(key[0, :, row])
                    values.append(value[0, :, row])
                    expected = by_hand(query[0, :, row], torch.stack(keys), torch.stack(values))
                    torch.testing.assert_close(attended[0, :, row], expected, atol=tolerance, rtol=tolerance)
                    row += 1
        for sequence, size in spans:
            cache.stored(sequence, [], size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("head_dim", [8, 21, 64])
def test_a_token_finds_the_same_alone_and_among_its_neighbours(way, dtype, head_dim):
    """To the last bit, in pieces of any size of a past that is longer than the softmax looks at once."""
    if way == "plain":
        pytest.skip("PyTorch's attention does not promise it")
    config = GPTConfig(8, 32, 1, 2, max_seq_len=320, n_kv_heads=1, head_dim=head_dim)
    query, key, value = rows(config, 300, torch.Generator().manual_seed(0))
    results = []
    for sizes in ([300], [1] * 300, [7, 16, 1, 90, 33, 100, 2, 51]):
        cache = PagedCache(config, 320, 1, dtype, reuse_prefixes=False)
        sequence, found, start = cache.open([0] * 300), [], 0
        for size in sizes:
            cache.begin_step([(sequence, size)])
            piece = slice(start, start + size)
            found.append(cache.attend(0, query[:, :, piece], key[:, :, piece], value[:, :, piece], None))
            cache.stored(sequence, [], size)
            start += size
        results.append(torch.cat(found, dim=2))  # (1, H, 300, K)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_the_cache_cannot_do_is_refused(way):
    """A mask, and heads of other numbers and sizes than it was made for: C would write beyond the end of its memory."""
    config = GPTConfig(vocab_size=8, d_model=32, n_layers=1, n_heads=4, max_seq_len=64, n_kv_heads=2)
    cache = PagedCache(config, 64, 1)
    cache.begin_step([(cache.open([0] * 9), 9)])
    query, key, value = rows(config, 9, torch.Generator().manual_seed(5))
    with pytest.raises(UserError, match="takes no mask"):
        cache.attend(0, query, key, value, torch.ones(9, 9, dtype=torch.bool).tril())
    for wrong in (
        (query[:, :2], key, value),
        (query, query, value),
        (query, key, query),
        (query[..., :4], key[..., :4], value[..., :4]),
        (query, key, value[:, :, :8]),
        (query[:, :, :8], key[:, :, :8], value[:, :, :8]),
    ):
        with pytest.raises(UserError, match="from this model's configuration, and a layer gives it"):
            cache.attend(0, *wrong, None)


def test_c_and_python_must_agree_about_the_size_of_a_block(monkeypatch):
    if paged_attention.load_native(paged_attention.SOURCE) is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(paged_attention, "BLOCK_SIZE", 8)
    with pytest.raises(RuntimeError, match="a block has 8 cells here, and not in paged_attention.c"):
        PagedCache(GPTConfig(vocab_size=8, d_model=32, n_layers=1, n_heads=4, max_seq_len=64), 64, 1)


def test_threads_share_the_work_and_change_nothing(monkeypatch):
    """Each query is computed by one thread, in the same order as ever."""
    if paged_attention.load_native(paged_attention.SOURCE) is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(paged_cache, "WORTH_THREADS", 0)
    config = GPTConfig(vocab_size=8, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        cache = PagedCache(config, 128, 2)
        cache.begin_step([(cache.open([0] * 30), 30), (cache.open([1] * 31), 31)])
        results.append(cache.attend(0, *rows(config, 61, torch.Generator().manual_seed(4)), None))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_both_ways_store_the_same_int8_cells(monkeypatch):
    """Integers and scales are equal bit for bit, so a cache filled one way is read the other way."""
    if paged_attention.load_native(paged_attention.SOURCE) is None:
        pytest.skip("no C compiler")
    config = GPTConfig(vocab_size=8, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)
    caches = [PagedCache(config, 64, 1, torch.int8)]
    monkeypatch.setattr(paged_attention, "load_native", lambda source: None)
    caches.append(PagedCache(config, 64, 1, torch.int8))
    query, key, value = rows(config, 50, torch.Generator().manual_seed(1))
    for cache in caches:
        cache.begin_step([(cache.open([0] * 50), 50)])
        cache.attend(0, query, key, value, None)
    for name in ("keys", "values", "key_scales", "value_scales"):
        assert torch.equal(getattr(caches[0], name), getattr(caches[1], name)), name


def test_cells_of_others_do_not_matter_even_if_they_hold_nan(way):
    """A sequence reads its own blocks only."""
    config = GPTConfig(vocab_size=8, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)
    cache = PagedCache(config, 128, 2)
    mine, other = cache.open([0] * 20), cache.open([1] * 20)
    cache.keys[:, :, other.blocks] = cache.values[:, :, other.blocks] = float("nan")
    cache.begin_step([(mine, 20)])
    assert cache.attend(0, *rows(config, 20, torch.Generator().manual_seed(2)), None).isfinite().all()


def test_scrubbing_writes_zeros_over_what_a_failed_step_has_left():
    config = GPTConfig(vocab_size=8, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)
    cache = PagedCache(config, 64, 1)
    sequence = cache.open([0] * 40)
    cache.begin_step([(sequence, 20)])
    query, key, value = rows(config, 20, torch.Generator().manual_seed(3))
    cache.attend(0, query, key, value, None)
    cache.stored(sequence, [0] * 40, 20)
    cache.begin_step([(sequence, 20)])
    cache.attend(0, query, torch.full_like(key, float("nan")), value, None)
    cache.scrub(sequence)
    assert cache.keys.isfinite().all()
    assert torch.equal(cache.keys[0, :, sequence.blocks[0]], key[0, :, :BLOCK_SIZE].transpose(1, 2))


def test_unused_cells_are_zeros():
    config = GPTConfig(vocab_size=8, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        cache = PagedCache(config, 64, 1, dtype)
        assert cache.keys.dtype == dtype and not cache.keys.any() and not cache.values.any()
