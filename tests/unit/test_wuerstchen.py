"""The latents of Würstchen beside its recipe: those of the networks whose weights Stable Cascade published."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms import Normalize

from prx_composer import registry

FILE = Path(__file__).parents[2] / "yamls" / "architectures" / "published" / "wuerstchen.py"


@pytest.fixture(scope="module")
def made() -> Any:
    registry.import_code([str(FILE)])
    torch.manual_seed(0)
    return registry.autoencoders.get("wuerstchen", "model.autoencoder")(pretrained=None)


def test_latents_are_what_efficientnet_makes_of_images_normed_as_imagenet_s(made: Any) -> None:
    image = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    latent = made.encode(image)
    assert latent.shape == (2, made.channels, 64 // made.downsampling, 96 // made.downsampling) and latent.dtype == torch.float32
    normed = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(image / 255)
    with torch.no_grad():
        torch.testing.assert_close(latent, made._encoder.mapper(made._encoder.backbone(normed)), atol=1e-5, rtol=1e-5)
    decoded = made.decode(latent)
    assert decoded.shape == image.shape and decoded.dtype == torch.uint8


def test_weights_are_read_from_the_published_files(made: Any, tmp_path: Path) -> None:
    """By the names of modules/effnet.py and modules/previewer.py; numbers of previewer layers are counted there."""
    assert {"backbone.0.0.weight", "mapper.0.weight", "mapper.1.running_var"} <= made._encoder.state_dict().keys()
    shapes = {name: tuple(tensor.shape) for name, tensor in made._previewer.state_dict().items()}
    assert shapes["blocks.0.weight"] == (512, 16, 1, 1) and shapes["blocks.6.weight"] == (512, 256, 2, 2)
    assert shapes["blocks.18.weight"] == (128, 128, 2, 2) and shapes["blocks.24.weight"] == (3, 128, 1, 1)
    for part, name in ((made._encoder, "effnet_encoder"), (made._previewer, "previewer")):
        save_file(part.state_dict(), tmp_path / f"{name}.safetensors")
    again = type(made)(str(tmp_path))
    image = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(again.encode(image), made.encode(image))
    assert torch.equal(again.decode(again.encode(image)), made.decode(made.encode(image)))


def test_planning_reads_no_weights(made: Any) -> None:
    with torch.device("meta"):
        type(made)()  # else a download
