"""Models as folders, such as Hugging Face's hub takes: written by `save_pretrained`, read by
`splatshard.encoder`, evaluation, and `init` of another run.

    FOLDER/model.safetensors     weights, fp32
    FOLDER/tokenizer.json, ...   of a CLIP with a text tower, as transformers writes them
    FOLDER/README.md             the model card (evaluation/model_card.py)
    FOLDER/config.json           comes last; schemas/saved.py

Nothing in them is executed, and none is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from splatshard.pipeline.models.build import build_model
from splatshard.pipeline.models.clip import load_tokenizer
from splatshard.pipeline.storage import atomic, fs
from splatshard.schemas.document import strict_json
from splatshard.schemas.errors import SourceError, UsageError
from splatshard.schemas.plain import from_dict, to_dict
from splatshard.schemas.saved import MODEL_TYPE, SAVED_VERSION, SavedConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"
STATE = "state.pt"
"""Is in a checkpoint, whose config.json is another."""
FETCHED = ("*.json", "*.txt", "*.model", "README.md", WEIGHTS)
"""Of a repository: configuration, tokenizer, card and weights."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""Its name on the hub."""


def place_of(path: str, revision: str | None = None) -> str:
    """The URL of what `path` names: a folder; or where there is none, the local copy of a
    repository of Hugging Face's hub, at its branch, tag or commit `revision`.

    Raises UsageError for a repository that cannot be had, or is of other models.
    """
    url = fs.absolute(path).rstrip("/")
    if not REPOSITORY.fullmatch(path) or fs.exists(url):
        if revision is not None:
            raise UsageError(
                f"revision={revision!r}: {path} is a folder, and only repositories of the Hugging "
                "Face hub have revisions: leave it out"
            )
        return url
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise UsageError(
            f"{path}: there is no such folder, and a repository of the Hugging Face hub needs "
            "huggingface_hub: install it, or splatshard with its extra `train`"
        ) from e
    try:
        read_config(snapshot_download(path, revision=revision, allow_patterns=[CONFIG]))
        return snapshot_download(path, revision=revision, allow_patterns=list(FETCHED))
    except UsageError:
        raise
    except Exception as e:  # huggingface_hub raises many kinds, also for a missing network
        why = str(e).strip().partition("\n")[0]
        raise UsageError(
            f"{path}: there is no such folder, and the Hugging Face hub does not give a repository "
            f"of this name ({type(e).__name__}: {why}): check the name; run hf auth login for a "
            "private one; without network give a folder"
        ) from e


def read_config(url: str) -> SavedConfig | None:
    """config.json of the model in the folder `url`; None where there is none, or a checkpoint's.
    Raises UsageError for one that is not understood, or of other libraries' models."""
    url = url.rstrip("/")
    path = f"{url}/{CONFIG}"
    if not fs.exists(path):
        return None
    try:
        values = strict_json(fs.read_bytes(path))
    except (ValueError, RecursionError) as e:
        if fs.exists(f"{url}/{STATE}"):
            return None
        raise UsageError(f"{path} is damaged ({e}): fetch or save it again") from e
    if not isinstance(values, dict) or "model_type" not in values:
        return None
    if values["model_type"] != MODEL_TYPE:
        raise UsageError(
            f"{path} is of a model of the type {values['model_type']!r}, which splatshard did not "
            "save: give one that it did, or a run; RGB CLIPs are read by evaluate --images"
        )
    version = values.get("version")
    if type(version) is not int or not 1 <= version <= SAVED_VERSION:
        raise UsageError(
            f"{path} has the version {version!r}, and this build reads 1 to {SAVED_VERSION}: "
            "update splatshard"
        )
    try:
        config = from_dict(SavedConfig, values)
    except UsageError as e:
        raise UsageError(
            f"{path}: {e}; it was changed, or saved by another version of splatshard: update that, "
            "or save the model again"
        ) from e
    if config.model.text is None:
        return config
    text = replace(config.model.text, tokenizer=url)
    return replace(config, model=replace(config.model, text=text))


def read_model(url: str, config: SavedConfig) -> tuple[nn.Module, str]:
    """The model in the folder `url`, and the SHA-256 of its weights' file. Raises UsageError for
    weights that are missing, damaged or another model's."""
    path, digest = f"{url.rstrip('/')}/{WEIGHTS}", hashlib.sha256()
    model = build_model(config.model)
    try:
        with fs.local_copy(path, digest) as copy:
            state = load_file(copy)
            check_weights(path, state, model.state_dict())
            if (kind := type(model).__name__) not in config.architectures:
                raise UsageError(
                    f"{path}: {CONFIG} says {', '.join(config.architectures)} and describes a "
                    f"{kind}: take both files as they were saved"
                )
            model.load_state_dict(state)
    except SourceError as e:
        raise UsageError(f"{path} is missing ({e}): fetch or save the model again") from e
    except SafetensorError as e:
        raise UsageError(f"{path} is damaged ({e}): fetch or save the model again") from e
    return model, digest.hexdigest()


def check_weights(path: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raises UsageError unless the tensors of `state`, which are in the file `path`, have the names
    and shapes of the model's `own`."""
    faults: list[str] = []
    for what, here, there in (("lacks", own, state), ("has besides", state, own)):
        if names := [name for name in here if name not in there]:
            faults.append(f"it {what} {len(names)} tensors, such as {names[0]}")
    for name in (name for name in own if name in state):
        found, wanted = list(state[name].shape), list(own[name].shape)
        if found != wanted:
            faults.append(f"{name} is {found} in it, and {wanted} by {CONFIG}")
    if faults:
        raise UsageError(
            f"{path} is not of the model that {CONFIG} describes: {'; '.join(faults[:4])}: take "
            "both files as they were saved"
        )


def refuse_other_folder(folder: str) -> None:
    """Raises UsageError where `folder` has a config.json that no `save_pretrained` wrote, or is on
    a store that is only read."""
    if not fs.is_local(folder) and not folder.startswith(("s3://", "s3a://")):
        raise UsageError(f"{folder}: a local folder or s3://bucket/... can be written; choose one")
    path = f"{folder}/{CONFIG}"
    if not fs.exists(path):
        return
    try:
        values = strict_json(fs.read_bytes(path))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        raise UsageError(
            f"{path} was not written by save_pretrained, and would be lost: choose another folder"
        )


def write_model(folder: str, model: nn.Module, config: SavedConfig) -> None:
    """Write tokenizer, weights and, last, config.json. Raises UsageError for a tokenizer that
    cannot be loaded, StorageError and UnavailableError."""
    files: dict[str, bytes] = {}
    if config.model.text is not None:
        with tempfile.TemporaryDirectory() as aside:
            load_tokenizer(config.model.text).save_pretrained(aside)
            files = {path.name: path.read_bytes() for path in sorted(Path(aside).iterdir())}
        text = replace(config.model.text, tokenizer=".")  # no place of this machine
        config = replace(config, model=replace(config.model, text=text))
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    files[WEIGHTS] = safetensors_bytes(state, {"format": "pt"})
    files[CONFIG] = (json.dumps(to_dict(config), indent=1) + "\n").encode()
    atomic.delete(f"{folder}/{CONFIG}")
    for name, data in files.items():
        fs.write_bytes(f"{folder}/{name}", data)
