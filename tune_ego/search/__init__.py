"""A hyper-parameter search on Ray Tune."""
