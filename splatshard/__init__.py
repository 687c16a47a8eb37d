"""Image datasets to shards of 2D Gaussians, and vision models trained directly on them."""
