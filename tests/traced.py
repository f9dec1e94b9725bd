"""Watch which program of an interpreted kernel loads and stores which addresses."""

from collections import defaultdict
from contextlib import contextmanager

import numpy as np
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder


@contextmanager
def watched():
    """Note every access of the kernels that run in this block.

    Yields:
        {(kernel, "load" or "store"): {program: set of addresses}}, filled meanwhile.
    """
    seen = defaultdict(lambda: defaultdict(set))
    originals = {
        "load": interpreter_builder.create_masked_load,
        "store": interpreter_builder.create_masked_store,
    }
    run, running = InterpretedFunction.run, [None]

    def watch(kind):
        def access(pointers, *arguments):
            mask = arguments[0 if kind == "load" else 1]
            program = interpreter_builder.grid_idx[0]
            addresses, read = np.broadcast_arrays(pointers.data, mask.data)
            touched = addresses[read.astype(bool)].ravel().tolist()
            seen[running[0], kind][program].update(touched)
            return originals[kind](pointers, *arguments)

        return access

    def named(kernel, *arguments, **options):
        running[0] = kernel.__name__
        return run(kernel, *arguments, **options)

    interpreter_builder.create_masked_load = watch("load")
    interpreter_builder.create_masked_store = watch("store")
    InterpretedFunction.run = named
    try:
        yield seen
    finally:
        del interpreter_builder.create_masked_load
        del interpreter_builder.create_masked_store
        InterpretedFunction.run = run


def programs_of_rows(accesses, x):
    """Return, for every row of the last axis of a tensor, the programs that meet it.

    Args:
        accesses: {program: set of addresses}, from `watched`.
        x: tensor with adjacent columns.

    Returns:
        Array of sets, of the shape of x without its last axis.
    """
    found = np.empty(x.shape[:-1], dtype=object)
    for at in np.ndindex(found.shape):
        row = x[at]
        addresses = {row.data_ptr() + i * x.element_size() for i in range(len(row))}
        found[at] = {p for p, touched in accesses.items() if touched & addresses}
    return found
