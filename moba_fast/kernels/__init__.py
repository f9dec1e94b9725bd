"""Triton kernels, one file per step of the algorithm.

Nothing outside this package imports it before a GPU is to be used, so that `moba_fast`
needs no triton.

| file | step | reads | writes |
|---|---|---|---|
| `pool.py` | average the keys of every block | k | k_mean |
| `gate.py` | choose the best past blocks of every query | q, k_mean | selected |
| `route.py` | list the queries of every block | selected | lists |
| `attend.py` | attend from a list to its block | q, k, v, lists | parts |
| `combine.py` | attend to the own block, merge the parts | q, k, v, parts | out, lse |
| `backward*.py` | the gradients | all of it, dout | dq, dk, dv |
"""
