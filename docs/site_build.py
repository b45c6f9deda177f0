"""Hook of .mkdocs.yml: files from elsewhere, GitHub's Markdown, the commands, llms.txt, and a check that nothing is loaded from outside.

Pages are written for GitHub as well as for the site. Links to files outside docs/ therefore lead to copies of these files in the site.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site that are made of Markdown files elsewhere in the repository.
PAGES = {"CHANGELOG.md": "changelog.md", "smartfrz_ds/predictor/default.md": "predictor-card.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
LISTED = re.compile(r"\s*([-*+]|\d+\.)\s")
# What a browser would load by itself: everything but links that the reader follows.
LOADED = re.compile(r"<(?:script|img|link|iframe|source|video|audio|object|embed)\b[^>]*?(?:src|href|data)=[\"']?(?:https?:)?//[^\"'> ]+")
LOADED_BY_CSS = re.compile(r"(?:@import\s+|url\()\s*[\"']?(?:https?:)?//[^)\"']+")


def outside(text: str) -> Iterator[str]:
    """The files outside docs/ to which a page of docs/ links, from the repository's root."""
    for _, _, target in LINK.findall(text):
        if target.startswith("../"):
            yield target.removeprefix("../").partition("#")[0]


def on_files(files: Files, config: Any) -> Files:
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=from_root((ROOT / source).read_text(encoding="utf-8"), source)))
    wanted = {path for page in files.documentation_pages() for path in outside(page.content_string)}
    for path in sorted(wanted - PAGES.keys() - {"README.md"}):
        if (ROOT / path).is_file():
            files.append(File.generated(config, f"files/{path}", content=(ROOT / path).read_bytes()))
    return files


def from_root(text: str, source: str) -> str:
    """The text of a file elsewhere in the repository, with its links as a page of docs/ would write them."""

    def moved(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        if re.match(r"\w+:|#", target):
            return match[0]
        path = (ROOT / source).parent.joinpath(target).resolve()
        inside = path.is_relative_to(ROOT / "docs")
        return f"{mark}[{label}]({path.relative_to(ROOT / 'docs') if inside else f'../{path.relative_to(ROOT)}'})"

    return LINK.sub(moved, text)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    titles = {f.src_uri: heading(f.content_string) for f in files.documentation_pages()}

    def followed(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        if not target.startswith("../"):
            return f"[{titles.get(label, label)}]({target})" if label in target and label in titles else match[0]
        path, hash_, anchor = target.removeprefix("../").partition("#")
        if path == "README.md":
            return f"[{label}](index.md)"
        if path in PAGES:
            return f"[{label}]({PAGES[path]}{hash_}{anchor})"
        return f"{mark}[{label}](files/{path})" if (ROOT / path).is_file() else label

    text = LINK.sub(followed, markdown)
    if page.file.src_uri == "cli.md":
        text += "\n" + "\n".join(commands())
    if page.file.src_uri == "configuration.md":
        text += '\n## The keys, one by one\n\n<div class="settings" markdown>\n\n' + settings() + "\n</div>\n"
    return spaced(text)


def settings() -> str:
    """The table of all settings, from their declarations."""
    from smartfrz_ds.config.table import to_markdown

    return to_markdown()


def heading(markdown: str) -> str:
    """The title of a page, which the site shows where GitHub shows the name of its file."""
    return next((line.removeprefix("# ") for line in markdown.splitlines() if line.startswith("# ")), "")


def spaced(text: str) -> str:
    """Insert the blank line that Python-Markdown, unlike GitHub, needs in front of a list or a table."""
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        last = lines[-1] if lines else ""
        if not fenced and last.strip():
            starts_list = LISTED.match(line) and not line.startswith(" ") and not LISTED.match(last) and not last.startswith(" ")
            starts_table = line.startswith("|") and not last.startswith("|")
            if starts_list or starts_table:
                lines.append("")
        if line.lstrip().startswith("```"):
            fenced = not fenced
        lines.append(line)
    return "\n".join(lines) + "\n"


def commands() -> Iterator[str]:
    """A section for each command of `smartfrz`, from the command line's own help."""
    import typer

    from smartfrz_ds.cli.main import app

    def sections(command: Any, name: str) -> Iterator[str]:
        children = getattr(command, "commands", {})
        yield f"## {name}\n\n{(command.help or '').strip()}\n"
        rows = [p for p in command.params if getattr(p, "help", None) is not None or p.param_type_name == "argument"]
        if rows and not children:
            yield "| | default | |\n| --- | --- | --- |"
            for option in rows:
                label = ", ".join(f"`{x}`" for x in option.opts) if option.param_type_name == "option" else f"`{option.name.upper()}`"
                default = option.default() if callable(option.default) else option.default
                shown = f"`{default}`" if default not in (None, False, (), []) and "Sentinel" not in repr(default) else ""
                yield f"| {label} | {shown} | {(option.help or '').replace('|', '&#124;')} |"
            yield ""
        for child, found in children.items():
            yield from sections(found, f"{name} {child}")

    top = typer.main.get_command(app)
    for child, found in getattr(top, "commands", {}).items():
        yield from sections(found, f"smartfrz {child}")


def summary(markdown: str) -> str:
    """The first sentence of a page's text."""
    without = re.sub(r"^```.*?^```$|<!--.*?-->", "", markdown, flags=re.MULTILINE | re.DOTALL)
    without = re.sub(r"^(#|!\[|\||:::).*$", "", without, flags=re.MULTILINE)
    paragraph = next((" ".join(p.split()) for p in without.split("\n\n") if p.strip()), "")
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
    return re.split(r"(?<=[.!?:])\s", plain)[0].rstrip(":")


def on_nav(nav: Any, config: Any, files: Files) -> Any:
    config.extra["nav_items"] = nav.items
    return nav


def on_post_build(config: Any) -> None:
    site = Path(config.site_dir)
    (site / "llms.txt").write_text("\n".join(llms(config)) + "\n", encoding="utf-8")
    found = [f"{f.relative_to(site)}: {x}" for f in site.rglob("*.html") for x in LOADED.findall(f.read_text(encoding="utf-8"))]
    found += [f"{f.relative_to(site)}: {x}" for f in site.rglob("*.css") for x in LOADED_BY_CSS.findall(f.read_text(encoding="utf-8"))]
    if found:
        raise PluginError("pages load files from outside the site:\n" + "\n".join(found))


def llms(config: Any) -> Iterator[str]:
    """llms.txt (llmstxt.org): the pages by section, with their Markdown beside the HTML and the first sentence of each."""
    site = Path(config.site_dir)
    yield f"# {config.site_name}\n\n> {config.site_description}\n"
    for item in config.extra["nav_items"]:
        pages = [item] if item.is_page else [p for p in item.children if p.is_page]
        yield f"## {item.title}\n"
        for page in pages:
            target = site / page.file.src_uri
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(page.markdown, encoding="utf-8")
            yield f"- [{page.title}]({page.file.src_uri}): {summary(page.markdown)}"
        yield ""
