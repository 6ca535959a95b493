"""How a mixture of experts uses its experts while it is trained: figures for the log, and a picture at the end."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn as nn

from transformer_components import MixtureOfExperts


class ExpertUse:
    """Counts, on this rank, how often each expert of each layer is chosen.

    Args:
        model: the model that is trained; one without experts has no figures.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
        self.n_idle = sum(layer.num_idle_parameters() for layer in self.layers)  # parameters that a token passes by
        self.shares: list[torch.Tensor] = []  # (layers, E) each: since the call of `figures` before
        self.forget()

    def figures(self) -> dict[str, float]:
        """The shares of the least and the most used expert of a layer since the last call, as multiples of the even
        share: 0 is an expert that nothing passes, 1 one that is used like all others. A GPU is waited for once."""
        if not self.layers:
            return {}
        shares = torch.stack([layer.n_chosen for layer in self.layers]).cpu().double()  # (layers, E)
        self.forget()
        if not shares.sum(dim=1).all():
            return {}
        shares *= shares.size(1) / shares.sum(dim=1, keepdim=True)
        self.shares.append(shares)
        return {"experts_least_used": shares.min().item(), "experts_most_used": shares.max().item()}

    def forget(self) -> None:
        """Begin to count, or take back what was counted since the last call of `figures`."""
        for layer in self.layers:  # a number from the start: code that was compiled for None would be compiled anew
            device = layer.router.weight.device
            layer.n_chosen = torch.zeros(len(layer.experts), dtype=torch.int64, device=device)

    def plot(self, path: Path) -> None:
        """Draw the use of each expert, a panel a layer, over the times of logging; without experts nothing."""
        if not self.shares:
            return
        from matplotlib.figure import Figure  # slow to import

        over_time = torch.stack(self.shares)  # (times, layers, E)
        n_layers = over_time.size(1)
        figure = Figure(figsize=(7, 1.2 + 1.1 * n_layers), layout="constrained")
        for layer, axes in enumerate(figure.subplots(n_layers, squeeze=False)[:, 0]):
            image = axes.imshow(over_time[:, layer].T, aspect="auto", vmin=0, vmax=2, cmap="viridis")
            axes.set_ylabel(f"layer {layer}")
            axes.set_xticks([])
        axes.set_xlabel("training, from left to right; a row is an expert")
        figure.colorbar(image, ax=figure.axes, label="share of the choices; 1 is even")
        figure.savefig(path, dpi=110)
