"""Muon against SVDs, torch's AdamW and torch's Muon."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from prx_composer.models import PRXBackbone
from prx_composer.optim import add_parameters, state_after_a_step
from prx_composer.optim import exchange as shares
from prx_composer.optim.muon import Muon, muon_parameters
from prx_composer.optim.newton_schulz import newton_schulz

POLYNOMIAL = [2.0315, 0, -4.7750, 0, 3.4445, 0]  # highest power first


def oracle(matrix: Tensor, steps: int) -> Tensor:
    """U·p(p(…p(Σ/‖Σ‖)…))·Vᵀ from LAPACK's SVD in fp64."""
    u, s, vt = scipy.linalg.svd(matrix.double().numpy(), full_matrices=False)
    s /= np.linalg.norm(s)
    for _ in range(steps):
        s = np.polyval(POLYNOMIAL, s)
    return torch.from_numpy(u * s @ vt)


def ill_conditioned(*shape: int, condition: float = 1e4) -> Tensor:
    """Random singular vectors, singular values spaced evenly in the logarithm."""
    u, _, vt = torch.linalg.svd(torch.randn(*shape, dtype=torch.float64), full_matrices=False)
    return u * torch.logspace(0, -np.log10(condition), min(shape[-2:]), dtype=torch.float64) @ vt


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(3, 6)
        self.up = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.down = nn.Linear(10, 4, bias=False)
        self.out = nn.Linear(4, 6)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return x + self.out(self.down(self.norm(self.up(x + self.positions(tokens % 3)))))


class Net(nn.Module):
    """Hidden matrices of three shapes among everything that isn't one."""

    def __init__(self, depth: int = 3):
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.last = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.table(tokens))
        for block in self.blocks:
            x = block(x, tokens)
        return self.last(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, schedule: Any = None) -> nn.Module:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randint(7, (8, 5), generator=generator)).pow(2).mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return model


def assert_equal(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}", **(tolerance or dict(atol=0, rtol=0)))


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (2, 3, 16, 9), (1, 7)])
def test_newton_schulz_iterates_a_polynomial_on_the_singular_values(shape: tuple[int, ...]) -> None:
    matrices = ill_conditioned(*shape, condition=1e5)
    found = newton_schulz(matrices, 5)
    assert found.shape == matrices.shape
    for ours, matrix in zip(found.reshape(-1, *shape[-2:]), matrices.reshape(-1, *shape[-2:]), strict=True):
        torch.testing.assert_close(ours, oracle(matrix, 5), atol=1e-11, rtol=0)


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("shape", [(96, 64), (64, 384), (128, 128)])
def test_singular_values_reach_the_documented_interval(shape: tuple[int, int], dtype: torch.dtype, slack: float) -> None:
    matrix = ill_conditioned(*shape, condition=1e6)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    reached = u.mT @ newton_schulz(matrix.to(dtype), 5).double() @ vt.mT
    shares = s / s.norm()
    assert 0 < (shares >= 0.0016).sum() < len(s)
    assert torch.linalg.matrix_norm(reached, 2) < 1.203 + slack
    assert reached.diagonal()[shares >= 0.0016].min() > 0.68 - slack


def test_the_interval_is_that_of_the_scalar_polynomial() -> None:
    x = np.geomspace(1e-9, 1, 1_000_000)
    for steps in (5, 6, 9):
        y = x
        for _ in range(steps):
            y = np.polyval(POLYNOMIAL, y)
        assert 0.68 < y[x >= 0.0016].min() < 0.69 and 1.20 < y.max() < 1.203


def test_the_size_of_a_gradient_does_not_matter_and_zero_stays_zero() -> None:
    matrix = torch.randn(6, 9)
    for size in (1e-11, 1e-3, 1e6):
        torch.testing.assert_close(newton_schulz(size * matrix), newton_schulz(matrix), atol=1e-5, rtol=0)
    assert not newton_schulz(torch.zeros(2, 6, 9)).any()
    assert newton_schulz(1e-30 * matrix).abs().max() < 1e-10


def reference_step(weight: Tensor, gradient: Tensor, buffer: Tensor, lr: float, decay: float, nesterov: bool, scale: str) -> None:
    """One matrix, plainly."""
    buffer.copy_(0.9 * buffer + 0.1 * gradient)
    direction = oracle(0.9 * buffer + 0.1 * gradient if nesterov else buffer, 4)
    rows, columns = weight.shape
    size = {"rms": 0.2 * np.sqrt(max(rows, columns)), "spectral": np.sqrt(max(1, rows / columns))}[scale]
    weight.data = weight.data * (1 - lr * decay) - lr * size * direction


@pytest.mark.parametrize(("nesterov", "scale", "decay"), [(True, "rms", 0.1), (False, "spectral", 0.0)])
def test_steps_equal_a_loop_over_matrices_with_svds(net: Net, nesterov: bool, scale: Any, decay: float) -> None:
    arguments = dict(lr=0.05, momentum=0.9, nesterov=nesterov, newton_schulz_steps=4, scale=scale, weight_decay=decay)
    plain = copy.deepcopy(net)
    optimizer = Muon(net, adam_lr=0.0, **arguments)
    buffers = {name: torch.zeros_like(p) for name, p in muon_parameters(plain).items()}
    for _ in range(4):
        train(net, optimizer, range(1))
        plain.zero_grad()
        plain(torch.randint(7, (8, 5), generator=torch.Generator().manual_seed(0))).pow(2).mean().backward()
        for name, weight in muon_parameters(plain).items():
            assert weight.grad is not None
            reference_step(weight, weight.grad, buffers[name], 0.05, decay, nesterov, scale)
    assert_equal(net, plain, atol=1e-9, rtol=1e-9)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize(("ours", "theirs"), [("rms", "match_rms_adamw"), ("spectral", "original")])
def test_an_update_is_that_of_torchs_muon_up_to_its_bf16(net: Net, ours: Any, theirs: str) -> None:
    matrices = muon_parameters(net.float())
    before = copy.deepcopy(net)
    other = copy.deepcopy(matrices)
    for name, weight in matrices.items():
        weight.grad = torch.randn_like(weight)
        other[name].grad = weight.grad.clone()
    kind: Any = torch.optim.Muon  # pyright: ignore[reportAttributeAccessIssue]
    Muon(net, lr=0.1, scale=ours, weight_decay=0.2).step()
    kind(other.values(), lr=0.1, weight_decay=0.2, adjust_lr_fn=theirs).step()
    for name, start in muon_parameters(before).items():
        updates = [(weight - start).detach() for weight in (matrices[name], other[name])]
        assert (updates[0] - updates[1]).norm() < 0.03 * updates[1].norm(), name


def test_in_bf16_as_on_a_gpu_updates_are_those_of_fp32_up_to_rounding(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [net.float(), copy.deepcopy(net)]
    for weight, other in zip(*(muon_parameters(model).values() for model in nets), strict=True):
        weight.grad = other.grad = torch.randn_like(weight)
    before = copy.deepcopy(net)
    Muon(nets[0], lr=0.1).step()
    layout: Any = shares._Layout.of
    monkeypatch.setattr(shares._Layout, "of", lambda weight: layout(weight)._replace(dtype=torch.bfloat16))
    Muon(nets[1], lr=0.1).step()
    for name, start in muon_parameters(before).items():
        updates = [(muon_parameters(model)[name] - start).detach() for model in nets]
        assert 0 < (updates[0] - updates[1]).norm() < 0.03 * updates[0].norm(), name


def test_everything_else_takes_torchs_adamw_steps_bit_for_bit(net: Net) -> None:
    net.float()
    other = copy.deepcopy(net)
    taken = {id(p) for p in muon_parameters(other).values()}
    rest = [p for p in other.parameters() if id(p) not in taken]
    decayed = {id(layer.weight) for layer in (other.first, other.last)}
    groups = [
        {"params": [p for p in rest if id(p) in decayed], "weight_decay": 0.3},
        {"params": [p for p in rest if id(p) not in decayed], "weight_decay": 0.0},
    ]
    train(net, Muon(net, lr=0.0, adam_lr=0.02, weight_decay=0.3), range(5))
    train(other, torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), fused=True), range(5))
    assert_equal(net, other)


def test_matrices_are_the_blocks_of_the_backbone() -> None:
    backbone = PRXBackbone(in_channels=3, patch_size=4, context_in_dim=8, hidden_size=16, num_heads=2, depth=2)
    layers = ["attention.img_qkv_proj", "attention.txt_kv_proj", "attention.to_out.0", "gate_proj", "up_proj", "down_proj"]
    expected = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in [*layers, "modulation.lin"]}
    assert muon_parameters(backbone).keys() == expected
    whole = nn.ModuleDict({"backbone": backbone, "text_encoder": Net()})
    whole.backbone.blocks[0].requires_grad_(False)
    trained = {f"backbone.{name}" for name in expected if "blocks.1" in name and "modulation" not in name}
    assert muon_parameters(whole, exclude=["modulation.lin"]).keys() == trained
    optimizer = Muon(whole, exclude=["modulation.lin"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(p.requires_grad for p in whole.parameters())
    assert len(muon_parameters(Net())) == 9, "embeddings inside of blocks are no matrices"


def test_split_heads_orthogonalises_every_head_by_itself() -> None:
    torch.manual_seed(0)
    model = PRXBackbone(in_channels=3, patch_size=4, context_in_dim=8, hidden_size=12, num_heads=3, depth=2, axes_dim=(2, 2))
    names = ("blocks.1.attention.img_qkv_proj.weight", "blocks.0.attention.txt_kv_proj.weight", "blocks.0.modulation.lin.weight")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = copy.deepcopy(model)
    Muon(model, lr=0.1, split_heads=True).step()
    for name, heads in zip(names, (9, 6, 1), strict=True):
        gradient, start = model.get_parameter(name).grad, before.get_parameter(name).detach()
        assert gradient is not None
        parts = [oracle(part, 5) * 0.2 * max(part.shape) ** 0.5 for part in gradient.chunk(heads)]
        torch.testing.assert_close(model.get_parameter(name).detach(), start - 0.1 * torch.cat(parts).float(), atol=2e-5, rtol=0)


def test_split_qkv_orthogonalises_queries_keys_and_values_by_themselves() -> None:
    """As if each had a layer of its own, whose rows the attention takes for its queries, keys or values."""
    torch.manual_seed(0)
    model = PRXBackbone(in_channels=3, patch_size=4, context_in_dim=8, hidden_size=12, num_heads=3, depth=2, axes_dim=(2, 2))
    names = ("blocks.1.attention.img_qkv_proj.weight", "blocks.0.attention.txt_kv_proj.weight", "blocks.0.up_proj.weight")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    own = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(5))})  # q, k, v | k, v
    gradients = [part for name in names[:2] for part in _gradient(model, name).split(12)]
    for layer, gradient in zip(own["blocks"].children(), gradients, strict=True):
        layer.get_parameter("weight").data.zero_()
        layer.get_parameter("weight").grad = gradient.clone()
    before = copy.deepcopy(model)
    Muon(model, lr=0.1, split_qkv=True).step()
    Muon(own, lr=0.1).step()
    steps = [model.get_parameter(name).detach() - before.get_parameter(name).detach() for name in names]
    torch.testing.assert_close(torch.cat(steps[:2]), torch.cat([p.detach() for p in own.parameters()]), atol=1e-6, rtol=0)
    whole = oracle(_gradient(model, names[2]), 5) * 0.2 * max(steps[2].shape) ** 0.5
    torch.testing.assert_close(steps[2], -0.1 * whole.float(), atol=2e-5, rtol=0)


def _gradient(model: nn.Module, name: str) -> Tensor:
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("split", [False, True])
def test_normuon_divides_rows_by_their_second_moment_and_keeps_the_norm(split: bool) -> None:
    """Against the paper's algorithm, one matrix after the other, with the norm of its authors' code."""
    torch.manual_seed(0)
    sizes: Any = dict(in_channels=3, patch_size=4, context_in_dim=8, hidden_size=12, num_heads=3, depth=1, axes_dim=(2, 2))
    model = PRXBackbone(**sizes).double()
    optimizer = Muon(model, lr=0.1, momentum=0.0, nesterov=False, split_qkv=split, normuon=True, neuron_beta2=0.7)
    matrices = muon_parameters(model)
    moments = {name: torch.zeros(len(weight), 1, dtype=torch.float64) for name, weight in matrices.items()}
    for _ in range(3):
        for weight in matrices.values():
            weight.grad = torch.randn_like(weight) * torch.logspace(0, -2, len(weight), dtype=torch.float64)[:, None]
        before = {name: weight.detach().clone() for name, weight in matrices.items()}
        optimizer.step()
        for name, weight in matrices.items():
            parts = {"img_qkv_proj": 3, "txt_kv_proj": 2}.get(name.split(".")[-2], 1) if split else 1
            expected = []
            for gradient, moment in zip(_gradient(model, name).chunk(parts), moments[name].chunk(parts), strict=True):
                update = oracle(gradient, 5)
                moment.copy_(0.7 * moment + 0.3 * update.square().mean(1, keepdim=True))
                even = update / moment.sqrt()
                expected.append(-0.1 * 0.2 * max(update.shape) ** 0.5 * even * update.norm() / even.norm())
            torch.testing.assert_close(weight.detach() - before[name], torch.cat(expected), atol=1e-9, rtol=1e-6)


def test_in_its_first_step_normuon_gives_every_neuron_the_same_step() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(9, 30, bias=False)])})
    weight = next(net.parameters())
    weight.grad = torch.randn_like(weight) * torch.logspace(0, -3, 30)[:, None]
    before = weight.detach().clone()
    Muon(net, lr=1.0, normuon=True).step()
    rows = (weight.detach() - before).norm(dim=1)
    torch.testing.assert_close(rows, rows.mean().expand(30), rtol=1e-4, atol=0)


def test_fp16_on_what_travels_in_bf16_is_nearer_to_fp32_than_bf16_is(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    layers = [nn.Linear(48, 12, bias=False), nn.Linear(12, 12, bias=False)]
    net = nn.ModuleDict({"blocks": nn.ModuleList(layers)})  # type: ignore[assignment]
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter).bfloat16().float()
    nets = [copy.deepcopy(net) for _ in range(3)]
    for model in nets:
        for parameter, other in zip(model.parameters(), net.parameters(), strict=True):
            assert other.grad is not None
            parameter.grad = other.grad.clone()
    arguments: dict[str, Any] = dict(lr=1.0, momentum=0.0, nesterov=False)
    Muon(nets[0], **arguments).step()
    layout: Any = shares._Layout.of
    monkeypatch.setattr(shares._Layout, "of", lambda weight: layout(weight)._replace(dtype=torch.bfloat16))
    Muon(nets[1], newton_schulz_dtype="fp16", **arguments).step()
    Muon(nets[2], **arguments).step()
    for exact, fp16, bf16 in zip(*(model.parameters() for model in nets), strict=True):
        assert 0 < (fp16 - exact).norm() < 0.5 * (bf16 - exact).norm()


OTHER_WAYS: dict[str, Any] = dict(coefficients="polar_express", newton_schulz_dtype="fp16", normuon=True, neuron_beta2=0.9)


@pytest.mark.parametrize("options", [{}, OTHER_WAYS], ids=["as_ever", "other_ways"])
def test_a_run_that_is_saved_and_resumed_repeats_every_bit(net: Net, options: dict[str, Any]) -> None:
    def fresh(model: nn.Module) -> Muon:
        return Muon(model, lr=0.03, weight_decay=0.1, **options)

    other = copy.deepcopy(net)
    train(net, fresh(net), range(6))
    optimizer = fresh(other)
    train(other, optimizer, range(3))
    file = io.BytesIO()
    torch.save((other.state_dict(), optimizer.state_dict()), file)
    resumed = Net().double()
    optimizer = fresh(resumed)
    train(resumed, optimizer, range(90, 92))  # whatever came before is overwritten
    weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert_equal(train(resumed, optimizer, range(3, 6)), net)


def test_what_a_checkpoint_holds_of_settings_is_what_it_held_before_there_were_more(net: Net) -> None:
    """Old checkpoints are read and new ones by old code; the recipe says the rest."""
    for options in ({}, OTHER_WAYS):
        muon = Muon(net, **options).state_dict()["param_groups"][0]
        held = {"algorithm", "lr", "momentum", "nesterov", "newton_schulz_steps", "scale", "weight_decay", "pieces"}
        assert muon.keys() == held | {"params", "betas", "eps", "fused"}


def test_what_is_kept_per_row_is_counted_before_there_is_a_step(net: Net) -> None:
    plain, more = (state_after_a_step(Muon(net, normuon=normuon)) for normuon in (False, True))
    assert not plain[1] and not more[1], "nothing is guessed"
    rows = sum(len(weight) for weight in muon_parameters(net).values())
    assert sum(s.numel() for s in more[0]) == sum(s.numel() for s in plain[0]) + rows


def test_a_schedule_scales_both_parts(net: Net) -> None:
    optimizer = Muon(net, lr=0.04, adam_lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(net, optimizer, range(3), schedule)
    assert {g["algorithm"]: g["lr"] for g in optimizer.param_groups} == {"muon": 0.01, "adamw": 0.0025}


def test_what_is_added_later_gets_adamw(net: Net) -> None:
    optimizer = Muon(net, lr=0.1, adam_lr=0.02, adam_betas=(0.8, 0.9))
    projector = nn.Linear(3, 3)
    expected = copy.deepcopy(projector)
    add_parameters(optimizer, projector)
    theirs = torch.optim.AdamW(expected.parameters(), lr=0.02, betas=(0.8, 0.9), weight_decay=0.0, fused=True)
    for _ in range(3):
        for model in (projector, expected):
            model.zero_grad()
            model(torch.ones(2, 3)).pow(2).sum().backward()
        optimizer.step()
        theirs.step()
    assert_equal(projector, expected)


def test_states_that_a_checkpoint_makes_before_the_first_step_change_nothing(net: Net) -> None:
    other, third = copy.deepcopy(net), copy.deepcopy(net)
    train(net, Muon(net, lr=0.03, weight_decay=0.1), range(3))
    optimizer = Muon(other, lr=0.03, weight_decay=0.1)
    saved = copy.deepcopy(get_optimizer_state_dict(other, optimizer))
    assert_equal(other, third)
    for name, parameter in other.named_parameters():
        assert all(v.shape == parameter.shape for key, v in saved["state"][name].items() if key != "step"), name
    assert_equal(train(other, optimizer, range(3)), net)
    optimizer = Muon(third, lr=0.03, weight_decay=0.1)
    set_optimizer_state_dict(third, optimizer, saved)
    assert_equal(train(third, optimizer, range(3)), net)


def test_a_warm_up_from_zero_counts_its_first_step(net: Net) -> None:
    net.float()
    other = copy.deepcopy(net)

    def warm_up(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 3)

    groups = [{"params": other.parameters()}]
    theirs = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ours = Muon(net, lr=0.1, exclude=["blocks.0", "blocks.1", "up", "down"])
    other.blocks[2].out.weight.requires_grad_(False)
    ours.param_groups[0]["params"][0].requires_grad_(False)  # the one matrix: gradients are the same in both
    train(net, ours, range(4), warm_up(ours))
    train(other, theirs, range(4), warm_up(theirs))
    assert_equal(net, other)


def test_parameters_without_gradient_are_left_alone_and_come_back(net: Net) -> None:
    optimizer = Muon(net, lr=0.03, weight_decay=0.1)
    for frozen in (net.blocks[1], net.blocks[0]):
        before = copy.deepcopy(frozen)
        frozen.requires_grad_(False)
        train(net, optimizer, range(2))
        assert_equal(frozen, before)
        frozen.requires_grad_(True)
        train(net, optimizer, range(2))
        assert not torch.equal(frozen.up.weight, before.up.weight)


def test_a_closure_is_called_with_gradients(net: Net) -> None:
    optimizer = Muon(net)

    def closure() -> Tensor:
        loss = net(torch.arange(7)).pow(2).mean()
        loss.backward()
        return loss

    before = net.last.weight.clone()
    assert optimizer.step(closure).requires_grad
    assert not torch.equal(net.last.weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lr=-1.0), "lr must be a number ≥ 0"),
        (dict(momentum=1.0), r"momentum must lie in \[0, 1\)"),
        (dict(newton_schulz_steps=0), "newton_schulz_steps must be a whole number ≥ 1"),
        (dict(scale="kimi"), "scale must be rms or spectral"),
        (dict(weight_decay=-0.1), "weight_decay must be a number ≥ 0"),
        (dict(adam_lr=float("nan")), "adam_lr must be a number ≥ 0"),
        (dict(adam_betas=(0.9, 1.0)), "adam_betas must be two numbers"),
        (dict(adam_eps=-1.0), "adam_eps must be a number ≥ 0"),
        (dict(neuron_beta2=1.0), r"neuron_beta2 must lie in \[0, 1\)"),
        (dict(coefficients="you"), "coefficients must be jordan or polar_express, not 'you'"),
        (dict(newton_schulz_dtype="fp8"), "newton_schulz_dtype must be bf16 or fp16, not 'fp8'"),
        (dict(split_heads=True, split_qkv=True), "leave split_qkv out"),
        (dict(split_qkv=True), "split_qkv needs projections named img_qkv_proj or txt_kv_proj"),
        (dict(exclude="blocks"), "exclude must be a list"),
        (dict(exclude=["modulatoin"]), "'modulatoin' is part of no matrix's name"),
        (dict(exclude=["blocks"]), "keeps every matrix out"),
        (dict(split_heads=True), "split_heads needs projections"),
    ],
)
def test_unusable_arguments_are_refused(net: Net, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon(net, **arguments)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no matrix"):
        Muon(nn.Linear(3, 3))


def test_a_whole_model_trains_with_it(tiny_model: Callable[..., Any], tiny_batch: dict[str, Tensor]) -> None:
    model = tiny_model()
    optimizer = Muon(model, lr=3e-3, split_heads=True)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = sum(model.loss(model(tiny_batch), tiny_batch).values())
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
