"""How good a model is: perplexity and bits per byte of text; exactness, BLEU and ROUGE of answers, skill by skill, and
how likely it finds the reference answers; and how often a reward model prefers the better answer.

    python evaluator.py --model_path models/sft/sft_best.pth --test_data_path data/sft/sft_test.json --model_type sft
    python evaluator.py --model_path models/pretrain/pretrain_best.pth --test_data_path data/pretrain/val
    python evaluator.py --model_path models/reward/reward_best.pth --test_data_path data/sft/rlhf_pairwise_test.json

It prints tables for people and writes everything, each answer included, as JSON and as a page (HTML) next to the
checkpoint. Figures come with 95 % intervals. Interrupted, it goes on where it was when it is started again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, weight_fingerprint
from command_line import UserError, option, parse_config, run_main
from data_loader import PreferenceDataset, length_multiple, lengthened, pad_rows
from evaluation.answer_report import (
    Question,
    ReferenceScore,
    answers_page,
    answers_summary,
    answers_table,
    check_writable,
    format_table,
    interval_table,
    load_questions,
    report_answers,
    write_json,
)
from evaluation.intervals import Interval, middle, resampled_sums, wilson
from evaluation.kept_work import KeptWork
from evaluation.score_page import ScorePage, figures_of, write_page
from evaluation.text_metrics import References, corpus_bleu_score, mean_rouge_scores
from evaluation.text_report import CALIBRATION_BINS, ScoredText, text_page, text_summary
from gpt_model import IGNORED_LABEL, GPTModel
from inference.quantizer import load_any
from inference.request import Generation, Prompt, encode_prompt
from inference.text_generation import generate_texts, longest_prompt
from machine import PRECISIONS, resolve_device
from progress import Progress
from text.account import Account
from text.conversation_data import RecordOptions, load_records, parse_columns, parse_preference
from text.text_files import RECORD_ENDINGS, TEXT_ENDINGS, iter_documents, resolve_files

if TYPE_CHECKING:  # it brings all that trains, which takes a second to import
    from alignment.reward_model import RewardModel

Window = tuple[list[int], list[int]]  # inputs and targets, of equal length; a target −100 does not count
PIECE = 256  # questions between two moments at which an interrupted evaluation can go on


class ScoredTargets(NamedTuple):
    """Of each of N targets, on the CPU: −log p in nats, in double precision; whether it is the likeliest token; the
    number of its window; and the probability of the likeliest token. (N,) each."""

    nats: torch.Tensor
    hits: torch.Tensor
    windows: torch.Tensor
    confidence: torch.Tensor


class GPTEvaluator:
    """Scores a language model.

    Args:
        model: the model; it is moved to `device` if one is given.
        tokenizer: the tokenizer that it was trained with.
        device: where to compute; None leaves the model where it is.

    Raises:
        UserError: the tokenizer has ids that the model does not know.
    """

    def __init__(
        self, model: GPTModel, tokenizer: ByteLevelBPETokenizer, device: torch.device | str | None = None
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer

    def compute_perplexity(self, texts: str | Path | Iterable[str], **settings: Any) -> dict[str, float]:
        """The "scores" of `score_texts`, whose arguments it takes."""
        return self.score_texts(texts, **settings)["scores"]

    @torch.no_grad()
    def score_texts(
        self,
        texts: str | Path | Iterable[str],
        *,
        as_documents: bool = False,
        batch_size: int = 16,
        stride: int | None = None,
        show_progress: bool = False,
        seed: int = 0,
        kept: KeptWork | None = None,
    ) -> dict[str, Any]:
        """Score every token of some texts exactly once.

        As one stream, which is how pretraining reads text and measures `val_loss` and `val_bpb`: `<s>` text `</s>`
        after one another, cut into windows of the context's length, each of which predicts all but its first.

        With `as_documents`, each text by itself: `<s>` opens it and nothing closes it, so that neither is scored, and
        no other text is seen. One longer than the context is read in windows that advance by `stride` tokens, and only
        the tokens that no earlier window has scored count: each is predicted from at least context − stride tokens.

        The two differ: in a stream, beginnings and ends of documents are predicted, too, and the text before a window
        is not seen. The sums run over tokens, so no batch counts for more than its tokens.

        Args:
            texts: the texts; or the path of a text file, a folder or a name without its ending.
            batch_size: windows that are computed together; it changes nothing but speed and memory.
            stride: of documents, 1 … context; None means half the context.
            seed: of the bootstrap, which draws windows (a document that fits the context is one).
            kept: where finished pieces are kept, see `KeptWork`.

        Returns:
            "scores": {"loss": nats a token, "perplexity": e^loss, "bits_per_byte": of the UTF-8 text, "token_accuracy":
            the share of tokens that the model held likeliest, "calibration_error": see `calibration_error`, "tokens",
            "bytes"}; "intervals": of the first four; "calibration": [tokens, their share held likeliest, mean
            probability of the likeliest] by its probability; "worst", of documents: the hardest of them.

        Raises:
            UserError: there is no text, or the model's loss is not finite.
        """
        documents = iter_documents(texts) if isinstance(texts, str | Path) else iter(texts)
        stride = stride or max(1, self.model.config.max_seq_len // 2)
        if not 1 <= stride <= self.model.config.max_seq_len:
            raise ValueError(f"stride must be 1 to {self.model.config.max_seq_len}, not {stride}")
        kept, scored, n_bytes = kept or KeptWork(), ScoredText(), 0
        name = f"documents by {stride}" if as_documents else "stream"
        was_training = self.model.training
        self.model.eval()
        progress = Progress("scoring", unit="document", shown=show_progress)
        stream = _Stream(self.model.config.max_seq_len)
        try:
            while chunk := list(islice(documents, 1024)):  # so that a corpus never has to fit into memory
                encoded = self.tokenizer.encode_documents(chunk)
                if as_documents:
                    cut = [list(self._windows(ids, stride)) for ids in encoded]
                    windows = [window for each in cut for window in each]
                else:
                    cut, windows = [], stream.windows_of(self._with_ends(ids) for ids in encoded if ids)
                piece = kept.of(f"{name} {progress.done}", partial(self._score_windows, windows, batch_size))
                scored.add(piece, chunk, [len(each) for each in cut])
                n_bytes += sum(len(text.encode("utf-8", "replace")) for text in chunk)
                progress.update(len(chunk))
            scored.add(kept.of(f"{name} end", partial(self._score_windows, stream.last_window(), batch_size)))
        finally:
            progress.close()
            self.model.train(was_training)
        return scored.report(n_bytes, seed)

    def _with_ends(self, ids: list[int]) -> list[int]:
        """A document as it stands in a stream, see `data_loader.TokenShards`."""
        return [*self.tokenizer.prefix_ids, *ids, self.tokenizer.eos_token_id]

    def _windows(self, ids: list[int], stride: int) -> Iterator[Window]:
        """Windows that score each id of a document once."""
        inputs = [*(self.tokenizer.prefix_ids or [self.tokenizer.eos_token_id]), *ids]
        scored = begin = 0
        while scored < len(ids):
            end = min(begin + self.model.config.max_seq_len, len(ids))
            # inputs[t] is read to predict ids[t]; what an earlier window has scored is context only
            yield inputs[begin:end], [IGNORED_LABEL] * (scored - begin) + ids[scored:end]
            scored, begin = end, begin + stride

    def _score_windows(self, windows: Sequence[Window], batch_size: int) -> dict[str, list[list[float]]]:
        """Sums of each window, and of the tokens in each bin of confidence; see `ScoredText`."""
        order = sorted(range(len(windows)), key=lambda number: len(windows[number][0]))  # needs little padding
        rows = torch.zeros(len(windows), 3, dtype=torch.float64)  # nats, hits, tokens
        bins = torch.zeros(CALIBRATION_BINS, 3, dtype=torch.float64)  # tokens, hits, confidence
        for start in range(0, len(order), batch_size):
            numbers = torch.tensor(order[start : start + batch_size])
            nats, hits, window, confidence = self._score_targets([windows[number] for number in numbers])
            ones, confidence = torch.ones_like(nats), confidence.double()
            rows.index_add_(0, numbers[window], torch.stack((nats, hits.double(), ones), dim=1))
            places = (confidence.nan_to_num() * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
            bins.index_add_(0, places, torch.stack((ones, hits.double(), confidence), dim=1))
        return {"windows": rows.tolist(), "bins": bins.tolist()}

    def _score_targets(self, windows: Sequence[Window]) -> ScoredTargets:
        """Every target of some windows."""
        rows, labels = zip(*windows, strict=True)
        # Padding stands on the right, where a causal model cannot see it: it needs no mask
        pad_token_id, device = self.tokenizer.pad_token_id, self.model.device
        batch = {"input_ids": pad_rows(rows, pad_token_id), "labels": pad_rows(labels, IGNORED_LABEL)}
        batch = lengthened(batch, length_multiple(device), pad_token_id, self.model.config.max_seq_len)
        inputs, targets = batch["input_ids"].to(device), batch["labels"].to(device)  # (B, T), (B, T)
        scored = targets != IGNORED_LABEL  # (B, T)
        hidden, targets = self.model.hidden_states(inputs)[scored], targets[scored]  # (N, D), (N,)
        nats, hits, confidence = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)], [torch.empty(0)]
        # Logits are the largest tensor of all, so they are made for a thousand tokens at a time
        for some, their_targets in zip(hidden.split(1024), targets.split(1024), strict=True):
            logits = self.model.lm_head(some).float()  # (N', V)
            nats.append(F.cross_entropy(logits, their_targets, reduction="none").cpu())
            best = logits.max(dim=-1)
            hits.append((best.indices == their_targets).cpu())
            confidence.append((best.values - logits.logsumexp(dim=-1)).exp().cpu())
        rows = scored.nonzero()[:, 0].cpu()
        return ScoredTargets(torch.cat(nats).double(), torch.cat(hits), rows, torch.cat(confidence))

    @torch.no_grad()
    def score_references(self, questions: Sequence[Question], batch_size: int = 16) -> list[ReferenceScore | None]:
        """How likely the model finds each reference answer, the token that ends it included, after its question.

        Returns:
            a score for each question; None where question and answer together are longer than the context.
        """
        windows: list[Window] = []
        for question in questions:
            chat = self.tokenizer.encode_chat([*question.prompt, {"role": "assistant", "content": question.reference}])
            ids, labels = chat["input_ids"], chat["labels"]
            end = max(place for place, label in enumerate(labels) if label != IGNORED_LABEL) + 1
            begin = end
            while begin and labels[begin - 1] != IGNORED_LABEL:  # of several answers, the last
                begin -= 1
            windows.append((ids[: end - 1], [IGNORED_LABEL] * (begin - 1) + ids[begin:end]))
        fitting = [n for n, (ids, _) in enumerate(windows) if len(ids) < self.model.config.max_seq_len]
        fitting.sort(key=lambda number: len(windows[number][0]))
        scores: list[ReferenceScore | None] = [None] * len(windows)
        was_training = self.model.training
        self.model.eval()
        for start in range(0, len(fitting), batch_size):
            numbers = fitting[start : start + batch_size]
            nats, hits, rows, _ = self._score_targets([windows[number] for number in numbers])
            for row, number in enumerate(numbers):
                own = rows == row
                scores[number] = ReferenceScore(float(nats[own].sum()), int(hits[own].sum()), int(own.sum()))
        self.model.train(was_training)
        return scores

    def generate_predictions(
        self, instructions: Sequence[Prompt], max_gen_len: int = 64, *, chat: bool = True, **settings: Any
    ) -> list[str]:
        """The model's answers, greedy unless `settings` (those of `generate_texts`) say otherwise."""
        settings = {"max_gen_len": max_gen_len, "chat": chat, **settings}
        return [generation.text for generation in generate_texts(self.model, self.tokenizer, instructions, **settings)]

    @staticmethod
    def compute_bleu(predictions: Sequence[str], references: Sequence[References]) -> float:
        """See `corpus_bleu_score`."""
        return corpus_bleu_score(predictions, references)

    @staticmethod
    def compute_rouge(predictions: Sequence[str], references: Sequence[References]) -> dict[str, float]:
        """See `mean_rouge_scores`."""
        return mean_rouge_scores(predictions, references)

    def evaluate_pretrained(
        self,
        data_path: str | Path,
        *,
        max_samples: int | None = None,
        batch_size: int = 16,
        n_continuations: int = 8,
        show_progress: bool = False,
        stride: int | None = None,
        kept: KeptWork | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Perplexity of a text file, and how the model continues the beginnings of its first documents.

        Args:
            max_samples: score no more documents than this, from the beginning.
            stride, kept: see `score_texts`.
            settings: those of `generate_texts`, for the continuations.

        Returns:
            {"scores", "intervals", "calibration", "worst": see `score_texts`; of the text as one stream and, with
            "document_" before their names, of each document by itself. "predictions": [{"prompt", "reference",
            "prediction"}]}
        """
        report: dict[str, Any] = {"scores": {}, "intervals": {}}
        for prefix in ("", "document_"):
            of_text = self.score_texts(
                islice(iter_documents(data_path), max_samples),
                as_documents=bool(prefix),
                batch_size=batch_size,
                show_progress=show_progress,
                stride=stride,
                seed=settings.get("seed") or 0,
                kept=kept,
            )
            for kind in ("scores", "intervals"):
                report[kind] |= {prefix + name: value for name, value in of_text.pop(kind).items()}
            report |= of_text if prefix == "document_" else {}
        del report["scores"]["document_bytes"]
        documents = list(islice(iter_documents(data_path), n_continuations))
        prompts = [text[: min(len(text) // 3, 40)].rstrip() or text[:1] for text in documents]
        continued = self.generate_predictions(prompts, **{"chat": False, **settings})
        report["predictions"] = [
            {"prompt": prompt, "reference": text[len(prompt) :], "prediction": prediction}
            for prompt, text, prediction in zip(prompts, documents, continued, strict=True)
        ]
        return report

    def evaluate_sft(
        self,
        data_path: str | Path,
        *,
        max_samples: int | None = None,
        max_gen_len: int = 64,
        account: Account | None = None,
        columns: Mapping[str, str] | None = None,
        kept: KeptWork | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Answer the questions of an instruction file, grade the answers, and score the reference answers.

        Where a record has an "answer" besides its response, `answer_checker` grades with it; otherwise an answer is
        exact if it equals the record's response, or one of its "references", but for white space.

        Args:
            account: learns what became of the records, and how many questions are too long to be read whole.
            columns: fields of other names, see `conversation_data.parse_columns`.
            kept: where finished pieces are kept, see `KeptWork`.
            settings: those of `generate_texts`; a seed is that of the bootstrap, too.

        Returns:
            see `report_answers`.
        """
        questions = load_questions(data_path, max_samples, account, columns)
        prompts = [question.prompt for question in questions]
        if account is not None:
            room = longest_prompt(self.model.config, max_gen_len)
            account.cut += sum(len(encode_prompt(self.tokenizer, prompt, True)) > room for prompt in prompts)
        settings = {"max_gen_len": max_gen_len, "chat": True, **settings}
        answers: list[Generation] = []
        likelihoods: list[ReferenceScore | None] = []
        for start in range(0, len(questions), PIECE):
            piece = partial(self._answered, questions[start : start + PIECE], start, settings)
            generations, scores = (kept or KeptWork()).of(f"questions {start}", piece)
            answers += [Generation(*each) for each in generations]
            likelihoods += [None if score is None else ReferenceScore(*score) for score in scores]
        return report_answers(questions, answers, likelihoods, settings.get("seed") or 0)

    def _answered(self, questions: Sequence[Question], start: int, settings: dict[str, Any]) -> tuple[list, list]:
        """Answers to some questions, the first of which is number `start`, and the scores of their references."""
        if settings.get("seed") is not None:
            settings = {**settings, "seed": settings["seed"] + start}  # equal questions are not to get equal answers
        answers = generate_texts(self.model, self.tokenizer, [question.prompt for question in questions], **settings)
        return [(each.text, each.ended, each.token_ids) for each in answers], self.score_references(questions)


class _Stream:
    """Cuts a stream of documents into the windows of `data_loader.GPTPretrainDataset`, without keeping the stream."""

    def __init__(self, length: int) -> None:
        self.length, self.ids, self.begin = length, [], 0  # a window of `length` ids begins at `begin`

    def windows_of(self, documents: Iterable[list[int]]) -> list[Window]:
        """All whole windows, once these documents have come."""
        for ids in documents:
            self.ids += ids
        windows = []
        while len(self.ids) - self.begin >= self.length:
            window = self.ids[self.begin : self.begin + self.length]
            windows.append((window[:-1], window[1:]))
            self.begin += self.length - 1  # the last token of a window is the first of the next
        unneeded = max(0, min(self.begin, len(self.ids) - self.length))  # the last window reaches back to be full
        self.ids, self.begin = self.ids[unneeded:], self.begin - unneeded
        return windows

    def last_window(self) -> list[Window]:
        """What is left at the end of the stream, if anything is."""
        if len(self.ids) - self.begin < 2:
            return []
        start = max(0, len(self.ids) - self.length)
        window, scored = self.ids[start:], self.begin - start
        return [(window[:-1], [IGNORED_LABEL] * scored + window[scored + 1 :])]


def evaluate_reward(
    model: RewardModel,
    tokenizer: ByteLevelBPETokenizer,
    data_path: str | Path,
    *,
    max_samples: int | None = None,
    batch_size: int = 64,
    account: Account | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How often a reward model prefers the better of two answers, by the "defect" of the worse one.

    Answers that do not fit into the model's context are left out.

    Args:
        account, columns: see `GPTEvaluator.evaluate_sft`.
        seed: of the bootstrap, which draws pairs.

    Returns:
        {"scores": {"count", "loss", "accuracy", "margin", "calibration_error"}, see `preference_figures`; "intervals"
        of the means among them; "by_defect": the same scores for each defect, if records name one}
    """
    from alignment.reward_model import compare, preference_figures

    def parse(record: dict, where: str) -> tuple[str, dict]:
        return str(record.get("defect")), parse_preference(record, where)

    loaded = load_records(data_path, parse, account, columns)[:max_samples]
    data = PreferenceDataset([preference for _, preference in loaded], tokenizer, model.config.max_seq_len, account)
    groups: dict[str, list[int]] = {}
    for index, place in enumerate(data.places):
        groups.setdefault(loaded[place][0], []).append(index)
    compared = {defect: compare(model, data, groups[defect], batch_size) for defect in sorted(groups)}

    def figures(margins: torch.Tensor, weights: torch.Tensor) -> dict[str, float]:
        return {"count": round(float(weights.sum())), **preference_figures(margins, weights)}

    margins, weights = (torch.cat(parts) for parts in zip(*compared.values(), strict=True))
    report = {"scores": figures(margins, weights), "intervals": _reward_intervals(margins, weights, seed)}
    if list(groups) != ["None"]:
        report["by_defect"] = {defect: figures(*parts) for defect, parts in compared.items()}
    return report


def _reward_intervals(margins: torch.Tensor, weights: torch.Tensor, seed: int) -> dict[str, Interval]:
    """Of the figures that are means over pairs; see `preference_figures`."""
    of_pairs = torch.stack((-F.logsigmoid(margins), (margins > 0).float(), margins, torch.ones_like(margins)))
    sums = resampled_sums((of_pairs * weights).double().T.numpy(), seed)  # (R, 4)
    return {name: middle(sums[:, place] / sums[:, 3]) for place, name in enumerate(("loss", "accuracy", "margin"))}


# -- the command line --------------------------------------------------------------------------------------------------


TEST_DATA = {  # by what is scored
    "pretrain": "data/pretrain/val",
    "sft": "data/sft/sft_test.json",
    "reward": "data/sft/rlhf_pairwise_test.json",
}


@dataclass
class EvaluationConfig(RecordOptions):
    """Settings of one evaluation."""

    model_path: str = option("models/sft/sft_best.pth", "the checkpoint, in full precision or INT8")
    test_data_path: str | None = option(None, "text, instruction data or preferences; default: the sample data's")
    model_type: str | None = option(
        None, "score text, answers or preferences; default by the checkpoint's stage", choices=tuple(TEST_DATA)
    )
    output_path: str | None = option(None, "JSON file for all results; default <model>_eval.json beside the model")
    max_samples: int | None = option(None, "score at most this many records or documents", at_least=1)
    max_gen_len: int = option(64, "longest answer, in tokens", at_least=1)
    temperature: float = option(0.0, "0 takes the likeliest token; otherwise sample at this temperature", at_least=0)
    top_k: int = option(0, "sample among the k likeliest tokens; 0 means among all", at_least=0)
    batch_size: int = option(64, "answers or windows of text that are computed together", at_least=1)
    stride: int | None = option(
        None, "tokens by which windows of long documents advance; default half the context", at_least=1
    )
    seed: int = option(42, "makes sampling and the intervals' bootstrap repeatable")
    device: str = option("auto", "auto, cpu or cuda")
    precision: str = option(
        "auto", "what to compute in; auto: bf16 on a GPU, fp16 on one before Ampere, otherwise fp32", choices=PRECISIONS
    )
    num_threads: int = option(0, "CPU threads; 0 means as many as torch takes", at_least=0)


def reward_summary(report: dict[str, Any]) -> str:
    """The scores of a reward model in one line."""
    scores = report["scores"]
    return f"{scores['count']} pairs, the better answer preferred in {scores['accuracy']:.1%}"


def reward_table(report: dict[str, Any]) -> str:
    """The scores of a reward model as a table by defect."""
    rows = {**report.get("by_defect", {}), "all": report["scores"]}
    cells = [[name, str(scores["count"]), f"{100 * scores['accuracy']:.1f}"] for name, scores in rows.items()]
    return format_table(["defect", "count", "accuracy %"], cells)


def reward_page(report: dict[str, Any], title: str, about: dict[str, Any]) -> ScorePage:
    """The scores of a reward model as a page."""
    rows = [
        (name, each["count"], each["accuracy"], wilson(each["accuracy"] * each["count"], each["count"]))
        for name, each in report.get("by_defect", {}).items()
    ]
    groups = {"The better answer preferred, by defect": rows} if rows else {}
    return ScorePage(title, about, figures_of(report), groups=groups)


def main(argv: list[str] | None = None) -> None:
    """Evaluate a checkpoint from the command line."""
    config = parse_config(EvaluationConfig, argv, description="Evaluate a pretrained, fine-tuned or reward model.")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    model_path, device = Path(config.model_path), resolve_device(config.device)
    output_path = check_writable(config.output_path or model_path.with_name(f"{model_path.stem}_eval.json"))
    checkpoint = load_checkpoint(model_path)
    model_type = config.model_type or (checkpoint["stage"] if checkpoint["stage"] in TEST_DATA else "sft")
    data_path = config.test_data_path or TEST_DATA[model_type]

    started = time.perf_counter()
    sizes = {"max_samples": config.max_samples, "batch_size": config.batch_size}
    kind = {"sft": "questions", "reward": "preferences"}.get(model_type, "documents")
    advice = "the model's context was fixed in pretraining: lower --max_gen_len, or give shorter records"
    unread = output_path.with_name(f"{output_path.stem}_left_out.jsonl")
    account = Account(str(data_path), kind, advice, config.skip_bad_records, unread)
    records = {"account": account, "columns": parse_columns(config.columns)}
    sampling = {name: getattr(config, name) for name in ("max_gen_len", "temperature", "top_k", "seed")}
    # What results depend on: not how many are computed at once, nor where the files are
    settings = ("max_samples", "max_gen_len", "temperature", "top_k", "seed", "stride", "columns", "skip_bad_records",
                "precision")  # fmt: skip
    depends_on = {name: getattr(config, name) for name in settings} | {"device": str(device), "type": model_type}
    depends_on |= {"weights": weight_fingerprint(checkpoint), "data": _fingerprint_of(data_path)}
    kept = KeptWork(output_path.with_name(f"{output_path.stem}_unfinished.jsonl"), depends_on)
    if kept.found:
        print(f"going on with {kept.found} finished pieces of an interrupted evaluation", flush=True)
    if model_type == "reward":
        from alignment.reward_model import load_reward_model

        reward_model = load_reward_model(model_path, device)
        report = evaluate_reward(*reward_model, data_path, **sizes, **records, seed=config.seed)
        table, summary, page = reward_table(report), reward_summary(report), reward_page
    else:
        model, tokenizer, _ = load_any(model_path, device, precision=config.precision)
        evaluator = GPTEvaluator(model, tokenizer)
        if config.stride and config.stride > model.config.max_seq_len:
            raise UserError(f"--stride must be at most {model.config.max_seq_len}, the model's context")
        if model_type == "sft":
            report = evaluator.evaluate_sft(data_path, **sizes, **sampling, **records, kept=kept, show_progress=True)
            table, summary, page = answers_table(report), answers_summary(report), answers_page
        else:
            report = evaluator.evaluate_pretrained(
                data_path, **sizes, **sampling, stride=config.stride, kept=kept, show_progress=True
            )
            table, summary, page = "", text_summary(report), text_page
    about = {
        "model_path": str(model_path),
        "stage": checkpoint["stage"],
        "step": checkpoint["step"],
        "quantization": checkpoint.get("quantization"),
        "model_type": model_type,
        "test_data_path": str(data_path),
        "temperature": config.temperature,
        "seed": config.seed,
        **({"data": account.as_dict()} if account.read else {}),
        "seconds": round(time.perf_counter() - started, 2),
    }
    write_json({**about, **report}, output_path)
    shown = {name: value for name, value in about.items() if name not in ("data", "seconds") and value is not None}
    write_page(page(report, f"Scores of {model_path.name}", shown), output_path.with_suffix(".html"))
    kept.finish()
    print(table, end="\n\n" if table else "")
    print(interval_table(report), end="\n\n")
    if account.read:
        print(*account.sentences(), sep="\n")
    print(
        f"{model_path} on {data_path}: {summary}; written to {output_path} and "
        f"{output_path.with_suffix('.html').name}"
    )


def _fingerprint_of(data_path: str | Path) -> list[tuple[str, int, int]]:
    """Which files the data are, and whether they have changed."""
    files = resolve_files(data_path, tuple(dict.fromkeys(TEXT_ENDINGS + RECORD_ENDINGS)))
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


if __name__ == "__main__":
    run_main(main)
