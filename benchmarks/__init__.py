"""One script per concern, one table each; results as JSON with machine, versions and commit."""
