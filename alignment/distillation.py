"""Distillation: a small model, the student, learns from a larger one, the teacher (arXiv:1503.02531).

From its probabilities (white box): at every position that carries a label the student learns the label and the whole
distribution that the teacher gives, which also says how wrong each of the wrong tokens is. Both have to have the same
tokenizer. From its texts (black box, `--from_text`, arXiv:1606.07947): the teacher answers the questions, and the
student is fine-tuned on these answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from alignment.log_probabilities import LOGITS_AT_ONCE, labelled_places, with_places
from alignment.stage import InstructionData, StageConfig, fit_context, load_parts, run, start_of
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_model
from command_line import UserError, option, replacing
from data_loader import Batch, GPTPretrainDataset, GPTSFTDataset
from gpt_model import GPTConfig, GPTModel
from inference.text_generation import generate_texts
from text.account import Account
from text.chat_template import Message
from text.conversation_data import load_conversations
from text.token_shards import tokenize_to_shards
from training import ranks
from training.run_folder import set_earlier_run_aside
from training.run_identity import fingerprints
from training.saved_run import TrainingData
from training.training_config import prepare_machine
from training.training_loop import TrainingLoop


@dataclass
class DistillationConfig(InstructionData, StageConfig):
    """Settings of distillation."""

    start: ClassVar = ("teacher_model", "the teacher", "train it first")
    teacher_model: str = option("models/sft/sft_best.pth", "the checkpoint to learn from", reads="model")
    student_model: str = option(
        "", "the checkpoint that the student starts from; empty: a new model of these sizes:", reads="model"
    )
    n_layers: int = option(0, "layers of a new student; 0 means half of the teacher's", at_least=0)
    d_model: int = option(0, "width of a new student; 0 means half of the teacher's", at_least=0)
    n_heads: int = option(0, "attention heads of a new student; 0 means half of the teacher's", at_least=0)
    n_kv_heads: int = option(0, "key/value heads of it; 0 means the teacher's proportion to --n_heads", at_least=0)
    text_data: str = option(
        "", "text to learn from instead: a file, a folder, or a name without its ending", reads="text"
    )
    shard_dir: str = option("models/token_shards", "folder for tokenized --text_data, which is made once and reused")
    output_dir: str = "models/distill"
    optimizer: str = "muon"
    lr: float = 3e-3
    epochs: float = 6.0
    alpha: float = option(0.9, "the teacher's share of the loss; the rest is the labels'", at_least=0, at_most=1)
    temperature: float = option(1.0, "softens both distributions; above 1, small probabilities count more", above=0)
    from_text: bool = option(False, "learn from texts that the teacher writes, not from its probabilities")
    max_gen_len: int = option(64, "longest answer of the teacher, in tokens, with --from_text", at_least=1)
    sampling_temperature: float = option(
        0.0, "of the teacher's answers, with --from_text; 0 takes the likeliest token", at_least=0
    )

    def validate(self) -> list[str]:
        """What does not fit together, a sentence each."""
        complaints = super().validate()
        sizes = ("n_layers", "d_model", "n_heads", "n_kv_heads")
        if self.student_model and any(getattr(self, name) for name in sizes):
            complaints.append(f"--student_model brings its own size; leave out --{', --'.join(sizes)}")
        if self.from_text and self.text_data:
            complaints.append("--from_text has the teacher answer the questions of --data_path; leave out --text_data")
        return complaints


class DistillationModel(nn.Module):
    """The student, the frozen teacher, and the loss.

    Args:
        student: trained.
        teacher: of the same vocabulary; None if only the labels are learned.
        alpha: the teacher's share of the loss.
        temperature: T, which softens both distributions.
    """

    def __init__(self, student: GPTModel, teacher: GPTModel | None, alpha: float, temperature: float) -> None:
        super().__init__()
        self.student, self.alpha, self.temperature = student, alpha, temperature
        self.teacher = None if teacher is None else teacher.requires_grad_(False)

    def train(self, mode: bool = True) -> DistillationModel:
        """The teacher never drops anything out."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss as a mean over the positions that carry a label; elsewhere nothing is computed from logits.

        Args:
            input_ids, labels, attention_mask: (B, T), as `GPTModel.forward` takes them.
            places: where the labels are, see `log_probabilities.with_places`; None: they are looked for.

        Returns:
            {"loss": (1 − α) CE + α T² KL, "cross_entropy": of the labels, "teacher_kl": KL(teacher ‖ student) at T,
            "token_accuracy": the share of labels that are the student's likeliest tokens}

            Soft targets have gradients that are smaller by 1/T², hence T² (arXiv:1503.02531, section 2).
        """
        places = labelled_places(labels) if places is None else places  # (N,)
        before = places + places // (labels.size(1) - 1)  # (N,): the tokens before those, among all B · T
        targets = labels.flatten().index_select(0, before + 1)  # (N,)
        hidden = self.student.hidden_states(input_ids, attention_mask).flatten(0, 1).index_select(0, before)  # (N, D)
        if self.teacher is None:
            theirs = hidden.new_empty(len(targets), 0)  # (N, 0)
        else:
            with torch.no_grad():
                theirs = self.teacher.hidden_states(input_ids, attention_mask).flatten(0, 1)
                theirs = theirs.index_select(0, before)  # (N, D')
        # The logits of both exist for a chunk at a time, and are computed once more in the backward pass
        size = max(1, LOGITS_AT_ONCE // self.student.config.vocab_size)
        parts = [
            recompute_in_backward(self._losses_of_chunk, *chunk, use_reentrant=False)
            for chunk in zip(hidden.split(size), theirs.split(size), targets.split(size), strict=True)
        ]
        cross_entropy, kl, accuracy = (
            torch.stack(sums).sum() / max(1, len(targets)) for sums in zip(*parts, strict=True)
        )
        if self.teacher is None:
            return {"loss": cross_entropy, "token_accuracy": accuracy}
        loss = (1 - self.alpha) * cross_entropy + self.alpha * self.temperature**2 * kl
        return {"loss": loss, "cross_entropy": cross_entropy, "teacher_kl": kl, "token_accuracy": accuracy}

    def _losses_of_chunk(
        self, hidden: torch.Tensor, theirs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums of −log q(target) and of KL(p ‖ q) after the student's (N, D) and the teacher's (N, D') states, and how
        many targets were the likeliest."""
        logits = self.student.lm_head(hidden).float()  # (N, V)
        cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
        right = (logits.detach().argmax(dim=-1) == targets).sum()
        if self.teacher is None:
            return cross_entropy, torch.zeros_like(cross_entropy), right
        log_q = (logits / self.temperature).log_softmax(dim=-1)  # (N, V)
        log_p = (self.teacher.lm_head(theirs).float() / self.temperature).log_softmax(dim=-1)  # (N, V)
        return cross_entropy, F.kl_div(log_q, log_p, reduction="sum", log_target=True), right


class DistillationLoop(TrainingLoop):
    """The training loop, whose best checkpoint is the student alone."""

    published = "student"

    def prepared(self, batch: Batch) -> Batch:
        """With the places of the labels, which a GPU would have to be waited for."""
        return with_places(super().prepared(batch))


def student_of(teacher: GPTConfig, config: DistillationConfig) -> GPTConfig:
    """The teacher's architecture in the sizes of the settings.

    Raises:
        UserError: the sizes do not go together.
    """
    sizes = {name: getattr(config, name) or max(1, getattr(teacher, name) // 2) for name in ("n_layers", "d_model")}
    n_heads = config.n_heads or max(1, teacher.n_heads // 2)
    n_kv_heads = config.n_kv_heads or max(1, n_heads * teacher.n_kv_heads // teacher.n_heads)
    try:
        return replace(teacher, **sizes, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=None, head_dim=None)
    except ValueError as error:
        raise UserError(f"no student has these sizes: {error}; change --d_model, --n_heads or --n_kv_heads") from None


def teacher_answers(
    config: DistillationConfig,
    teacher: GPTModel,
    tokenizer: ByteLevelBPETokenizer,
    conversations: Sequence[Sequence[Message]],
    account: Account,
) -> list[list[Message]]:
    """The conversations with the teacher's last answer in place of their own; without those that it did not end.

    They are written to `teacher_answers.jsonl` in the output folder, from where a resumed run takes them; beside it
    stands what they were made of. The account learns how many were not ended.

    Raises:
        UserError: the teacher ended no answer by itself; or a resumed run would have other answers.
    """
    path = Path(config.output_dir) / "teacher_answers.jsonl"
    record = path.with_name("teacher_answers.made_of.json")  # written last: without it, there are no answers
    if ranks.is_main():
        inputs = fingerprints(config)
        made_of = {name: inputs.get(name) for name in ("teacher_model", "data_path")}
        made_of |= {name: getattr(config, name) for name in ("max_gen_len", "sampling_temperature", "seed")}
        before = json.loads(record.read_text(encoding="utf-8")) if config.resume and record.is_file() else None
        if before and (other := [name for name in made_of if _content(before[name]) != _content(made_of[name])]):
            raise UserError(
                f"{path} was written with another --{', --'.join(other)}; use the same, or another --output_dir"
            )
    if ranks.is_main() and before is None:
        answers = generate_texts(
            teacher,
            tokenizer,
            [list(conversation[:-1]) for conversation in conversations],
            chat=True,
            max_gen_len=config.max_gen_len,
            temperature=config.sampling_temperature,
            seed=config.seed,
            show_progress=True,
        )
        taught = [
            [*conversation[:-1], {"role": "assistant", "content": answer.text}]
            for conversation, answer in zip(conversations, answers, strict=True)
            if answer.ended and answer.text.strip()
        ]
        if not taught:
            raise UserError(
                f"{config.teacher_model} ended no answer by itself; raise --max_gen_len or take an sft model"
            )
        set_earlier_run_aside(Path(config.output_dir), "distill", path.name, record.name)
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in taught]
        for place, text in ((path, "".join(lines)), (record, json.dumps(made_of))):
            with replacing(place, "free some space or choose another --output_dir") as file:
                file.write(text.encode())
        print(f"the teacher wrote {len(taught)} answers, see {path}", flush=True)
    ranks.barrier()
    taught = load_conversations(path)
    account.leave_out("the teacher did not end its answer", len(conversations) - len(taught))
    return taught


def _content(value: Any) -> Any:
    """Of an input, what stood at the path and not which path it was."""
    return value[1] if isinstance(value, list) else value


def load_data(
    config: DistillationConfig,
    teacher: GPTModel,
    tokenizer: ByteLevelBPETokenizer,
    context: GPTConfig,
    students: ByteLevelBPETokenizer,
) -> tuple[TrainingData, TrainingData]:
    """Training and validation data: conversations, or windows of text.

    Args:
        context: of the model whose context is the limit, the student.
        tokenizer, students: the teacher's and the student's, which may differ if the teacher writes texts.
    """
    if config.text_data:
        sources = [(config.text_data, "train"), (config.text_data, "val")]
        if config.val_data_path:
            sources = [(config.text_data, "all"), (config.val_data_path, "all")]

        def read(path: str, part: str) -> GPTPretrainDataset:
            shards = tokenize_to_shards(path, tokenizer, config.shard_dir, part=part, val_fraction=config.val_fraction)
            return GPTPretrainDataset(shards, config.max_seq_len, path)

        if ranks.is_main():
            data = [read(*source) for source in sources]
        ranks.barrier()  # the other ranks then find the shards on the disk
        return tuple(data if ranks.is_main() else [read(*source) for source in sources])

    def make(conversations: list[list[Message]], account: Account) -> GPTSFTDataset:
        if config.from_text and account.source == config.data_path:
            conversations = teacher_answers(config, teacher, tokenizer, conversations, account)
        return GPTSFTDataset(conversations, students, config.max_seq_len, account)

    return load_parts(config, context, load_conversations, make, "conversations")


def distill(config: DistillationConfig | None = None, **settings: Any) -> dict[str, float]:
    """Teach a small model what a larger one knows; leaves `distill_best.pth`.

    Returns:
        the metrics of the best student.
    """
    config = config or DistillationConfig(**settings)
    path, device = start_of(config), prepare_machine(config)
    if config.text_data:
        config.data_path = ""  # not read
    teacher, tokenizer, _ = load_model(path, device)
    if config.student_model:
        student, student_tokenizer, _ = load_model(config.student_model)
        if student_tokenizer.fingerprint != tokenizer.fingerprint and not config.from_text:
            raise UserError(
                f"{config.student_model} and {config.teacher_model} have different tokenizers, so their probabilities "
                "are of different things; add --from_text, or train the student with the teacher's tokenizer"
            )
    else:
        student_tokenizer, student = tokenizer, GPTModel.from_config(student_of(teacher.config, config))
    fit_context(config, student)
    if teacher.config.max_seq_len < config.max_seq_len and not config.from_text:
        limit = teacher.config.max_seq_len
        raise UserError(f"{config.teacher_model} reads at most {limit} tokens; use --max_seq_len {limit}")
    data = load_data(config, teacher, tokenizer, student.config, student_tokenizer)
    asked = teacher if config.alpha > 0 and not config.from_text else None
    model = DistillationModel(student, asked, config.alpha, config.temperature)
    lengths = getattr(data[0], "lengths", None)  # windows of text have none: they are all of one length
    loop = DistillationLoop(config, model, student.config, student_tokenizer, "distill", *data, device, lengths)
    return run(
        loop,
        f"a student of {student.num_parameters() / 1e6:.2f} M parameters learns from {config.teacher_model} "
        f"({teacher.num_parameters() / 1e6:.2f} M), {loop.max_steps} steps",
        "distilled",
        lambda best: f"validation loss {best.get('val_cross_entropy', best['val_loss']):.4f} nats a token",
    )
