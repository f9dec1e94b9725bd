"""Bring an executed notebook into the one form in which it is committed."""

import hashlib
import json
import re
from itertools import count
from pathlib import Path

from nbformat import NotebookNode

METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
MEMORY_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
RANDOM_ID = re.compile(r"[0-9a-f]{32}")
# A widget shown by the number of its model, which lives as long as its kernel.
WIDGET = "application/vnd.jupyter.widget-view+json"
TEXT_TYPES = ("text/plain", "text/html", "text/markdown", "text/latex")


def runs(cell):
    """Tell whether a kernel numbers this cell: code that is not only blank.

    >>> runs(NotebookNode(cell_type="code", source="1 + 1"))
    True
    >>> runs(NotebookNode(cell_type="code", source=" "))
    False
    """
    return cell.cell_type == "code" and bool(cell.source.strip())


def source_hash(notebook):
    """Return a SHA-256 over the ids and sources of the code cells.

    Stored beside the outputs, it ties them to the code that made them.
    """
    code = [[cell.id, cell.source] for cell in notebook.cells if runs(cell)]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def clean(notebook, root):
    """Rewrite a notebook in place so that a second run gives the same bytes.

    Execution counts become 1..n, stderr is dropped, memory addresses and random
    element ids and the paths under ``root`` go from the text of outputs, widgets keep
    only what they show without a kernel, metadata shrinks to the kernel's name, the
    cells' tags and the hash of the source.

    Args:
        notebook: an executed notebook, nbformat 4.5.
        root: folder whose absolute path must not show, the repository's.

    Returns:
        The same notebook.
    """
    numbers = count(1)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = NotebookNode({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        cell.execution_count = next(numbers) if runs(cell) else None
        kept = (out for out in cell.outputs if out.get("name") != "stderr")
        cell.outputs = join_texts(kept)
        for output in cell.outputs:
            _clean_output(output, cell, Path(root))
    own = {"moba": {"source_sha256": source_hash(notebook)}}
    notebook.metadata = NotebookNode(METADATA | own)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def join_texts(outputs):
    """Put printed texts that follow each other together; pictures keep their places.

    A kernel sends what is printed in pieces whose ends depend on its speed.

    >>> a, b = (NotebookNode(output_type="stream", text=text) for text in "ab")
    >>> [out.text for out in join_texts([a, b])]
    ['ab']
    """
    joined = []
    for output in outputs:
        before = joined[-1].output_type if joined else None
        if output.output_type == before == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _clean_output(output, cell, root):
    if output.output_type == "execute_result":
        output.execution_count = cell.execution_count
    if output.output_type == "stream":
        output.text = _clean_text(output.text, cell.id, root)
    output.get("data", {}).pop(WIDGET, None)
    for kind in TEXT_TYPES:
        if kind in output.get("data", {}):
            output.data[kind] = _clean_text(output.data[kind], cell.id, root)
    if output.output_type == "error":
        output.traceback = [_clean_text(t, cell.id, root) for t in output.traceback]


def _clean_text(text, cell_id, root):
    """Remove from a text what differs between machines and runs.

    >>> _clean_text("<f at 0x7f01> in /home/me/moba/x.py", "c", Path("/home/me/moba"))
    '<f> in x.py'
    """
    text = text.replace(f"{root}/", "").replace(str(root), ".")
    return _stable_ids(MEMORY_ADDRESS.sub("", text), cell_id)


def _stable_ids(text, cell_id):
    """Replace random hexadecimal ids by ids derived from the cell's own.

    Two ids of one text stay two ids, so films keep pointing at their own pictures.

    >>> stable = _stable_ids(f"img{'0' * 32} img{'1' * 32} img{'0' * 32}", "film")
    >>> first, second, third = stable.split()
    >>> first == third, first == second
    (True, False)
    """
    found = dict.fromkeys(RANDOM_ID.findall(text))
    for number, old in enumerate(found):
        digest = hashlib.sha256(f"{cell_id}/{number}".encode()).hexdigest()
        text = text.replace(old, digest[:32])
    return text
