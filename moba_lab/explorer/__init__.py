"""Look at one attention call, query by query: `BlockExplorer`."""

from moba_lab.explorer.shares import block_shares
from moba_lab.explorer.widget import BlockExplorer

__all__ = ["BlockExplorer", "block_shares"]
