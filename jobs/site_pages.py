"""MkDocs hooks: Markdown files outside docs/ become pages of the site, and Markdown is read as GitHub reads it."""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Page of the site: file of the repository. All others are docs/PAGE.
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "jobs.md": "jobs/README.md",
    "micro.md": "lit_prune/micro/weights/README.md",
    "micro_576.md": "lit_prune/micro/weights_576/README.md",
}
PAGES = {source: page for page, source in ELSEWHERE.items()}
LINK = re.compile(r'(\]\(|\b(?:src|href)=")(?!\w+:|#)([^)\s"#]+)')
FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)
# A list or a table that follows a line of text: GitHub starts one there, Python-Markdown only after an empty line.
UNSEPARATED = re.compile(r"^(?![-|#>\s])(.*\S)\n(?=- |\|)", re.MULTILINE)
# `::: package.*` in a page of the API: one entry for each module of the package.
MODULES = re.compile(r"^::: ([\w.]+)\.\*$", re.MULTILINE)
log = logging.getLogger("mkdocs.hooks.site_pages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of `ELSEWHERE`."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files into links between pages, separate lists and tables from text, list modules."""
    uri = page.file.src_uri
    folder = posixpath.dirname(ELSEWHERE.get(uri, f"docs/{uri}"))

    def relink(match: re.Match[str]) -> str:
        opening, target = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", ELSEWHERE.get(uri, uri), target)
        inside = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if inside is None:
            log.warning("%s links to %s, which is no page of the site", ELSEWHERE.get(uri, uri), target)
            return match[0]
        return opening + posixpath.relpath(inside, posixpath.dirname(uri) or ".")

    parts = FENCE.split(markdown)
    # Every second part is a block of code, which stays as it is.
    parts[::2] = (UNSEPARATED.sub(r"\1\n\n", LINK.sub(relink, part)) for part in parts[::2])
    return MODULES.sub(lambda match: "\n\n".join(f"::: {name}" for name in modules(match[1])), "".join(parts))


def modules(package: str) -> list[str]:
    """The public modules of a package, sorted."""
    names = (path.stem for path in ROOT.joinpath(*package.split(".")).iterdir() if path.suffix in ("", ".py"))
    return sorted(f"{package}.{name}" for name in names if not name.startswith("_"))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Warn about a table that was not read as one."""
    if re.search(r"<p>[^<]*\|\s*:?-{3}", html):
        log.warning("%s has a table that is shown as text", page.file.src_uri)
    return html
