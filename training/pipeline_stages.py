"""Pipeline parallelism: consecutive layers of a GPTModel on consecutive ranks, over torch.distributed.pipelining.

The micro-batches of one step follow each other through the parts, so that all parts have work at once. A part is built
from the model's own modules under their own names: its weights and those of the whole model are the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from gpt_model import IGNORED_LABEL, GPTModel, next_token_loss
from transformer_components import Positions

if TYPE_CHECKING:  # importing it takes a second, which training without a pipeline need not wait
    from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe


class PipelinePart(GPTModel):
    """One stage: some consecutive layers; the first stage also embeds, the last has the head and the loss.

    Args:
        model: the whole model; the layers of other stages are dropped from memory there.
        stage, n_stages: which of how many parts.
    """

    def __init__(self, model: GPTModel, stage: int, n_stages: int) -> None:
        nn.Module.__init__(self)  # and not GPTModel's, which would build the whole model
        config = model.config
        self.config, self.recompute_activations = config, model.recompute_activations
        self.is_first, self.is_last = stage == 0, stage == n_stages - 1
        mine = range(stage * config.n_layers // n_stages, (stage + 1) * config.n_layers // n_stages)
        if self.is_first:
            self.token_embedding, self.embedding_dropout = model.token_embedding, model.embedding_dropout
        # Tables are wherever they may be needed; weights are where they are added to embeddings, in one part only
        has_weights = any(True for _ in model.position_embedding.parameters())
        self.position_embedding = model.position_embedding if self.is_first or not has_weights else Positions()
        self.layers = nn.ModuleDict({str(index): model.layers[index] for index in mine})  # "layers.5.…", as ever
        if self.is_last:
            self.final_norm, self.lm_head = model.final_norm, model.lm_head
        kept = set(self.modules())
        for module in [*model.children(), *model.layers]:
            if module not in kept and module is not model.layers:
                module.to("meta")

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """This part's share of the model: ids (B, T) or hidden states (B, T, D) → hidden states, or the loss (1,)."""
        here = slice(0, x.size(1))
        if self.is_first:
            x = self.embed(x, here)  # (B, T, D)
        rotary = self.position_embedding.rotary(here)
        for layer in self.layers.values():
            if self.recompute_activations and self.training:
                x = recompute_in_backward(layer, x, None, rotary, None, 0, use_reentrant=False)
            else:
                x = layer(x, None, rotary)  # (B, T, D)
        if not self.is_last:
            return x
        return next_token_loss(self.lm_head(self.final_norm(x)), labels).unsqueeze(0)  # (1,)


class Pipeline:
    """All parts as one model, seen from the rank of one of them.

    Called with a batch, it gives its loss, without gradients; `step` trains. The schedule is 1F1B (PipeDream,
    arXiv:1806.03377; a rank keeps the activations of at most `n_stages` micro-batches) or, with fewer micro-batches
    than stages, GPipe's (arXiv:1811.06965).

    Args:
        part: of this rank.
        group: the ranks of the pipeline, in the order of their parts.
        device: of this rank.
    """

    def __init__(self, part: PipelinePart, group: dist.ProcessGroup, device: torch.device) -> None:
        self.part, self.group, self.device = part, group, device
        self.has_copy_of_embedding = part.is_last and part.config.tie_embeddings
        self._ends = ends_of_pipelines(group) if part.config.tie_embeddings else None
        self._schedules: dict[bool, tuple[tuple[int, ...], Schedule1F1B | ScheduleGPipe]] = {}

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"loss"} of a batch, both (B, T), known to every rank of the pipeline."""
        losses: list[torch.Tensor] = []
        target = torch.ones(1, device=self.device)
        self._schedule(1, input_ids.shape, training=False).eval(*self._inputs(input_ids), target=target, losses=losses,
                                                                **self._labels(labels))  # fmt: skip
        return {"loss": self._known_to_all(losses)}

    def step(self, batches: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]) -> torch.Tensor:
        """Forward and backward passes of the micro-batches of one step.

        Args:
            batches: {"input_ids", "labels"}: (B, T) each; B is the same for all.
            weights: of the losses of the micro-batches in their sum, whose gradient is added.

        Returns:
            the weighted sum of the losses, on every rank of the pipeline.
        """
        longest = max(batch["labels"].size(1) for batch in batches)

        def joined(name: str, padding: int) -> torch.Tensor:  # what pads on the right is seen by nothing before it
            rows = [batch[name] for batch in batches]
            return torch.cat([F.pad(row, (0, longest - row.size(1)), value=padding) for row in rows])

        input_ids, labels = joined("input_ids", 0), joined("labels", IGNORED_LABEL)  # (n · B, T)
        losses: list[torch.Tensor] = []
        shape = torch.Size((input_ids.size(0) // len(batches), longest))
        # What the schedule calls a micro-batch's target is its weight here: the last part has its labels as an input
        self._schedule(len(batches), shape, training=True).step(
            *self._inputs(input_ids),
            target=torch.tensor(weights, device=self.device),
            losses=losses,
            **self._labels(labels),
        )
        self._add_up_tied_gradients()
        return self._known_to_all(losses)

    def _inputs(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (input_ids,) if self.part.is_first else ()

    def _labels(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"labels": labels} if self.part.is_last else {}

    def _schedule(self, n_batches: int, shape: torch.Size, training: bool) -> Schedule1F1B | ScheduleGPipe:
        """The schedule for micro-batches of `shape` (B, T); buffers are kept for the last shape only."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        key = (n_batches, *shape)
        if training not in self._schedules or self._schedules[training][0] != key:
            hidden = torch.empty(*shape, self.part.config.d_model, device="meta", requires_grad=training)
            stage = PipelineStage(
                self.part,
                dist.get_rank(self.group),
                dist.get_world_size(self.group),
                self.device,
                input_args=torch.empty(shape, dtype=torch.int64, device="meta") if self.part.is_first else hidden,
                output_args=torch.empty(1, device="meta", requires_grad=training) if self.part.is_last else hidden,
                group=self.group,
            )
            kind = Schedule1F1B if n_batches >= stage.num_stages else ScheduleGPipe
            # Unscaled: the weights add up to a mean already
            weighted = kind(stage, n_batches, loss_fn=lambda loss, weight: (loss * weight).sum(), scale_grads=False)
            self._schedules[training] = key, weighted
        return self._schedules[training][1]

    def _known_to_all(self, losses: list[torch.Tensor]) -> torch.Tensor:
        total = torch.stack(losses).sum().detach() if self.part.is_last else torch.zeros((), device=self.device)
        dist.all_reduce(total, group=self.group)
        return total

    def _add_up_tied_gradients(self) -> None:
        """A tied embedding lives in the first and in the last part: both get the sum of the two gradients."""
        if self._ends is not None:
            weight = self.part.token_embedding.weight if self.part.is_first else self.part.lm_head.weight
            gradient = weight.grad.to_local() if isinstance(weight, DTensor) else weight.grad
            dist.all_reduce(gradient, group=self._ends)


def ends_of_pipelines(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """A group of the first and the last rank of this rank's pipeline; None on the ranks between them."""
    ranks = dist.get_process_group_ranks(group)
    ends: list[tuple[int, int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(ends, (ranks[0], ranks[-1]))
    mine = None
    for pair in sorted(set(ends)):  # every rank has to take part in making every group
        made = dist.new_group(pair)
        if dist.get_rank() in pair:
            mine = made
    return mine


def layers_of(model: GPTModel) -> list[nn.Module]:
    """The decoder layers of a model or of a part of it."""
    return list(model.layers.values() if isinstance(model.layers, nn.ModuleDict) else model.layers)
