"""Training and hyper-parameter search of a gaze-supervised two-stream action recogniser on Ray."""

__version__ = "0.1.0"
