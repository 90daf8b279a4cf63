"""What was measured here of each algorithm, as a line of its card: made from the newest ablations with several seeds.

python benchmarks/card_lines.py --write

Every card of prx_composer/algorithms/README.md has a line "**Measured here:** …". It is made from the JSON files in
benchmarks/results that ablate.py wrote, and from nothing else: of every recipe, the newest result of a stack that differs from
the base by this algorithm alone. Without --write the lines are only printed.
"""

import argparse
import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "prx_composer" / "algorithms" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "**Measured here:** "
NOTHING = "no ablation of several seeds yet."
SHOWN = {"accuracy": "accuracy", "validation_loss": "validation loss", "step": "time of a step"}


def results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the ablations that were compared over seeds, by name of their file, the oldest first."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*ablate*.json"))}
    return {name: result for name, result in found.items() if "comparisons" in result}


def card_names(text: str) -> list[str]:
    """Return the names of the algorithms that have a card, in order: titles that are a name."""
    return re.findall(r"^## ([a-z][a-z0-9_]*)$", text, re.M)


def line(algorithm: str, found: Mapping[str, Mapping[str, Any]], cards: Collection[str]) -> str:
    """Return the line of an algorithm's card.

    Args:
        found: as `results` gives it.
        cards: names that have a card. What has none, such as the optimizer that Muon takes the place of, is no trick.
    """
    newest: dict[tuple[str, str], str] = {}
    for name, result in found.items():
        for stack, known in result["stacks"].items():
            tricks = [name for name in (*known["adds"], *known["leaves_out"]) if name in cards]
            if not known["sets"] and tricks == [algorithm] and _seeds(stack, result) > 1:
                newest[" ".join(result["recipe"]), stack] = name
    told = [_told(algorithm, stack, name, found[name]) for (_, stack), name in sorted(newest.items())]
    return BEGIN + (" ".join(told) or NOTHING)


def _seeds(stack: str, result: Mapping[str, Any]) -> int:
    """Return with how many seeds a stack was compared with the base."""
    return max((len(c["pairs"]) for c in result["comparisons"] if c["stack"] == stack), default=0)


def _told(algorithm: str, stack: str, name: str, result: Mapping[str, Any]) -> str:
    """Write what a result says of a stack: "[quickstart](…), 3 seeds, with it: accuracy better by 0.021 (0.004 to 0.038), …"."""
    recipes = "+".join(Path(word).stem for word in result["recipe"] if "=" not in word)
    known = result["stacks"][stack]
    side = "left out" if algorithm in known["leaves_out"] else "added"
    verdicts = {c["column"]: c["words"] for c in result["comparisons"] if c["stack"] == stack}
    said = [f"{title} {verdicts[key]}" for key, title in SHOWN.items() if key in verdicts]
    page = f"../../benchmarks/results/{name.removesuffix('.json')}.md"
    head = f"[{recipes}]({page}), {result['length']}, {_seeds(stack, result)} seeds, `{stack}` ({side}): "
    return head + "; ".join(said) + "." + "".join(f" Note: {note}." for note in known["notes"])


def with_lines(text: str, lines: Mapping[str, str]) -> str:
    """Return the cards with these lines: in the place of the old ones, or at the end of a card that has none."""
    parts = re.split(r"^(?=## )", text, flags=re.M)
    return "".join(_with_line(part, lines) for part in parts)


def _with_line(card: str, lines: Mapping[str, str]) -> str:
    title = re.match(r"## (\w+)\n", card)
    if title is None or title[1] not in lines:
        return card
    kept = [row for row in card.rstrip("\n").split("\n") if not row.startswith(BEGIN)]
    while not kept[-1]:
        kept.pop()
    return "\n".join([*kept, "", lines[title[1]], "", ""])


def all_lines(text: str, found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    names = card_names(text)
    return {name: line(name, found, names) for name in names}


def main(arguments: Iterable[str]) -> int:
    """Print the lines, or write them into the cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {CARDS.relative_to(ROOT)}")
    options = parser.parse_args(list(arguments))
    text = CARDS.read_text()
    lines = all_lines(text, results())
    if options.write:
        CARDS.write_text(with_lines(text, lines))
    else:
        sys.stdout.write("".join(f"{name}: {told}\n" for name, told in lines.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
