"""The Ray that a job runs on: the one this process is in, the one that RAY_ADDRESS names (as in
`ray job submit`), or one of its own.

Since 2.60 a Ray that is started in a process keeps a token in ~/.ray/auth_token, where every later
`ray start` finds it and wants it, too. So one of its own gets a token for its own life, in the
environment of its processes; and one that is joined is asked whether it wants a token, since
RAY_AUTH_MODE is often set on one side alone.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import ray
from ray import _raylet
from ray._private.node import Node
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from splatshard.jobs.cli.log import debugging
from splatshard.jobs.cli.text import say
from splatshard.jobs.driver.cluster import Workers, answers
from splatshard.jobs.driver.prometheus import advertised
from splatshard.schemas.errors import BackendError, UnavailableError, UsageError

MODE, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
LONGEST_TMPDIR = 33
"""Bytes: a socket's path has at most 107, of which Ray takes up to 74 below TMPDIR."""
SHORT = "/tmp"


@contextmanager
def ray_session(workers: Workers) -> Iterator[None]:
    """Ray, while the block runs. Raises UsageError, UnavailableError and BackendError where it
    cannot be joined or started."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if is_own():
        session = started(workers)
    elif ray.is_initialized():
        session = nullcontext()
    else:
        session = joined(os.environ["RAY_ADDRESS"])
    # standard output is where Ray's threads would print that a worker died
    with session, redirect_stdout(sys.stderr):
        yield


def is_own() -> bool:
    """Whether `ray_session` starts a Ray of its own, on this machine."""
    return not ray.is_initialized() and os.environ.get("RAY_ADDRESS", "") in ("", "local")


def submission_id() -> str:
    """Of the `ray job submit` that started this process; "" where none did."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return job.get("metadata", {}).get("job_submission_id", "")


def _logging() -> dict[str, Any]:
    debug = debugging()
    return {"log_to_driver": debug, "logging_level": "INFO" if debug else "ERROR"}


# A Ray of its own


@contextmanager
def started(workers: Workers) -> Iterator[None]:
    """A Ray on this machine, which ends with the block."""
    say("starting Ray ...")
    token = os.environ.get(TOKEN) or secrets.token_hex(32)
    with authentication({TOKEN: token}), short_folder() as folder:
        try:
            with only_what_converts():
                context: Any = ray.init(
                    address="local",
                    num_cpus=workers if isinstance(workers, int) else len(os.sched_getaffinity(0)),
                    include_dashboard=False,
                    object_store_memory=100 * 2**20,  # only small records pass through it
                    _temp_dir=folder,
                    **_logging(),
                )
        except Exception as e:  # Ray raises just that
            raise BackendError(f"Ray cannot start: {why(e)}") from e
        try:
            with advertised(context.address_info["session_dir"]):
                yield
        finally:
            ray.shutdown()


@contextmanager
def only_what_converts() -> Iterator[None]:
    """Ray starts neither an autoscaler nor, without --debug, a reader of logs, nor the dashboard's
    process, which `include_dashboard=False` only empties: they take a second to start and one to
    stop, and do nothing on one machine."""

    def start_no_dashboard(node: Any, **_: Any) -> None:
        node._webui_url = ""

    instead: dict[str, Any] = {
        "start_monitor": lambda _: None,
        "start_log_monitor": lambda _: None,
        "start_api_server": start_no_dashboard,
    }
    if debugging():
        del instead["start_log_monitor"]
    known = {name: own for name, own in instead.items() if hasattr(Node, name)}
    with patch.multiple(Node, **known):  # they are no public interface: another Ray starts it all
        yield


@contextmanager
def short_folder() -> Iterator[str | None]:
    """A folder for Ray in /tmp, of this user alone, where TMPDIR is too long for its sockets, not
    ASCII or cannot be written; None where it will do."""
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or SHORT
    short = len(os.fsencode(usual)) <= LONGEST_TMPDIR and usual.isascii()
    if short and os.access(usual, os.W_OK):
        yield None
        return
    try:
        folder = TemporaryDirectory(prefix="splatshard-ray-", dir=SHORT, ignore_cleanup_errors=True)
    except OSError as e:
        raise BackendError(
            f"Ray has no folder for its sockets: {usual} is too long, not ASCII or cannot be "
            f"written, and neither can {SHORT} ({e.strerror}): set RAY_TMPDIR to a folder that "
            f"can, of at most {LONGEST_TMPDIR} bytes"
        ) from None
    with folder as name:
        yield name


def why(error: Exception) -> str:
    """What Ray says, and what helps."""
    if "timed out during startup" in str(error):
        return (
            "its processes were not up within 30 s; is the machine very busy, or its disk slow? "
            "Run the same command again, or start a Ray that stays (ray start --head) and set "
            "RAY_ADDRESS=auto"
        )
    said = str(error).strip().partition("\n")[0]
    return (
        f"{type(error).__name__}: {said} (RAY_TMPDIR, else TMPDIR, is where it writes; --debug "
        "shows more)"
    )


# One that runs already


@contextmanager
def joined(address: str) -> Iterator[None]:
    """The Ray at `address`, until the block ends."""
    gcs = gcs_address(address)
    if not answers(gcs):
        raise UnavailableError(
            f"no Ray answers at RAY_ADDRESS={gcs}: is its head running, and does a firewall let "
            "this machine through?"
        )
    with authentication({MODE: mode_of(gcs)}):
        try:
            ray.init(address=gcs, **_logging())
        except (ConnectionError, RuntimeError) as e:
            raise UnavailableError(
                f"the Ray at RAY_ADDRESS={address} cannot be joined: {e} (--debug shows more)"
            ) from e
        try:
            yield
        finally:
            ray.shutdown()


def gcs_address(address: str) -> str:
    """`host:port` of RAY_ADDRESS. Raises UsageError for what is none."""
    try:
        found = None if "://" in address else canonicalize_bootstrap_address(address)
    except (ValueError, OSError):
        found = None
    if found:
        return found
    if address == "auto":
        raise UsageError(
            "RAY_ADDRESS=auto: no Ray runs on this machine: ray start --head starts one; unset it "
            "to convert without"
        )
    raise UsageError(
        f"RAY_ADDRESS={address}: give auto or host:port of the head, such as 10.0.0.5:6379; an "
        "address of jobs (http://...) is for ray job submit --address http://... --working-dir . "
        "-- python -m splatshard.jobs.convert ..."
    )


def mode_of(gcs: str) -> str:
    """The RAY_AUTH_MODE of the Ray at `gcs`. Raises UsageError where it lets us in with none."""
    for mode in ("disabled", "token"):
        if lets_in(gcs, mode):
            return mode
    raise UsageError(
        f"the Ray at {gcs} wants a token, and not the one here, if there is one: copy the head's "
        "~/.ray/auth_token here, or set RAY_AUTH_TOKEN to what `ray get-auth-token` prints there"
    )


def lets_in(gcs: str, mode: str) -> bool:
    """Whether the Ray at `gcs` takes a caller in this RAY_AUTH_MODE."""
    if mode == "token" and not _token_loader().has_token(ignore_auth_mode=True):
        return False  # trying it would abort this process
    with authentication({MODE: mode}), silent():
        try:
            _raylet.GcsClient(address=gcs)  # pyright: ignore[reportAttributeAccessIssue]
        except RayError as e:
            if type(e).__name__ == "AuthenticationError":
                return False
            raise UnavailableError(f"the Ray at RAY_ADDRESS={gcs} does not answer: {e}") from e
    return True


@contextmanager
def authentication(variables: Mapping[str, str]) -> Iterator[None]:
    """RAY_AUTH_MODE and RAY_AUTH_TOKEN while the block runs, for Ray's C++ as well; then as they
    were."""
    before = {name: os.environ.get(name) for name in (MODE, TOKEN)}
    os.environ.update(variables)
    _reread()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _reread()


def _reread() -> None:
    _raylet.Config.initialize("")  # pyright: ignore[reportAttributeAccessIssue]
    if loader := _token_loader():
        loader.reset_cache()


def _token_loader() -> Any:
    """None before Ray 2.52, which knows no tokens."""
    loader = getattr(_raylet, "AuthenticationTokenLoader", None)
    return loader and loader.instance()


@contextmanager
def silent() -> Iterator[None]:
    """What C++ writes to standard error is lost while the block runs."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
