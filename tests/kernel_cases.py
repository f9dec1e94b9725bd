"""Cases that the kernels of both directions go through."""

from impls import make_case

CASES = {
    "one sequence": make_case([70], block_size=16, topk=3, D=16),
    "a pack": make_case([27, 0, 3, 21, 0], block_size=10, topk=3, H=4, HK=2, D=20),
    "three heads in a group": make_case([40], block_size=8, topk=3, H=6, HK=2),
    "last queries of longer keys": make_case(
        [90, 20, 9, 16], queries=[13, 20, 0, 1], block_size=16, topk=4, H=4, HK=2, D=8
    ),
    "blocks of 100": make_case([230], queries=[80], block_size=100, topk=3, D=40),
    "heads of 256": make_case([100], block_size=40, topk=2, H=1, D=256),
    "only the current block": make_case([70, 4], block_size=16, topk=1),
    "more slots than blocks": make_case([40, 9], block_size=8, topk=9),
    "one block, not complete": make_case([9], block_size=10**10, topk=3),
}
