"""What notebooks and experiments need around the two packages.

``example`` is the running example, ``viz`` the pictures, ``agree`` the one policy of
what agreement means. ``data``, ``model``, ``train``, ``card`` and ``probe`` are the
small language model; ``notebooks`` runs and checks the notebooks; ``picture`` and
``readme`` make what the README shows.
"""
