"""The encoder–decoder Transformer of "Attention Is All You Need" (arXiv:1706.03762), of the GPT's own components.

An encoder reads the whole source at once; a decoder, a GPT with one more attention in each layer, writes the target
and looks at what the encoder made of the source. Read in this order: attention between two sequences, the two kinds of
layer, the model, its search for the likeliest target.

Shapes: B batch, S source tokens, T target tokens, D = d_model, H heads, K = D / H, V target vocabulary, W beams.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from byte_level_bpe import IGNORED_LABEL
from command_line import beyond_bounds, option
from transformer_components import (
    POSITIONS,
    FeedForwardNetwork,
    KVCache,
    MultiHeadAttention,
    attend,
)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": partial(F.gelu, approximate="tanh"),
}


@dataclass
class Seq2SeqConfig:
    """Everything that determines the model's function and the names and shapes of its weights.

    Raises:
        ValueError: what is not allowed or does not go together.
    """

    src_vocab: int = option(MISSING, "tokens of the source language", at_least=1)
    tgt_vocab: int = option(MISSING, "tokens of the target language", at_least=1)
    d_model: int = option(256, "width of the residual stream", at_least=1)
    num_heads: int = option(4, "heads of each attention", at_least=1)
    num_encoder_layers: int = option(3, "layers of the encoder", at_least=1)
    num_decoder_layers: int = option(3, "layers of the decoder", at_least=1)
    d_ff: int | None = option(None, "inner width of the feed-forward networks; None: 4 × d_model", at_least=1)
    max_seq_len: int = option(128, "longest source and longest target, in tokens", at_least=1)
    dropout: float = option(0.1, "share that is dropped in training", at_least=0, below=1)
    pad_token_id: int = option(1, "the token that fills up rows", at_least=0)
    position: str = option("sinusoidal", "kind of positions", choices=("sinusoidal", "learned"))
    norm_first: bool = option(True, "norms before each branch (arXiv:2002.04745), not after it as in the paper")
    activation: str = option("relu", "of the feed-forward networks", choices=tuple(ACTIVATIONS))
    norm_eps: float = option(1e-5, "epsilon of all norms", above=0)
    share_embeddings: bool = option(True, "one table for source, target and output, if the vocabulary is one (3.4)")

    def __post_init__(self) -> None:
        self.d_ff = self.d_ff or 4 * self.d_model
        complaints = beyond_bounds(self, prefix="")
        if not complaints and self.d_model % self.num_heads:
            complaints.append(f"d_model {self.d_model} must be a multiple of num_heads {self.num_heads}")
        if not complaints and self.pad_token_id >= min(self.src_vocab, self.tgt_vocab):
            complaints.append(f"pad_token_id {self.pad_token_id} is outside of a vocabulary")
        if complaints:
            raise ValueError("; ".join(complaints))
        self.share_embeddings = self.share_embeddings and self.src_vocab == self.tgt_vocab

    # What the one training loop asks of any model's description, to tell how much of the machine's speed is used. A
    # source token passes the encoder, a target token the decoder, and there are about as many of either.
    vocab_size = property(lambda self: self.tgt_vocab)
    n_layers = property(lambda self: self.num_encoder_layers + 2 * self.num_decoder_layers)  # by attentions
    n_heads = property(lambda self: self.num_heads)
    head_dim = property(lambda self: self.d_model // self.num_heads)
    tie_embeddings = True


# -- attention between two sequences, and the layers -------------------------------------------------------------------


class Attention(MultiHeadAttention):
    """Attention of one sequence to another, or of a sequence to all of itself; its weights on request."""

    def keys_and_values(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries meet: (B, S, D) twice → (B, H, S, K) twice. For a source they are computed once."""
        return self._split_heads(self.key_proj(key)), self._split_heads(self.value_proj(value))

    def attend_to(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The attention of queries (B, T, D) to `keys_and_values`, (B, T, D)."""
        if mask is None:  # which would mean causal
            mask = keys.new_ones(1, 1, 1, keys.size(2), dtype=torch.bool)
        dropout = self.dropout if self.training else 0.0
        attended = attend(self._split_heads(self.query_proj(query)), keys, values, mask, dropout)  # (B, H, T, K)
        return self.output_proj(attended.transpose(1, 2).flatten(2))  # (B, T, D)

    def weights(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """How much each query looks at each key, (B, H, T, S); the fused kernel keeps this to itself."""
        keys, _ = self.keys_and_values(key, key)
        scores = self._split_heads(self.query_proj(query)) @ keys.mT / math.sqrt(self.head_dim)  # (B, H, T, S)
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend from query (B, T, D) to key and value (B, S, D); returns (B, T, D).

        Args:
            mask: boolean, broadcastable to (B, H, T, S), True where a query may look; None: everywhere.
        """
        return self.attend_to(query, *self.keys_and_values(key, value), mask)


class Network(FeedForwardNetwork):
    """The position-wise network with the paper's activation (3.3), or GELU."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config.d_model, config.d_ff, config.dropout)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.down_proj(self.dropout(self.activation(self.up_proj(x))))


class _Layer(nn.Module):
    """Branches beside a residual stream, each with a norm before or after it."""

    def __init__(self, config: Seq2SeqConfig, *norms: str) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        for name in norms:
            setattr(self, name, nn.LayerNorm(config.d_model, eps=config.norm_eps))
        self.feed_forward = Network(config)
        self.dropout = nn.Dropout(config.dropout)

    def _add(self, x: torch.Tensor, norm: nn.Module, branch: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """x + branch(norm(x)), or in the paper's order norm(x + branch(x))."""
        if self.norm_first:
            return x + self.dropout(branch(norm(x)))
        return norm(x + self.dropout(branch(x)))


class EncoderLayer(_Layer):
    """Every source token looks at all of the source, then passes the feed-forward network."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config, "attention_norm", "feed_forward_norm")
        self.attention = Attention(config.d_model, config.num_heads, dropout=config.dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, S, D) → (B, S, D); mask as in `Attention.forward`."""
        x = self._add(x, self.attention_norm, lambda normed: self.attention(normed, normed, normed, mask))
        return self._add(x, self.feed_forward_norm, self.feed_forward)


class DecoderLayer(_Layer):
    """Every target token looks at those before it, then at the source, then passes the feed-forward network."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config, "attention_norm", "cross_attention_norm", "feed_forward_norm")
        self.attention = MultiHeadAttention(config.d_model, config.num_heads, dropout=config.dropout)  # the GPT's own
        self.cross_attention = Attention(config.d_model, config.num_heads, dropout=config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        source: tuple[torch.Tensor, torch.Tensor],
        source_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> torch.Tensor:
        """(B, T, D) → (B, T, D).

        Args:
            source: this layer's `cross_attention.keys_and_values` of the source.
            source_mask: boolean, broadcastable to (B, H, T, S), True where there is no padding.
            cache, layer: of the target so far, as in `MultiHeadAttention.forward`.
        """
        x = self._add(x, self.attention_norm, lambda normed: self.attention(normed, cache=cache, layer=layer))
        cross = self.cross_attention
        x = self._add(x, self.cross_attention_norm, lambda normed: cross.attend_to(normed, *source, source_mask))
        return self._add(x, self.feed_forward_norm, self.feed_forward)


# -- the model ---------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """What the decoder needs of a batch of sources, computed once: keys and values for each of its layers, the mask."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]  # (B, H, S, K) twice, for each layer
    mask: torch.Tensor  # (B, 1, 1, S)

    def repeat(self, times: int) -> Source:
        """Each source `times` times in a row."""
        layers = [tuple(part.repeat_interleave(times, dim=0) for part in layer) for layer in self.layers]
        return Source(layers, self.mask.repeat_interleave(times, dim=0))


class Transformer(nn.Module):
    """An encoder–decoder Transformer. The arguments are the fields of `Seq2SeqConfig`."""

    def __init__(
        self,
        src_vocab: int,
        tgt_vocab: int,
        d_model: int = 256,
        num_heads: int = 4,
        num_encoder_layers: int = 3,
        num_decoder_layers: int = 3,
        d_ff: int | None = None,
        max_seq_len: int = 128,
        dropout: float = 0.1,
        pad_token_id: int = 1,
        **switches: Any,
    ) -> None:
        super().__init__()
        self.config = config = Seq2SeqConfig(
            src_vocab, tgt_vocab, d_model, num_heads, num_encoder_layers, num_decoder_layers, d_ff, max_seq_len,
            dropout, pad_token_id, **switches,
        )  # fmt: skip
        self.label_smoothing = 0.0  # of the loss in training
        self.recompute_activations = False  # True trades time for memory in training
        self.src_embedding = nn.Embedding(src_vocab, d_model)
        self.tgt_embedding = nn.Embedding(tgt_vocab, d_model)
        self.src_positions, self.tgt_positions = (POSITIONS[config.position](config) for _ in range(2))
        self.embedding_dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(num_encoder_layers))
        self.encoder_norm = nn.LayerNorm(d_model, eps=config.norm_eps)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(num_decoder_layers))
        self.decoder_norm = nn.LayerNorm(d_model, eps=config.norm_eps)
        self.lm_head = nn.Linear(d_model, tgt_vocab, bias=False)
        self.initialize_weights()
        self.lm_head.weight = self.tgt_embedding.weight
        if config.share_embeddings:
            self.src_embedding.weight = self.tgt_embedding.weight

    @classmethod
    def from_config(cls, config: Seq2SeqConfig) -> Transformer:
        """A model with freshly initialised weights."""
        return cls(**vars(config))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder_norm.weight.device

    def initialize_weights(self) -> None:
        """Glorot's initialisation of matrices; embeddings of variance 1/D, which leave the model scaled by √D."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.d_model**-0.5)

    def num_parameters(self) -> int:
        """How many numbers training can change; tied weights count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Source:
        """Read sources (B, S).

        Args:
            attention_mask: (B, S), 1 for tokens and 0 for padding; None: whatever is not `pad_token_id` is a token.
        """
        memory, mask = self.encoder_states(input_ids, attention_mask)
        return Source([layer.cross_attention.keys_and_values(memory, memory) for layer in self.decoder], mask)

    def encoder_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's normed output (B, S, D), and the mask (B, 1, 1, S) of what is no padding in it."""
        if input_ids.size(1) > self.config.max_seq_len:
            raise ValueError(f"{input_ids.size(1)} tokens do not fit into max_seq_len {self.config.max_seq_len}")
        mask = input_ids.ne(self.config.pad_token_id) if attention_mask is None else attention_mask.bool()
        mask = mask[:, None, None, :]  # (B, 1, 1, S)
        scaled = self.src_embedding(input_ids) * math.sqrt(self.config.d_model)
        x = self.embedding_dropout(self.src_positions.add_to(scaled, slice(0, input_ids.size(1))))  # (B, S, D)
        for layer in self.encoder:
            x = self._run(layer, x, mask)  # (B, S, D)
        return self.encoder_norm(x), mask

    def decode(self, decoder_input_ids: torch.Tensor, source: Source, cache: KVCache | None = None) -> torch.Tensor:
        """The logits (B, T, V) of the target tokens after each of decoder_input_ids (B, T); padding on the right.

        Args:
            cache: keys and values of the target so far; the new tokens are added to it.
        """
        past, n_tokens = 0 if cache is None else cache.length, decoder_input_ids.size(1)
        if past + n_tokens > self.config.max_seq_len:
            raise ValueError(f"{past + n_tokens} tokens do not fit into max_seq_len {self.config.max_seq_len}")
        scaled = self.tgt_embedding(decoder_input_ids) * math.sqrt(self.config.d_model)
        x = self.embedding_dropout(self.tgt_positions.add_to(scaled, slice(past, past + n_tokens)))  # (B, T, D)
        for index, layer in enumerate(self.decoder):
            x = self._run(layer, x, source.layers[index], source.mask, cache, index)  # (B, T, D)
        if cache is not None:
            cache.advance(n_tokens)
        return self.lm_head(self.decoder_norm(x))  # (B, T, V)

    def _run(self, layer: nn.Module, *inputs: Any) -> torch.Tensor:
        if self.recompute_activations and torch.is_grad_enabled():
            return recompute_in_backward(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def forward(
        self,
        input_ids: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """Logits of the next target token and, with labels, their mean cross-entropy.

        Args:
            input_ids: (B, S) int64, sources.
            decoder_input_ids: (B, T) int64, targets that begin with a token of their own, padded on the right.
            attention_mask: see `encode`.
            labels: (B, T) int64, what is to follow each token (no shift happens here); −100 is ignored.

        Returns:
            {"logits": (B, T, V), "loss": in nats a token, None without labels}; where the loss is smoothed, which it is
            in training only (arXiv:1512.00567, section 7), "nll" is the plain one; in eval mode also "token_accuracy",
            the share of labels that are the likeliest tokens.
        """
        logits = self.decode(decoder_input_ids, self.encode(input_ids, attention_mask))  # (B, T, V)
        if labels is None:
            return {"logits": logits, "loss": None}
        flat, targets = logits.flatten(0, 1).float(), labels.flatten()  # (B·T, V), (B·T,)
        nll = F.cross_entropy(flat, targets, ignore_index=IGNORED_LABEL)
        if not self.training:
            right = (logits.argmax(dim=-1) == labels).sum() / labels.ne(IGNORED_LABEL).sum().clamp(min=1)
            return {"logits": logits, "loss": nll, "token_accuracy": right}
        if not self.label_smoothing:
            return {"logits": logits, "loss": nll}
        smoothing = self.label_smoothing
        smoothed = F.cross_entropy(flat, targets, ignore_index=IGNORED_LABEL, label_smoothing=smoothing)
        return {"logits": logits, "loss": smoothed, "nll": nll}

    # ----------------------------------------------------------------------------------------------------- the search

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        bos_token_id: int,
        eos_token_id: int,
        max_gen_len: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The best targets that a beam search of `num_beams` finds for a batch of sources; 1 is greedy.

        A target of n tokens, its end included, scores Σ log p / n ^ length_penalty. The search of a source ends when it
        has `num_beams` targets and none of its beams, as long as they are, beats the worst of these.

        Args:
            input_ids: (B, S) int64, padded with `pad_token_id`.
            max_gen_len: at most so many tokens; 0, and never more than, what the context holds.

        Returns:
            (B, n) int64, without the first token, with the end where there is one, padded with `pad_token_id`.
        """
        was_training = self.training
        self.eval()
        try:
            source = self.encode(input_ids, attention_mask).repeat(num_beams)
            room = self.config.max_seq_len
            steps = min(max_gen_len or room, room)
            return self._search(source, bos_token_id, eos_token_id, steps, num_beams, length_penalty)
        finally:
            self.train(was_training)

    def _search(
        self, source: Source, bos: int, eos: int, steps: int, width: int, length_penalty: float
    ) -> torch.Tensor:
        config, rows = self.config, source.mask.size(0)
        batch, device = rows // width, self.device
        cache = KVCache(
            config.num_decoder_layers, rows, config.num_heads, steps, config.head_dim, device,
            self.decoder_norm.weight.dtype,
        )  # fmt: skip
        ids = torch.full((batch, width, steps), config.pad_token_id, device=device)  # of the beams that go on
        sums = torch.full((batch, width), -torch.inf, device=device)
        sums[:, 0] = 0.0  # at first all beams of a source are the same
        best, scores = ids.clone(), torch.full_like(sums, -torch.inf)  # of the targets that have ended
        over = torch.zeros(batch, 1, dtype=torch.bool, device=device)  # which searches have ended
        new_ids = torch.full((rows, 1), bos, device=device)
        for length in range(1, steps + 1):
            logits = self.decode(new_ids, source, cache)[:, -1].float()  # (B·W, V)
            logits[:, config.pad_token_id] = -torch.inf  # it says that nothing follows
            totals = sums.unsqueeze(2) + logits.log_softmax(dim=-1).view(batch, width, -1)  # (B, W, V)
            # So many that W beams go on even if each of the best ends here
            found = totals.flatten(1).topk(min(2 * width, totals[0].numel()))  # (B, 2W), best first
            beam, token = found.indices // totals.size(2), found.indices % totals.size(2)
            extended = ids.gather(1, beam.unsqueeze(2).expand(-1, -1, steps))  # (B, 2W, steps)
            extended[:, :, length - 1] = token
            ends = (token == eos) | (length == steps)
            ends[:, width:] = False  # those further down are only there to go on
            ends &= ~over  # or a source's target would depend on how long others take
            done = found.values.masked_fill(~ends, -torch.inf) / length**length_penalty  # (B, 2W)
            scores, kept = torch.cat((scores, done), dim=1).topk(width)  # (B, W)
            best = torch.cat((best, extended), dim=1).gather(1, kept.unsqueeze(2).expand(-1, -1, steps))
            sums, kept = found.values.masked_fill(token == eos, -torch.inf).topk(width)  # (B, W)
            over |= (sums[:, :1] / length**length_penalty <= scores[:, -1:]) | (length == steps)
            if bool(over.all()):
                break
            ids = extended.gather(1, kept.unsqueeze(2).expand(-1, -1, steps))
            first_row = torch.arange(batch, device=device).unsqueeze(1) * width  # (B, 1)
            cache.keep_rows((first_row + beam.gather(1, kept)).flatten())
            new_ids = token.gather(1, kept).view(rows, 1)
        best = best[:, 0]  # (B, steps)
        return best[:, : int(best.ne(config.pad_token_id).sum(dim=1).max())]
