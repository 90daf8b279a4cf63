"""Features of images by frozen networks, and how far two sets of images are apart in them.

Distances are Fréchet's and the maximum mean discrepancy (MMD).
"""

import hashlib
import logging
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from composer.utils import dist
from torch import Tensor, nn

from prx_composer.common.errors import UserError
from prx_composer.common.installation import adding
from prx_composer.data.stored import fingerprint
from prx_composer.models.encoders import IMAGENET_MEAN, IMAGENET_STD
from prx_composer.models.huggingface import Frozen, load_config, says_how_to_get
from prx_composer.models.prompts import cut_off

log = logging.getLogger(__name__)

CLIP = "openai/clip-vit-large-patch14-336"  # of CMMD
CLIP_SCORE = "openai/clip-vit-large-patch14"  # torchmetrics' default
DINO = "facebook/dinov2-large"  # of FD-DINOv2 (arXiv:2306.04675)
INCEPTION = "torch-fidelity"
_INCEPTION_SIZE = 299
_DINO_SIZE = 224


def square(images: Tensor, size: int) -> Tensor:
    """Return the centred square of uint8 (B, 3, H, W) at another size, bicubic and antialiased, as real images are read."""
    side = min(images.shape[-2:])
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    images = images[..., top : top + side, left : left + side]
    if side == size:
        return images
    return F.interpolate(images.cpu(), (size, size), mode="bicubic", antialias=True).to(images.device)


class Extractor:
    """A frozen network that gives one vector per image.

    Args:
        name: hub id, folder or description.
        module: the network, whose fingerprint tells it from others.
        image_size: side of the squares that it reads.
        extract: module, uint8 (B, 3, image_size, image_size) on its device → (B, D).
        recipe: how images become features, in a few words, by which cached features are recognised too.
    """

    def __init__(self, name: str, module: nn.Module, image_size: int, extract: Callable[[Any, Tensor], Tensor], recipe: str):
        self.name, self.image_size = name, image_size
        said = f"{recipe} {image_size} {fingerprint(module)}"
        self.fingerprint = hashlib.sha256(said.encode()).hexdigest()
        self._frozen = Frozen(module, torch.float32)
        self._extract = extract

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features fp32 (B, D) of the centred squares of uint8 images (B, 3, H, W), on their device."""
        images = square(images, self.image_size)
        return self._extract(self._frozen.on(images.device), images).float()


def _normalised(images: Tensor, mean: Any, std: Any) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images.float() / 255 - mean) / std


def clip_images(name: str = CLIP) -> Extractor:
    """Return the extractor of CLIP's image embeddings, of length 1: CMMD's features.

    Args:
        name: hub id or folder of a CLIP model.

    Raises:
        OSError: it cannot be had. ValueError: it is no CLIP model.
    """
    from transformers import CLIPVisionModelWithProjection
    from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    with says_how_to_get(name):
        _check_type(name, load_config(name).model_type, ("clip", "clip_vision_model"))
        module = CLIPVisionModelWithProjection.from_pretrained(name, dtype=torch.float32)

    def extract(module: Any, images: Tensor) -> Tensor:
        embedded = module(pixel_values=_normalised(images, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)).image_embeds
        return F.normalize(embedded, dim=-1)

    return Extractor(name, module, int(module.config.image_size), extract, "clip image_embeds, length 1")


def dino_images(name: str = DINO) -> Extractor:
    """Return the extractor of the class token, after its last norm, of a DINOv2, DINOv3 or other ViT of transformers.

    Args:
        name: hub id or folder.

    Raises:
        OSError: it cannot be had. ValueError: it is no vision transformer with a class token.
    """
    from transformers import AutoModel

    with says_how_to_get(name):
        _check_type(name, load_config(name).model_type, ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit"))
        module = AutoModel.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    patch = int(module.config.patch_size)
    size = _DINO_SIZE // patch * patch if module.config.model_type != "vit" else int(module.config.image_size)

    def extract(module: Any, images: Tensor) -> Tensor:
        return module(pixel_values=_normalised(images, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 0]

    return Extractor(name, module, size, extract, "class token")


def inception_images(weights: str = INCEPTION) -> Extractor:
    """Return the extractor of FID's InceptionV3, as torchmetrics runs it.

    Images are brought to 299 × 299 with antialiasing (clean-fid, arXiv:2104.11222).

    Args:
        weights: a file of torch-fidelity's weights, or "torch-fidelity": it downloads them.

    Raises:
        ValueError: torch-fidelity isn't installed. OSError: the weights cannot be had.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = None if weights == INCEPTION else weights
    try:
        if path is not None:
            torch.load(path, weights_only=True, mmap=True)  # torch-fidelity would execute what else is in it
        module = NoTrainInceptionV3("inception-v3-compat", ["2048"], path)
    except ModuleNotFoundError as error:
        raise UserError(
            f"fid needs torch-fidelity: {adding('eval')}  (cmmd and fd_dino need nothing more, and agree better with what people "
            "see.)"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise OSError(
            f"FID's InceptionV3 cannot be loaded ({str(error).strip().splitlines()[0]}). Without a network, give the file "
            "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases by its path."
        ) from error
    return Extractor("InceptionV3, torch-fidelity", module, _INCEPTION_SIZE, lambda module, images: module(images), "pool3")


class ClipScore:
    """100 · cos of a CLIP model's embeddings of image and prompt, 0 where it is negative (CLIPScore, arXiv:2104.08718).

    Prompts are cut to what the model reads (77 tokens), as torchmetrics does.

    Args:
        name: hub id or folder, with its tokenizer.

    Raises:
        OSError: it cannot be had. ValueError: it is no CLIP model.
    """

    def __init__(self, name: str = CLIP_SCORE):
        from transformers import AutoTokenizer, CLIPModel

        with says_how_to_get(name):
            _check_type(name, load_config(name).model_type, ("clip",))
            module: Any = CLIPModel.from_pretrained(name, dtype=torch.float32)
            self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.name, self.image_size = name, int(module.config.vision_config.image_size)
        self._max_tokens = int(module.config.text_config.max_position_embeddings)
        self.fingerprint = fingerprint(module, self._tokenizer)
        self._frozen = Frozen(module)
        self._told = False

    def say_what_is_cut(self, prompts: list[str]) -> None:
        """Warn once of prompts that are too long for this network, if there are any."""
        tokens = self._tokenizer(prompts, truncation=True, max_length=self._max_tokens)
        cut = sum(count > 0 for count in cut_off(self._tokenizer, prompts, tokens))
        if cut and not self._told and dist.get_global_rank() == 0:
            log.warning(
                "clip_score: %d of %d prompts have more than %d tokens; %s compares images with their beginnings only.",
                cut, len(prompts), self._max_tokens, self.name,
            )  # fmt: skip
        self._told = self._told or cut > 0

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return the scores (B,) of uint8 images (B, 3, H, W) and their prompts."""
        from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        module = self._frozen.on(images.device)
        tokens = self._tokenizer(prompts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        pixels = _normalised(square(images, self.image_size), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        made = module(
            input_ids=tokens["input_ids"].to(images.device),
            attention_mask=tokens["attention_mask"].to(images.device),
            pixel_values=pixels,
        )
        cosine = (F.normalize(made.image_embeds, dim=-1) * F.normalize(made.text_embeds, dim=-1)).sum(-1)
        return 100 * cosine.clamp(min=0)


def _check_type(name: str, model_type: str, allowed: tuple[str, ...]) -> None:
    if model_type not in allowed:
        raise ValueError(f"{name} is a {model_type}; what is needed here is one of: {', '.join(allowed)}.")


# ------------------------------------------------------------------------------------------------------------ distances


SIGMA, SCALE = 10.0, 1000.0  # of CMMD (Jayasumana et al., arXiv:2401.09603, section 4.1)
_BLOCK = 2048  # rows and columns of the kernel matrix that are in memory at once


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and unbiased covariance (D, D) of features (N, D), in float64.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(features)}.")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.mT @ centred / (len(features) - 1)


def frechet_distance(mean_x: Tensor, covariance_x: Tensor, mean_y: Tensor, covariance_y: Tensor) -> float:
    """Return |μx − μy|² + tr(Σx + Σy − 2 (Σx Σy)^½), of two normal distributions (FID: arXiv:1706.08500).

    In float64, by eigenvalues of the symmetric Σx^½ Σy Σx^½, which has those of Σx Σy; singular covariances, of fewer images
    than features, are no special case.
    """
    values, vectors = torch.linalg.eigh(covariance_x.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    inner = root @ covariance_y.double() @ root
    cross = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp(min=0).sqrt().sum()
    squares = (mean_x.double() - mean_y.double()).square().sum()
    return float(squares + covariance_x.double().trace() + covariance_y.double().trace() - 2 * cross)


def mean_kernel(x: Tensor, y: Tensor | None = None, unbiased: bool = True) -> float:
    """Return the mean of k − 1 over the pairs of x (N, D) and y (M, D), or of x with itself; k(a, b) = exp(−|a − b|² / 2σ²).

    k is close to 1 everywhere, so it is k − 1 that is added up. In float64 and block by block: memory doesn't grow with N·M.

    Args:
        unbiased: leave out the pairs of a row and itself, of x with itself.

    Raises:
        ValueError: `unbiased` of fewer than two rows.
    """
    itself = y is None
    x = x.double()
    y = x if y is None else y.double()
    if itself and unbiased and len(x) < 2:
        raise ValueError(f"an unbiased estimate needs at least 2 images, not {len(x)}.")
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for x_block, x_start in zip(x.split(_BLOCK), range(0, len(x), _BLOCK), strict=True):
        for y_block, y_start in zip(y.split(_BLOCK), range(0, len(y), _BLOCK), strict=True):
            if itself and y_start < x_start:  # counted by its mirror image
                continue
            squared = (x_block.square().sum(1)[:, None] + y_block.square().sum(1) - 2 * x_block @ y_block.mT).clamp(min=0)
            if itself and x_start == y_start:
                squared.fill_diagonal_(0)
            added = torch.expm1(squared / (-2 * SIGMA**2)).sum()
            total += 2 * added if itself and y_start > x_start else added
    pairs = len(x) * (len(x) - 1) if itself and unbiased else len(x) * len(y)
    return float(total / pairs)


def mmd(x: Tensor, y: Tensor, unbiased: bool = True, within_y: float | None = None) -> float:
    """Return the squared MMD with CMMD's kernel (σ = 10), times 1000.

    Args:
        x, y: features (N, D) and (M, D); CMMD's are of length 1.
        unbiased: Gretton et al. 2012, equation 3, which may be slightly negative. False: their equation 5, as CMMD's authors
            compute it; it is higher by about 1000 · (1 − mean k) · (1/N + 1/M), so it depends on the number of images.
        within_y: `mean_kernel(y, unbiased=unbiased)`, if it is known.

    Raises:
        ValueError: `unbiased` of fewer than two rows.
    """
    within_y = mean_kernel(y, unbiased=unbiased) if within_y is None else within_y
    return SCALE * (mean_kernel(x, unbiased=unbiased) + within_y - 2 * mean_kernel(x, y))
