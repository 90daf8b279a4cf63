"""The model and its algorithms in a Composer Trainer of one's own, without a recipe: squares of two colours.

python recipes/custom_stack/plain_composer.py runs/plain_composer 300ba     # stopped? the same command goes on, bit for bit
"""

import sys
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback, DataSpec, State
from composer.loggers import Logger
from composer.utils import dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prx_composer.algorithms.ema import EMA
from prx_composer.algorithms.token_routing import TREAD
from prx_composer.callbacks.checkpointing import RandomStep
from prx_composer.models import FlowMatching, HuggingFaceTextEncoder, PRXBackbone, TextToImage
from prx_composer.models.encoders import train_tokenizer
from prx_composer.optim.muon import Muon

CAPTIONS = ("a red square", "a blue square")


class Squares(Dataset[dict[str, Any]]):
    """256 images of 16 px; sample i is the same in every epoch."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.full((3, 16, 16), 255, dtype=torch.uint8)
        top, left = index % 8, index // 8 % 8
        colour = (200, 30, 30) if index % 2 == 0 else (30, 30, 200)
        image[:, top : top + 8, left : left + 8] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
        return {"image": image, "caption": CAPTIONS[index % 2]}


class PrintLoss(Callback):
    """`state.total_loss_dict` has the loss of the whole batch, over all ranks; `state.loss` that of its last microbatch."""

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % 50 == 0:
            loss = state.total_loss_dict["loss/train/total"]
            sys.stdout.write(f"batch {state.timestamp.batch.value}: loss {loss:.3f}\n")


def main(folder: str, duration: str) -> None:
    tokenizer = train_tokenizer(list(CAPTIONS))
    words = dict(model_type="t5", d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    torch.manual_seed(17)
    text_encoder = HuggingFaceTextEncoder(tokenizer, config=words, max_tokens=8, trainable=True)
    backbone = PRXBackbone(in_channels=3, patch_size=4, hidden_size=64, depth=4, num_heads=2, context_in_dim=64)
    model = TextToImage(backbone, text_encoder, FlowMatching(prediction="x", min_timestep=0.3), seed=17)

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        captions = text_encoder.tokenize([sample["caption"] for sample in samples])
        return {"image": torch.stack([sample["image"] for sample in samples]), **captions}

    squares = Squares()
    loader = DataLoader(squares, 32, sampler=dist.get_sampler(squares, shuffle=True), collate_fn=collate)  # an order by epoch
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(loader, get_num_samples_in_batch=lambda batch: len(batch["image"])),
        optimizers=Muon(model, lr=3e-3, adam_lr=3e-3),
        max_duration=duration,
        algorithms=[EMA(half_life="50ba"), TREAD(start_block=1, end_block=2, rate=0.5)],
        callbacks=[RandomStep(), PrintLoss()],  # RandomStep ties timesteps, noise and routes to the step: exact resume needs it
        seed=17,
        run_name=Path(folder).name,
        save_folder=folder,
        save_interval="50ba",
        save_overwrite=True,
        autoresume=True,
        progress_bar=False,
    )
    if trainer.state.timestamp < duration:  # a run that is over has nothing left to fit
        trainer.fit()
    with model.sampling_weights():  # those of EMA
        drawn = model.generate(list(CAPTIONS), height=16, width=16, num_inference_steps=10, guidance_scale=2.0)
    for caption, image in zip(CAPTIONS, drawn, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((128, 128), Image.Resampling.NEAREST).save(
            Path(folder, f"{caption.replace(' ', '_')}.png")
        )
    sys.stdout.write(f"{folder}: drawn\n")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["runs/plain_composer"])[:1], *(sys.argv[2:] or ["300ba"])[:1])
