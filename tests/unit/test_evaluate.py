"""The evaluation job on toy models and real shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from splatshard.jobs.destination.class_texts import lines_of
from splatshard.jobs.destination.sources import remember
from splatshard.jobs.evaluate import EvaluateOptions, datasets_of
from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.evaluation.class_texts import CLASSNAMES
from splatshard.pipeline.evaluation.metrics import classification, retrieval
from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.models.classifier import SplatClassifier
from splatshard.pipeline.models.clip import SplatCLIP, load_tokenizer, tokenize
from splatshard.pipeline.train import checkpoint
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import (
    EncoderConfig,
    ModelConfig,
    ResamplerConfig,
    StemConfig,
    TextConfig,
)
from splatshard.schemas.train import DataConfig, OptimConfig, TrainConfig
from tests.clips import save_tokenizer, vocabulary_of
from tests.splat_shards import N, commit, rows_of, splat_config
from tests.unit.evaluating import Capsys, run_job

# The list of datasets


def options(*data: str, **values: Any) -> EvaluateOptions:
    return EvaluateOptions(ckpt="x", data=data, **values)


def test_a_list_of_datasets(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(
        "# comment\n\nwds/cars=/d/cars/test metric=top5 # why\n/d/pets/test task=probe train=/t\n"
    )
    cars, pets, direct = datasets_of(options(str(path), "s3://b/eurosat", metric="top1"))
    assert (cars.name, cars.src, cars.metric, cars.task) == (
        "wds/cars",
        "/d/cars/test",
        "top5",
        "auto",
    )
    assert (pets.name, pets.metric, pets.task, pets.train) == ("pets/test", "top1", "probe", "/t")
    assert (direct.name, direct.src) == ("eurosat", "s3://b/eurosat")
    for line, problem in (("a b", "'b' is no option"), ("a task=b", "task=b"), ("a bad=1", "bad")):
        path.write_text(line)
        with pytest.raises(UsageError, match=problem):
            datasets_of(options(str(path)))
    with pytest.raises(UsageError, match="would both be called"):
        datasets_of(options("/a/x", "/b/x"))
    with pytest.raises(UsageError, match="DATA is missing"):
        options()


# The job

CLASSES = 5
NAMES = ["red", "green", "a", "b", "photograph"]
TEMPLATES = ["a photo of {c}", "{} number"]


def model_config(folder: Path, kind: str) -> ModelConfig:
    encoder = EncoderConfig(
        width=16,
        layers=1,
        heads=2,
        tokens=4,
        stem=StemConfig(bands=2, hidden=16),
        resampler=ResamplerConfig(heads=2),
    )
    if kind == "classifier":
        return ModelConfig(encoder=encoder, num_classes=CLASSES)
    text = TextConfig(
        width=16,
        layers=1,
        heads=2,
        vocab_size=len(vocabulary_of()),
        context_length=12,
        tokenizer=str(folder),
    )
    return ModelConfig(encoder=encoder, text=text if kind == "clip" else None, embed_dim=8)


Run = tuple[str, SplatCLIP | SplatClassifier]


def make_run(folder: Path, kind: str, cutoff: float = 3.0, average: bool = False) -> Run:
    """A checkpoint of a random model, and the model."""
    torch.manual_seed(3)
    save_tokenizer(folder)
    config = TrainConfig(
        stage="classify" if kind == "classifier" else "distill",
        dst=str(folder / "run"),
        model=model_config(folder, kind),
        data=DataConfig(src="elsewhere"),
        optim=OptimConfig(steps=1, ema=0.9 if average else None),
    )
    model = build_model(config.model).eval()
    if isinstance(model, SplatClassifier):
        torch.nn.init.normal_(model.head.weight)
    weights = model.state_dict()
    other = {name: value * 0.5 for name, value in weights.items()}
    checkpoint.save(
        config.dst,
        7,
        other if average else weights,
        weights if average else None,
        {},
        config,
        {"data": "x", "cutoff": cutoff},
        keep=1,
    )
    return config.dst, model


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    made: dict[Any, Run] = {}

    def get(kind: str, **values: Any) -> Run:
        key = (kind, *values.items())
        if key not in made:
            made[key] = make_run(tmp_path_factory.mktemp("run"), kind, **values)
        return made[key]

    return get


def make_data(dst: Path) -> str:
    """Shards of random splats with labels below CLASSES; captions of one to three lines, no two
    alike."""
    for shard, count in enumerate((9, 5)):
        rows = rows_of(shard, count)
        for i, row in enumerate(rows):
            lines = [f"{'abcdefghi'[i]} {'pqr'[k]} {'xy'[shard]}" for k in range(3)]
            row |= {"label": (i * 3 + shard) % CLASSES, "caption": "\n".join(lines[: i % 3 + 1])}
        commit(str(dst), f"{shard:05d}", rows)
    return str(dst)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("eurosat"))


def write_texts(folder: Path) -> list[str]:
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "prompts.txt").write_text("\n".join(TEMPLATES) + "\n")
    return ["--classnames", str(folder / "names.txt"), "--templates", str(folder / "prompts.txt")]


def whole(data: str) -> Any:
    """All samples as one batch, of the exact size."""
    count = len(list(SplatDataset(data, batch_size=1, shuffle=False)))
    (batch,) = SplatDataset(data, batch_size=count, shuffle=False)
    return batch


def expected_zeroshot(model: SplatCLIP, data: str) -> float:
    """Sample by sample and class by class."""
    batch = whole(data)
    tokenizer = load_tokenizer(model.config.text)
    with torch.no_grad():
        images = F.normalize(model.encode_image(batch), dim=1)
        classes = []
        for name in NAMES:
            vectors = []
            for prompt in (f"a photo of {name}", f"{name} number"):
                ids, mask = tokenize(tokenizer, [prompt], 12)
                vectors.append(F.normalize(model.encode_text(ids, mask), dim=1)[0])
            classes.append(F.normalize(sum(vectors) / 2, dim=0))
    hits = sum(
        max(range(CLASSES), key=lambda c, v=v: float(v @ classes[c])) == int(label)
        for v, label in zip(images, batch.labels, strict=True)
    )
    return hits / len(batch)


def test_zeroshot(make: Callable[..., Run], data: str, tmp_path: Path, capsys: Capsys) -> None:
    """The last batch is padded; the results are kept and compared, and computed again only when
    something has changed."""
    ckpt, model = make("clip")
    texts = write_texts(tmp_path)
    arguments = (ckpt, data, *texts, "--batch-size", 4, "--output", tmp_path / "out")
    code, total, err = run_job(capsys, *arguments)
    assert code == 0, err
    (name,) = total["datasets"]
    result = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert (result["task"], result["samples"], result["step"]) == ("zeroshot", 11, 7)
    assert result["metrics"]["top1"] == pytest.approx(expected_zeroshot(model, data))
    assert result["main"] == {"metric": "top1", "value": result["metrics"]["top1"]}
    assert total["mean"] == result["metrics"]["top1"]

    path = tmp_path / "out" / f"{name}.json"
    path.write_text(json.dumps(result | {"metrics": {"top1": 0.5, "top5": 0.25}}))
    code, total, err = run_job(capsys, *arguments, "--metric", "top5")
    assert total["datasets"] == {name: 0.25}  # kept
    (tmp_path / "prompts.txt").write_text("{c}\n")
    path.write_text(json.dumps(result | {"metrics": {"top1": 7.0}}))
    assert run_job(capsys, *arguments)[1]["mean"] <= 1  # other prompts: computed again

    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "summary.json").write_text(json.dumps({"datasets": {name: 0.5}}))
    code, total, err = run_job(capsys, *arguments, "--reference", reference)
    assert total["ratio_of_means"] == pytest.approx(total["mean"] / 0.5)
    assert "mean of ratios" in err
    code, _, err = run_job(capsys, *arguments, "--reference", tmp_path)
    assert (code, "no summary.json" in err) == (1, True)


def test_texts_beside_the_images(
    make: Callable[..., Run], tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CLIP_benchmark lays them out: over the folder of the tars."""
    ckpt, model = make("clip")
    data = make_data(tmp_path / "out" / "test")
    (tmp_path / "in").mkdir()
    for name, lines in (("classnames", NAMES), ("zeroshot_classification_templates", TEMPLATES)):
        (tmp_path / "in" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    for marker in Path(data).glob("0*.json"):
        values = json.loads(marker.read_text()) | {"source_url": f"{tmp_path}/in/test/0.tar"}
        marker.write_text(json.dumps(values))
    assert lines_of("", CLASSNAMES, data) == []  # a marker may name any place
    remember(data, f"{tmp_path}/in/test")
    code, total, err = run_job(capsys, ckpt, data, "--output", tmp_path / "results")
    assert code == 0, err
    assert total["datasets"] == {"out/test": pytest.approx(expected_zeroshot(model, data))}
    assert (tmp_path / "results" / "out-test.json").exists()


def test_retrieval_of_captions(
    make: Callable[..., Run], data: str, tmp_path: Path, capsys: Capsys
) -> None:
    ckpt, model = make("clip")
    code, _, err = run_job(capsys, ckpt, f"flickr={data}", "--output", tmp_path)
    assert code == 0, err
    result = json.loads((tmp_path / "flickr.json").read_text())
    batch = whole(data)
    texts = [(i, line) for i, c in enumerate(batch.captions) for line in c.split("\n")]
    tokenizer = load_tokenizer(model.config.text)
    ids, _ = tokenize(tokenizer, [line for _, line in texts], 12)
    with torch.no_grad():
        x = F.normalize(model.encode_image(batch), dim=1)
        y = F.normalize(model.encode_text(ids), dim=1)
    wanted = retrieval(x, y, torch.tensor([i for i, _ in texts]))
    assert (result["task"], result["texts"]) == ("retrieval", len(texts))
    assert f"chance {result['chance']['mean_recall1']:.4f}" in err
    assert ("since captions repeat" in err) == (result["ceiling"]["mean_recall1"] < 1)
    for name, value in wanted.items():
        assert result["metrics"][name] == pytest.approx(value), name


def test_classifier_and_its_average(
    make: Callable[..., Run], data: str, tmp_path: Path, capsys: Capsys
) -> None:
    ckpt, model = make("classifier", average=True)
    batch = whole(data)
    with torch.no_grad():
        wanted = classification(model(batch), batch.labels)
    code, total, err = run_job(capsys, ckpt, f"x={data}", "--output", tmp_path)
    assert code == 0, err
    assert total["mean"] == pytest.approx(wanted["top1"])
    assert json.loads((tmp_path / "x.json").read_text())["metrics"] == pytest.approx(wanted)
    kept = json.loads((tmp_path / "x.json").read_text())["inputs"]["weights"]
    run_job(capsys, ckpt, f"x={data}", "--output", tmp_path, "--weights", "model")
    assert json.loads((tmp_path / "x.json").read_text())["inputs"]["weights"] != kept
    code, _, err = run_job(capsys, make("classifier")[0], f"x={data}", "--weights", "ema")
    assert (code, "no average of the weights" in err) == (1, True)


def test_probe(make: Callable[..., Run], data: str, tmp_path: Path, capsys: Capsys) -> None:
    """On what it was trained on, a probe knows better than chance; no text tower is needed."""
    ckpt, _ = make("vision")
    code, _, err = run_job(capsys, ckpt, f"x={data}", "--task", "probe", "--train", data)
    assert code == 0, err
    result = json.loads(Path(ckpt, "evaluation", "00000007", "x.json").read_text())
    assert (result["samples"], result["training_samples"], result["task"]) == (11, 11, "probe")
    assert result["metrics"]["top1"] >= 3 / 11


@pytest.mark.parametrize(
    ("kind", "arguments", "problem"),
    [
        ("vision", (), "no text tower"),
        ("vision", ("--task", "probe"), "give --train"),
        ("clip", ("--task", "classify"), "no classifier"),
        ("classifier", ("--task", "zeroshot"), "no text tower"),
        ("clip", ("--task", "zeroshot"), "no classnames.txt"),
        ("clip", ("--metric", "top9"), "retrieval gives no top9"),
        ("clip", ("--num-gaussians", str(N + 1)), f"num_gaussians is {N + 1}"),
        ("clip", ("--batch-size", "0"), "--batch-size 0"),
        ("clip", ("--classnames", "nowhere.txt"), "nowhere.txt cannot be read"),
    ],
)
def test_what_does_not_go_together(
    kind: str,
    arguments: tuple[str, ...],
    problem: str,
    make: Callable[..., Run],
    data: str,
    tmp_path: Path,
    capsys: Capsys,
) -> None:
    code, _, err = run_job(capsys, make(kind)[0], data, *arguments, "--output", tmp_path)
    assert (code, problem in err) == (1, True), err


def test_shards_of_another_cutoff_are_refused(
    make: Callable[..., Run], data: str, tmp_path: Path, capsys: Capsys
) -> None:
    """The same numbers would be another picture than in training."""
    ckpt, _ = make("classifier", cutoff=4.0)
    code, _, err = run_job(capsys, ckpt, data, "--output", tmp_path)
    assert code == 1
    assert "was fitted with a cutoff of 3.0" in err
    assert "convert it with --cutoff 4.0" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"label": None}, "have no label"),
        ({"label": CLASSES}, "beyond the model's 5 classes, the first of them 000000000 (5)"),
    ],
)
def test_bad_labels(
    changes: dict[str, Any], problem: str, make: Callable[..., Run], tmp_path: Path, capsys: Capsys
) -> None:
    rows = rows_of(0, 3)
    for row in rows:
        row |= {"label": 0}
    rows[0] |= changes
    commit(str(tmp_path / "in"), "a", rows, splat_config())
    code, _, err = run_job(capsys, make("classifier")[0], tmp_path / "in")
    assert (code, problem in err) == (1, True), err


def test_no_captions(make: Callable[..., Run], tmp_path: Path, capsys: Capsys) -> None:
    rows = rows_of(0, 3)
    for row in rows:
        row |= {"caption": None}
    commit(str(tmp_path / "in"), "a", rows)
    code, _, err = run_job(capsys, make("clip")[0], tmp_path / "in")
    assert (code, "/in: 3 of 3 samples have no caption" in err) == (1, True), err


def test_no_checkpoint(data: str, tmp_path: Path, capsys: Capsys) -> None:
    code, _, err = run_job(capsys, tmp_path, data)
    assert (code, "has no checkpoint" in err) == (1, True)
