"""Go on where the system killed the process that measures, for want of memory.

Linux kills a process that takes more memory than there is, and no exception tells it.
So another process measures, and notes what it is about to do.
"""

import json
import os
import signal
import subprocess
import sys

from moba_lab.evaluate.options import MODULE, WORKER
from moba_lab.evaluate.statuses import FAILED, INTERRUPTED, OUT_OF_MEMORY

KILLED = "the process was killed, as Linux does when memory runs out"


def supervise(arguments, options):
    """Run a command in a process of its own, and again if that is killed at a point.

    Args:
        arguments: of the command line.
        options: `Options`, which they say.

    Returns:
        exit status.
    """
    options.pending.unlink(missing_ok=True)
    while True:
        own = WORKER, str(os.getpid())
        status = run([sys.executable, "-m", MODULE, *own, *arguments])
        if status != -signal.SIGKILL:
            return status if status >= 0 else INTERRUPTED
        if not options.pending.exists():
            print(f"error: {KILLED}, before anything was measured", file=sys.stderr)
            return FAILED
        record(options)


def run(command):
    """Run a command, pass signals on to it, and return its exit status."""
    # In a session of its own, so that Ctrl-C reaches it once, from here.
    process = subprocess.Popen(command, start_new_session=True)
    before = {
        number: signal.signal(number, lambda number, _: process.send_signal(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_alone(options):
    """Say whether the process that started this one, if any did, is gone."""
    return options.supervisor is not None and os.getppid() != options.supervisor


def note(options, row):
    """Note the row that a point gets if this process does not come to its end."""
    options.out.mkdir(parents=True, exist_ok=True)
    row = row | {"status": OUT_OF_MEMORY, "message": KILLED}
    options.pending.write_text(json.dumps(row), encoding="utf-8")


def record(options):
    """Keep the row that was noted."""
    # Imported late: this process is to stay small.
    from moba_lab.experiments import results

    row = json.loads(options.pending.read_text(encoding="utf-8"))
    print(f"{row['run']}: {row['message']}", file=sys.stderr)
    results.add(options.csv, [row])
    options.pending.unlink()
