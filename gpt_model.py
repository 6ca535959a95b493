"""The decoder-only language model.

Three presets of one architecture, all of which exist in Hugging Face `transformers`, so that weights can move:

    gpt2    learned positions, LayerNorm, GELU, biases                           = GPT2LMHeadModel
    modern  rotary positions, RMSNorm, SwiGLU, grouped-query attention, QK-norm  = Qwen3ForCausalLM
    moe     the same with experts in the place of each feed-forward network      = Qwen3MoeForCausalLM

The letters of the shapes are explained in transformer_components.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import transformer_components
from byte_level_bpe import IGNORED_LABEL
from inference.sampling import sample_next
from transformer_components import ARCHITECTURES as ARCHITECTURES  # which users import from here
from transformer_components import (
    Cache,
    GPTConfig,
    KVCache,
    MixtureOfExperts,
    Part,
    TransformerDecoderLayer,
    make_norm,
    make_positions,
)


class GPTModel(Part):
    """A decoder-only Transformer language model.

    The arguments are the fields of `GPTConfig`, whose defaults give GPT-2. `GPTModel.from_config(config)` takes them
    together.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 768,
        n_layers: int = 12,
        n_heads: int = 12,
        d_ff: int | None = None,
        max_seq_len: int = 1024,
        dropout: float = 0.0,
        pad_token_id: int = 1,
        **switches: Any,
    ) -> None:
        super().__init__()
        config = GPTConfig(vocab_size, d_model, n_layers, n_heads, d_ff, max_seq_len, dropout, pad_token_id, **switches)
        self.config = config
        self.recompute_activations = False  # True trades time for memory in training
        self.keeps_logits = True  # False saves the memory of all logits in training, which then returns none
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = make_positions(config)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerDecoderLayer.from_config(config) for _ in range(config.n_layers))
        self.final_norm = make_norm(config.norm, config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.initialize_weights()
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.final_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the activations; weight matrices may be of another, quantized one."""
        return self.final_norm.weight.dtype

    def initialize_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02²), branches into the residual stream smaller by √(2 · n_layers)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                into_residual = name.endswith(("output_proj", "down_proj"))
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if into_residual else 0.02
                nn.init.normal_(module.weight, mean=0.0, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def num_parameters(self) -> int:
        """How many numbers training can change; tied weights count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """How many of them compute a token: of experts only those that it passes."""
        experts = (module for module in self.modules() if isinstance(module, MixtureOfExperts))
        return self.num_parameters() - sum(layer.num_idle_parameters() for layer in experts)

    def new_cache(self, batch_size: int, max_len: int) -> KVCache:
        """An empty KV cache for `batch_size` rows of at most `max_len` tokens, where the model's weights are."""
        config = self.config
        return KVCache(
            config.n_layers, batch_size, config.n_kv_heads, max_len, config.head_dim, self.device, self.dtype
        )

    def embed(self, input_ids: torch.Tensor, here: slice | torch.Tensor) -> torch.Tensor:
        """Embeddings (B, T, D) of tokens (B, T) that stand `here`, see `Positions`."""
        return self.embedding_dropout(self.position_embedding.add_to(self.token_embedding(input_ids), here))

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """The final, normed hidden states of input_ids (B, T), as (B, T, D).

        Args:
            attention_mask: (B, S), 1 for tokens and 0 for padding, over the cached and the new tokens. Positions count
                only tokens, so padding on the left changes nothing. Without a cache, attention sees no mask: the tokens
                are moved to the left, where causal attention never looks at the padding behind them, and flash kernels,
                which know no masks, can compute it.
            cache: keys and values of what came before; the new tokens are added to it.
        """
        n_tokens, past = input_ids.size(1), 0 if cache is None else cache.length
        fits = n_tokens <= self.config.max_seq_len and not self.position_embedding.depends_on_length
        if attention_mask is not None and cache is None and fits:
            place = places_on_the_left(attention_mask)  # (B, T)
            hidden = self.hidden_states_at(input_ids.scatter(1, place, input_ids), None)  # (B, T, D)
            return hidden.gather(1, place.unsqueeze(-1).expand_as(hidden))
        if past + n_tokens > self.config.max_seq_len and attention_mask is None:
            raise ValueError(f"{past + n_tokens} tokens do not fit into max_seq_len {self.config.max_seq_len}")
        mask = positions = None
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, past:]  # (B, T)
        if attention_mask is not None or (past and n_tokens > 1):
            mask = visible_keys(n_tokens, past, attention_mask, input_ids.device)  # (B or 1, 1, T, S)
        return self.hidden_states_at(input_ids, positions, mask, cache, past)

    def hidden_states_at(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """`hidden_states` of tokens that stand at any positions, (B, T) int64 or start, start + 1, …

        What a token may look at is up to `mask` (see `transformer_components.attend`) or to a cache that ignores it.
        """
        n_tokens = input_ids.size(1)
        here = slice(start, start + n_tokens) if positions is None else positions
        x, rotary = self.embed(input_ids, here), self.position_embedding.rotary(here)  # (B, T, D)
        for index, layer in enumerate(self.layers):
            if self.recompute_activations and torch.is_grad_enabled() and cache is None:
                x = recompute_in_backward(layer, x, mask, rotary, use_reentrant=False)
            else:
                x = layer(x, mask, rotary, cache, index)  # (B, T, D)
        if cache is not None:
            cache.advance(n_tokens)
        return self.final_norm(x)  # (B, T, D)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: KVCache | None = None,
        segments: torch.Tensor | None = None,
        bounds: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """Next-token logits and, with labels, their mean cross-entropy.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S), 1 for tokens, 0 for padding on either side; None if there is no padding.
            labels: (B, T) int64, aligned with input_ids (the shift by one happens here); −100 is ignored.
            cache: see `hidden_states`.
            segments: (B, T) int64, which of several texts in a row each token is of, if these must not see each other;
                texts are numbered in order, and each one's positions begin at 0. Not with a mask or a cache.
            bounds: (S,) int32, `text_bounds` of the segments, where attention takes them in place of a mask.

        Returns:
            {"logits": (B, T, V), "loss": scalar in nats a token, or None without labels}; in eval mode, with labels,
            also "token_accuracy", the share of them that the likeliest tokens are. In training, with labels, logits are
            None if `keeps_logits` is false.
        """
        if segments is None:
            hidden = self.hidden_states(input_ids, attention_mask, cache)  # (B, T, D)
        else:
            hidden = self.hidden_states_at(input_ids, *places_in_segments(segments, bounds))  # (B, T, D)
        if labels is not None and self.training and not self.keeps_logits:
            if type(self.lm_head) is nn.Linear:
                return {"logits": None, "loss": loss_in_chunks(hidden, self.lm_head.weight, labels)}
            return {"logits": None, "loss": loss_of_any_head(hidden, self.lm_head, labels, self.config.vocab_size)}
        logits = self.lm_head(hidden)  # (B, T, V)
        output = {"logits": logits, "loss": None if labels is None else next_token_loss(logits, labels)}
        if labels is not None and not self.training:
            output["token_accuracy"] = next_token_accuracy(logits, labels)
        return output

    def generate(
        self,
        input_ids: torch.Tensor,
        max_gen_len: int = 64,
        top_k: int = 0,
        temperature: float = 1.0,
        attention_mask: torch.Tensor | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continue a batch of prompts, with a KV cache.

        Args:
            input_ids: (B, T) int64; prompts of different lengths are padded on the left with `pad_token_id`.
            max_gen_len: at most so many new tokens a row; fewer where max_seq_len is reached.
            top_k: sample among the k likeliest tokens; 0 means among all.
            temperature: 0 always takes the likeliest token.
            attention_mask: (B, T), 0 for padding; if None, that is each row's first tokens if they are `pad_token_id`.
            eos_token_id: a row that produces it is finished.
            generator: source of randomness, on the model's device.

        Returns:
            (B, T + n) int64 with n ≤ max_gen_len; after its end a row is filled with `pad_token_id`.
        """
        batch_size, prompt_len = input_ids.shape
        pad_token_id = self.config.pad_token_id
        # What is padding stands on the left: further in, the same token may end a turn
        derived = input_ids.ne(pad_token_id).cumsum(dim=1) > 0  # (B, T)
        mask = derived if attention_mask is None else attention_mask.bool()
        longest = int(mask.sum(dim=1).max()) if prompt_len else 0  # padding takes no position
        if not 1 <= longest <= self.config.max_seq_len:
            raise ValueError(f"a prompt must have 1 to {self.config.max_seq_len} tokens, not {longest}")
        max_len = prompt_len + max(0, min(max_gen_len, self.config.max_seq_len - longest))
        was_training, padded = self.training, not bool(mask.all())
        output = input_ids.new_full((batch_size, max_len), pad_token_id)  # not in inference mode: it may be trained on
        output[:, :prompt_len] = input_ids
        self.eval()
        try:
            with torch.inference_mode():  # a tenth faster than no_grad where single tokens are computed
                cache = self.new_cache(batch_size, max_len)
                rows = torch.arange(batch_size, device=input_ids.device)  # the rows that are still going
                new_ids, length = input_ids, prompt_len
                while length < max_len and len(rows):
                    hidden = self.hidden_states(new_ids, mask if padded else None, cache)[:, -1]  # (B, D)
                    next_ids = sample_next(self.lm_head(hidden), temperature, top_k, generator)  # (B,)
                    output[rows, length] = next_ids
                    length += 1
                    if eos_token_id is not None and bool((ended := next_ids == eos_token_id).any()):
                        rows, next_ids, mask = rows[~ended], next_ids[~ended], mask[~ended]
                        cache.keep_rows(~ended)
                    mask = F.pad(mask, (0, 1), value=True) if padded else mask
                    new_ids = next_ids.unsqueeze(1)  # (B, 1)
            return output[:, :length]
        finally:
            self.train(was_training)


def visible_keys(n_tokens: int, past: int, attention_mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Which keys each new token may look at: itself and every earlier one that is not padding, (B or 1, 1, T, S)."""
    query = torch.arange(past, past + n_tokens, device=device).unsqueeze(1)  # (T, 1)
    key = torch.arange(past + n_tokens, device=device)  # (S,)
    visible = (key <= query)[None, None]  # (1, 1, T, S)
    if attention_mask is not None:
        # A padding token still sees itself: a softmax over nothing would be NaN and spread
        visible = visible & attention_mask.bool()[:, None, None, :] | (key == query)  # (B, 1, T, S)
    return visible


def places_on_the_left(attention_mask: torch.Tensor) -> torch.Tensor:
    """Where each token goes if the tokens of a row are moved together on the left, in order, and its padding behind
    them: (B, T) → (B, T) int64."""
    is_token = attention_mask.bool()
    n_tokens = is_token.sum(dim=1, keepdim=True)  # (B, 1)
    return torch.where(is_token, is_token.cumsum(dim=1), n_tokens + (~is_token).cumsum(dim=1)) - 1


def places_in_segments(
    segments: torch.Tensor, bounds: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (B, T) and visible keys (B, 1, T, T), or else `bounds`, of several texts in a row, each as if alone."""
    place = torch.arange(segments.size(1), device=segments.device)  # (T,)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)  # (B, T)
    start = torch.where(begins, place, 0).cummax(dim=1).values  # (B, T): where a token's text begins
    if bounds is not None:
        return place - start, bounds
    visible = (segments[:, :, None] == segments[:, None, :]) & (place[:, None] >= place)  # (B, T, T)
    return place - start, visible[:, None]


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of predicting labels[:, t + 1] from logits[:, t]; −100 is ignored.

    Args:
        logits: (B, T, V); labels: (B, T) int64.
    """
    targets = next_tokens(labels)  # (B·T,)
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / targets.ne(IGNORED_LABEL).sum().clamp(min=1)  # a batch without any target has loss 0, not NaN


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """What each position should predict: (B, T) labels → (B · T,), −100 at the end of each row.

    Shifting the labels and not the logits spares a copy of the largest tensor of a step.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()


def loss_in_chunks(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, logits_at_once: int = 0
) -> torch.Tensor:
    """`next_token_loss` of a head (V, D) after the states (B, T, D), of which at most so many logits exist at once; 0:
    512 MiB of them in fp32 on a GPU, and on a CPU 4 MiB, which its caches hold."""
    logits_at_once = logits_at_once or (1 << 20 if hidden.device.type == "cpu" else 1 << 27)
    targets, size = next_tokens(labels), max(1, logits_at_once // weight.size(0))
    total = _LossOfChunks.apply(hidden.flatten(0, 1), weight, targets, size)
    return total / targets.ne(IGNORED_LABEL).sum().clamp(min=1)


class _LossOfChunks(torch.autograd.Function):
    """The sum of the cross-entropies, with the gradients computed along with it: nothing is kept or computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, size: int) -> torch.Tensor:
        """hidden (N, D), weight (V, D), targets (N,), of which `size` are taken at a time."""
        total, of_hidden = hidden.new_zeros((), dtype=torch.float32), []
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # with LoRA it is frozen
        for states, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            logits = F.linear(states, weight)  # (n, V), under autocast in bf16
            losses = transformer_components.kernels.cross_entropy_(logits, wanted)  # (n,); logits: their gradients now
            # Not in place: compiled by PyTorch 2.11, a result that was changed in place would lose its gradient
            total = total + losses.sum()
            of_hidden.append((logits @ weight).to(hidden.dtype))
            if of_weight is not None and logits.dtype == of_weight.dtype == states.dtype:
                of_weight.addmm_(logits.mT, states)
            elif of_weight is not None:
                of_weight += logits.mT @ states
        ctx.save_for_backward(torch.cat(of_hidden), of_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients times that of the sum."""
        of_hidden, of_weight = ctx.saved_tensors
        return of_hidden * gradient, None if of_weight is None else of_weight * gradient, None, None


def loss_of_any_head(
    hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, vocab_size: int, logits_at_once: int = 1 << 27
) -> torch.Tensor:
    """`loss_in_chunks` of a head that is more than a matrix, such as one with an adapter: where there are more than so
    many logits, the backward pass computes them once more."""

    def total_of(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(states).float(), wanted, ignore_index=IGNORED_LABEL, reduction="sum")

    targets, size = next_tokens(labels), max(1, logits_at_once // vocab_size)
    if len(targets) <= size:
        return next_token_loss(head(hidden), labels)
    parts = zip(hidden.flatten(0, 1).split(size), targets.split(size), strict=True)
    total = sum(recompute_in_backward(total_of, states, wanted, use_reentrant=False) for states, wanted in parts)
    return total / targets.ne(IGNORED_LABEL).sum().clamp(min=1)


def next_token_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of labels[:, t + 1] that are the likeliest tokens of logits[:, t]; −100 is ignored. Shapes as above."""
    targets = labels[:, 1:]  # (B, T − 1)
    right = logits[:, :-1].argmax(dim=-1) == targets  # (B, T − 1); no token is −100
    return right.sum() / targets.ne(IGNORED_LABEL).sum().clamp(min=1)
