"""What MkDocs asks while it builds the site: Markdown of the repository becomes pages, and tables are made of the code.

The site has the repository's own layout: `recipes/quickstart/README.md` is the page `recipes/quickstart/`. Files of `docs/` are
at its root. So a link leads to the same place on the forge and on the site; what it names is taken along, whatever it is.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from prx_docs import cards, fits, pages, pictures, results, tricks

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
TAKEN = ("recipes/**/*.md", "prx_composer/*/README.md", "benchmarks/*.md", "benchmarks/results/*.*", "*.md")
ELSEWHERE = {"README.md": "docs/index.md", "": "docs/index.md", "benchmarks/results": "docs/results.md"}
_AS_IT_IS = (".png", ".svg", ".json")  # which a browser shows
_CODE = re.compile(r"(^ *(`{3,}).*?^ *\2|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_MADE = re.compile(r"^<!-- made: (.+) -->$", re.MULTILINE)
_LANGUAGES = {".yml": "yaml", ".sh": "bash", ".py": "python", ".yaml": "yaml", ".toml": "toml", ".md": "markdown"}
_UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"
MADE = {
    "file": lambda name: _shown(REPOSITORY / name),
    "classes": pages.classes,
    "keys": pages.keys,
    "registries": pages.registries,
    "resume": pages.resume_table,
    "commands": pages.commands,
    "api": lambda *names: pages.api(names),
    "methods": pages.methods,
    "results": lambda: results.table(REPOSITORY / "benchmarks" / "results"),
    "fits": fits.table,
    "evidence": tricks.evidence_table,
    "when": cards.when_table,
    "house": pictures.house,
    "step": pictures.step,
}


_CARDS = {f"prx_composer/algorithms/{name}.md": name for name in cards.cards()}  # page → its algorithm


def on_config(config: Any) -> None:
    """List the algorithms' pages below their README."""
    section = next(part["Algorithms"] for part in config.nav if "Algorithms" in part)
    section[1:1] = [{name: uri} for uri, name in _CARDS.items()]


def on_files(files: Files, config: Any) -> Files:
    """Take in the Markdown of the repository, and all that it or the site's own pages link to."""
    own = {Path(f.abs_src_path) for f in files if f.abs_src_path}
    left = [f for f in own if f.suffix == ".md"]
    left += [file for pattern in TAKEN for file in REPOSITORY.glob(pattern) if _name(file) not in ELSEWHERE]
    for uri, name in _CARDS.items():
        files.append(File.generated(config, uri, content=cards.page(name)))
    seen = set[Path]()
    while left:
        path = left.pop()
        if path in seen or not path.exists():  # MkDocs says which link leads nowhere
            continue
        seen.add(path)
        if path not in own or _name(path) != f"docs/{_uri(path)}":
            files.append(_taken(path, config))
        if path.is_dir():
            left += _listed(path)
        elif path.suffix == ".md":
            left += _targets(path)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Make what a page asks for, and let links lead to where the site has what they name."""
    source = _source(page.file)
    if source is None:
        return markdown
    if source == cards.FILE and page.file.src_uri not in _CARDS:
        markdown = cards.index(markdown)
    markdown = _MADE.sub(_made, markdown)
    parts = _CODE.split(markdown)
    if source == cards.FILE:
        parts[::3] = [prose.replace("](#", f"]({source.name}#") for prose in parts[::3]]
    parts[::3] = [_LINK.sub(lambda link: _relinked(link, source, page.file), prose) for prose in parts[::3]]
    return "".join(part for index, part in enumerate(parts) if index % 3 != 2)


def _source(file: File) -> Path | None:
    """Return the file of the repository that links of a page start from; None for one that shows a file."""
    if file.src_uri in _CARDS:
        return cards.FILE
    return Path(file.abs_src_path) if file.abs_src_path else None


def _made(match: re.Match[str]) -> str:
    name, *arguments = match[1].split()
    return MADE[name](*arguments)


def _relinked(link: re.Match[str], source: Path, file: File) -> str:
    target, anchor, folder = (
        _page_of(Path(os.path.normpath(source.parent / link[1]))),
        link[2] or "",
        os.path.dirname(file.src_uri),
    )
    if not target.exists():
        return link[0]
    card = f"prx_composer/algorithms/{anchor[1:]}.md"
    uri, anchor = (card, "") if target == cards.FILE and card in _CARDS else (_uri(target), anchor)
    return os.path.relpath(uri, folder or ".") + anchor


def _name(path: Path) -> str:
    name = str(path.relative_to(REPOSITORY))
    return "" if name == "." else name


def _targets(page: Path) -> Iterator[Path]:
    """Yield the files and folders of the repository that a page links to."""
    for prose in _CODE.split(page.read_text(encoding="utf-8"))[::3]:
        for link, _ in _LINK.findall(prose):
            yield _page_of(Path(os.path.normpath(page.parent / link)))


def _page_of(path: Path) -> Path:
    """Return what stands for a file or folder on the site."""
    if not path.is_relative_to(REPOSITORY):
        return path
    if (instead := ELSEWHERE.get(_name(path))) is not None:
        return REPOSITORY / instead
    return path / "README.md" if (path / "README.md").exists() else path


def _uri(path: Path) -> str:
    """Return the site's name of a file or folder of the repository."""
    if path.is_relative_to(DOCS) and path.suffix != ".py" and "prx_docs" not in path.parts:
        return str(path.relative_to(DOCS))
    if path.is_dir():
        return f"{_name(path)}/index.md"
    return _name(path) if path.suffix in (".md", *_AS_IT_IS) else f"{_name(path)}.md"


def _listed(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith((".", "__")))


def _taken(path: Path, config: Any) -> File:
    """Return a page that is a file of the repository, or that shows one or lists a folder."""
    uri = _uri(path)
    if not path.is_dir() and path.suffix in (".md", *_AS_IT_IS):
        return File.generated(config, uri, abs_src_path=str(path))
    if path.suffix == ".ipynb":
        return File.generated(config, uri, content=_notebook(path))
    if path.is_dir():
        text = "\n".join(f"- [`{file.name}`]({_uri(file).removeprefix(f'{_name(path)}/')})" for file in _listed(path))
    else:
        text = _shown(path)
    return File.generated(config, uri, content=f"{_UNSEARCHED}# `{_name(path)}`\n\n{text}\n")


def _notebook(path: Path) -> str:
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells)


def _shown(path: Path) -> str:
    return f"`````{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8').rstrip()}\n`````"
