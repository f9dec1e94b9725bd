"""Draw the pictures of the README: `python -m moba_lab.picture`."""

from pathlib import Path

from moba_lab import viz
from moba_lab.example import running_example
from moba_lab.explorer import BlockExplorer
from moba_ref import partition, pool_keys, select_blocks

FOLDER = Path(__file__).resolve().parents[1] / "docs"


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


def explorer_picture():
    """Draw what the explorer of notebook 5 shows before somebody touches it.

    Returns:
        Figure.
    """
    e = running_example()
    sizes = {"block_size": e.block_size, "topk": e.topk}
    return BlockExplorer(e.q, e.k, e.v, **sizes, query=22).figure()


PICTURES = {
    FOLDER / "selection.png": selection_picture,
    FOLDER / "explorer.png": explorer_picture,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, draw in PICTURES.items():
        draw().savefig(path, metadata={"Software": None})
        print(f"wrote {path.name}")
