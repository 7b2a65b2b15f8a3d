"""Files of searches and runs on disk or an object store."""
