"""Models on splats; start at encoder.py. build.py makes the one that a configuration describes."""
