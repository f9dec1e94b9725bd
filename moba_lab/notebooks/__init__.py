"""Run, clean, check and publish the notebooks: ``python -m moba_lab.notebooks``."""
