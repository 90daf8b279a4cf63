"""What pages of the site quote and say: messages that the code has, links that lead somewhere, sentences that can be read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"


def strings() -> Iterator[str]:
    """Yield every text in the source of the package, with … for what is filled in."""
    for file in (REPOSITORY / "prx_composer").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_troubleshooting_quotes_messages_that_the_code_has() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = [text for line in re.findall(r"^> (.+)$", page, re.MULTILINE) for text in re.findall(r"`([^`]+)`", line)]
    code = list(strings())
    others = {
        "Skipping import of cpp extensions due to incompatible torch version",  # torchao's
        "Waiting up to 30 seconds for all training processes to terminate. Press Ctrl-C to exit immediately.",  # Composer's
    }
    lacking = []
    for text in quoted:
        parts = [re.escape(part.strip()) for part in text.split("…") if part.strip(" .,:;")]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        if text not in others and not any(pattern.search(said) for said in code):
            lacking.append(text)
    assert len(quoted) > 30 and not lacking, lacking


def prose(page: Path) -> str:
    text = re.sub(r"^---\n.*?^---\n|^```.*?^```|^ *<!--.*?-->|^\|.*?$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\]\([^)]*\)|[*`\[#>]", " ", text)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_no_sentence_of_the_site_is_over_35_words(page: Path) -> None:
    sentences = re.split(r"(?<=[.!?:;])\s+|\n\s*\n|\n\s*- |\n\s*\d+\. ", prose(page))
    long = [sentence for sentence in sentences if len(re.findall(r"\w[\w'-]*", sentence)) > 35]
    assert not long, long
