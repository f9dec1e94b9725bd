"""Statuses of a row, and of the command when it ends."""

# Of a row; any other one says that it failed.
OK, OUT_OF_MEMORY = "ok", "out of memory"
# Of the command; 0 says that all was measured.
FAILED, WRONG, INTERRUPTED = 1, 2, 3
