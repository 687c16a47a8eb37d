"""Training on splat shards; start at loop.py."""
