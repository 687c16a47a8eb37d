"""The job over a Ray cluster."""
