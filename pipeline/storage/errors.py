"""What goes wrong at a store, as one of our errors: one line, the remedy in it, no secrets.

    a connection cut or refused, a time-out, 5xx, throttling   UnavailableError: worth another try
    anything else (absent, denied, clock, full)                SourceError when a source is read,
                                                               StorageError when it is DST

Drivers raise OSErrors (s3fs translates botocore's), but also exceptions of botocore, aiohttp,
urllib3 and Google's libraries that are none. They are looked up by name among the modules that are
loaded: an error of a module that was never imported cannot have been raised.

A refusal that a store sends for a HEAD has no body, so there only the status code is known.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from splatshard.pipeline.storage.options import redact
from splatshard.schemas.errors import SourceError, SplatshardError, StorageError, UnavailableError

DRIVER_ERRORS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "botocore.parsers": ("ResponseParserError",),
    "aiohttp": ("ClientError",),
    "urllib3.exceptions": ("HTTPError",),
    "http.client": ("HTTPException",),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
}
"""What drivers raise beside OSErrors."""

TRANSIENT_ERRORS = {
    "botocore.exceptions": ("ConnectionError", "HTTPClientError", "IncompleteReadError"),
    "botocore.parsers": ("ResponseParserError",),  # a page of some proxy
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "urllib3.exceptions": ("HTTPError",),
    "http.client": ("HTTPException",),
    "requests.exceptions": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
    "google.auth.exceptions": ("TransportError",),
    "s3fs.utils": ("FileExpired",),  # replaced while it was read: the next read sees the new one
    "socket": ("gaierror",),
}

TRANSIENT_CODES = frozenset(
    (
        *("InternalError", "InternalFailure", "ServiceUnavailable", "SlowDown", "BadGateway"),
        *("RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException"),
        *("RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequests", "OperationAborted"),
        *("IncompleteBody", "BadDigest", "ClientDisconnected", "ConditionalRequestConflict"),
    )
)
TRANSIENT_STATUS = frozenset((408, 429, 500, 502, 503, 504))

CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or --storage-options"
RENEW = "the credentials have expired: renew them"
REGION = "the bucket is in another region: set AWS_REGION"
DENIED = "check the credentials, what they may do there, and this machine's clock"

REMEDIES = {
    "NoSuchBucket": "there is no such bucket: create it or correct the name",
    "InvalidBucketName": "correct the bucket's name",
    "ParamValidationError": "correct the bucket's name",
    "AccessDenied": "check what the credentials may do in this bucket",
    "InvalidAccessKeyId": f"the access key is unknown: {CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key is wrong: {CREDENTIALS}",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it (NTP)",
    "RequestExpired": "this machine's clock is wrong: set it (NTP)",
    "AuthorizationHeaderMalformed": REGION,
    "IllegalLocationConstraintException": REGION,
    "PermanentRedirect": REGION,
    "301": REGION,
    "XAmzContentSHA256Mismatch": "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    **dict.fromkeys(("QuotaExceeded", "XMinioStorageFull", "507"), "no space left: free some"),
    "401": DENIED,
    "403": DENIED,
    "410": "it is no longer there: find another address",
    "TooManyRedirects": "the server redirects in a circle: open the address in a browser",
    "PermissionError": "check what this user may do there",
    "IsADirectoryError": "a folder is in the place of a file: move it away",
    "NotADirectoryError": "a file is in the place of a folder: move it away",
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"), RENEW),
    **dict.fromkeys(("InvalidToken", "TokenRetrievalError", "UnauthorizedSSOTokenError"), RENEW),
    **dict.fromkeys(
        (
            *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
            *("ProfileNotFound", "DefaultCredentialsError", "RefreshError"),
        ),
        f"{CREDENTIALS} ('{{\"anon\": true}}' for a public bucket)",
    ),
}
"""What to do, by a store's error code, HTTP status or the class of an exception."""


def driver_errors() -> tuple[type[BaseException], ...]:
    """OSError, and what the drivers loaded so far raise beside it; for `except`."""
    return (OSError, *_loaded(DRIVER_ERRORS))


def _loaded(names: Mapping[str, tuple[str, ...]]) -> Iterator[type[BaseException]]:
    for module, classes in names.items():
        if module in sys.modules:
            found = (getattr(sys.modules[module], name, None) for name in classes)
            yield from filter(None, found)


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help."""
    passing = (ConnectionError, TimeoutError, *_loaded(TRANSIENT_ERRORS))
    for e in _chain(error):
        if codes := _codes(e):
            return any(c in TRANSIENT_CODES or c in map(str, TRANSIENT_STATUS) for c in codes)
        if isinstance(e, passing) or getattr(e, "errno", None) in (
            errno.EHOSTUNREACH,
            errno.ESTALE,
        ):
            return True
    return False


def is_absent(error: BaseException) -> bool:
    """Whether there is nothing at the address; not so for a missing bucket.

    fsspec's HTTP driver calls whatever fails "not found", so the cause is looked at, too.
    """
    codes = codes_of(error)
    found_nothing = not codes or ("NoSuchBucket" not in codes and codes & {"404", "410"})
    return isinstance(error, FileNotFoundError) and bool(found_nothing) and not is_transient(error)


def is_refused_condition(error: BaseException) -> bool:
    """Whether a conditional write was refused. Some servers' refusals arrive as FileExistsError,
    others' as OSError."""
    refused = {"PreconditionFailed", "ConditionalRequestConflict", "412", "NoSuchKey"}
    return isinstance(error, FileExistsError) or bool(codes_of(error) & refused)


def codes_of(error: BaseException) -> set[str]:
    """A store's error code and HTTP status, as far as they are known."""
    return {code for e in _chain(error) for code in _codes(e)}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was made from."""
    cause: BaseException | None = error
    for _ in range(5):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__


def _codes(error: BaseException) -> list[str]:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = [response.get("Error", {}).get("Code")]
        found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    else:  # aiohttp's and Google's
        found = [getattr(error, "status" if hasattr(error, "status") else "code", None)]
    return [str(code) for code in found if isinstance(code, str | int) and code not in ("", 0)]


def as_error(error: BaseException, what: str, otherwise: type[SplatshardError]) -> SplatshardError:
    """UnavailableError or `otherwise`, with the message "{what}: {reason}; {remedy}"."""
    reason, remedy = _reason(error)
    if is_transient(error):
        return UnavailableError(redact(f"{what}: {reason}; the store does not answer as it should"))
    return otherwise(redact(f"{what}: {reason}" + (f"; {remedy}" if remedy else "")))


def _reason(error: BaseException) -> tuple[str, str]:
    """What happened, in the store's words, and the remedy, if there is one of REMEDIES."""
    responses = (getattr(e, "response", None) for e in _chain(error))
    if found := next((r.get("Error", {}) for r in responses if isinstance(r, dict)), None):
        text = f"{found.get('Code', '')} {found.get('Message', '')}"
    elif is_absent(error):
        text = getattr(error, "strerror", None) or "nothing is there"
    else:
        cause = list(_chain(error))[-1] if isinstance(error, FileNotFoundError) else error
        text = getattr(cause, "strerror", None) or _said(cause) or type(cause).__name__
    names = [*(code for e in _chain(error) for code in _codes(e))]
    names += [type(e).__name__ for e in _chain(error)]
    remedy = next((REMEDIES[name] for name in names if name in REMEDIES), "")
    return " ".join(str(text).split()), remedy


def _said(error: BaseException) -> str:
    """The message; of aiohttp's, which repeat the address, status and reason."""
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    return f"{status or ''} {message}".strip() if isinstance(status, int) else str(error)


@contextmanager
def storage_errors(path: Path | str, verb: str = "write") -> Iterator[None]:
    """Errors of the block as StorageError "cannot {verb} {path}", with the remedy, or as
    UnavailableError."""
    try:
        yield
    except driver_errors() as e:
        reason, remedy = _reason(e)
        file = getattr(e, "filename", None)  # of a folder that is listed, say
        path = file if isinstance(file, str) and file.startswith(f"{path}/") else path
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            reason, remedy = "no space left", "free some"
        elif not remedy:
            remedy = "check permissions and the " + ("address" if "://" in str(path) else "disk")
        if is_transient(e):
            raise as_error(e, f"cannot {verb} {path}", StorageError) from e
        raise StorageError(
            redact(
                f"cannot {verb} {path}: {reason}: {remedy}, then run the same command again "
                "(committed shards stay as they are)"
            )
        ) from e


@contextmanager
def source_errors(url: str, verb: str = "read") -> Iterator[None]:
    """Errors of the block as SourceError "cannot {verb} {url}" or UnavailableError.

    FileNotFoundError passes through when nothing is there.
    """
    try:
        yield
    except driver_errors() as e:
        if is_absent(e):
            raise
        raise as_error(e, f"cannot {verb} {url}", SourceError) from e
