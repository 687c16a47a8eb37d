"""Which rank a dataset reads as, where nobody says it; with real processes in
tests/integration/test_data_ranks.py."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.data.place import LAUNCHERS
from splatshard.schemas.errors import UsageError
from tests.splat_shards import keys_of

NAMES = ("RANK", "WORLD_SIZE", *LAUNCHERS, *LAUNCHERS.values())


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody started this process with others."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def say(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def place_of(dst: str, **options: int) -> tuple[int, int]:
    return SplatDataset(dst, batch_size=4, **options).place


def test_a_process_alone_reads_everything(dst: str) -> None:
    assert place_of(dst) == (0, 1)


def test_torchruns_environment_says_the_rank(dst: str, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, RANK="1", WORLD_SIZE="2")
    dataset = SplatDataset(dst, batch_size=4)
    assert (dataset.rank, dataset.world_size) == (1, 2)
    assert keys_of(dataset) == keys_of(SplatDataset(dst, batch_size=4, rank=1, world_size=2))


def test_what_is_given_counts(dst: str, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, RANK="1", WORLD_SIZE="2")
    assert place_of(dst, rank=0, world_size=1) == (0, 1)
    assert place_of(dst, rank=2, world_size=3) == (2, 3)
    assert place_of(dst, world_size=1) == (0, 1)
    assert place_of(dst, rank=1) == place_of(dst, world_size=2) == (1, 2)


@pytest.mark.parametrize(
    ("rank", "world_size", "shuffle", "warned"),
    [("1", "2", True, 1), ("0", "2", True, 0), ("1", "2", False, 0), ("2", "2", True, 0)],
    ids=["rank 1", "rank 0", "in order", "no rank"],
)
def test_a_further_rank_that_was_told_to_read_alone_says_so_once(
    dst: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rank: str,
    world_size: str,
    shuffle: bool,
    warned: int,
) -> None:
    """Several that do so train on the same samples; one that evaluates reads on rank 0, or in
    order."""
    say(monkeypatch, RANK=rank, WORLD_SIZE=world_size)
    dataset = SplatDataset(dst, batch_size=4, rank=0, world_size=1, shuffle=shuffle)
    for _ in range(2):
        list(dataset)
    assert len(caplog.messages) == warned
    assert all(
        "rank 0 of 1 was given, and this process is rank 1 of 2" in m for m in caplog.messages
    )


@pytest.mark.parametrize("options", [{"rank": 1}, {"world_size": 2}])
def test_half_of_a_place_is_refused(dst: str, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="rank 0 of 1: give both, or neither"):
        place_of(dst, **options)


def test_a_process_group_counts_more_than_the_environment(
    dst: str, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, RANK="1", WORLD_SIZE="2")
    assert place_of(dst) == (0, 1)


def test_the_place_is_asked_when_reading_begins(dst: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset may be made before the process group, and travel to another process."""
    dataset = SplatDataset(dst, batch_size=4)
    steps = len(dataset)
    sent = pickle.dumps(dataset)
    say(monkeypatch, RANK="1", WORLD_SIZE="2")
    half = keys_of(SplatDataset(dst, batch_size=4, rank=1, world_size=2))
    assert len(dataset) == steps // 2
    assert keys_of(dataset) == keys_of(pickle.loads(sent)) == half


def test_ranks_that_fill_no_step_are_refused_when_reading_begins(
    dst: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = SplatDataset(dst, batch_size=16)
    say(monkeypatch, RANK="1", WORLD_SIZE="9")
    with pytest.raises(UsageError, match="each of 9 ranks"):
        list(dataset)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 and WORLD_SIZE 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK 'one'"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE '-1'"),
    ],
)
def test_an_environment_without_sense_is_refused(
    dst: str, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], what: str
) -> None:
    say(monkeypatch, **values)
    with pytest.raises(UsageError, match=f"{what}.* rank and world_size"):
        SplatDataset(dst, batch_size=4)


def test_one_of_several_that_does_not_know_which_is_refused(
    dst: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only as reading begins: until then a process group may say it."""
    say(monkeypatch, WORLD_SIZE="2")
    dataset = SplatDataset(dst, batch_size=4)
    with pytest.raises(UsageError, match=r"WORLD_SIZE 2 and no RANK.*init_process_group"):
        next(iter(dataset))
    assert keys_of(SplatDataset(dst, batch_size=4, rank=0, world_size=1))


def test_a_rank_without_a_world_size_is_refused(dst: str, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, RANK="1")
    with pytest.raises(UsageError, match="RANK 1 and no WORLD_SIZE"):
        next(iter(SplatDataset(dst, batch_size=4)))
    say(monkeypatch, RANK="0")
    assert keys_of(SplatDataset(dst, batch_size=4))


@pytest.mark.parametrize(("several", "which"), LAUNCHERS.items())
def test_other_launchers_are_not_followed_but_said_once(
    dst: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    several: str,
    which: str,
) -> None:
    say(monkeypatch, **{several: "4", which: "3"})
    dataset = SplatDataset(dst, batch_size=4)
    with caplog.at_level(logging.WARNING):
        first, second = keys_of(dataset), keys_of(dataset)
        list(SplatDataset(dst, batch_size=4, rank=0, world_size=1))
    (said,) = caplog.messages
    assert f"{several} is 4, and this dataset is rank 0 of 1" in said
    assert f'rank=int(os.environ["{which}"])' in said
    monkeypatch.delenv(several)
    again = SplatDataset(dst, batch_size=4)
    assert (keys_of(again), keys_of(again)) == (first, second)


@pytest.mark.parametrize(
    "values",
    [
        {"SLURM_NTASKS": "4"},  # a shell of salloc
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun -n1
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "RANK": "1", "WORLD_SIZE": "4"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
    ids=lambda values: "-".join(values),
)
def test_one_alone_is_not_warned(
    dst: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    values: dict[str, str],
) -> None:
    say(monkeypatch, **values)
    with caplog.at_level(logging.WARNING):
        keys_of(SplatDataset(dst, batch_size=4, lanes=4))
    assert caplog.messages == []


class Wrapper(IterableDataset):
    """Somebody's own, around the dataset."""

    def __init__(self, dataset: SplatDataset) -> None:
        self.inner = dataset

    def __iter__(self) -> Iterator[object]:
        return iter(self.inner)


class Samples(Wrapper):
    """Which gives single samples."""

    def __iter__(self) -> Iterator[object]:
        for batch in self.inner:
            yield from batch.labels


def prepared(loader: DataLoader, world_size: int = 1, **options: Any) -> Any:
    """As rank 0 of so many has it from Accelerator.prepare."""
    from accelerate.data_loader import prepare_data_loader

    options |= {"num_processes": world_size, "process_index": 0, "device": torch.device("cpu")}
    return prepare_data_loader(loader, put_on_device=True, **options)


@pytest.mark.parametrize(
    ("name", "wrap", "batch_size"),
    [
        ("DataLoaderDispatcher", lambda dataset: dataset, None),
        ("DataLoaderDispatcher", Wrapper, None),
        ("IterableDatasetShard", Samples, 4),
    ],
)
def test_what_accelerate_divides_again_is_refused(
    dst: str, name: str, wrap: Callable[[SplatDataset], Any], batch_size: int | None
) -> None:
    """Of two ranks' samples half were never read."""

    def loader(world_size: int, context: str | None = None, **options: Any) -> Any:
        dataset = SplatDataset(dst, batch_size=4, rank=0, world_size=world_size, **options)
        workers = {"num_workers": int(context is not None), "multiprocessing_context": context}
        inner = DataLoader(wrap(dataset), batch_size=batch_size, **workers)
        return prepared(inner, world_size, dispatch_batches=name == "DataLoaderDispatcher")

    for context in (None, "fork", "spawn"):
        with pytest.raises(UsageError, match=rf"accelerate \({name}\) divides among the ranks"):
            list(loader(2, context))
    assert list(loader(1, as_dict=wrap is not Samples))
    alone = SplatDataset(dst, batch_size=4, rank=0, world_size=2)
    assert list(DataLoader(Wrapper(alone), batch_size=None))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # by torchdata 0.11
@pytest.mark.parametrize("name", ["DataLoaderDispatcher", "DataLoaderShard"])
@pytest.mark.parametrize("stateful", [False, True])
def test_a_state_is_refused_where_accelerate_reads_ahead(
    dst: str, name: str, stateful: bool
) -> None:
    """It has taken one batch more than it hands out, and that one was never read again."""
    options = {"dispatch_batches": name == "DataLoaderDispatcher"}
    options |= {"use_stateful_dataloader": stateful}

    def loader() -> tuple[SplatDataset, Any]:
        dataset = SplatDataset(dst, batch_size=4, rank=0, world_size=1, as_dict=True)
        inner = dataset if stateful else Wrapper(dataset)
        return dataset, prepared(DataLoader(inner, batch_size=None), **options)

    dataset, batches = loader()
    assert type(batches).__name__ == name
    batch = next(iter(batches))
    with pytest.raises(UsageError, match=rf"accelerate \({name}\) reads ahead"):
        dataset.state_dict()
    if stateful:  # such a loader asks for the state before it goes on
        _, again = loader()
        again.load_state_dict(batches.state_dict())
        assert next(iter(again))["position"][0, 1] == 8
    dataset.load_state_dict(dataset.state_after(batch))
    assert dataset.state_dict()["samples"] == 4
