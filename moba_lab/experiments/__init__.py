"""The paper's training experiments, in a small and in a full size.

`python -m moba_lab.experiments --list` names them; `contract.py` says what one is made
of, and every other module here that defines `EXPERIMENT` is one.
"""
