"""Where the class names and prompts of a dataset are: what `evaluate` and `explain` share."""

from __future__ import annotations

from splatshard.schemas.shard import ShardManifest


def lines_of(given: str, name: str, src: str) -> list[str]:
    """The lines of the file `given`, else of the one called `name` beside the data; none where
    there is none."""
    from splatshard.pipeline.evaluation.class_texts import find
    from splatshard.pipeline.evaluation.zeroshot import read_lines

    url = given or find(name, folders_of(src))
    return read_lines(url) if url else []


def folders_of(src: str) -> list[str]:
    """Where the texts of a dataset may be: with the shards, and with the images they are of."""
    from splatshard.pipeline.evaluation.class_texts import beside
    from splatshard.pipeline.shards.markers import read_markers

    markers = (m for m in read_markers(src).values() if isinstance(m, ShardManifest))
    source = next((marker.source_url for marker in markers), "")
    src = src.rpartition("/")[0] if src.endswith((".tar", ".parquet")) else src  # --images
    is_file = source.endswith((".tar", ".parquet"))
    folders = [src, source.rpartition("/")[0] if is_file else source]
    return [place for folder in folders for place in beside(folder)]
