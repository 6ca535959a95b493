"""How a model is spread over ranks, on nothing but torch.distributed.

`ParallelModel` applies data, tensor and pipeline parallelism from outside: the model's own file knows nothing of ranks.
docs/distributed.md says which mode to use when, and what each one costs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from command_line import UserError
from gpt_model import GPTModel
from lora import trained_state
from training.optimization import by_mesh, like, whole
from training.pipeline_stages import Pipeline, PipelinePart, layers_of
from training.ranks import is_main, rank, sum_over_ranks, world_size
from training.tensor_plan import BY_INPUTS, BY_OUTPUTS, indivisible
from transformer_components import AuxiliaryLoss

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # unsharded, on the CPU of rank 0

# ------------------------------------------------------------------------------------------------------------ layout


@dataclass(frozen=True)
class Layout:
    """Into how many parts each kind of parallelism cuts the work; the product is the number of ranks.

    The order is that of the device mesh, from the slowest to the fastest links: the ranks of one tensor-parallel group
    are neighbours, on one machine.
    """

    pp: int = 1  # pipeline: consecutive layers
    ddp: int = 1  # copies of the model, each with its own samples
    fsdp: int = 1  # the same, with parameters, gradients and optimiser state cut among the ranks
    tp: int = 1  # tensor: every matrix of a layer

    @property
    def data_ranks(self) -> int:
        """How many different batches are in the works at once."""
        return self.ddp * self.fsdp

    @property
    def model_ranks(self) -> int:
        """How many ranks work on the same samples."""
        return self.pp * self.tp


KINDS = tuple(field.name for field in fields(Layout))


def parse_layout(mode: str, n_ranks: int) -> Layout:
    """Read `--parallel`: `fsdp`, or several kinds with their sizes such as `pp:2+fsdp+tp:2`.

    One kind may come without a size; it takes the ranks that the others leave.

    Raises:
        UserError: an unknown kind, or sizes that do not multiply to the number of ranks.
    """
    sizes: dict[str, int | None] = {}
    for part in mode.split("+"):
        kind, colon, size = part.strip().partition(":")
        if kind not in KINDS or kind in sizes or (colon and not (size.isdecimal() and int(size) > 0)):
            raise UserError(
                f"--parallel {mode}: {part!r} is not right; join {', '.join(KINDS)} by +, each once and with a size "
                "where needed, such as fsdp or fsdp:2+tp:2"
            )
        sizes[kind] = int(size) if colon else None
    given = math.prod(size for size in sizes.values() if size)
    open_kinds = [kind for kind, size in sizes.items() if size is None]
    if n_ranks == 1 and given == 1:
        return Layout()
    if len(open_kinds) > 1:
        raise UserError(
            f"--parallel {mode} does not say how the {n_ranks} ranks are divided; give all kinds but one a size, "
            f"such as {open_kinds[0]}+{'+'.join(f'{kind}:2' for kind in open_kinds[1:])}"
        )
    if n_ranks % given or (not open_kinds and n_ranks != given):
        raise UserError(
            f"--parallel {mode} needs {'a multiple of ' if open_kinds else ''}{given} ranks and there "
            f"{'is' if n_ranks == 1 else 'are'} {n_ranks}; change the sizes or torchrun's --nproc_per_node"
        )
    return Layout(**{kind: size or n_ranks // given for kind, size in sizes.items()})


def check_parallel_option(mode: str) -> list[str]:
    """What is wrong with `--parallel` for the number of processes that torchrun says there are; a sentence, or none."""
    try:
        parse_layout(mode, int(os.environ.get("WORLD_SIZE", 1)))
    except UserError as error:
        return [str(error)]
    return []


# ------------------------------------------------------------------------------------------------------------- model


class ParallelModel:
    """A model as all ranks train it together, and what a training loop has to know about that.

    Calling it with a batch gives `{"loss": …}`, the loss of the samples of this rank's data-parallel share.

    Args:
        model: the same on every rank, on `device`. Anything beyond DDP needs a `GPTModel`.
        mode: see `parse_layout`.
        device: of this rank.
        precision: of the matrix products, in which `fsdp` also gathers the layers' parameters if it is bf16.

    Attributes:
        module: what this rank optimises; under pipeline parallelism a part of the model.
        layout: how the ranks share the work.
        data_rank: which share of each global batch this rank reads, from 0.
        pipeline: the pipeline, if there is one.
        copies: the ranks that have all of the same parameters and gradients, if these are not cut among them.

    Raises:
        UserError: the mode does not suit the model or the number of ranks.
    """

    def __init__(
        self, model: nn.Module, mode: str, device: torch.device, precision: torch.dtype = torch.float32
    ) -> None:
        self.layout, self.device, self._precision = parse_layout(mode, world_size()), device, precision
        self.module, self.data_rank, self.pipeline, self.copies = model, 0, None, None
        self._is_compiled = False
        self._call: Callable[..., dict[str, torch.Tensor]] = model
        self._mesh: DeviceMesh | None = None
        self._tied = getattr(getattr(model, "config", None), "tie_embeddings", False)
        layout = self.layout
        if layout == Layout():
            return
        if layout == Layout(ddp=layout.ddp):
            # The buffers are constants: broadcasting them at every step would be for nothing
            gpu = [device] if device.type == "cuda" else None
            self._call = DistributedDataParallel(model, device_ids=gpu, broadcast_buffers=False)
            self.data_rank, self.copies = rank(), dist.group.WORLD
            return
        if not isinstance(model, GPTModel):
            raise UserError(f"--parallel {mode} is for pretraining and supervised fine-tuning; use --parallel ddp here")
        self._require_suitable(model, mode)
        self._mesh = init_device_mesh(device.type, astuple(layout), mesh_dim_names=KINDS)
        pp_rank, ddp_rank, fsdp_rank, _ = self._mesh.get_coordinate()
        self.data_rank = ddp_rank * layout.fsdp + fsdp_rank  # ranks that differ only in pp or tp read the same samples
        if layout.pp > 1:
            self.module = PipelinePart(model, pp_rank, layout.pp)
        if layout.tp > 1:
            cut_matrices(self.module, self._mesh["tp"])
        if layout.data_ranks > 1:
            # Copies are shards of one: DistributedDataParallel does not know sharded tensors, fully_shard does
            self._shard(self._mesh["ddp", "fsdp"] if layout.ddp > 1 else self._mesh["fsdp"])
        if layout.pp > 1:
            self.pipeline = Pipeline(self.module, self._mesh["pp"].get_group(), device)
        self._call = self.pipeline or self.module

    def __call__(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._call(**batch)

    @property
    def is_sharded(self) -> bool:
        """Whether no rank has all of the model."""
        return self._mesh is not None

    def train(self, training: bool = True) -> None:
        """Switch dropout on or off."""
        (self._call if isinstance(self._call, nn.Module) else self.module).train(training)

    def eval(self) -> None:
        """Switch dropout off."""
        self.train(False)

    def synchronised(self, last: bool) -> AbstractContextManager:
        """The context of one micro-batch of a step: copies of the model exchange gradients in the `last` one only."""
        if isinstance(self._call, DistributedDataParallel) and not last:
            return self._call.no_sync()
        # Shards are reduced after every backward pass, or they would not fit; copies of them are added up in the last
        if isinstance(self.module, FSDPModule) and self.layout.ddp > 1:
            self.module.set_requires_all_reduce(last)
        return nullcontext()

    def sum(self, value: float) -> float:
        """The sum over the data-parallel shares of a number that ranks working on the same samples agree on."""
        return self.sums(value)[0]

    def sums(self, *values: float) -> list[float]:
        """The same of several numbers, in one exchange."""
        return [total / self.layout.model_ranks for total in sum_over_ranks(*values)]

    def compile(self, dynamic: bool) -> None:
        """torch.compile: the whole model if every rank has all of it, otherwise layer by layer, between exchanges.

        Args:
            dynamic: whether batches are of different lengths; one piece of code is then to serve them all.
        """
        self._is_compiled, dynamic = True, dynamic or None  # None: once they turn out to be
        if self._mesh is None:
            self._call.compile(dynamic=dynamic)
            return
        for layer in layers_of(self.module):
            layer.forward = torch.compile(layer.forward, dynamic=dynamic)

    def as_written(self) -> AbstractContextManager:
        """The context of evaluations, in which a compiled model computes without its code: it was made for training,
        and making another one takes longer than an evaluation."""
        return torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext()

    def clip_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Scale the gradients of the whole model to a global norm of at most `max_norm`; returns the norm before.

        Each gradient counts once, however it is cut or copied.
        """
        if self._mesh is None:
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        squares = torch.zeros((), device=self.device)
        groups = by_mesh([parameter for parameter in parameters if parameter.grad is not None])
        copy = self.module.lm_head.weight if self.pipeline and self.pipeline.has_copy_of_embedding else None
        for group in groups:
            for parameter in group:
                # Each rank of a tensor-parallel group has seen some heads only: their sum is the QK-norms' gradient
                if isinstance(parameter, DTensor) and parameter.grad.placements != parameter.placements:
                    parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
            gradients = [parameter.grad for parameter in group if parameter is not copy]
            if gradients:
                squares += whole(nn.utils.get_total_norm(gradients, foreach=True)).square()
        if self.pipeline:
            dist.all_reduce(squares, group=self.pipeline.group)
        for group in groups:  # tensors of different meshes cannot share a kernel
            nn.utils.clip_grads_with_norm_(group, max_norm, squares.sqrt(), foreach=True)
        return squares.sqrt()

    # ------------------------------------------------------------------------------------------------- saving, loading

    def model_state(self) -> dict[str, torch.Tensor]:
        """The weights of the whole model on the CPU of rank 0; all ranks have to call it, the others get {}.

        What is frozen is left out: it can be loaded from where it came.
        """
        if self._mesh is None:
            state = trained_state(self.module, get_model_state_dict(self.module, options=WHOLE))
            first: dict[nn.Parameter, str] = {}
            for name, parameter in self.module.named_parameters(remove_duplicate=False):
                if (original := first.setdefault(parameter, name)) in state and name in state:
                    state[name] = state[original]  # from a GPU, tied weights came as two copies
            return state
        state = self._gather(get_model_state_dict(self.module))
        if self._tied and is_main():
            state["lm_head.weight"] = state["token_embedding.weight"]  # one tensor in the file, too
        return state

    def whole_model(self) -> nn.Module | None:
        """On rank 0, a model that can write texts by itself, on the CPU if it had to be put together; elsewhere None.

        All ranks have to call it.
        """
        if not self.is_sharded:
            return self.module if is_main() else None
        state = self.model_state()
        if not is_main():
            return None
        with torch.random.fork_rng(devices=[]):  # the throw-away initialisation takes no random numbers from training
            model = GPTModel.from_config(self.module.config)
        model.load_state_dict(state)
        return model

    def load_model_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take this rank's share of the weights of a whole model; what is frozen stays as it is."""
        mine = trained_state(self.module, get_model_state_dict(self.module))
        share = {name: like(state[name].to(self.device), mine[name]) for name in mine}
        set_model_state_dict(self.module, share, options=StateDictOptions(strict=False))

    def optimizer_state(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, dict[str, torch.Tensor]]:
        """What the optimisers remember, by parameter name, on the CPU of rank 0; all ranks have to call it.

        Learning rates and the like are not part of it: they follow from the settings and the step.
        """
        names = self._parameter_names()
        return self._gather(
            {names[parameter]: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
        )

    def load_optimizer_state(
        self, optimizers: Sequence[torch.optim.Optimizer], saved: dict[str, dict[str, torch.Tensor]]
    ) -> None:
        """Take this rank's share of what `optimizer_state` gave, on any number of ranks and in any mode."""
        names = self._parameter_names()
        for optimizer in optimizers:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                index: {
                    key: like(value.to(self.device), parameter) if value.shape == parameter.shape else value
                    for key, value in saved[names[parameter]].items()
                }
                for index, parameter in enumerate(parameters)
                if names[parameter] in saved
            }
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def _parameter_names(self) -> dict[nn.Parameter, str]:
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        if self.pipeline and self.pipeline.has_copy_of_embedding:
            names[self.module.lm_head.weight] = "token_embedding.weight"
        return names

    def _gather(self, state: dict[str, Any]) -> dict[str, Any]:
        """The tensors of all shards and all pipeline stages, whole, on the CPU of rank 0."""
        # Of each stage, one rank: data rank 0, tensor rank 0
        leads = is_main() if self._mesh is None else not any(self._mesh.get_coordinate()[1:])

        def collect(value: dict | torch.Tensor) -> Any:
            if isinstance(value, dict):
                return {key: collect(entry) for key, entry in value.items()}
            value = whole(value.detach())
            return value.cpu() if leads else None  # one at a time: a GPU need not hold all of the model

        mine = collect(state)
        if self.pipeline and leads:
            parts = [None] * self.layout.pp if is_main() else None
            dist.gather_object(mine, parts, dst=0, group=self.pipeline.group)
            mine = {name: value for part in parts or [] for name, value in part.items()}
        return mine if is_main() else {}

    # ---------------------------------------------------------------------------------------------------------- set-up

    def _require_suitable(self, model: GPTModel, mode: str) -> None:
        layout, config = self.layout, model.config
        if name := indivisible(config, layout.tp):
            raise UserError(
                f"--parallel {mode} cuts each layer in {layout.tp} and {name} is {getattr(config, name)}; "
                f"make it a multiple of {layout.tp}, or lower tp"
            )
        if config.n_experts and layout.tp > 1:
            raise UserError(f"--parallel {mode} cuts no experts; use ddp or fsdp")
        if config.n_layers < layout.pp:
            raise UserError(f"--parallel {mode} needs at least {layout.pp} layers, not {config.n_layers}; lower pp")
        if layout.pp > 1 and any(isinstance(module, AuxiliaryLoss) for module in model.modules()):
            raise UserError(f"--parallel {mode} leaves out the losses that layers have of their own; use ddp or fsdp")

    def _shard(self, mesh: DeviceMesh) -> None:
        """FSDP2: a layer's parameters are gathered when it is their turn and freed after it; the rest with the root."""
        policy = MixedPrecisionPolicy()
        # Autocast rounds the matrices anyway, and half as much is sent. What passes between layers stays in fp32, as do
        # embeddings and head. A CPU's LayerNorm wants weights of its input's type
        if self._precision == torch.bfloat16 and (self.device.type != "cpu" or self.module.config.norm != "layernorm"):
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in layers_of(self.module):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self.module, mesh=mesh)


def cut_matrices(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism of every layer, as tensor_plan.py has it; the head stays whole, too.

    One all-reduce a branch adds the parts up.
    """
    x, rest = Replicate(), (None,) * 4  # attention also takes mask, rotary, cache and layer
    plan = {
        "attention": PrepareModuleInput(input_layouts=(x, *rest), desired_input_layouts=(x, *rest)),
        "feed_forward": PrepareModuleInput(input_layouts=x, desired_input_layouts=x),
    }
    plan |= dict.fromkeys(BY_OUTPUTS, ColwiseParallel()) | dict.fromkeys(BY_INPUTS, RowwiseParallel())
    # The weights of the QK-norms are shared by all heads: each rank applies them to its own, (B, heads, T, K)
    own_heads = SequenceParallel(sequence_dim=1, use_local_output=True)
    plan |= {f"attention.{name}_norm": own_heads for name in ("query", "key")}
    for layer in layers_of(model):
        modules = dict(layer.named_modules())
        present = {name: style for name, style in plan.items() if has_parameters(modules.get(name))}
        parallelize_module(layer, mesh, present)


def has_parameters(module: nn.Module | None) -> bool:
    """Whether there is such a module and it has weights; a norm that is switched off is an `nn.Identity`."""
    return module is not None and any(True for _ in module.parameters())
