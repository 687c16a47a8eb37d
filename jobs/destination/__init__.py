"""What stands in DST beside the shards."""
