"""Publish executed notebooks as pages that load nothing from the network."""

import base64
import copy
import os
import platform
import re
from html import escape
from importlib.metadata import version
from pathlib import Path

from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import MarkdownWithMath
from pygments.formatters import HtmlFormatter

from moba_lab.notebooks.maths import MathmlRenderer

PACKAGES = ("numpy", "torch", "matplotlib")
# Tag: attribute through which a browser fetches something while it opens a page.
LOADING = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
    "object": "data",
}
REMOTE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
REMOTE_STYLE = re.compile(
    r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)", re.IGNORECASE
)


class PageExporter(HTMLExporter):
    """Make the body of a page: nbconvert's plain template, formulas as MathML."""

    def __init__(self):
        super().__init__(template_name="basic", embed_images=True)

    def markdown2html(self, context, source):
        """Render a text cell; nbconvert calls this filter by its name."""
        folder = context.get("resources", {}).get("metadata", {}).get("path", "")
        renderer = MathmlRenderer(
            escape=False,
            embed_images=True,
            path=folder,
            attachments=context.get("cell", {}).get("attachments", {}),
        )
        return MarkdownWithMath(renderer=renderer).render(source)

    # Jinja hands its context only to filters that ask for it.
    markdown2html.jinja_pass_arg = HTMLExporter.markdown2html.jinja_pass_arg


def write_site(runs, site):
    """Write one page per run, and ``index.html``.

    Args:
        runs: ``Run`` objects in reading order; ``seconds`` None where the outputs
            are the stored ones.
        site: folder to write to, made where missing.

    Returns:
        The path of the index.
    """
    site = Path(site)
    site.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs):
        before = runs[number - 1] if number > 0 else None
        after = runs[number + 1] if number + 1 < len(runs) else None
        page = site / f"{run.path.stem}.html"
        page.write_text(_page(run, before, after, site), encoding="utf-8")
    index = site / "index.html"
    index.write_text(_index(runs), encoding="utf-8")
    return index


def title_and_goal(notebook):
    """Return the title and the one-line goal that a notebook's first cell states."""
    first = notebook.cells[0].source if notebook.cells else ""
    lines = [line.strip() for line in first.splitlines() if line.strip()]
    title = lines[0].removeprefix("# ") if lines else "untitled"
    return title, lines[1] if len(lines) > 1 else ""


def remote_loads(html):
    """List what a browser would fetch from another host while it opens a page.

    >>> remote_loads('<img src="data:,"><a href="https://example.org/">read</a>')
    []
    >>> remote_loads('<script src="//example.org/a.js"></script>')
    ['//example.org/a.js']
    """
    found = BeautifulSoup(html, "html.parser").find_all(list(LOADING))
    addresses = [element.get(LOADING[element.name], "") for element in found]
    return [a for a in addresses if REMOTE.match(a)] + REMOTE_STYLE.findall(html)


def _page(run, before, after, site):
    title, goal = title_and_goal(run.notebook)
    resources = {"metadata": {"path": str(run.path.parent)}}
    body, _ = PageExporter().from_notebook_node(_with_alt(run.notebook), resources)
    body = _relink(body, run.path.parent, site)
    if run.error:
        body = f'<pre class="failed">{escape(run.error)}</pre>{body}'
    links = ['<a href="index.html">All notebooks</a>']
    if before:
        links.insert(0, f'<a href="{before.path.stem}.html" rel="prev">← previous</a>')
    if after:
        links.append(f'<a href="{after.path.stem}.html" rel="next">next →</a>')
    navigation = f"<nav>{' · '.join(links)}</nav>"
    return _shell(title, goal, navigation, body, f"{navigation}<p>{_status(run)}</p>")


def _index(runs):
    rows = []
    for run in runs:
        title, goal = title_and_goal(run.notebook)
        figure = _first_figure(run.notebook)
        picture = f'<img src="{figure}" alt="">' if figure else ""
        rows.append(
            f'<li><div class="thumb">{picture}</div>'
            f'<div><h2><a href="{run.path.stem}.html">{escape(title)}</a></h2>'
            f"{_markdown(goal)}<p>{_status(run)}</p></div></li>"
        )
    body = f'<h1>MoBA notebooks</h1><ul class="notebooks">{"".join(rows)}</ul>'
    installed = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    footer = f"Python {platform.python_version()}, {installed}"
    return _shell("MoBA notebooks", "", "", body, footer)


def _shell(title, goal, header, body, footer):
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    code_style = HtmlFormatter().get_style_defs(".highlight")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f'<meta name="description" content="{escape(goal)}">\n'
        # Without an icon of its own a page makes the browser ask the host for one.
        '<link rel="icon" href="data:,">\n'
        f"<style>\n{code_style}\n{style}</style>\n</head>\n<body>\n"
        f"<header>{header}</header>\n<main>{body}</main>\n<footer>{footer}</footer>\n"
        "</body>\n</html>\n"
    )


def _status(run):
    if run.error:
        return '<span class="failed">failed</span>'
    if run.seconds is None:
        return "stored outputs, not run this time"
    return f"ran in {run.seconds:.1f} s"


def _markdown(text):
    return MarkdownWithMath(renderer=MathmlRenderer(escape=False)).render(text)


def _first_figure(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if picture:
                # Stored notebooks may break base64 into lines, addresses may not.
                raw = base64.b64decode(picture)
                return f"data:image/png;base64,{base64.b64encode(raw).decode()}"
    return None


def _with_alt(notebook):
    """Copy a notebook; every figure gets its "What to see" sentence as alt text."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        printed = "".join(out.get("text", "") for out in outputs)
        seen = [s for s in printed.splitlines() if s.startswith("What to see")]
        alt = seen[0] if seen else f"figure of cell {cell.get('id', '')}"
        for output in outputs:
            if "image/png" in output.get("data", {}):
                output.metadata.setdefault("image/png", {}).setdefault("alt", alt)
    return notebook


def _relink(html, folder, site):
    """Point links between notebooks at pages, other local links at their files."""
    soup = BeautifulSoup(html, "html.parser")
    for link in soup.find_all("a", href=True):
        address, hash_sign, part = link["href"].partition("#")
        if not address or re.match(r"\w+:|//", address):
            continue
        target = folder / address
        if target.suffix == ".ipynb" and target.parent.resolve() == folder.resolve():
            address = f"{target.stem}.html"
        else:
            address = Path(os.path.relpath(target, site)).as_posix()
        link["href"] = f"{address}{hash_sign}{part}"
    return str(soup)
