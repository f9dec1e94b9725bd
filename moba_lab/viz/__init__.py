"""Picture MoBA: arrays or tensors in, a matplotlib Figure out, nothing computed.

Every function returns a Figure that carries its sentence, `fig.what_to_see`, and its
text for screen readers, `fig.alt`; `show(fig)` shows both. Queries run downwards and
blocks to the right; the colours of the four states are in `style.py`.
"""

from moba_lab.viz.blocks import block_ruler
from moba_lab.viz.conversion import conversion_curves
from moba_lab.viz.errors import error_map
from moba_lab.viz.evaluations import loss_curves, needle_scores
from moba_lab.viz.gaps import gap_histogram
from moba_lab.viz.gate import gate_map
from moba_lab.viz.granularity import granularity_curves
from moba_lab.viz.head_reads import head_reads
from moba_lab.viz.hybrid import hybrid_curves
from moba_lab.viz.layerwise import layerwise_losses
from moba_lab.viz.lines import line_heatmap
from moba_lab.viz.load import load, load_histogram
from moba_lab.viz.mask import token_mask
from moba_lab.viz.memory import memory_curves
from moba_lab.viz.merge import block_weights, merge_weights
from moba_lab.viz.movie import film, film_stills
from moba_lab.viz.needles import needle_heatmaps
from moba_lab.viz.page import text_html
from moba_lab.viz.parts import pipeline_parts
from moba_lab.viz.pipeline import pipeline_stills
from moba_lab.viz.pipeline_movie import pipeline_film
from moba_lab.viz.positions import position_losses
from moba_lab.viz.profile import reading_profile
from moba_lab.viz.programs import program_map
from moba_lab.viz.recall import recall_curves
from moba_lab.viz.roofline import roofline
from moba_lab.viz.route import route_picture
from moba_lab.viz.router import router_recall
from moba_lab.viz.scaling import scaling_curves
from moba_lab.viz.scaling_laws import scaling_laws
from moba_lab.viz.select import selection_heatmap
from moba_lab.viz.show import show
from moba_lab.viz.speedup import speedup_rows
from moba_lab.viz.stage_times import stage_times
from moba_lab.viz.states import states, token_states
from moba_lab.viz.stream import topk_stream
from moba_lab.viz.strip import query_strip
from moba_lab.viz.style import State
from moba_lab.viz.terminal import ascii
from moba_lab.viz.text import text_blocks
from moba_lab.viz.tile import tile_life
from moba_lab.viz.work import work_bars

__all__ = [
    "State",
    "ascii",
    "block_ruler",
    "block_weights",
    "conversion_curves",
    "error_map",
    "film",
    "film_stills",
    "gap_histogram",
    "gate_map",
    "granularity_curves",
    "head_reads",
    "hybrid_curves",
    "layerwise_losses",
    "line_heatmap",
    "load",
    "load_histogram",
    "loss_curves",
    "memory_curves",
    "merge_weights",
    "needle_heatmaps",
    "needle_scores",
    "pipeline_film",
    "pipeline_parts",
    "pipeline_stills",
    "position_losses",
    "program_map",
    "query_strip",
    "reading_profile",
    "recall_curves",
    "roofline",
    "route_picture",
    "router_recall",
    "scaling_curves",
    "scaling_laws",
    "selection_heatmap",
    "show",
    "speedup_rows",
    "stage_times",
    "states",
    "text_blocks",
    "text_html",
    "tile_life",
    "token_mask",
    "token_states",
    "topk_stream",
    "work_bars",
]
