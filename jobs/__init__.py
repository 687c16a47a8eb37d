"""Entry points: one `main` per job, each also `python -m jobs.NAME` for `ray job submit`."""
