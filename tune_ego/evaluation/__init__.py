"""Testing a model: accuracies, agreement of attention with gaze, pictures."""
