"""Shards -> batches on the device."""
