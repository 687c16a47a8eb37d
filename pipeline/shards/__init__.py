"""Splat shards: rows, files, markers, commits."""
