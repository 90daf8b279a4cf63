"""What stored text embeddings save: the same training step with the text encoder run online and with its output in the batch.

An entry of `compare.py`. The encoder is a T5 with random weights whose forward pass is about as much of the step as T5Gemma-2B's
is of the 24-hour recipe's at 512 px. Losses must agree before anything is timed.
"""

from collections.abc import Callable
from typing import Any

import torch
from interleaved import ratio, summary, time_in_turns
from torch import Tensor

from prx_composer.models import PRXBackbone
from prx_composer.models.text_encoder import HuggingFaceTextEncoder, train_tokenizer
from prx_composer.models.text_to_image import TextToImage

__all__ = ["compare_stored_text"]

TOLERANCE = 1e-5


def compare_stored_text(batch_size: int, text_tokens: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a photograph of a lighthouse on a cliff above the sea at dawn"] * 2, 256)
    config = dict(model_type="t5", d_model=256, d_kv=64, d_ff=1024, num_layers=8, num_heads=4, dropout_rate=0.0)
    encoder = HuggingFaceTextEncoder(tokenizer, config=config, max_tokens=text_tokens)
    backbone = PRXBackbone(
        in_channels=3, patch_size=4, context_in_dim=256, hidden_size=256, depth=6, num_heads=4, bottleneck_size=48
    )
    model = TextToImage(backbone, encoder, caption_dropout=0.0)
    tokens = encoder.tokenize(["a photograph of a lighthouse above the sea"] * batch_size)
    online = {"image": torch.randint(0, 256, (batch_size, 3, 64, 64), dtype=torch.uint8), **tokens}
    stored = online | {"text_embedding": encoder(**tokens)}
    losses = [_loss(model, batch) for batch in (online, stored)]
    difference = float((losses[0] - losses[1]).abs())
    if difference > TOLERANCE:
        raise SystemExit(f"Losses differ by {difference}: there is nothing to compare.")

    def step(batch: dict[str, Tensor]) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            _loss(model, batch).backward()

        return run

    times = time_in_turns({"online": step(online), "stored": step(stored)}, rounds)
    work = [model.flops_per_batch(batch) for batch in (online, stored)]
    return {
        "difference_of_losses": difference,
        "milliseconds": {name: summary(values, 2) for name, values in times.items()},
        "ratio": ratio(times, "online", "stored"),
        "ratio_of_flops": round(work[0] / work[1], 3),
    }


def _loss(model: TextToImage, batch: dict[str, Tensor]) -> Tensor:
    model.random.begin_step(0)
    return model.loss(model(batch), batch)["total"]
