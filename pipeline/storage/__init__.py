"""All access to files: local, S3 and whatever fsspec has."""
