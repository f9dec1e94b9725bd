"""The rules that every notebook keeps, each a function with a message for its author.

A rule takes a ``Source`` and yields ``(cell id or None, message)`` for every breach.
Lessons are the numbered notebooks; ``solutions`` keeps only the rules about files.
"""

import copy
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from moba_lab.notebooks.clean import TEXT_TYPES, clean, runs, source_hash
from moba_lab.notebooks.maths import MathmlRenderer, to_mathml
from moba_lab.notebooks.site import remote_loads

CELLS = range(25, 46)
CODE_LINES, FEW_CODE_LINES = 15, 6
# Authors aim at 80; the rule leaves them a sentence.
WORDS = 90
BYTES = 300_000
GOAL_CHARACTERS = 200
SENTENCES = 3
WRITE = "run `python -m moba_lab.notebooks --write {}`"

KEBAB_CASE = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
RANDOM_CELL_ID = re.compile(r"[0-9a-f]{8}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/])/(?:home|root|Users|work|tmp|usr|opt|var|mnt|private|etc)/\S*"
    r"|\b[A-Z]:\\\S+"
)
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")
NETWORK = re.compile(
    r"^\s*(?:!|%pip|%conda|%%bash|%%sh|%%script).*"
    r"|https?://\S+"
    r"|\b(?:urllib\.request|requests|httpx|socket|huggingface_hub|torch\.hub)\b",
    re.MULTILINE,
)
EMBEDDED = re.compile(r"base64,[A-Za-z0-9+/=\\\s]+")


@dataclass(frozen=True)
class Source:
    """A notebook as it lies in its folder.

    Attributes:
        path: its file.
        notebook: its cells.
        size: bytes of the file.
        lessons: stems of all lessons of the folder, in reading order.
        setup: the setup cell of the folder's first lesson, None where there is none.
    """

    path: Path
    notebook: nbformat.NotebookNode
    size: int
    lessons: tuple[str, ...]
    setup: str | None

    @cached_property
    def texts(self):
        """Return the text cells."""
        return [c for c in self.notebook.cells if c.cell_type == "markdown"]

    @cached_property
    def code(self):
        """Return the code cells."""
        return [c for c in self.notebook.cells if c.cell_type == "code"]


def check(path):
    """List every breach of a rule in one notebook.

    Args:
        path: the ``.ipynb`` file; its folder tells its neighbours.

    Returns:
        Messages of the form ``02_gate: cell 'look': 17 lines of code, ...``.
    """
    return check_source(read(path))


def check_source(source):
    """List every breach of a rule in a notebook that was read."""
    chosen = FILE_RULES
    if source.path.stem in source.lessons:
        chosen = FILE_RULES + LESSON_RULES
    return [
        f"{source.path.stem}: {f'cell {cell!r}: ' if cell else ''}{message}"
        for rule in chosen
        for cell, message in rule(source)
    ]


def read(path):
    """Read a notebook with what its rules need to know of its folder."""
    path = Path(path)
    notebook = _read(path)
    stems = sorted(p.stem for p in path.parent.glob("[0-9][0-9]_*.ipynb"))
    setup = None
    if stems:
        first = _read(path.parent / f"{stems[0]}.ipynb")
        setup = next((c.source for c in first.cells if c.get("id") == "setup"), None)
    return Source(path, notebook, path.stat().st_size, tuple(stems), setup)


def _read(path):
    # nbformat.read would quietly give a second cell of one id another one.
    return nbformat.v4.reads(path.read_text(encoding="utf-8"))


def cell_ids(source):
    """Want readable ids: they are link targets, and name cells in error messages."""
    seen = set()
    for cell in source.notebook.cells:
        name = cell.get("id", "")
        if not KEBAB_CASE.fullmatch(name) or RANDOM_CELL_ID.fullmatch(name):
            yield name, "expected a readable id in kebab-case, such as 'gate-scores'"
        if name in seen:
            yield name, "two cells have this id; give each its own"
        seen.add(name)


def file_size(source):
    """Want small files: they are read on the web and compared in reviews."""
    if source.size > BYTES:
        yield None, f"{source.size:,} bytes, at most {BYTES:,}: use fewer pictures"


def setup_cell(source):
    """Want one setup cell for all, so that readers learn it once."""
    first = source.code[0] if source.code else None
    if first is None or first.id != "setup":
        yield first and first.id, "expected 'setup' as the id of the first code cell"
    elif first.source != source.setup:
        yield "setup", f"differs from the setup cell of {source.lessons[0]}; copy it"


def links(source):
    """Want links that lead somewhere without a network."""
    for cell in source.texts:
        page = BeautifulSoup(_html(cell), "html.parser")
        for element in page.find_all(["a", "img"]):
            address = element.get("href") or element.get("src") or ""
            target = address.partition("#")[0]
            if re.match(r"\w+:|//", address):
                if not address.startswith(("data:", "attachment:")):
                    yield cell.id, f"{address} is not local; name the source in words"
            elif target and not (source.path.parent / target).exists():
                yield cell.id, f"links to {target}, which does not exist"


def no_network(source):
    """Want cells that neither install nor download."""
    for cell in source.code:
        for found in NETWORK.finditer(cell.source):
            line = found.group().strip()
            yield cell.id, f"{line!r} would install or download; use what is here"


def maths(source):
    """Want formulas that the offline pages can draw."""
    for cell in source.texts:
        broken = []

        class Collect(MathmlRenderer):
            def _formula(self, latex, display, broken=broken):
                try:
                    return to_mathml(latex, display)
                except ValueError as error:
                    broken.append(str(error))
                    return ""

        MarkdownWithMath(renderer=Collect(escape=False)).render(cell.source)
        for message in broken:
            yield cell.id, message


def outputs_belong(source):
    """Want stored outputs that came from the stored code, in one clean run."""
    write = WRITE.format(source.path.stem)
    cells = [cell for cell in source.code if runs(cell)]
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        yield None, f"execution counts are not 1 to {len(cells)}; {write}"
    stored = source.notebook.metadata.get("moba", {}).get("source_sha256")
    if stored != source_hash(source.notebook):
        yield None, f"the outputs were made from other code; {write}"


def outputs_clean(source):
    """Want outputs that hold on every machine: no errors, paths, addresses, hosts."""
    for cell in source.code:
        for output in cell.outputs:
            if output.output_type == "error":
                yield cell.id, f"stores an error: {output.ename}: {output.evalue}"
            if output.get("name") == "stderr":
                yield cell.id, f"stores stderr: {output.text.strip()!r}"
            text = EMBEDDED.sub("", output_text(output))
            for what, pattern in (("path", ABSOLUTE_PATH), ("address", ADDRESS)):
                found = pattern.search(text)
                if found:
                    yield cell.id, f"stores the {what} {found.group()} of one machine"
            html = output.get("data", {}).get("text/html", "")
            for address in remote_loads(html):
                yield cell.id, f"loads {address} from the network; embed it"


def stored_form(source):
    """Want the one stored form, so that a second run changes no byte."""
    tidy = clean(copy.deepcopy(source.notebook), source.path.resolve().parents[1])
    stored = source.notebook.metadata.get("moba")
    if stored:
        tidy.metadata["moba"] = stored
    if tidy != source.notebook:
        write = WRITE.format(source.path.stem)
        yield None, f"metadata or outputs are not in the stored form; {write}"


def title(source):
    """Want a title and one line that says what the notebook is for."""
    first = source.notebook.cells[0] if source.notebook.cells else None
    lines = [n for n in first.source.splitlines() if n.strip()] if first else []
    if not lines or first.cell_type != "markdown" or not lines[0].startswith("# "):
        yield first and first.id, "expected the title, '# …', in the first cell"
    elif len(lines) < 2 or lines[1].startswith("#") or len(lines[1]) > GOAL_CHARACTERS:
        yield first.id, "expected the goal in one line below the title"


def promises(source):
    """Want the reader told beforehand what they will be able to do."""
    if not any("You will be able to" in cell.source for cell in source.texts[:3]):
        yield None, "expected 'You will be able to' in one of the first three texts"


def lengths(source):
    """Want a lesson of one sitting, in pieces that fit on a screen."""
    count = len(source.notebook.cells)
    if count not in CELLS:
        yield None, f"{count} cells, expected {CELLS[0]} to {CELLS[-1]}"
    long = 0
    for cell in source.code:
        lines = len(cell.source.strip().splitlines())
        long += lines > FEW_CODE_LINES
        if lines > CODE_LINES:
            yield cell.id, f"{lines} lines of code, at most {CODE_LINES}: import them"
    if 2 * long >= len(source.code):
        total = len(source.code)
        yield None, f"{long} of {total} code cells exceed {FEW_CODE_LINES} lines: split"
    for cell in source.texts:
        words = _words(cell)
        if words > WORDS:
            yield cell.id, f"{words} words, expected about 80: cut or split"


def agreement(source):
    """Want fast and reference compared before the reader's eyes."""
    if not any(re.search(r"\bagree\(", cell.source) for cell in source.code):
        yield None, "expected a cell that calls agree(fast, ref, name)"


def exercises(source):
    """Want exercises with a folded answer and a check that starts unsolved."""
    if not any(
        re.search(r"^#+ .*exercise", c.source, re.I | re.M) for c in source.texts
    ):
        yield None, "expected a heading with the word 'Exercises'"
    if not any("<details>" in cell.source for cell in source.texts):
        yield None, "expected answers folded in <details>"
    printed = "".join(output_text(out) for cell in source.code for out in cell.outputs)
    if "not solved yet" not in printed:
        yield None, "expected a check cell that prints 'not solved yet'"


def recap(source):
    """Want three sentences to take away."""
    cells = [
        c for c in source.texts if re.search(r"^#+ .*recap", c.source, re.I | re.M)
    ]
    if not cells:
        yield None, "expected a heading with the word 'Recap' near the end"
        return
    after = re.split(r"^#+ .*recap.*$", cells[-1].source, flags=re.I | re.M)[-1]
    prose = " ".join(n for n in after.splitlines() if ".ipynb" not in n).strip()
    sentences = len(re.findall(r"[.!?][)*_`\"”]*(?=\s|$)", prose))
    if sentences != SENTENCES:
        yield cells[-1].id, f"a recap of {sentences} sentences, expected {SENTENCES}"


def neighbours(source):
    """Want links to the previous and the next lesson at the end."""
    place = source.lessons.index(source.path.stem)
    end = "".join(_html(cell) for cell in source.texts[-2:])
    linked = {a["href"] for a in BeautifulSoup(end, "html.parser").find_all("a")}
    wanted = source.lessons[max(place - 1, 0) : place] + source.lessons[place + 1 :][:1]
    for stem in wanted:
        if f"{stem}.ipynb" not in linked:
            yield None, f"expected a link to {stem}.ipynb in the last text cells"


def output_text(output):
    """Return everything readable that one output holds."""
    data = output.get("data", {})
    parts = [data[kind] for kind in TEXT_TYPES if kind in data]
    return "\n".join([output.get("text", ""), *parts, *output.get("traceback", [])])


def _html(cell):
    return MarkdownWithMath(renderer=IPythonRenderer(escape=False)).render(cell.source)


def _words(cell):
    """Count the words of a text cell; formulas, code and folded answers are free."""
    page = BeautifulSoup(_html(cell), "html.parser")
    for element in page.find_all(["pre", "code", "table", "details"]):
        element.decompose()
    prose = re.sub(r"\$\$.*?\$\$|\$.*?\$", " ", page.get_text(" "), flags=re.S)
    return len(re.findall(r"\w[\w'’-]*", prose))


FILE_RULES = (
    cell_ids,
    file_size,
    setup_cell,
    links,
    no_network,
    maths,
    outputs_belong,
    outputs_clean,
    stored_form,
)
LESSON_RULES = (
    title,
    promises,
    lengths,
    agreement,
    exercises,
    recap,
    neighbours,
)
