"""Continue the training of a dense model of transformers with MoBA.

`python -m moba_lab.convert --help` says what it can do. A run is a row of stages, each
trained by the library's `Trainer` and saved whole; the same command again goes on where
it was stopped.
"""
