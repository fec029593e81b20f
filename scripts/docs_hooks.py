"""What MkDocs does besides rendering docs/: pages from elsewhere in the project, the command reference, and links.

The pages in docs/ and the README are read on a code host too, where a link to a file outside docs/ is relative to the
page. In the site such a link leads to a page made of that file, or to a copy of it, so no address of a host is needed.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from command_reference import render
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Markdown outside docs/ that is a page of the site, by its path in the project.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "tests/golden/README.md": "golden.md",
}
COMMANDS = "commands.md"
COPIES = "files"  # the site's folder of copied files
_FENCE = re.compile(r"^\s*(```|~~~)")
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, COMMANDS, content=render()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/ into links within the site."""
    sources = {generated: source for source, generated in PAGES.items()}
    uri = page.file.src_uri
    source = sources.get(uri, f"docs/{uri}")

    def in_site(link: re.Match[str]) -> str:
        address, mark, anchor = link["target"].partition("#")
        if not address or ":" in address:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), address))
        if (ROOT / path).is_dir():  # a code host lists a folder, a site of files cannot
            return link["text"]
        if not (ROOT / path).exists():
            return link[0]  # the strict build names it
        target = _page_or_copy(path, config, files)
        text = _title(path) if link["text"] in {link["target"], path} else link["text"]
        relative = posixpath.relpath(target, posixpath.dirname(uri) or ".")
        return f"{link['image']}[{text}]({relative}{mark}{anchor})"

    return outside_code(markdown, in_site)


def outside_code(markdown: str, replace: Callable[[re.Match[str]], str]) -> str:
    """Return `markdown` with `replace` applied to each link that does not stand in a fenced block."""
    lines, fenced = [], False
    for line in markdown.split("\n"):
        fence = _FENCE.match(line) is not None
        fenced ^= fence
        lines.append(line if fenced or fence else _LINK.sub(replace, line))
    return "\n".join(lines)


def _title(path: str) -> str:
    """Return the heading of the project's Markdown file `path`: a code host's readers know it by its path."""
    heading = re.match(r"# (.+)", (ROOT / path).read_text(encoding="utf-8")) if path.endswith(".md") else None
    return heading[1] if heading else path


def _page_or_copy(path: str, config: MkDocsConfig, files: Files) -> str:
    """Return where the project's file `path` is in the site, copied there if need be."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    target = f"{COPIES}/{path}"
    if files.get_file_from_path(target) is None:
        files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
    return target
