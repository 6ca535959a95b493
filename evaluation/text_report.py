"""Texts scored token by token: perplexity, bits a byte, accuracy, calibration, and the documents that were hardest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from command_line import UserError
from evaluation.intervals import middle, resampled_sums
from evaluation.score_page import ScorePage, figures_of

CALIBRATION_BINS = 15


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error (arXiv:1706.04599, equation 3): is the likeliest token right as often as its
    probability says?

    Args:
        bins: of equal width by that probability, (n, 3): tokens, right ones, sum of the probabilities.
    """
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / max(1.0, bins[:, 0].sum()))


def calibration_rows(bins: np.ndarray) -> list[list[float]]:
    """[count, share that is right, mean probability] of each bin that is not empty, for `score_page`."""
    return [[int(count), float(right / count), float(sure / count)] for count, right, sure in bins if count]


class ScoredText:
    """Adds up the pieces of a text, each {"windows": [nats, hits, tokens] of each window, "bins": see
    `calibration_error`}."""

    def __init__(self) -> None:
        self.windows: list[np.ndarray] = []
        self.bins = np.zeros((CALIBRATION_BINS, 3))
        self.worst: list[tuple[float, int, str]] = []  # nats a token, tokens, text

    def add(self, piece: dict[str, Any], documents: Sequence[str] = (), n_windows: Sequence[int] = ()) -> None:
        """Add a piece; with `n_windows` of each of its documents, the hardest of these are remembered."""
        rows = np.array(piece["windows"]).reshape(-1, 3)
        self.windows.append(rows)
        self.bins += np.array(piece["bins"])
        if len(n_windows):
            ends = np.cumsum([0, *n_windows])
            sums = [rows[begin:end].sum(axis=0) for begin, end in itertools.pairwise(ends)]
            hardest = [
                (float(nats / tokens), int(tokens), text[:500])
                for (nats, _, tokens), text in zip(sums, documents, strict=True)
                if tokens
            ]
            self.worst = sorted(self.worst + hardest, reverse=True)[:20]

    def report(self, n_bytes: int, seed: int) -> dict[str, Any]:
        """What `GPTEvaluator.score_texts` returns."""
        rows = np.concatenate(self.windows)
        nats, hits, tokens = rows.sum(axis=0)
        if tokens == 0:
            raise UserError("there is no text to score; give at least one text that is not empty")
        loss = float(nats / tokens)
        if not math.isfinite(loss):
            raise UserError(
                "the model's loss is not a finite number; its weights are damaged, use another checkpoint"
            )
        bits = tokens / math.log(2) / n_bytes  # a byte, of one nat a token
        sums = resampled_sums(rows, seed)
        low, high = middle(sums[:, 0] / sums[:, 2])
        report = {
            "scores": {
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "bits_per_byte": loss * bits,
                "token_accuracy": float(hits / tokens),
                "calibration_error": calibration_error(self.bins),
                "tokens": int(tokens),
                "bytes": n_bytes,
            },
            "intervals": {
                "loss": (low, high),
                "perplexity": (math.exp(min(low, 700.0)), math.exp(min(high, 700.0))),
                "bits_per_byte": (low * bits, high * bits),
                "token_accuracy": middle(sums[:, 1] / sums[:, 2]),
            },
            "calibration": calibration_rows(self.bins),
        }
        if self.worst:
            report["worst"] = [dict(zip(("loss", "tokens", "text"), each, strict=True)) for each in self.worst]
        return report


def text_summary(report: dict[str, Any]) -> str:
    """The scores of text in one line."""
    scores = report["scores"]
    return (
        f"{scores['tokens']:,} tokens, loss {scores['loss']:.4f} nats a token, perplexity {scores['perplexity']:.2f}, "
        f"{scores['bits_per_byte']:.4f} bits per byte (one stream, as val_bpb in training); each document by itself: "
        f"perplexity {scores['document_perplexity']:.2f}, {scores['document_bits_per_byte']:.4f} bits per byte"
    )


def text_page(report: dict[str, Any], title: str, about: dict[str, Any]) -> ScorePage:
    """The scores of text as a page, with the documents that were hardest."""
    return ScorePage(
        title, about, figures_of(report), calibration=report["calibration"], worst=report.get("worst", ()),
        worst_title="The hardest documents",
    )  # fmt: skip
