"""JupyterLab and Chromium for the browser tests, both shut off from the outside."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from urllib.parse import urlsplit

from nbformat.sign import NotebookNotary

from moba_lab.notebooks.clean import WIDGET
from moba_lab.notebooks.run import kernel_environment

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium calls home at every start unless it is told not to.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NEWS = "@jupyterlab/apputils-extension:announcements"
TOKEN = "test"


def find_chromium():
    """Return the path of a Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def lab_server(notebooks, state):
    """Serve a folder with a JupyterLab that has no settings and asks for no news.

    Args:
        notebooks: folder whose notebooks are served.
        state: folder for all that JupyterLab writes, empty but for what `trust` wrote.

    Yields the address.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.allow_root": True,
        "ServerApp.root_dir": notebooks,
        "IdentityProvider.token": TOKEN,
        "LabApp.expose_app_in_browser": True,
        "LabApp.extension_manager": "readonly",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser"]
    command += [f"--{name}={value}" for name, value in options.items()]
    log = state / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=_lab_environment(state), stdout=output, stderr=output
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api/status?token={TOKEN}", server, log)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


def trust(notebook, state):
    """Let the JupyterLab with this state show all outputs of a notebook."""
    (state / "data").mkdir(exist_ok=True)
    NotebookNotary(data_dir=str(state / "data")).sign(notebook)


def _lab_environment(state):
    folders = {
        "JUPYTER_CONFIG_DIR": state / "config",
        "JUPYTER_DATA_DIR": state / "data",
        "JUPYTER_RUNTIME_DIR": state / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": state / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": state / "workspaces",
    }
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    page = state / "config" / "labconfig" / "page_config.json"
    page.parent.mkdir()
    page.write_text(json.dumps({"disabledExtensions": {NEWS: True}}))
    # Lab keeps only visible cells on the page unless it is told not to.
    cells = (
        state / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    )
    cells.parent.mkdir(parents=True)
    cells.write_text(json.dumps({"windowingMode": "none"}))
    own = {name: str(folder) for name, folder in folders.items()}
    return kernel_environment(state / "ipython") | own


def _wait_for(address, server, log, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


@contextmanager
def watched_page(chromium):
    """Open a page in a context of its own.

    Yields the page and a list that grows by every console error, every uncaught
    exception and every request that leaves this machine.
    """
    context = chromium.new_context(service_workers="block")
    page, problems = context.new_page(), []

    def on_request(request):
        if not is_local(request.url):
            problems.append(f"request to {request.url}")

    def on_console(message):
        if message.type == "error":
            problems.append(f"console error: {message.text}")

    context.on("request", on_request)
    page.on("websocket", on_request)
    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    yield page, problems
    context.close()


def is_local(address):
    parts = urlsplit(address)
    return parts.scheme in ("data", "blob", "file") or parts.hostname == "127.0.0.1"


OPEN = """async path => {
    window.only ??= await jupyterapp.serviceManager.kernels.startNew({name: 'python3'});
    const panel = await jupyterapp.commands.execute(
        'docmanager:open', {path, factory: 'Notebook', kernel: window.only.model});
    await Promise.all([panel.revealed, panel.sessionContext.ready]);
}"""
CLEAR = "() => jupyterapp.commands.execute('notebook:clear-all-cell-outputs')"
SHOWN = ".jp-NotebookPanel:not(.lm-mod-hidden)"
IDLE = """() => window.jupyterapp?.shell?.currentWidget?.sessionContext
    ?.session?.kernel?.status === 'idle'"""
RUN_ALL = """() => {
    window.ran = false;
    jupyterapp.commands.execute('notebook:run-all-cells')
        .then(() => { window.ran = true; });
}"""
MODEL = "() => jupyterapp.shell.currentWidget.content.model.toJSON().cells"
ACTIVE_CELL = "() => jupyterapp.shell.currentWidget.content.activeCellIndex"
COMMAND_MODE = "() => jupyterapp.commands.execute('notebook:enter-command-mode')"
IN_KERNEL = """code => jupyterapp.shell.currentWidget.sessionContext.session.kernel
    .requestExecute({code}).done.then(reply => reply.content.status)"""
SHUT_DOWN = "() => jupyterapp.shell.currentWidget.sessionContext.shutdown()"
WIDTHS = "images => images.map(i => Math.min(i.naturalWidth, i.clientWidth))"
SLIDE = """slider => {
    slider.value = slider.max;
    slider.dispatchEvent(new Event('input', {bubbles: true}));
}"""


def run_in_lab(page, address, name, timeout=300):
    """Open a notebook in JupyterLab and run all its cells.

    Returns:
        The cells of the notebook model, as nbformat has them.
    """
    page.goto(f"{address}/lab/tree/{name}?reset&token={TOKEN}")
    page.wait_for_function(IDLE, timeout=60_000)
    page.evaluate(RUN_ALL)
    page.wait_for_function("() => window.ran", timeout=timeout * 1000)
    page.wait_for_function(IDLE, timeout=60_000)
    return page.evaluate(MODEL)


def open_in_lab(page, name):
    """Open a notebook with what it stores in a page that shows Lab.

    All that a page opens get one kernel, so that none has to be started for each.

    Returns:
        The cells of the notebook model, as nbformat has them.
    """
    page.wait_for_function("() => window.jupyterapp?.shell", timeout=60_000)
    page.evaluate("() => jupyterapp.started")
    page.evaluate(OPEN, name)
    return page.evaluate(MODEL)


def cell_problems(cells):
    """List code cells without an execution count and outputs that are errors."""
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        if not cell["execution_count"]:
            yield f"cell {cell['id']!r} was not executed"
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"cell {cell['id']!r} raised {output['ename']}"


def picture_problems(page, expected=None, within="body"):
    """List pictures without a width, and films whose slider changes nothing.

    Args:
        page: the open page.
        expected: number of image/png outputs in the notebook model.
        within: selector of the part of the page that is looked at.
    """
    part = page.locator(within)
    page.wait_for_function("() => [...document.images].every(i => i.complete)")
    if expected is not None:
        widths = part.locator(".jp-RenderedImage img").evaluate_all(WIDTHS)
        if len(widths) != expected:
            yield f"{len(widths)} pictures on the page, {expected} in the model"
        yield from ("a picture has no width" for width in widths if width == 0)
    for film in part.locator(".animation").all():
        picture = film.locator("img")
        before = picture.get_attribute("src")
        film.locator("input[type=range]").evaluate(SLIDE)
        if picture.get_attribute("src") == before:
            yield "a film's slider does not change its picture"


def lab_problems(page, address, name):
    """Run a notebook in JupyterLab and list what is wrong with cells and pictures."""
    found = notebook_problems(page, run_in_lab(page, address, name))
    page.evaluate(SHUT_DOWN)
    return found


def notebook_problems(page, cells):
    """List what is wrong with the cells and pictures of a notebook that was run."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    kinds = [output.get("data", {}) for output in outputs]
    # A widget carries a picture for pages without a kernel, and Lab shows the widget.
    pictures = sum("image/png" in kind and WIDGET not in kind for kind in kinds)
    return [*cell_problems(cells), *picture_problems(page, pictures, SHOWN)]


def missing_chromium():
    """Say why there is no browser."""
    return f"no Chromium: none of {', '.join(NAMES)} in {os.environ.get('PATH')}"
