"""How the users of each engine open a folder of shards, one function each.

docs/make_interop.py runs them:

    python readers.py READER FOLDER ... OUTPUT.json

A reader takes the folder and gives rows as dictionaries. It imports its engine itself, since each
runs in a Python of its own. OUTPUT.json is, for each folder, the rows, or the error in a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path
from typing import Any, ClassVar

Rows = list[dict[str, Any]]

# Parquet


def pyarrow(folder: str) -> Rows:
    import pyarrow.parquet as pq

    return pq.read_table(glob(f"{folder}/*.parquet")).to_pylist()


def pyarrow_checked(folder: str) -> Rows:
    import pyarrow.parquet as pq

    files = glob(f"{folder}/*.parquet")
    return pq.read_table(files, page_checksum_verification=True).to_pylist()


def duckdb(folder: str) -> Rows:
    import duckdb

    found = duckdb.sql(f"select * from '{folder}/*.parquet'")
    return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]


def polars(folder: str) -> Rows:
    import polars

    return polars.read_parquet(f"{folder}/*.parquet").to_dicts()


def datasets(folder: str) -> Rows:
    from datasets import load_dataset

    return list(load_dataset(folder, split="train"))


def pandas(folder: str) -> Rows:
    import pandas

    return pandas.read_parquet(glob(f"{folder}/*.parquet")).to_dict("records")


def pandas_arrow(folder: str) -> Rows:
    import pandas

    files = glob(f"{folder}/*.parquet")
    return pandas.read_parquet(files, dtype_backend="pyarrow").to_dict("records")


def daft(folder: str) -> Rows:
    import daft

    return daft.read_parquet(f"{folder}/*.parquet").to_pylist()


def datafusion(folder: str) -> Rows:
    from datafusion import SessionContext

    return SessionContext().read_parquet(folder).to_pylist()


def spark(folder: str) -> Rows:
    spark = spark_session()
    return [
        row.asDict(recursive=True) for row in spark.read.parquet(f"{folder}/*.parquet").collect()
    ]


def spark_checked(folder: str) -> Rows:
    spark = spark_session()
    spark._jsc.hadoopConfiguration().set("parquet.page.verify-checksum.enabled", "true")
    return [
        row.asDict(recursive=True) for row in spark.read.parquet(f"{folder}/*.parquet").collect()
    ]


def ray_parquet(folder: str) -> Rows:
    return ray_of_its_own().data.read_parquet(glob(f"{folder}/*.parquet")).take_all()


def litdata(folder: str) -> Rows:
    from litdata import StreamingDataset, index_parquet_dataset
    from litdata.streaming.item_loader import ParquetLoader

    index_parquet_dataset(folder)
    return list(StreamingDataset(folder, item_loader=ParquetLoader()))


def lance(folder: str) -> Rows:
    import lance
    import pyarrow.dataset

    shards = pyarrow.dataset.dataset(glob(f"{folder}/*.parquet"))
    return lance.write_dataset(shards, f"{folder}/shards.lance").to_table().to_pylist()


def vortex(folder: str) -> Rows:
    import pyarrow.parquet as pq
    import vortex

    table = pq.read_table(glob(f"{folder}/*.parquet"))
    vortex.io.write(vortex.array(table), f"{folder}/shards.vortex")
    return vortex.open(f"{folder}/shards.vortex").to_arrow().read_all().to_pylist()


def arro3(folder: str) -> Rows:
    import pyarrow
    from arro3.io import read_parquet

    tables = [pyarrow.table(read_parquet(file).read_all()) for file in glob(f"{folder}/*.parquet")]
    return pyarrow.concat_tables(tables).to_pylist()


def chdb(folder: str) -> Rows:
    import chdb

    query = f"select * from file('{folder}/*.parquet', Parquet)"
    return chdb.query(query, "DataFrame").to_dict("records")


def chdb_arrow(folder: str) -> Rows:
    import chdb

    query = f"select * from file('{folder}/*.parquet', Parquet)"
    bytes_as_bytes = "settings output_format_arrow_string_as_string = 0"
    return chdb.query(f"{query} {bytes_as_bytes}", "ArrowTable").to_pylist()


def fastparquet(folder: str) -> Rows:
    from fastparquet import ParquetFile

    return ParquetFile(glob(f"{folder}/*.parquet")).to_pandas().to_dict("records")


# WebDataset


def webdataset(folder: str) -> Rows:
    import webdataset

    tars = glob(f"{folder}/*.tar")
    return list(webdataset.WebDataset(tars, shardshuffle=False).decode())


def wids(folder: str) -> Rows:
    import wids

    shards = [{"url": tar, "nsamples": 6} for tar in glob(f"{folder}/*.tar")]
    return list(wids.ShardListDataset(shards))


def ray_tar(folder: str) -> Rows:
    return ray_of_its_own().data.read_webdataset(glob(f"{folder}/*.tar")).take_all()


def datasets_tar(folder: str) -> Rows:
    from datasets import load_dataset

    return list(load_dataset(folder, split="train"))


def energon(folder: str) -> Rows:
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        get_loader,
        get_val_dataset,
        stateless,
    )

    @stateless
    def raw(sample: dict[str, Any]) -> dict[str, Any]:
        return sample

    class Raw(DefaultTaskEncoder):
        cookers: ClassVar = [Cooker(raw)]

        @stateless
        def encode_sample(self, sample: Any) -> Any:
            return sample

        def batch(self, samples: Any) -> Any:
            return samples

        def encode_batch(self, batch: Any) -> Any:
            return batch

    command = Path(sys.executable).with_name("energon")
    options = ["--non-interactive", "--split-ratio", "0,1,0", "--sample-type", "CrudeWebdataset"]
    subprocess.run([command, "prepare", *options, folder], check=True, capture_output=True)
    here = WorkerConfig(rank=0, world_size=1, num_workers=0)
    loader = get_loader(
        get_val_dataset(folder, worker_config=here, batch_size=1, task_encoder=Raw())
    )
    return [sample for batch in loader for sample in batch]


# PLY


def plyfile(folder: str) -> Rows:
    from plyfile import PlyData

    vertices = PlyData.read(f"{folder}/sample.ply")["vertex"].data
    return [dict(zip(vertices.dtype.names, row, strict=True)) for row in vertices.tolist()]


def ray_of_its_own() -> Any:
    """Ray of its own, since ray.data joins whichever runs on the machine."""
    import ray

    os.environ.pop("RAY_ADDRESS", None)
    ray.init(address="local", num_cpus=1, include_dashboard=False, ignore_reinit_error=True)
    return ray


def spark_session() -> Any:
    from pyspark.sql import SparkSession

    return SparkSession.builder.master("local[1]").config("spark.ui.enabled", False).getOrCreate()


def plain(value: Any) -> Any:
    """As JSON holds it: bytes as {"bytes": hex}, what is neither as {"other": its type}."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "getvalue"):
        value = value.getvalue()
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": bytes(value).hex()}
    known = value is None or isinstance(value, bool | int | float | str)
    return value if known else {"other": type(value).__name__}


def read(reader: str, folder: str) -> Rows | str:
    try:
        return [plain(row) for row in globals()[reader](folder)]
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    reader, *folders, output = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"HF_HOME": scratch, "HF_HUB_OFFLINE": "1", "WIDS_CACHE": scratch}
        Path(output).write_text(json.dumps([read(reader, folder) for folder in folders]))
    sys.stdout.flush()
    os._exit(0)  # some engines crash while Python ends; what was read is written
