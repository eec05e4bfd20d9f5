"""The optimizer with its groups of parameters, the schedule of its learning rate, and the average of weights."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bitferry.pipeline.training.freezing import Freezing
from bitferry.pipeline.training.settings import Training

BETAS = (0.9, 0.99)  # 0.999 remembers the first, useless gradients for longer than a short training lasts
FEWEST = 3
"""Steps for which there is a schedule."""
FUSED = ("cpu", "cuda")


def optimizer(model: nn.Module, training: Training, freezing: Freezing, device: torch.device) -> torch.optim.Optimizer:
    """Make the optimizer: no weight decay of biases and norms, and a learning rate of its own for the backbone."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        factor = 1.0 if freezing.in_head(name) else training.backbone_learning_rate
        decay = training.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((training.learning_rate * factor, decay), []).append(parameter)
    given = [{"params": some, "lr": rate, "weight_decay": decay} for (rate, decay), some in groups.items()]
    fused = device.type in FUSED
    if training.optimizer == "sgd":
        nesterov = training.nesterov
        return torch.optim.SGD(given, training.learning_rate, training.momentum, nesterov=nesterov, fused=fused)
    return torch.optim.AdamW(given, training.learning_rate, BETAS, fused=fused)


def schedule(optimizer: torch.optim.Optimizer, training: Training, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Make the schedule: one-cycle (Smith & Topin 2018), or a cosine after a linear warm-up."""
    if steps < FEWEST:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    if training.schedule == "one-cycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        share = max(training.warm_up, 2 / steps)  # PyTorch divides by zero for fewer steps of rising than two
        cycles = training.optimizer != "sgd"  # whose momentum is the recipe's, not 0.85 to 0.95
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates, total_steps=steps, pct_start=share, cycle_momentum=cycles
        )
    warm = training.warm_up * steps

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Average:
    """A moving average of all weights and statistics, which begins short so that the first ones are soon forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after that step, counted from 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.state[name].lerp_(tensor, share)
            else:
                self.state[name].copy_(tensor)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Bring back an average that was kept."""
        for name, tensor in state.items():
            self.state[name].copy_(tensor)
