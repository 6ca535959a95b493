"""One optimiser step, and what determines it: parameter groups, optimisers, schedules.

Every trainer updates its model through `Updater`, so accumulation, loss scaling, clipping and the handling of
non-finite gradients exist once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, distribute_tensor

from command_line import UserError
from lora import lora_layers
from machine import autocast

SCHEDULES = ("cosine", "wsd", "cosine_restarts", "constant", "noam")
OPTIMIZERS = ("adamw", "muon")
MUON_BYTES = 1 << 28  # of matrices that Muon orthogonalises together; it needs some four times as much for a moment


# --------------------------------------------------------------------------------------------------------- schedules


def learning_rate_factor(
    schedule: str,
    step: int,
    max_steps: int,
    warmup_steps: int,
    min_ratio: float = 0.1,
    n_cycles: int = 3,
    first_cycle: int = 0,
    growth: float = 1.0,
) -> float:
    """What to multiply the peak learning rate with at `step` (from 0). A pure function, so resuming needs no state.

    cosine           linear warm-up, then half a cosine down to `min_ratio` (SGDR, arXiv:1608.03983)
    wsd              warm-up, constant, and a linear decay over the last fifth (MiniCPM, arXiv:2404.06395)
    cosine_restarts  warm-up, then half cosines, each `growth` times as long as the one before it (SGDR's T_mult): the
                     first takes `first_cycle` steps (T_0); 0: as many as let `n_cycles` fill the run exactly
    constant         warm-up, then 1
    noam             warm-up, then 1/√step, scaled so that the peak is 1 (arXiv:1706.03762, section 5.3)
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    length = max(1, max_steps - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / length)  # 0 … 1
    if schedule == "constant":
        return 1.0
    if schedule == "noam":
        return math.sqrt(max(1, warmup_steps) / max(1, step + 1))
    if schedule == "wsd":
        return 1.0 - (1.0 - min_ratio) * max(0.0, (progress - 0.8) / 0.2)
    if schedule == "cosine_restarts":
        cycle = first_cycle or length / sum(growth**number for number in range(n_cycles))
        progress = place_in_cycle(step - warmup_steps, cycle, growth) if progress < 1.0 else 1.0
    elif schedule != "cosine":
        raise ValueError(f"unknown schedule {schedule!r}")
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def place_in_cycle(step: int, cycle: float, growth: float) -> float:
    """How much of its cycle has passed at a step, 0 … 1; the first cycle has `cycle` steps, each next one `growth`
    times as many."""
    cycles = step / cycle  # in lengths of the first one
    if growth > 1:
        cycles = math.log(1 + cycles * (growth - 1), growth)
    number = math.floor(cycles + 1e-9)  # an end that rounding puts behind a whole step is at that step
    before = cycle * (number if growth == 1 else (growth**number - 1) / (growth - 1))
    return max(0.0, step - before) / (cycle * growth**number)


# -------------------------------------------------------------------------------------------------------- optimisers


def newton_schulz(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Approximately the nearest semi-orthogonal matrices (U Vᵀ of the SVD), for a batch (…, rows, columns).

    The quintic iteration and its coefficients are those of Keller Jordan's Muon
    (https://kellerjordan.github.io/posts/muon/). It runs in the dtype it is given.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    tall = x.size(-2) > x.size(-1)
    for _ in range(iterations):
        gram = x.mT @ x if tall else x @ x.mT  # (…, n, n) of the smaller side
        polynomial = (gram @ gram).mul_(c).add_(gram, alpha=b)  # in place: a pass over memory less for each term
        x = (x @ polynomial if tall else polynomial @ x).add_(x, alpha=a)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for the matrices of hidden layers.

    Updates are scaled by 0.2 · √max(rows, columns), which gives them AdamW's typical size, so that one learning rate
    and one weight decay serve both optimisers (Moonlight, arXiv:2502.16982). The iteration runs in bf16 on a GPU and in
    fp32 on a CPU, where bf16 would be 10–20 times slower.

    Matrices of one shape are orthogonalised together, `MUON_BYTES` of them at a time. Of ranks that have, or share, the
    same matrices each orthogonalises its part and gives it to the others.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        ranks: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.ranks = ranks
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon takes matrices only")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for mesh in by_mesh(parameter for parameter in group["params"] if parameter.grad is not None):
                by_shape: dict[torch.Size, list[nn.Parameter]] = {}
                for parameter in mesh:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
                for shape, parameters in by_shape.items():
                    scale = 0.2 * math.sqrt(max(shape))
                    ranks = self._ranks_of(parameters[0])
                    dtype = torch.bfloat16 if parameters[0].is_cuda else torch.float32
                    at_least = dist.get_world_size(ranks) if ranks else 1
                    size = max(at_least, MUON_BYTES // (shape.numel() * dtype.itemsize))
                    for some in (parameters[start : start + size] for start in range(0, len(parameters), size)):
                        directions = self._directions(some, group["momentum"], dtype, ranks)  # (n, rows, columns)
                        for parameter, direction in zip(some, directions.unbind(), strict=True):
                            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                            direction = like(direction.to(torch.float32), parameter)
                            parameter.add_(direction, alpha=-group["lr"] * scale)

    def _ranks_of(self, parameter: nn.Parameter) -> dist.ProcessGroup | None:
        """The ranks that a matrix of a DTensor is cut among, along the mesh's longest side; or that all have it."""
        if not isinstance(parameter, DTensor):
            return self.ranks
        sizes = parameter.device_mesh.shape
        return parameter.device_mesh.get_group(sizes.index(max(sizes)))

    def _directions(
        self, parameters: list[nn.Parameter], momentum: float, dtype: torch.dtype, ranks: dist.ProcessGroup | None
    ) -> torch.Tensor:
        """The orthogonalised momenta of n matrices of one shape, (n, rows, columns), the same on all `ranks`."""
        n_ranks, rank = (dist.get_world_size(ranks), dist.get_rank(ranks)) if ranks else (1, 0)
        share = -(-len(parameters) // n_ranks)  # matrices for each rank; the last ones may have none left
        mine = []
        for number, parameter in enumerate(parameters):
            gradient = whole(self._nesterov(parameter, momentum).to(dtype))  # sent in the type that it is needed in
            if number // share == rank:
                mine.append(gradient)
        if n_ranks == 1:
            return newton_schulz(torch.stack(mine))
        directions = torch.zeros(share, *parameters[0].shape, dtype=dtype, device=parameters[0].device)
        if mine:
            directions[: len(mine)] = newton_schulz(torch.stack(mine))
        everyones = torch.empty(n_ranks * share, *parameters[0].shape, dtype=dtype, device=directions.device)
        dist.all_gather_into_tensor(everyones, directions, group=ranks)
        return everyones[: len(parameters)]

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].lerp_(parameter.grad, 1.0 - momentum)
        return parameter.grad.lerp(state["momentum_buffer"], momentum)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself or, if it is sharded over ranks (DTensor), all of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`tensor`, equal on all ranks, sharded in the way that `reference` is."""
    if isinstance(reference, DTensor):
        return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)
    return tensor


def by_mesh(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Tensors that one foreach kernel can take together: sharded over the same ranks, or not at all."""
    groups: dict[object, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


def parameter_groups(model: nn.Module, optimizer: str) -> dict[str, list[nn.Parameter]]:
    """Each trainable parameter in exactly one of `muon`, `adapters`, `decay` and `no_decay`.

    Weight decay is for matrices; vectors (norms and biases) and, under Muon, embeddings and the head have none or
    stay with AdamW: their rows are looked up, not multiplied through.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    heads = {id(module.weight) for name, module in linear.items() if name.endswith("head")}
    adapters = {id(matrix) for layer in lora_layers(model).values() for matrix in (layer.lora_A, layer.lora_B)}
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "adapters": [], "decay": [], "no_decay": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in adapters:
            groups["adapters"].append(parameter)
        elif parameter.ndim < 2:
            groups["no_decay"].append(parameter)
        elif optimizer == "muon" and id(parameter) not in embeddings | heads:
            groups["muon"].append(parameter)
        else:
            groups["decay"].append(parameter)
    return groups


def build_optimizers(
    model: nn.Module,
    optimizer: str = "adamw",
    lr: float = 2e-4,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    ranks: dist.ProcessGroup | None = None,
) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), or Muon for hidden matrices beside AdamW for the rest.

    Adapters (LoRA) have AdamW in either case, without decay, and their own multiple of the learning rate.

    Args:
        ranks: those that have the same parameters and gradients, and share Muon's work.
    """
    groups = parameter_groups(model, optimizer)
    adamw_groups = [
        {"params": parameters, "weight_decay": decay}
        for name, decay in (("decay", weight_decay), ("no_decay", 0.0))
        for parameters in by_mesh(groups[name])
    ]
    if groups["adapters"]:
        scale = next(iter(lora_layers(model).values())).options.lora_lr_scale
        adamw_groups.append({"params": groups["adapters"], "weight_decay": 0.0, "lr_scale": scale})
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    # The fused kernel updates all parameters in one pass over memory, on CPUs and GPUs alike
    speed = {"foreach": True} if sharded else {"fused": True}
    optimizers: list[torch.optim.Optimizer] = []  # where most is frozen, one of the two may have nothing to do
    if groups["muon"]:
        optimizers.append(Muon(groups["muon"], lr=lr, weight_decay=weight_decay, ranks=ranks))
    if adamw_groups:
        optimizers.append(torch.optim.AdamW(adamw_groups, lr=lr, betas=betas, eps=1e-8, **speed))
    return optimizers


# ---------------------------------------------------------------------------------------------------------- the step


class Updater:
    """Turns accumulated gradients into one optimiser step: unscale, check, clip, step.

    Args:
        model: the model that is trained.
        optimizers: from `build_optimizers`.
        precision: the dtype of the matrix products; fp16 brings a gradient scaler.
        device: where the model is.
        max_grad_norm: gradients are scaled down to this global norm (Pascanu et al., arXiv:1211.5063); 0 turns it off.
        max_skipped: after this many steps in a row with a non-finite gradient the run stops with advice.
        clip: scales the gradients of (parameters, max_norm) in place and returns their norm before; a model that is
            spread over ranks brings its own, `parallel_model.ParallelModel.clip_gradients`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        precision: torch.dtype,
        device: torch.device,
        max_grad_norm: float = 1.0,
        max_skipped: int = 10,
        clip: Callable[[Sequence[nn.Parameter], float], torch.Tensor] = nn.utils.clip_grad_norm_,
    ) -> None:
        self.clip = clip
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizers = optimizers
        self.precision, self.device = precision, device
        self.max_grad_norm, self.max_skipped = max_grad_norm, max_skipped
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        self.skipped = 0  # steps skipped since the start
        self.skipped_in_a_row = 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context to compute a loss in."""
        return autocast(self.device, self.precision)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss` (a scalar, already weighted for accumulation)."""
        self.scaler.scale(loss).backward()

    def step(self, lr: float, loss: float = 0.0) -> float:
        """Update the parameters with the learning rate `lr` and clear the gradients; `clip_gradients`, then `apply`.

        Returns:
            the global norm of the gradients before clipping.
        """
        grad_norm = float(self.clip_gradients())
        self.apply(lr, grad_norm, loss)
        return grad_norm

    def clip_gradients(self) -> torch.Tensor:
        """Clip the gradients; returns their global norm before, a scalar on the device that nothing has waited for."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        return self.clip(self.parameters, self.max_grad_norm or math.inf)

    def discard(self) -> None:
        """Throw clipped gradients away."""
        self.scaler.update()  # also after a skipped step: the scale that made fp16 overflow is halved
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def apply(self, lr: float, grad_norm: float, loss: float = 0.0) -> None:
        """Update the parameters with clipped gradients and clear these; skip it if the norm or the `loss` that they
        come from is not finite.

        Raises:
            UserError: `max_skipped` steps in a row were non-finite.
        """
        # Both numbers are those of the whole step, so that all ranks skip it or none does
        if math.isfinite(grad_norm + loss):
            self.skipped_in_a_row = 0
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("lr_scale", 1.0)
                optimizer.step()  # and not the scaler's, which would read once more whether all is finite
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.discard()
        # fp16's scaler starts far too high by design and needs some skips to find its scale
        patience = self.max_skipped + (20 if self.scaler.is_enabled() else 0)
        if self.skipped_in_a_row >= patience:
            raise UserError(
                f"loss or gradients were not finite {self.skipped_in_a_row} steps in a row; lower --lr, lengthen "
                "--warmup_steps, or use --precision fp32, and continue with --resume auto"
            )

    def state_dict(self) -> dict:
        """What exact resuming needs besides the optimisers' own state."""
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped, "in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict) -> None:
        """Take up the state that `state_dict` gave."""
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["in_a_row"]
