"""The `report` command: an experiment as one HTML page, and its numbers as JSON."""
