"""The straight line from image bytes to shards. Start at convert.py. Knows nothing of Ray."""
