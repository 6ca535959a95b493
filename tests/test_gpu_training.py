"""What makes training fast on a GPU and can be shown without one: attention that flash kernels can compute, few shapes,
few moments at which the CPU waits. The tests marked `gpu` compare a GPU's results with the CPU's.

PyTorch's meta device stands in for a GPU: it computes shapes alone, and whoever wants a number of it is caught.
"""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import policy_loops
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import gpt_model
import machine
import transformer_components
from alignment import rollouts
from alignment.classify import ClassifyConfig, ClassifyLoop, LabelledDataset
from alignment.distillation import DistillationConfig, DistillationLoop, DistillationModel
from alignment.dpo import DPOConfig, DPODataset, DPOLoop
from alignment.kto import KTOConfig, KTODataset, KTOLoop
from alignment.log_probabilities import token_log_probs
from alignment.reward_model import RewardConfig, RewardLoop, RewardModel
from alignment.sft import SFTConfig
from data_loader import GPTPretrainDataset, GPTSFTDataset, PackedDataset, PreferenceDataset, lengthened
from gpt_model import IGNORED_LABEL, places_on_the_left, visible_keys
from inference.kernels.int8_weights import Int8Linear
from inference.service.text_classifier import TextClassifier
from lora import LoRAOptions, apply_lora
from pretrain_trainer import PretrainConfig
from text.conversation_data import parse_preference, parse_unpaired
from text.token_shards import tokenize_to_shards
from training import attention_within_texts, optimization, parallel_model
from training.training_loop import TrainingLoop
from transformer_components import MixtureOfExperts, attend, takes_groups, takes_text_bounds, text_bounds

META = torch.device("meta")
COMMON = dict(device="cpu", precision="fp32", num_threads=1, batch_size=4, grad_accum_steps=2, max_steps=4)
SUPERVISED = ("pretrain", "sft", "reward", "classify", "dpo", "kto", "distill")
TRAINERS = (*SUPERVISED, "ppo", "grpo")


def make_loop(trainer, folder, tokenizer, random_model, device, **settings):
    """The loop of a trainer on a small model, `modern` unless `settings` have another `architecture`, and texts of
    different lengths."""
    torch.manual_seed(0)
    architecture = settings.pop("architecture", "modern")
    usual = {**COMMON, "output_dir": str(folder), "max_seq_len": 48, **settings}
    model = random_model(architecture, vocab_size=len(tokenizer), max_seq_len=48)
    chats = [[{"role": "user", "content": "x" * k}, {"role": "assistant", "content": "y" * k}] for k in range(1, 13)]
    pairs = [parse_preference({"instruction": "x" * k, "chosen": "yes" * k, "rejected": "no"}, "") for k in range(1, 9)]
    if trainer in policy_loops.ALGORITHMS:
        usual = {name: value for name, value in usual.items() if name != "grad_accum_steps"}
        return policy_loops.make_loop(trainer, folder, tokenizer, **usual)
    rest = model.config, tokenizer, trainer
    if trainer == "pretrain":
        text = Path(folder) / "text.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text("The quick brown fox jumps over the lazy dog.\n" * 40, encoding="utf-8")
        data = GPTPretrainDataset(tokenize_to_shards(text, tokenizer, folder), 48)
        return TrainingLoop(PretrainConfig(**usual), model, *rest, data, data, device)
    if trainer == "sft":
        data = GPTSFTDataset(chats, tokenizer, 48)
        return TrainingLoop(SFTConfig(**usual), model, *rest, data, data, device, data.lengths)
    if trainer == "reward":
        data = PreferenceDataset(pairs, tokenizer, 48)
        return RewardLoop(RewardConfig(**usual), RewardModel(model), *rest, data, data, device)
    if trainer == "classify":
        data = LabelledDataset([("x" * k, str(k % 2)) for k in range(1, 13)], tokenizer, 48)
        data.labels = ["0", "1"]
        return ClassifyLoop(ClassifyConfig(**usual), TextClassifier(model, 2), *rest, data, data, device)
    if trainer == "distill":
        data = GPTSFTDataset(chats, tokenizer, 48)
        student = random_model("modern", 1, vocab_size=len(tokenizer), max_seq_len=48)
        learner = DistillationModel(student, model, 0.5, 2.0)
        return DistillationLoop(DistillationConfig(**usual), learner, *rest, data, data, device)
    if trainer == "dpo":
        data = DPODataset(pairs, tokenizer, 48)
        return DPOLoop(DPOConfig(**usual), model, tokenizer, data, data, device, GPTSFTDataset(chats, tokenizer, 48))
    items = [{"prompt": "x" * k, "completion": "y" * k, "label": k % 2 == 1} for k in range(1, 13)]
    data = KTODataset([parse_unpaired(item, "") for item in items], tokenizer, 48)
    return KTOLoop(KTOConfig(**usual), model, tokenizer, data, data, device, GPTSFTDataset(chats, tokenizer, 48))


# -- attention that flash kernels can compute --------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_trainer_hands_a_mask_to_attention(trainer, tmp_path, tokenizer, random_model, monkeypatch):
    """In training and in evaluations; answers are written by the engine, which is not asked here."""
    loop, masks = make_loop(trainer, tmp_path, tokenizer, random_model, torch.device("cpu")), []

    def seen(query, key, value, mask=None, dropout=0.0):
        masks.append(mask)
        return attend(query, key, value, mask, dropout)

    if trainer in policy_loops.ALGORITHMS:
        rollout = policy_loops.fixed_rollout(loop)
        monkeypatch.setattr(transformer_components, "attend", seen)
        monkeypatch.setattr(rollouts, "write_answers", lambda *_, **__: {**rollout})
        loop.train_step()
    else:
        monkeypatch.setattr(transformer_components, "attend", seen)
        loop.train_step()
        loop.evaluate()
    assert masks and not any(mask is not None for mask in masks)


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_states_without_a_mask_are_those_with_one(random_model, architecture):
    """Wherever the padding stands, with holes in the row as well; what padding itself has is finite, and no token's."""
    model, ids = random_model(architecture), torch.randint(4, 64, (5, 12))
    mask = torch.ones(5, 12, dtype=torch.long)
    mask[0, :4] = mask[1, 7:] = mask[2, :2] = mask[2, 9:] = mask[3, 4:6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model.hidden_states_at(ids, positions, visible_keys(12, 0, mask, ids.device))
    states = model.hidden_states(ids, mask)
    assert torch.allclose(states[mask.bool()], expected[mask.bool()], atol=1e-5)
    assert states.isfinite().all()
    assert torch.equal(states[mask.bool()], model.hidden_states(ids.masked_fill(mask == 0, 63), mask)[mask.bool()])


def test_tokens_move_to_the_left_in_their_order():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    places = [[2, 3, 0, 1], [0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert places_on_the_left(mask).tolist() == places


def test_grouped_heads_never_come_to_the_kernel_that_keeps_all_weights():
    """On a CPU flash attention takes them as they are; elsewhere they are repeated, unless it takes them there."""
    assert takes_groups("cuda", torch.bfloat16, masked=False)
    assert takes_groups("cuda", torch.float16, masked=False)
    assert not takes_groups("cuda", torch.float32, masked=False)
    assert not takes_groups("cuda", torch.bfloat16, masked=True)
    query, key, value = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        grouped = attend(query, key, value)
        masked = attend(query, key, value, torch.ones(8, 8, dtype=torch.bool).tril())
    expected = F.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), is_causal=True
    )
    assert torch.allclose(grouped, expected, atol=1e-6)
    assert torch.allclose(masked, expected, atol=1e-6)


def test_where_no_kernel_takes_groups_heads_are_repeated(monkeypatch):
    """The same result, of as many key/value heads as query heads."""
    query, key, value = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    expected, usual, heads = attend(query, key, value), F.scaled_dot_product_attention, []

    def seen(query, key, value, **settings):
        heads.append((query.size(1), key.size(1), value.size(1), settings["enable_gqa"]))
        return usual(query, key, value, **settings)

    monkeypatch.setattr(transformer_components, "takes_groups", lambda *_, **__: False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    assert torch.allclose(attend(query, key, value), expected, atol=1e-6)
    assert heads == [(4, 4, 4, False)]


# -- several texts in a row --------------------------------------------------------------------------------------------


def one_by_one(query, key, value, starts, ends, longest, _, **causal):
    """What flash attention computes of texts of different lengths, (tokens, H, K) each; `ends` are the starts, too."""
    assert longest >= (starts[1:] - starts[:-1]).max()
    parts = [slice(start, end) for start, end in zip(starts.tolist(), ends[1:].tolist(), strict=False) if start < end]
    alone = [attend(*(x[part].transpose(0, 1)[None] for x in (query, key, value)))[0] for part in parts]
    return torch.cat(alone, dim=1).transpose(0, 1)


def packed_loop(folder, tokenizer, random_model, device="cpu", **settings):
    """SFT on conversations of different lengths, several in a row."""
    config = SFTConfig(**{**COMMON, "output_dir": str(folder), "max_seq_len": 128, "device": device, **settings})
    chats = [[{"role": "user", "content": "x" * k}, {"role": "assistant", "content": "y" * k}] for k in range(1, 13)]
    data = PackedDataset(GPTSFTDataset(chats, tokenizer, 128), 128)
    model = random_model("modern", vocab_size=len(tokenizer), max_seq_len=128)
    rest = model.config, tokenizer, "sft", data, data, torch.device(device), data.lengths
    return TrainingLoop(config, model, *rest)


def test_bounds_of_texts_are_where_segments_change_and_rows_end():
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, -1, -1]])
    assert text_bounds(segments, 1).tolist() == [0, 2, 5, 8, 10]
    assert text_bounds(segments, 8).tolist() == [0, 2, 5, 8, 10, 10, 10, 10]
    assert text_bounds(segments, 5).dtype == torch.int32 and len(text_bounds(segments, 5)) == 5


def test_packed_texts_need_no_mask(tmp_path, tokenizer, random_model, monkeypatch):
    """Steps and evaluations by bounds, of grouped heads, are those by masks."""
    results = []
    monkeypatch.setattr(attention_within_texts, "varlen_attn", one_by_one)
    for by_bounds in (False, True):
        monkeypatch.setattr("training.training_loop.takes_text_bounds", lambda *_, takes=by_bounds: takes)
        loop, masks = packed_loop(tmp_path / str(by_bounds), tokenizer, random_model, lr=1e-3), []
        assert max(map(len, loop.train_data.rows)) > 1

        def seen(query, key, value, mask=None, dropout=0.0, masks=masks):
            masks.append(None if mask is None else mask.dtype)
            return attend(query, key, value, mask, dropout)

        with monkeypatch.context() as patched:
            patched.setattr(transformer_components, "attend", seen)
            results.append([loop.train_step(), loop.train_step(), loop.evaluate()])
        assert set(masks) == {torch.int32 if by_bounds else torch.bool}
    for theirs, ours in zip(*results, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_pytorchs_attention_to_texts_is_called_as_it_wants_to_be():
    """Its shapes, forwards and backwards, on PyTorch's meta device; grouped heads are repeated before."""
    query = torch.empty(2, 4, 48, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key = torch.empty(2, 2, 48, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    attended = attend(query, key, key, torch.empty(64, dtype=torch.int32, device="meta"))
    assert attended.shape == query.shape
    attended.sum().backward()
    assert (query.grad.shape, key.grad.shape) == (query.shape, key.shape)


def test_only_flash_attention_takes_bounds(monkeypatch):
    assert not takes_text_bounds(torch.device("cpu"), torch.bfloat16, 64, 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    cuda = torch.device("cuda")
    assert takes_text_bounds(cuda, torch.bfloat16, 64, 0.0)
    unfit = [(torch.float32, 64, 0.0), (torch.bfloat16, 12, 0.0), (torch.bfloat16, 512, 0.0), (torch.float16, 64, 0.1)]
    assert not any(takes_text_bounds(cuda, *case) for case in unfit)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not takes_text_bounds(cuda, torch.float16, 64, 0.0)


# -- autocast ----------------------------------------------------------------------------------------------------------


def autocasts(operator, key="AutocastCUDA"):
    """Whether autocast changes the types of an operator's arguments; PyTorch's lists are the same in every build."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", key)


def test_the_lists_that_norms_rely_on_are_as_they_were():
    """On CUDA norms are computed in fp32 unless autocast is off (`rms_norm` in newer versions of PyTorch only); what is
    between them is not touched."""
    assert autocasts("layer_norm") and autocasts("scaled_dot_product_attention")
    assert autocasts("linear") and autocasts("nll_loss")
    assert not any(map(autocasts, ("embedding", "silu", "gelu", "mul.Tensor", "add.Tensor")))
    assert not autocasts("rms_norm", "AutocastCPU")


def test_queries_and_keys_keep_their_type_in_a_norm_under_autocast(monkeypatch):
    """Within it autocast is off, so that no list matters; the mean square is that of fp32, whatever the input."""
    norm, usual, seen = transformer_components.RMSNorm(64, eps=1e-6), F.rms_norm, []
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    x = torch.randn(4, 64) * 100

    def watched(x, shape, weight, eps):
        seen.append((torch.is_autocast_enabled("cpu"), x.dtype, weight.dtype))
        return usual(x, shape, weight, eps)

    monkeypatch.setattr(F, "rms_norm", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = norm(x.bfloat16())
        assert norm(x).dtype == torch.float32, "the residual stream stays in fp32"
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(False, torch.bfloat16, torch.bfloat16), (True, torch.float32, torch.float32)]
    assert result.dtype == torch.bfloat16
    exact = usual(x.bfloat16().double(), (64,), norm.weight.double(), 1e-6)
    assert torch.allclose(result.double(), exact, rtol=2**-6, atol=1e-3)
    result.sum().backward()
    assert norm.weight.grad.dtype == torch.float32


# -- few shapes --------------------------------------------------------------------------------------------------------


def test_rows_are_filled_up_to_a_multiple_and_not_beyond_the_context():
    batch = {"input_ids": torch.ones(2, 70), "labels": torch.ones(2, 70), "attention_mask": torch.ones(2, 70),
             "sft_labels": torch.ones(3, 5), "segments": torch.ones(2, 70), "weights": torch.ones(4)}  # fmt: skip
    longer = lengthened(batch, 64, 1, 100)
    sizes = {name: value.size(-1) for name, value in longer.items()}
    assert sizes == dict(input_ids=100, labels=100, attention_mask=100, sft_labels=64, segments=100, weights=4)
    ends = {name: value[0, -1].item() for name, value in longer.items() if value.ndim > 1}
    assert ends == dict(input_ids=1, labels=IGNORED_LABEL, attention_mask=0, sft_labels=IGNORED_LABEL, segments=-1)
    assert lengthened(batch, 64, 1, 64)["input_ids"].size(1) == 70, "nothing is cut"
    assert {name: value.size(-1) for name, value in lengthened(batch, 1, 1, 100).items()}["labels"] == 70


@pytest.mark.parametrize("trainer", TRAINERS)
def test_longer_rows_change_no_figure(trainer, tmp_path, tokenizer, random_model, monkeypatch):
    """A step's figures with rows filled up to multiples of 16 are those without, and all lengths are multiples."""
    results = []
    for multiple in (1, 16):
        loop = make_loop(trainer, tmp_path / str(multiple), tokenizer, random_model, torch.device("cpu"), lr=1e-3)
        loop.length_multiple = multiple
        lengths = set()

        def seen(query, *rest, lengths=lengths):
            lengths.add(query.size(2))
            return attend(query, *rest)

        if trainer in policy_loops.ALGORITHMS:
            answers = policy_loops.fixed_rollout(loop)
            monkeypatch.setattr(rollouts, "write_answers", lambda *_, answers=answers, **__: {**answers})
        with monkeypatch.context() as patched:
            patched.setattr(transformer_components, "attend", seen)
            torch.manual_seed(0)
            results.append(loop.train_step())
    assert {length % 16 for length in lengths} == {0}
    assert results[1] == pytest.approx(results[0], rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("trainer", SUPERVISED)
def test_batches_that_are_read_ahead_are_the_same(trainer, tmp_path, tokenizer, random_model):
    """Also where a run goes on from another step than was foreseen."""
    results = []
    for ahead in (False, True):
        loop = make_loop(trainer, tmp_path / str(ahead), tokenizer, random_model, torch.device("cpu"), lr=1e-3)
        loop.reads_ahead = ahead
        results.append([loop.train_step() for _ in range(2)])
        loop.step = 5
        results[-1].append(loop.train_step())
    assert results[1] == results[0]


# -- few moments of waiting --------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts how often numbers of the meta device are asked for; they come out as 1 and 0.

    Operations whose result has a size that depends on numbers, such as `nonzero`, fail there by themselves.
    """

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                self.n += 1
                return 1.0
            if func is torch.ops.aten._to_copy.default and kwargs.get("device", META).type == "cpu":
                self.n += not kwargs.get("non_blocking")
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.n = max(self.n, result.numel() if torch.is_tensor(result) else 0)
        return result


@pytest.fixture
def waits(monkeypatch):
    """The counter, with what a meta device lacks: AdamW's fused kernel, and that it can be waited for."""
    adamw, counter = torch.optim.AdamW, Waits()
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused=None, **settings: adamw(*args, **settings))

    def synchronize(device):
        counter.n += device.type == "meta"

    monkeypatch.setattr(machine, "synchronize", synchronize)
    return counter


@pytest.mark.parametrize("trainer", SUPERVISED)
def test_a_step_waits_once(trainer, tmp_path, tokenizer, random_model, monkeypatch, waits):
    """With two micro-batches, gradients clipped, non-finite steps recognised and every figure read."""
    monkeypatch.setattr(DPODataset, "ask_reference", lambda data, *_: tell_references(data))
    monkeypatch.setattr(KTODataset, "ask_reference", lambda data, *_: tell_references(data))
    loop = make_loop(trainer, tmp_path, tokenizer, random_model, META, optimizer="muon")
    with waits:
        figures = [loop.train_step() for _ in range(2)]
    assert waits.n == 2
    assert {"loss", "grad_norm", "lr", "tokens"} <= figures[0].keys()


@pytest.mark.parametrize("trainer", ["pretrain", "sft", "dpo"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_with_experts_waits_once(trainer, recompute, tmp_path, tokenizer, random_model, monkeypatch, waits):
    """And an evaluation, and who asks how experts are used; how many tokens chose one, nobody asks."""
    monkeypatch.setattr(DPODataset, "ask_reference", lambda data, *_: tell_references(data))
    settings = dict(architecture="moe", recompute_activations=recompute)
    loop = make_loop(trainer, tmp_path, tokenizer, random_model, META, **settings)
    with waits:
        assert loop.train_step()["aux_loss"] == 1.0
        assert waits.n == 1
        assert loop.expert_use.figures().keys() == {"experts_least_used", "experts_most_used"}
        assert waits.n == 2
        with contextlib.suppress(OverflowError):
            loop.evaluate()
    assert waits.n == 3


def tell_references(data):
    for sample in data.samples:
        sample["reference_log_probs"] = [0.0 for _ in sample["answers"]]


@pytest.mark.parametrize("trainer", policy_loops.ALGORITHMS)
def test_a_step_with_fresh_answers_waits_once_an_update_and_once_for_what_they_are_worth(
    trainer, tmp_path, tokenizer, random_model, monkeypatch, waits
):
    """PPO reads its β, too. Answers come from a CPU: how often the engine waits is its own matter."""
    answers = policy_loops.fixed_rollout(make_loop(trainer, tmp_path, tokenizer, random_model, torch.device("cpu")))
    monkeypatch.setattr(policy_loops, "prepare_machine", lambda config: META)
    monkeypatch.setattr(rollouts, "write_answers", lambda *_, **__: {**answers})
    loop = make_loop(trainer, tmp_path, tokenizer, random_model, META)
    with waits:
        figures = loop.train_step()
    assert figures["policy/updates"] == 4
    assert waits.n == 4 + 1 + (trainer == "ppo")


def test_an_evaluation_waits_once(tmp_path, tokenizer, random_model, waits):
    loop = make_loop("sft", tmp_path, tokenizer, random_model, META)
    with waits, contextlib.suppress(OverflowError):
        loop.evaluate()
    assert waits.n == 1


# -- several GPUs, large models ----------------------------------------------------------------------------------------


def test_each_process_of_torchrun_takes_its_own_gpu_before_it_opens_one(monkeypatch):
    """A context on the first GPU for each process would cost some hundred MiB there."""
    calls = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set", str(device))))
    monkeypatch.setattr(torch, "empty", lambda size, device: calls.append(("open", str(device))))
    assert machine.resolve_device("auto") == machine.resolve_device("cuda") == torch.device("cuda:3")
    assert calls == [("set", "cuda:3"), ("open", "cuda:3")] * 2
    monkeypatch.delenv("LOCAL_RANK")
    assert machine.resolve_device("cuda:1") == torch.device("cuda:1")
    assert calls[4:] == [("open", "cuda:1")]


def test_tied_weights_that_were_copied_off_a_gpu_are_written_once(tmp_path, tokenizer, random_model, monkeypatch):
    """A copy of a state dict from a GPU has them twice."""
    usual = parallel_model.get_model_state_dict

    def copied(module, options=None):
        return {name: value.clone() for name, value in usual(module, options=options).items()}

    monkeypatch.setattr(parallel_model, "get_model_state_dict", copied)
    loop = make_loop("distill", tmp_path, tokenizer, random_model, torch.device("cpu"))
    state = loop.parallel_model.model_state()
    assert state["student.lm_head.weight"].data_ptr() == state["student.token_embedding.weight"].data_ptr()
    loop.save_model(tmp_path / "copied.pth")
    monkeypatch.setattr(parallel_model, "get_model_state_dict", usual)
    loop.save_model(tmp_path / "usual.pth")
    sizes = [(tmp_path / name).stat().st_size for name in ("copied.pth", "usual.pth")]
    assert abs(sizes[0] - sizes[1]) < 4096


def test_muon_needs_no_more_memory_at_once_than_it_is_given(monkeypatch):
    """Of 32 matrices of one shape, 4 are orthogonalised together; no tensor is larger than these."""
    monkeypatch.setattr(optimization, "MUON_BYTES", 4 * 48 * 48 * 4)
    weights = [torch.nn.Parameter(torch.randn(48, 48)) for _ in range(32)]
    for weight in weights:
        weight.grad = torch.randn(48, 48)
    with Largest() as largest:
        optimization.Muon(weights).step()
    assert largest.n == 4 * 48 * 48


# -- a loss without logits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits_at_once", [1, 5 * 64, 1 << 27])
def test_a_loss_in_chunks_is_the_plain_one(architecture, precision, logits_at_once, random_model, monkeypatch):
    """Loss and gradients, of labels some of which are missing; the embedding that is the head gets both gradients."""
    ids, results = torch.randint(4, 64, (3, 12)), []
    labels = ids.masked_fill(torch.rand(3, 12) < 0.3, IGNORED_LABEL)
    usual = gpt_model.loss_in_chunks
    monkeypatch.setattr(gpt_model, "loss_in_chunks", lambda *args: usual(*args, logits_at_once))
    for keeps_logits in (True, False):
        model = random_model(architecture).train()
        model.keeps_logits = keeps_logits
        with machine.autocast(torch.device("cpu"), precision):
            output = model(ids, labels=labels)
        assert (output["logits"] is None) != keeps_logits
        (3 * output["loss"]).backward()
        results.append([output["loss"].detach(), *(parameter.grad for parameter in model.parameters())])
        model.eval()
        assert model(ids, labels=labels)["logits"] is not None
    near = dict(atol=1e-5, rtol=1e-4) if precision == torch.float32 else dict(atol=0.03, rtol=0.03)
    torch.testing.assert_close(results[1], results[0], **near)


def test_a_loss_in_chunks_of_nothing_is_nothing(random_model):
    model, ids = random_model("gpt2").train(), torch.randint(4, 64, (2, 5))
    model.keeps_logits = False
    loss = model(ids, labels=torch.full_like(ids, IGNORED_LABEL))["loss"]
    loss.backward()
    model.eval()
    assert loss.item() == 0.0


def test_no_logits_are_kept(random_model):
    """Not even those of a single chunk, and what is made at once is no larger than one."""
    model = random_model("gpt2", vocab_size=2000, d_model=8)
    hidden, labels = torch.randn(8, 32, 8, requires_grad=True), torch.randint(4, 2000, (8, 32))
    with Largest() as largest:
        loss = gpt_model.loss_in_chunks(hidden, model.lm_head.weight, labels, 16 * 2000)
    kept = sum(tensor.numel() for tensor in loss.grad_fn.next_functions[0][0].saved_tensors)
    assert kept == hidden.numel() + model.lm_head.weight.numel()
    assert largest.n == 16 * 2000


# -- compiled code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["pretrain", "sft"])
def test_a_run_is_compiled_once(trainer, tmp_path, tokenizer, random_model, monkeypatch):
    """For all lengths, and neither for evaluations nor for the training that follows them; figures stay the same."""
    torch._dynamo.reset()
    counter, usual, results = CompileCounter(), torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **how: usual(*args, backend=counter, **how))
    for compiled in (False, True):
        loop = make_loop(trainer, tmp_path / str(compiled), tokenizer, random_model, torch.device("cpu"))
        if compiled:
            loop.model.keeps_logits = False  # as on a GPU
            loop.parallel_model.compile(loop.order.lengths is not None)
        log = SimpleNamespace(log=lambda *_: None, say=lambda *_: None)
        results.append([])
        for _ in range(2):
            results[-1] += [loop.train_step()["loss"] for _ in range(2)]
            loop._evaluate_and_keep_best(log)
    assert counter.frame_count == 1, counter
    assert results[1] == pytest.approx(results[0], abs=1e-5)


def test_a_short_run_is_not_compiled(tmp_path, tokenizer, random_model, monkeypatch, capsys):
    """On a GPU of 1 TFLOP/s this model trains at once, and on one of 1 kFLOP/s for days; a CPU's is never compiled."""
    loop = make_loop("sft", tmp_path, tokenizer, random_model, torch.device("cpu"))
    assert not loop._is_worth_compiling()
    loop.device = torch.device("cuda")
    for peak, worth in ((1e12, False), (1e3, True)):
        monkeypatch.setattr("training.training_loop.peak_flops", lambda *_, peak=peak: peak)
        assert loop._is_worth_compiling() == worth
    assert capsys.readouterr().out == "not compiled: the run takes some 0 s; --compile true does it all the same\n"


# -- a GPU beside the CPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["modern", "moe"])
@pytest.mark.parametrize("trainer", SUPERVISED)
def test_a_gpus_steps_are_the_cpus(trainer, architecture, tmp_path, tokenizer, random_model):
    """In fp32, three steps of each supervised trainer."""
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for device in ("cpu", "cuda"):
        settings = dict(lr=1e-4, architecture=architecture)
        loop = make_loop(trainer, tmp_path / device, tokenizer, random_model, torch.device(device), **settings)
        results.append([loop.train_step() for _ in range(3)])
    for theirs, ours in zip(*results, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_a_gpus_steps_beside_int8_are_the_cpus(trainer, tmp_path, tokenizer, random_model, monkeypatch):
    """Adapters beside frozen layers of 8 bits, and none of these in another type."""
    torch.backends.cuda.matmul.allow_tf32 = False
    options, usual, results = LoRAOptions(lora_rank=4, frozen_weights="int8"), TrainingLoop.__init__, []

    def adapted(loop, config, model, *rest, **more):
        torch.manual_seed(0)
        apply_lora(model.policy if trainer == "dpo" else model, options, "base.pth")
        monkeypatch.setattr("training.training_loop.lora_settings", lambda model: None)  # no base lies on the disk
        usual(loop, config, model, *rest, **more)

    monkeypatch.setattr(TrainingLoop, "__init__", adapted)
    for device in ("cpu", "cuda"):
        loop = make_loop(trainer, tmp_path / device, tokenizer, random_model, torch.device(device), lr=1e-4)
        results.append([loop.train_step() for _ in range(3)])
        held = [layer for layer in loop.model.modules() if isinstance(layer, Int8Linear)]
        assert {(layer.weight.dtype, layer.weight.device.type) for layer in held} == {(torch.int8, device)}
    for theirs, ours in zip(*results, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def experts_learn(device, dtype, frozen):
    """Outputs, losses, gradients of a mixture that trains, or of adapters beside frozen experts; waits are errors."""
    torch.manual_seed(0)
    layer = MixtureOfExperts(64, n_experts=8, experts_per_token=2, d_ff=96, activation="swiglu", bias=False)
    layer.router.weight.data.zero_()[:, :8] = torch.eye(8)  # which experts a token chooses is beyond doubt
    first, second = torch.randint(0, 7, (2, 500))  # the last one is chosen by none
    x = 0.1 * torch.randn(1, 500, 64)
    x[0, torch.arange(500), first] += 6.0
    x[0, torch.arange(500), (first + 1 + second % 6) % 7] += 4.0
    if frozen:
        options = LoRAOptions(lora_rank=8, frozen_weights=frozen, lora_targets="up_proj,gate_proj,down_proj")
        apply_lora(layer, options, "base.pth")
        for parameter in layer.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape) if parameter.requires_grad else 0
    layer, x = layer.to(device), x.to(device).requires_grad_()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with transformer_components.auxiliary_losses() as losses, machine.autocast(torch.device(device), dtype):
            outputs = layer(x)
        (outputs.float().square().mean() + sum(losses)).backward()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    gradients = {name: each.grad for name, each in layer.named_parameters() if each.requires_grad}
    return {"outputs": outputs, "losses": losses[0], "x": x.grad, **gradients}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", ["", "fp32", "int8"])
def test_on_a_gpu_experts_learn_what_a_cpus_do_and_nobody_waits(dtype, frozen):
    """Through PyTorch's grouped product in bf16 where the GPU has it, elsewhere in blocks."""
    torch.backends.cuda.matmul.allow_tf32 = False
    theirs, ours = (experts_learn(device, dtype, frozen) for device in ("cpu", "cuda"))
    for name, expected in theirs.items():
        tolerance = (1e-4 if dtype == torch.float32 else 0.04) * float(expected.abs().max()) + 1e-7
        assert torch.allclose(ours[name].cpu(), expected, rtol=0, atol=tolerance), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu_no_grouped_heads_come_to_the_kernel_that_keeps_all_weights(dtype, masked):
    query, key, value = (torch.randn(2, heads, 64, 64, device="cuda", dtype=dtype) for heads in (8, 4, 4))
    mask = torch.ones(64, 64, dtype=torch.bool, device="cuda").tril() if masked else None
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        ours = attend(query, key, value, mask)
    expected = attend(query.cpu().float(), key.cpu().float(), value.cpu().float())
    assert torch.allclose(ours.cpu().float(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_packed_texts_never_come_to_the_kernel_that_keeps_all_weights(
    precision, tmp_path, tokenizer, random_model
):
    torch.backends.cuda.matmul.allow_tf32 = False
    losses = []
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        for device in ("cpu", "cuda"):
            kind = "fp32" if device == "cpu" else precision
            loop = packed_loop(tmp_path / device, tokenizer, random_model, device, precision=kind, lr=1e-4)
            losses.append([loop.train_step()["loss"], loop.evaluate()["val_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if precision == "bf16" else 1e-3)


@pytest.mark.gpu
def test_on_a_gpu_log_probabilities_of_padded_rows_are_the_cpus(random_model):
    model, ids = random_model("modern"), torch.randint(4, 64, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 7:] = 0
    expected, _ = token_log_probs(model, ids, mask)
    ours, _ = token_log_probs(model.cuda(), ids.cuda(), mask.cuda())
    model.cpu()
    assert torch.allclose(ours.cpu(), expected, atol=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_autocast_leaves_queries_and_keys_in_bf16(random_model):
    model, seen = random_model("modern"), []
    for layer in model.layers:
        layer.attention.query_norm.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model.cuda().hidden_states(torch.randint(4, 64, (2, 8), device="cuda"))
    model.cpu()
    assert set(seen) == {torch.bfloat16}
