"""Backbone + STAM, one stream and two."""

from tune_ego.model.two_stream import Stream, StreamOutput, TwoStream, build_stream
from tune_ego.model.weights import LoadedWeights, load_weights

__all__ = ["LoadedWeights", "Stream", "StreamOutput", "TwoStream", "build_stream", "load_weights"]
