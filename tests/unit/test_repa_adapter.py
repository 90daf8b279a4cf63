"""PixelREPA's adapter: what it hides, what it sees, and what it trains."""

import copy
from typing import Any

import pytest
import torch
from alignment import COLUMNS, ROWS, Batch, Build, attach, repa

from prx_composer.algorithms.repa import Adapter, MaskedTransformerAdapter, TappedTokens
from prx_composer.models import TextToImage


def tapped_tokens(model: TextToImage, batch: Batch) -> TappedTokens:
    outputs = model(batch)
    return TappedTokens(outputs.taps[1], ROWS, COLUMNS, None, outputs.timestep, outputs.text)


def test_the_adapter_hides_its_share_of_tokens_and_draws_anew_for_every_microbatch(tiny_model: Build, tiny_batch: Batch) -> None:
    model, algorithm = tiny_model(), repa(adapter=Adapter(depth=1, mask_rate=0.3))
    attach(model, algorithm)
    head = algorithm.head
    assert isinstance(head, MaskedTransformerAdapter)
    seen: list[torch.Tensor] = []
    head.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def hidden() -> torch.Tensor:  # (B, N)
        tapped = tapped_tokens(model, tiny_batch)
        head(tapped)
        is_mask = (seen[-1] == head.mask_token).all(-1)
        assert torch.equal(is_mask, (seen[-1] != tapped.tokens).any(-1)), "the others come as they are"
        return is_mask

    model.random.begin_step(3)
    first, second = hidden(), hidden()
    model.random.begin_step(3)
    assert torch.equal(hidden(), first) and not torch.equal(first, second)
    share = torch.stack([hidden() for _ in range(30)]).float().mean()
    assert share.item() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / (30 * 96)) ** 0.5)


def test_the_adapter_starts_token_by_token_and_learns_to_look_around(tiny_model: Build, tiny_batch: Batch) -> None:
    model, algorithm = tiny_model(), repa(adapter=Adapter(mask_rate=0.2))
    attach(model, algorithm)
    head: Any = algorithm.head
    model.random.begin_step(0)
    tapped = tapped_tokens(model, tiny_batch)
    generator = model.random.generator("repa_mask", torch.device("cpu"))
    hidden = torch.rand(4, ROWS * COLUMNS, generator=generator) < 0.2
    tokens = torch.where(hidden[..., None], head.mask_token, tapped.tokens)
    torch.testing.assert_close(head(tapped), head.out(tokens), msg="its blocks start as the identity")
    with torch.no_grad():
        for block in head.blocks:
            block.modulation.lin.weight.normal_(std=0.5)
    moved = tapped._replace(tokens=tapped.tokens.roll((1, 1), (1, 2)))
    order = torch.arange(ROWS * COLUMNS).expand(4, -1)
    turned = order.flip(1)
    head.mask_rate = 0.0
    plain = head(tapped)
    assert not torch.allclose(head(moved), plain.roll(1, 1), atol=1e-3)
    permuted = tapped._replace(tokens=tapped.tokens.flip(1), kept_indices=turned)
    torch.testing.assert_close(head(permuted), plain.flip(1), msg="tokens carry their places with them")
    assert not torch.allclose(head(permuted._replace(kept_indices=order)), plain.flip(1), atol=1e-3)


def test_the_adapter_trains_the_backbone_but_not_the_text_encoder(tiny_model: Build, tiny_batch: Batch) -> None:
    model, algorithm = tiny_model(), repa(adapter=Adapter())
    attach(model, algorithm)
    with torch.no_grad():
        for block in algorithm.head.blocks:  # pyright: ignore
            block.modulation.lin.weight.normal_(std=0.5)
    outputs = model(tiny_batch)
    inputs = [outputs.taps[1], *model.text_encoder.parameters()]
    loss = algorithm.loss(outputs, tiny_batch)
    loss.backward(retain_graph=True)
    assert all(p.grad is not None and p.grad.any() for p in algorithm.term.parameters())
    severed = outputs.taps[1].detach().requires_grad_()
    again = algorithm.loss(copy.copy(outputs).__class__(**(vars(outputs) | {"taps": {1: severed}})), tiny_batch)
    grads = torch.autograd.grad(again, [severed, *inputs[1:]], allow_unused=True)
    assert grads[0] is not None and all(grad is None for grad in grads[1:])
