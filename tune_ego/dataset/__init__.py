"""EGTEA Gaze+ on disk -> Parquet shards."""
