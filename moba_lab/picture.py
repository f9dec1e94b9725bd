"""Draw the picture of the README: `python -m moba_lab.picture`."""

from pathlib import Path

from moba_lab import viz
from moba_lab.example import running_example
from moba_ref import partition, pool_keys, select_blocks

PATH = Path(__file__).resolve().parents[1] / "docs" / "selection.png"


def selection_picture():
    """Draw which blocks every query of the running example reads.

    Returns:
        Figure.
    """
    example = running_example()
    blocks = partition(example.cu_seqlens, example.block_size)
    k_mean = pool_keys(example.k, blocks)
    selected = select_blocks(example.q, k_mean, blocks, example.topk)
    return viz.selection_heatmap(selected, blocks)


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    selection_picture().savefig(PATH, metadata={"Software": None})
    print(f"wrote {PATH.name}")
