"""What happens inside a model while it reads a prompt and answers, on one page for the browser.

    python -m inference.inspect_model --model_path models/sft/sft_best.pth --prompt "法国的首都是哪里？"

The page, inspect_model.html, is one file that asks nothing of the network: tokens with their bytes; where the
parameters are; attention of every layer and head; which experts were chosen, where there are some; what each layer
would say next ("logit lens"); and the likeliest tokens at each position, whose probabilities the page computes anew as
temperature, top-k and top-p are moved.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError, option, parse_config, replacing, require_writable_folder, run_main
from gpt_model import GPTModel
from inference.kernels.stacked_experts import StackedExperts
from inference.quantizer import load_any, weight_bytes
from inference.request import checked_ids
from inference.sampling import SamplingParams
from inference.text_generation import generate_texts
from machine import resolve_device
from transformer_components import MixtureOfExperts, attend

PAGE = Path(__file__).with_suffix(".html")
EXACT_TOKENS = 100  # of each distribution; those beyond are kept as a histogram of their logits
BIN_WIDTH = 0.25  # of that histogram, in nats
LENS_TOKENS = 5  # a layer and position
VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


class AttentionRecorder:
    """A `transformer_components.Cache` that keeps the attention weights, and computes attention as the model does.

    Attributes:
        weights: of each layer, (H, T, T); a row says how a token's attention is shared out, and sums up to 1.
    """

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The attention of query (1, H, T, K) to key and value (1, G, T, K), causal; of the shape of query."""
        n_tokens = query.size(2)
        keys = key.repeat_interleave(query.size(1) // key.size(1), dim=1)  # (1, H, T, K)
        scores = query.float() @ keys.float().transpose(-2, -1) / math.sqrt(query.size(-1))  # (1, H, T, T)
        later = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=query.device).triu(diagonal=1)
        self.weights.append(scores.masked_fill(later, -math.inf).softmax(dim=-1)[0].cpu())
        return attend(query, key, value, mask)

    def advance(self, n_tokens: int) -> None:
        """Nothing is read from here later."""


@dataclass
class Inside:
    """What a forward pass of ids (T,) leaves.

    Attributes:
        attention: of each layer, (H, T, T).
        lens: next-token logits (T, V) of the embeddings and after each layer, n_layers + 1 of them: its output goes
            through the final norm and the output layer, as if no layer followed (nostalgebraist, 2020). The last ones
            are the model's own logits.
        routers: logits (T, E) of the router of each layer that has experts.
    """

    attention: list[torch.Tensor]
    lens: list[torch.Tensor]
    routers: list[torch.Tensor]


@torch.inference_mode()
def look_inside(model: GPTModel, ids: Sequence[int]) -> Inside:
    """Compute one text with the model's own forward pass, and keep what its layers do."""
    recorder, streams, routers = AttentionRecorder(), [], []
    hooks = [model.layers[0].register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))]
    hooks += [layer.register_forward_hook(lambda *step: streams.append(step[2])) for layer in model.layers]
    networks = (layer.feed_forward for layer in model.layers)
    mixtures = [network for network in networks if isinstance(network, MixtureOfExperts | StackedExperts)]
    hooks += [mix.router.register_forward_hook(lambda *step: routers.append(step[2].float().cpu())) for mix in mixtures]
    try:
        tokens = torch.tensor([list(ids)], device=model.device)
        model.hidden_states_at(tokens, None, cache=recorder)
    finally:
        for hook in hooks:
            hook.remove()
    lens = [model.lm_head(model.final_norm(stream))[0].float().cpu() for stream in streams]  # (T, V) each
    if not lens[-1].isfinite().all():
        raise UserError("the model's logits are not finite numbers; its weights are damaged, use another checkpoint")
    return Inside(recorder.weights, lens, routers)


def parts_of(model: GPTModel) -> list[dict[str, Any]]:
    """Parameters and bytes of each part, those of all layers together; what is tied counts once, where it comes first.

    The bytes are those of the weights as they are now, the scales of quantized ones included.
    """
    parts: dict[str, dict[str, Any]] = {}

    def part_of(name: str) -> dict[str, Any]:
        title = re.match(r"layers\.\d+\.\w+|\w+", name)[0]
        title = re.sub(r"\d+", "*", title)
        return parts.setdefault(title, {"name": title, "parameters": 0, "bytes": 0})

    seen = set()
    for name, tensor in model.state_dict().items():
        part = part_of(name)
        if tensor.data_ptr() not in seen:
            part["bytes"] += tensor.nbytes
            seen.add(tensor.data_ptr())
    for name, parameter in model.named_parameters():  # each once
        part_of(name)["parameters"] += parameter.numel()
    return list(parts.values())


def label_of(tokenizer: ByteLevelBPETokenizer, token_id: int) -> dict[str, Any]:
    """A token for people: {"text", "bytes", "special"}; white space and what cannot be printed are made visible."""
    content = tokenizer.token_bytes(token_id)
    if not content:
        name = tokenizer.decode([token_id], skip_special_tokens=False) if token_id < tokenizer.vocab_size else ""
        return {"text": name or f"#{token_id}", "bytes": "", "special": True}
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:  # a part of a character
        return {"text": f"⟨{content.hex(' ').upper()}⟩", "bytes": content.hex(" "), "special": False}
    visible = (VISIBLE.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)
    return {"text": "".join(visible), "bytes": content.hex(" "), "special": False}


def distribution(logits: torch.Tensor) -> dict[str, Any]:
    """What the page needs to compute probabilities anew from logits (V,).

    Returns:
        {"ids", "logits"} of the likeliest tokens, best first, and "rest": of all others [logit, count] by bins of
        BIN_WIDTH nats, the logit being the one that gives the bin its exact mass at temperature 1
    """
    ordered, ids = logits.double().sort(descending=True, stable=True)  # (V,)
    best = ordered[0]
    rest = ordered[EXACT_TOKENS:] - best  # ≤ 0
    bins = (rest / BIN_WIDTH).floor().long()  # (V − EXACT_TOKENS,)
    values, places, counts = torch.unique_consecutive(bins, return_inverse=True, return_counts=True)
    mass = torch.zeros(len(values), dtype=torch.float64).scatter_add_(0, places, (rest - bins * BIN_WIDTH).exp())
    centres = values * BIN_WIDTH + (mass / counts).log() + best
    return {
        "ids": ids[:EXACT_TOKENS].tolist(),
        "logits": [round(value, 6) for value in ordered[:EXACT_TOKENS].tolist()],
        "rest": [[round(value, 4), count] for value, count in zip(centres.tolist(), counts.tolist(), strict=True)],
    }


def experts_of(logits: torch.Tensor, per_token: int) -> dict[str, Any]:
    """Which experts each token passed, and their weights, from a router's logits (T, E); see `MixtureOfExperts`."""
    weights, chosen = logits.softmax(dim=-1).topk(per_token, dim=-1)  # (T, C)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return {
        "chosen": chosen.tolist(),
        "weights": [[round(weight, 4) for weight in row] for row in weights.tolist()],
        "used": chosen.flatten().bincount(minlength=logits.size(-1)).tolist(),
    }


def contents_of(
    model: GPTModel, tokenizer: ByteLevelBPETokenizer, ids: Sequence[int], n_prompt: int
) -> dict[str, Any]:
    """Everything that the page shows of a prompt of `n_prompt` tokens and the answer that follows in `ids`."""
    inside, config = look_inside(model, ids), model.config
    n_tokens = len(ids)
    below = torch.tril_indices(n_tokens, n_tokens)
    maps = [(weights[:, below[0], below[1]] * 255).round().to(torch.uint8) for weights in inside.attention]
    final = inside.lens[-1].log_softmax(dim=-1)  # (T, V)
    own = final[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).exp().flatten().tolist()  # of all but the first
    lens, shown = [], set(ids)
    for logits in inside.lens:
        log_probs = logits.log_softmax(dim=-1)
        top = log_probs.topk(min(LENS_TOKENS, log_probs.size(-1)))
        divergence = (final.exp() * (final - log_probs)).sum(dim=-1).clamp(min=0)  # (T,)
        lens.append({
            "ids": top.indices.tolist(),
            "p": [[round(p, 4) for p in row] for row in top.values.exp().tolist()],
            "kl": [round(value, 3) for value in divergence.tolist()],
            "agrees": round(float((top.indices[:, 0] == final.argmax(dim=-1)).float().mean()), 4),
        })  # fmt: skip
        shown.update(top.indices.flatten().tolist())
    distributions = [distribution(row) for row in inside.lens[-1]]
    shown.update(token for each in distributions for token in each["ids"])
    return {
        "tokens": [
            {"id": token, "p": None if place == 0 else round(own[place - 1], 6)} for place, token in enumerate(ids)
        ],
        "n_prompt": n_prompt,
        "labels": {token: label_of(tokenizer, token) for token in sorted(shown)},
        "parts": parts_of(model),
        "parameters": model.num_parameters(),
        "active": model.num_active_parameters(),
        "bytes": weight_bytes(model),
        "tied": config.tie_embeddings,
        # Of the cache that one request has by itself; the engine's may be of another type
        "cache_bytes_a_token": 2 * config.n_layers * config.n_kv_heads * config.head_dim * model.dtype.itemsize,
        "config": {
            name: value for name, value in vars(config).items() if value is not None and name != "pad_token_id"
        },
        "attention": [base64.b64encode(each.numpy().tobytes()).decode() for each in maps],
        "heads": config.n_heads,
        "lens": lens,
        "experts": [experts_of(logits, config.experts_per_token) for logits in inside.routers],
        "distributions": distributions,
    }


def page_of(contents: dict[str, Any]) -> str:
    """The page that shows `contents`, in which no text of a token can become a part of the page.

    The data are JSON without "<", and the page writes them as text only; besides, the browser is told to run and load
    nothing but the one script and the one style sheet that have these hashes.
    """
    page = PAGE.read_text(encoding="utf-8")
    style, script = (re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1] for tag in ("style", "script"))

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    policy = f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; base-uri 'none'"
    data = json.dumps(contents, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return page.replace("POLICY", policy, 1).replace(">DATA<", f">{data}<", 1)


@dataclass
class InspectConfig:
    """The command line of the look inside."""

    model_path: str = option("models/sft/sft_best.pth", "the checkpoint, in full precision or INT8")
    prompt: str = option("法国的首都是哪里？", "what the model reads")
    chat: bool | None = option(None, "whether the prompt is a question, in the chat template; default by the stage")
    max_gen_len: int = option(16, "how many tokens of the likeliest answer are shown, too", at_least=0, at_most=256)
    max_tokens: int = option(128, "the longest prompt with its answer, in tokens", at_least=1, at_most=256)
    output_path: str | None = option(None, "where to write the page; default <model>_inside.html beside the model")
    device: str = option("auto", "auto, cpu, cuda or mps")
    num_threads: int = option(0, "CPU threads; 0 means as many as torch takes", at_least=0)


def main(argv: list[str] | None = None) -> None:
    """Write the page."""
    config = parse_config(InspectConfig, argv, description="Show what happens inside a model, as one HTML page.")
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    path = Path(config.output_path or Path(config.model_path).with_name(f"{Path(config.model_path).stem}_inside.html"))
    require_writable_folder(path.parent, "--output_path")
    model, tokenizer, checkpoint = load_any(config.model_path, resolve_device(config.device), precision="fp32")
    chat = checkpoint["stage"] != "pretrain" if config.chat is None else config.chat
    ids = checked_ids(config.prompt, SamplingParams(max(1, config.max_gen_len)), chat, tokenizer, model.config)
    if len(ids) > config.max_tokens:
        raise UserError(
            f"the prompt has {len(ids)} tokens and the page takes {config.max_tokens}; shorten it or raise --max_tokens"
        )
    room = min(config.max_gen_len, config.max_tokens - len(ids))
    answer = []
    if room:
        (generation,) = generate_texts(model, tokenizer, [config.prompt], chat=chat, max_gen_len=room)
        answer = generation.token_ids
    contents = contents_of(model, tokenizer, [*ids, *answer], len(ids))
    contents["model"] = f"{config.model_path} ({checkpoint.get('quantization') or 'full precision'})"
    page = page_of(contents).encode("utf-8", "replace")
    with replacing(path, "free some space or choose another --output_path") as file:
        file.write(page)
    print(
        f"{len(ids)} tokens of the prompt and {len(answer)} of the answer, {model.config.n_layers} layers with "
        f"{model.config.n_heads} heads: {path} ({len(page) / 2**20:.1f} MiB); open it in a browser"
    )


if __name__ == "__main__":
    run_main(main)
