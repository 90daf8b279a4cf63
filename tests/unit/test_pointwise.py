"""What lies between a block's matrix products, held against the plain formulas and autograd's own backward passes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prx_composer.models.layers import RMSNorm, gated_gelu


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad((output * weight).sum(), inputs))


def test_gated_gelu_and_its_gradients_are_those_of_the_formula() -> None:
    inputs = [4 * torch.randn(3, 7, dtype=torch.float64) for _ in range(2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    expected = F.gelu(inputs[0], approximate="tanh") * inputs[1]
    torch.testing.assert_close(gated_gelu(*inputs), expected)
    for mine, theirs in zip(gradients(gated_gelu(*inputs), inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gated_gelu_is_the_same_in_a_compiled_graph_for_large_and_small_values() -> None:
    gate = torch.tensor([-1e4, -30.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 30.0, 1e4], requires_grad=True)
    up = torch.linspace(-2, 2, 9, requires_grad=True)
    compiled = torch.compile(gated_gelu, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(gate, up), gated_gelu(gate, up))
    for mine, theirs in zip(gradients(compiled(gate, up), [gate, up]), gradients(gated_gelu(gate, up), [gate, up]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_second_backward_pass_over_the_same_graph_finds_nothing_changed() -> None:
    gate, up = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    output = gated_gelu(gate, up).sum()
    first = torch.autograd.grad(output, [gate, up], retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(output, [gate, up]), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("strided", [False, True])
def test_rms_norm_and_its_gradients_are_torchs(strided: bool) -> None:
    mine = RMSNorm(8, eps=1e-6)
    nn.init.normal_(mine.weight)
    theirs = nn.RMSNorm(8, eps=1e-6)
    theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    x = torch.randn(2, 5, 3, 8)
    x[0, 0] = 0  # eps alone
    x = (x.transpose(1, 2) if strided else x).detach().requires_grad_()
    torch.testing.assert_close(mine(x), theirs(x))
    found = zip(gradients(mine(x), [x, mine.weight]), gradients(theirs(x), [x, theirs.weight]), strict=True)
    for one, two in found:
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_other_dtypes_are_left_to_torch() -> None:
    norm = RMSNorm(8, eps=1e-6)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert torch.equal(norm(x), nn.RMSNorm(8, eps=1e-6)(x))
