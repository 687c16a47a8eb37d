"""The evaluate job: a trained model on datasets; a JSON for each, and a summary of all.

    datasets -> what the model reads -> vectors -> figures -> {name}.json -> summary.json

DATA are destinations of convert or, for a model that was trained on images, what convert takes as
its source; or text files that list them:

    # dataset                    options of this one, if any
    imagenet=splats/imagenet     metric=mean_per_class_recall
    splats/flickr30k             task=retrieval
    cars=s3://b/cars/test        task=probe train=s3://b/cars/train

Tasks: zeroshot (labels, class names), retrieval (captions, one per line), probe (a linear probe on
the encoder's CLS token, trained on another destination), classify (of a trained classifier). Class
names and prompts are looked for beside the shards, one folder up, and likewise where convert read
the images: CLIP_benchmark has classnames.txt and zeroshot_classification_templates.txt there.

A result that is there already, of the same weights, shards and texts, is kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from splatshard.jobs.cli.command import EXIT_OK, parse, run
from splatshard.jobs.cli.options import (
    USUAL_ENVIRONMENT,
    Checkpoint,
    Debug,
    Device,
    Json,
    Number,
    StorageOptions,
    Switch,
    Weights,
    torch_device,
    use_storage_options,
)
from splatshard.jobs.cli.text import print_json, say
from splatshard.jobs.destination.class_texts import lines_of
from splatshard.jobs.destination.plan_file import read_file, write_text
from splatshard.pipeline.storage.fs import absolute
from splatshard.pipeline.storage.options import redact_src
from splatshard.schemas.document import document
from splatshard.schemas.errors import CorruptShardError, UsageError

if TYPE_CHECKING:
    from splatshard.pipeline.train.trained import Data, Trained

Result = dict[str, Any]
Task = Literal["auto", "zeroshot", "retrieval", "probe", "classify"]
TASKS = get_args(Task)

MAIN = {"zeroshot": "top1", "classify": "top1", "probe": "top1", "retrieval": "mean_recall1"}
"""The figure of each task that goes into the summary."""

SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Evaluate a trained model: zero-shot, retrieval, linear probe, classification.

    Writes {name}.json for each dataset, and summary.json. DATA may be a text file that lists
    datasets, a line each: [NAME=]DATA, then options such as task=probe train=FOLDER.
    """

    ckpt: Checkpoint
    data: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="[NAME=]DATA ...", help_behavior_hint="(at least one)"),
    ]
    """Folders that convert wrote to or, where the model reads images, images as for convert; or
    lists of such (.txt)."""
    task: Task = "auto"
    """auto: classify for a classifier; else zeroshot where there are class names, retrieval where
    there are none."""
    train: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Shards, or images, on which the linear probe is trained."""
    metric: str = ""
    """The figure that goes into the summary, such as top5; empty: the task's usual one."""
    classnames: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Names of the classes, a line each; empty: looked for beside the data."""
    templates: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Prompts, a line each, with {c} for the class; empty: looked for beside the data."""
    images: Switch = False
    """For a reference: CKPT is an RGB CLIP (folder or name), not a checkpoint of splatshard train;
    DATA are images as for convert."""
    num_gaussians: Number = None
    """Gaussians per sample; default: as in training."""
    weights: Weights = "auto"
    batch_size: int = 64
    """Samples that go through the model together."""
    device: Device = "auto"
    output: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Where results go; empty: evaluation/STEP beside the run's checkpoints."""
    reference: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """The output of another run, to which the summary compares."""
    storage_options: Annotated[StorageOptions, USUAL_ENVIRONMENT] = ""
    json: Annotated[
        Json, tyro.conf.arg(help="End standard output with the summary as one JSON line.")
    ] = False
    debug: Debug = False

    def __post_init__(self) -> None:
        if not self.data:
            raise UsageError("DATA is missing: give a folder that convert wrote to, or a list")
        for name in ("batch_size", "num_gaussians"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One line of the list."""

    name: str
    src: str
    task: str = "auto"
    train: str = ""
    metric: str = ""
    classnames: str = ""
    templates: str = ""


NAME = r"[\w.-]+(/[\w.-]+)*"
PER_DATASET = ("task", "train", "metric", "classnames", "templates")


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard evaluate argv`."""
    return run(lambda: evaluate(parse(EvaluateOptions, "evaluate", argv)))


def evaluate(options: EvaluateOptions) -> int:
    """The whole job; returns the exit code."""
    use_storage_options(options.storage_options)
    datasets = datasets_of(options)
    from splatshard.pipeline.evaluation.metrics import summary

    trained, open_data = opened(options)
    output = absolute(options.output).rstrip("/") if options.output else output_of(trained)
    reference = read_reference(options.reference) if options.reference else None
    found: dict[str, float] = {}
    for dataset in datasets:
        result = evaluated(dataset, trained, open_data, output)
        name, value = result["main"]["metric"], result["main"]["value"]
        found[dataset.name] = value
        said = f"{result['task']}, {result['samples']:,} samples{bounds(result, name)}"
        say(f"{dataset.name}: {name} {value:.4f} ({said})")
    total = summary(found, reference)
    write_text(output, SUMMARY, json.dumps(total, indent=1, sort_keys=True) + "\n")
    say(f"mean of {len(found)}: {total['mean']:.4f}")
    if reference is not None:
        say(
            f"to the reference, {len(total['ratios'])} datasets: ratio of means "
            f"{total['ratio_of_means']:.4f}, mean of ratios {total['mean_of_ratios']:.4f}"
        )
    say(f"results are in {output}")
    if options.json:
        print_json(total)
    return EXIT_OK


def bounds(result: Result, metric: str) -> str:
    """What chance gives, and the best of models, where that is known and less than all."""
    if "chance" not in result or metric not in result["chance"]:
        return ""
    best = result["ceiling"][metric]
    most = f", at most {best:.4f}, since captions repeat" if best < 1 else ""
    return f"; chance {result['chance'][metric]:.4f}{most}"


def opened(options: EvaluateOptions) -> tuple[Trained, Callable[[str], Data]]:
    """The model, and what opens data for it."""
    from splatshard.pipeline.train.trained import load_trained, open_data

    device = torch_device(options.device)
    if options.images:
        from splatshard.pipeline.evaluation.samples import load_rgb

        if not options.output:
            raise UsageError("--images: give --output, a folder for the results")
        trained = load_rgb(options.ckpt, device)
    else:
        trained = load_trained(absolute(options.ckpt), options.weights, device)
    trained = replace(trained, num_gaussians=options.num_gaussians or trained.num_gaussians)
    return trained, lambda src: open_data(trained, src, options.batch_size)


def output_of(trained: Trained) -> str:
    """`evaluation/{step}` beside the run's checkpoints: those are deleted in time."""
    run_dst, _, step = trained.url.rpartition("/checkpoints/")
    return f"{run_dst}/evaluation/{step}" if run_dst else f"{trained.url}-evaluation"


# What to evaluate


def datasets_of(options: EvaluateOptions) -> list[Dataset]:
    """All datasets named by `options`. Raises UsageError for a list that cannot be understood, or
    two of one name."""
    shared = {name: getattr(options, name) for name in PER_DATASET}
    found: list[Dataset] = []
    for entry in options.data:
        if entry.endswith(".txt"):
            found += listed(entry, shared)
        else:
            found.append(dataset_of([entry], shared, entry))
    names: dict[str, Dataset] = {}
    for dataset in found:
        if file_of(dataset.name) in names:
            other = names[file_of(dataset.name)]
            raise UsageError(
                f"{other.src} and {dataset.src} would both be called {dataset.name}: give each a "
                "name, as in NAME=DATA"
            )
        names[file_of(dataset.name)] = dataset
    return found


def listed(url: str, shared: dict[str, str]) -> Iterator[Dataset]:
    """The datasets of a list file."""
    from splatshard.pipeline.evaluation.class_texts import read_lines

    for number, line in enumerate(read_lines(url, numbered=False)):
        words = line.partition("#")[0].split()
        if words:
            yield dataset_of(words, shared, f"{url}, line {number + 1}")


def dataset_of(words: Sequence[str], shared: dict[str, str], where: str) -> Dataset:
    """`[NAME=]DATA option=value ...`."""
    name, _, src = words[0].partition("=")
    if not src or re.fullmatch(NAME, name) is None:
        name, src = "", words[0]
    values = dict(shared)
    for word in words[1:]:
        option, equals, value = word.partition("=")
        if option not in PER_DATASET or not equals:
            raise UsageError(f"{where}: {word!r} is no option; choose {', '.join(PER_DATASET)}")
        values[option] = value
    if values["task"] not in TASKS:
        raise UsageError(f"{where}: task={values['task']}: choose {', '.join(TASKS)}")
    src = absolute(src).rstrip("/")
    return Dataset(name=name or name_of(src), src=src, **values)


def name_of(src: str) -> str:
    """The folder's name; with its parent's where it is only that of a split."""
    place = src.partition("?")[0] if src.startswith("http") else src
    *_, parent, last = ["", *place.split("/")]
    return f"{parent}/{last}" if last in ("test", "val", "validation", "train") else last


def file_of(name: str) -> str:
    """The file with the results of the dataset `name`."""
    return f"{name.replace('/', '-')}.json"


def read_reference(folder: str) -> dict[str, float]:
    """The main figures in the summary of another run. Raises UsageError where there is none."""
    folder = absolute(folder).rstrip("/")
    try:
        values = document(read_file(folder, SUMMARY) or b"", SUMMARY, "")["datasets"]
        return {name: float(value) for name, value in values.items()}
    except (CorruptShardError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(
            f"--reference {folder}: no {SUMMARY} that can be understood is there: give the output "
            "folder of another splatshard evaluate"
        ) from e


# One dataset


def evaluated(
    dataset: Dataset, trained: Trained, open_data: Callable[[str], Data], output: str
) -> Result:
    """The result for one dataset: the one that is there already if nothing has changed, else
    computed and written. Raises UsageError for data that do not fit the model or the task."""
    from splatshard.pipeline.evaluation.class_texts import CLASSNAMES, TEMPLATES

    shards = open_data(dataset.src)
    train = None
    texts: dict[str, list[str]] = {}
    task = dataset.task
    if task in ("auto", "zeroshot") and trained.config.num_classes is None:
        names = lines_of(dataset.classnames, CLASSNAMES, dataset.src)
        texts = {"classnames": names, "templates": templates_of(dataset, TEMPLATES)}
        texts = texts if names else {}
    task = check_task(task, dataset, trained, bool(texts))
    if task == "probe":
        train = open_data(dataset.train)
    metric = dataset.metric or MAIN[task]
    inputs = {
        "weights": trained.weights,
        "shards": shards.content,
        "train": train.content if train else "",
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest() if texts else "",
        "num_gaussians": trained.num_gaussians,
        "device": trained.device.type,  # whose precision may be another
        "task": task,
    }
    before = read_result(output, dataset.name)
    if before.get("inputs") == inputs and metric in before.get("metrics", {}):
        result = before
    else:
        result = computed(task, trained, shards, train, texts) | {"inputs": inputs}
    if metric not in result["metrics"]:
        raise UsageError(
            f"{dataset.name}: {task} gives no {metric}: choose {', '.join(result['metrics'])}"
        )
    result |= {
        "dataset": dataset.name,
        "src": redact_src(dataset.src),
        "checkpoint": trained.url,
        "step": trained.step,
        "main": {"metric": metric, "value": result["metrics"][metric]},
    }
    write_text(output, file_of(dataset.name), json.dumps(result, indent=1, sort_keys=True) + "\n")
    return result


def read_result(output: str, name: str) -> Result:
    """What is there already; empty where that is nothing or damaged."""
    try:
        return document(read_file(output, file_of(name)) or b"{}", name, "")
    except CorruptShardError:
        return {}


def check_task(task: str, dataset: Dataset, trained: Trained, names: bool) -> str:
    """The task, chosen if it is auto. Raises UsageError for one that the model cannot do."""
    model = trained.config
    where = f"{dataset.name}: task {task}"
    if task == "auto":
        task = "classify" if model.num_classes else "zeroshot" if names else "retrieval"
        where = f"{dataset.name}: task {task} (chosen; --task names another)"
    if task == "classify" and model.num_classes is None:
        raise UsageError(f"{where}: the model is no classifier; choose zeroshot or probe")
    if task in ("zeroshot", "retrieval") and model.text is None:
        raise UsageError(f"{where}: the model has no text tower; choose probe, with --train")
    if task == "zeroshot" and not names:
        raise UsageError(
            f"{where}: there is no classnames.txt beside the shards or their images: give "
            "--classnames"
        )
    if task == "probe" and not dataset.train:
        raise UsageError(f"{where}: give --train, the shards that the probe is trained on")
    return task


def templates_of(dataset: Dataset, name: str) -> list[str]:
    """The prompts of a dataset."""
    from splatshard.pipeline.evaluation.zeroshot import DEFAULT_TEMPLATES, checked_templates

    found = lines_of(dataset.templates, name, dataset.src)
    return checked_templates(found, dataset.templates or name) or list(DEFAULT_TEMPLATES)


def computed(
    task: str,
    trained: Trained,
    shards: Data,
    train: Data | None,
    texts: dict[str, list[str]],
) -> Result:
    """The figures of one dataset."""
    from splatshard.pipeline.evaluation import tasks

    if task == "zeroshot":
        found = tasks.zeroshot(trained, shards, texts["classnames"], texts["templates"])
    elif task == "retrieval":
        found = tasks.retrieve(trained, shards)
    elif task == "classify":
        found = tasks.classify(trained, shards)
    else:
        assert train is not None, "a probe has training shards"
        found = tasks.probe(trained, train, shards)
    return {"task": task, **found}


if __name__ == "__main__":
    sys.exit(main())
