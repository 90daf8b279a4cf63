"""Which algorithm goes with which class of diffusers, as the code says before anything is trained; and that as a table.

`python tests/class_tricks.py` writes the table into prx_composer/models/README.md.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from architectures import TINY, of_pixels
from stacks import TEACHER

from prx_composer import registry
from prx_composer.common.errors import UserError
from prx_composer.models.diffusers_backbone import DiffusersBackbone
from prx_composer.recipe.arguments import build

PAGE = Path(__file__).parents[1] / "prx_composer" / "models" / "README.md"
START, END = "<!-- by tests/class_tricks.py -->\n", "<!-- so far -->\n"

ROUTED_BLOCK = {"start_block": 1, "end_block": 1, "rate": 0.5}
REPA = {"teacher": TEACHER, "block": 1, "projector_hidden": 16}
ADAPTER, MUON = "repa.adapter", "muon"
# What each is given; a name with a dot is a setting of an algorithm. `progressive_resolution` is in the test of resumed runs.
GIVEN: dict[str, dict[str, Any]] = {
    "contrastive_flow_matching": {},
    "deferred_masking": {"mixer_blocks": 1, "rate": 0.5},
    "ema": {"half_life": "2ba"},
    "float8": {"emulate": True},
    "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 0.1},
    "internal_guidance": {"block": 1},
    "irepa": {"teacher": TEACHER, "block": 1},
    "lora": {"rank": 2},
    "low_precision_norm": {},
    "lpips": {"net": "squeeze", "random_weights": True, "scale": 1.25},
    "perceptual_dino": {"teacher": TEACHER, "image_size": 16},
    "readouts": {"heads": [{"block": 1, "patch_size": 2}]},
    "repa": REPA,
    ADAPTER: REPA | {"adapter": {"depth": 1, "mask_rate": 0.2}},
    "resolution_aware": {},
    "skip_nonfinite": {},
    "sprint": ROUTED_BLOCK,
    "timestep_phases": {"phases": [{"logit_mean": 0.8, "logit_std": 0.8}]},
    "tread": ROUTED_BLOCK | {"self_guidance": True},
}


def algorithm(trick: str) -> Any:
    name = trick.partition(".")[0]
    return build(registry.algorithms, name, dict(GIVEN[trick]), f"algorithms.{name}")


@cache
def refusals(name: str) -> dict[str, str]:
    """Return why algorithms are refused with a class, by the checks that `prx check --config-only` asks; those alone that are."""
    with torch.device("meta"):
        backbone = DiffusersBackbone(**{"class": name}, **of_pixels(name))
    found = {}
    for trick in GIVEN:
        try:
            algorithm(trick).check(None, [], backbone)
        except UserError as error:
            found[trick] = str(error)
    return found


def table() -> str:
    """Return it in Markdown: algorithms with the same answers in one row, and below it the reasons."""
    reasons, rows = list[str](), dict[tuple[str, ...], list[str]]()
    for trick in sorted([*GIVEN, MUON]):
        cells = []
        for name in TINY:
            said = refusals(name).get(trick, "").partition(": ")[2].partition(". ")[0]
            if said and said not in reasons:
                reasons.append(said)
            cells.append(f"no, {'abcdefgh'[reasons.index(said)]}" if said else "yes")
        rows.setdefault(tuple(cells), []).append(f"`{trick}`")
    classes = [name.removesuffix("Transformer2DModel").removesuffix("UNet") for name in TINY]
    lines = [f"| | {' | '.join(classes)} |", "|---" * (len(classes) + 1) + "|"]
    lines += [f"| {', '.join(tricks)} | {' | '.join(cells)} |" for cells, tricks in rows.items()]
    lines += ["", *(f"- {letter}: {reason}." for letter, reason in zip("abcdefgh", reasons, strict=False))]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}")
