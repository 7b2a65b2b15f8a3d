"""Use of a trained model on videos of any length: windows, scores, segments, and what is written about them."""
