"""A run without any fast path, for `code_paths`: diffusers' network, Muon one matrix after the other, Composer's own step.

`benchmarks/quality.py` compares what a recipe scores with it and with ours.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from torch import Tensor, nn
from torch.optim.adamw import adamw  # pyright: ignore[reportPrivateImportUsage]

from prx_composer import registry
from prx_composer.models import PRXBackbone
from prx_composer.optim.groups import parameter_groups
from prx_composer.optim.muon import muon_parameters

__all__ = ["PlainMuon", "PlainPRX", "orthogonalise"]


@registry.backbones.register("plain_prx")
class PlainPRX(PRXBackbone):
    """Our parameters, from the same initialisation, in diffusers' forward pass. Nothing can be attached to it."""

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        context_in_dim: int,
        hidden_size: int,
        mlp_ratio: float,
        num_heads: int,
        depth: int,
    ):
        super().__init__(in_channels, patch_size, context_in_dim, hidden_size, mlp_ratio, num_heads, depth)
        self._reference: list[nn.Module] = [PRXTransformer2DModel(**self.config)]  # in a list: it has no parameters of its own

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        route: Any = None,
        return_taps: bool = False,
    ) -> Any:
        if route is not None or self.taps or self.conditioners:
            raise ValueError("plain_prx computes what diffusers' model computes; leave tread, repa and the like out.")
        inputs = (hidden_states, timestep, encoder_hidden_states, attention_mask)
        (sample,) = torch.func.functional_call(
            self._reference[0], dict(self.named_parameters()), inputs, {"return_dict": False}, strict=True
        )
        return (sample, {}) if return_taps else sample


@registry.optimizers.register("plain_muon")
class PlainMuon(torch.optim.Optimizer):
    """Muon as it is usually published, and AdamW tensor by tensor; the arguments and update of `prx_composer`'s."""

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        adam_lr: float | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
    ):
        matrices = list(muon_parameters(model).values())
        taken = {id(weight) for weight in matrices}
        groups: list[dict[str, Any]] = [dict(params=matrices, muon=True, lr=lr, weight_decay=weight_decay)]
        for group in parameter_groups(model, weight_decay):
            if rest := [parameter for parameter in group["params"] if id(parameter) not in taken]:
                groups.append({**group, "params": rest})
        self._momentum, self._betas, self._eps = momentum, tuple(adam_betas), adam_eps
        super().__init__(groups, dict(muon=False, lr=lr if adam_lr is None else adam_lr))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._matrix(parameter, group) if group["muon"] else self._adam(parameter, group)
        return loss

    def _matrix(self, weight: Tensor, group: dict[str, Any]) -> None:
        assert weight.grad is not None
        buffer = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
        buffer.lerp_(weight.grad, 1 - self._momentum)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        update = orthogonalise(weight.grad.lerp(buffer, self._momentum))
        weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state, (beta1, beta2) = self.state[parameter], self._betas
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        adamw(
            [parameter],
            [parameter.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._eps,
            maximize=False,
        )


def orthogonalise(matrix: Tensor) -> Tensor:
    """Five steps of Newton–Schulz, written as they are usually published."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x
