"""Find the experiments: every module here that defines `EXPERIMENT`."""

import pkgutil
from importlib import import_module

from moba_lab import experiments


def find():
    """Import the package's modules and return its experiments.

    Returns:
        dict from name to `Experiment`, in the order of the names.
    """
    found = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        if module.name != "__main__":
            loaded = import_module(f"{experiments.__name__}.{module.name}")
            experiment = getattr(loaded, "EXPERIMENT", None)
            if experiment:
                found[experiment.name] = experiment
    return dict(sorted(found.items()))


def choose(names):
    """Return the experiments of these names, in this order; "all" means all.

    Raises:
        ValueError: there is no such experiment.
    """
    known = find()
    if names == ["all"]:
        return list(known.values())
    for name in names:
        if name not in known:
            raise ValueError(
                f"expected an experiment of {', '.join(known)}, got {name!r}"
            )
    return [known[name] for name in names]
