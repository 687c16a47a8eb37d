"""What every command's `main` shares: flags from a dataclass, one-line errors, exit codes.

    0 all done    1 usage, configuration or storage
    3 finished with failed shards, or without an ok sample
    130 interrupted (Ctrl-C)    143 terminated

Commands import `pipeline.shards.commit` and what else brings torch inside functions, so that
`--help` and usage errors take a tenth of a second instead of three.

tyro derives the flags; its framed multi-line errors are folded into one line, since logs are read
line by line, and its exit code 2 becomes 1.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import tyro

from splatshard.jobs.cli.log import debugging, log, log_to_stderr
from splatshard.jobs.cli.text import flush
from splatshard.schemas.errors import SplatshardError, UsageError

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_FAILED_SHARDS = 3
EXIT_INTERRUPTED = 128 + signal.SIGINT

TRAIN_EXTRA = ("safetensors", "tensorboard", "transformers")
"""Packages that only training, evaluation and teachers need."""
PACKAGES = ("PIL", "numba", "pyarrow", "ray", "torch", *TRAIN_EXTRA)
"""That are first imported when there is work for them, and may not be installed."""

Options = TypeVar("Options")


class Interrupted(BaseException):
    """The job was asked to stop; carries the exit code. No Exception: nothing may swallow it."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def number_or_none(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """`float | None` as `FLOAT|None`, where tyro would write `{None}|FLOAT`."""
    kinds = [kind for kind in (int, float) if get_args(info.type) == (kind, type(None))]
    if not kinds:
        return None
    kind = kinds[0]
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()}|None",
        instance_from_str=lambda args: None if args[0] == "None" else kind(args[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


@_registry.primitive_rule
def text_or_empty(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[str] | None:
    """An empty default is `empty`, where tyro would write `''`."""
    if info.type is not str:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=lambda args: args[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value or "empty"],
    )


MANY = "quote patterns, as '*.png', or the shell expands them, and join several sources by ::"
"""What is meant by arguments that are too many."""


def parse(
    options: type[Options], job: str, argv: list[str] | None, default: Options | None = None
) -> Options:
    """The options in `argv` (None: the process's); `debug` among them is in force from now on.

    Raises UsageError with one readable line.
    """
    args = sys.argv[1:] if argv is None else argv
    complaint = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            found = tyro.cli(
                options,
                args=args,
                prog=f"splatshard {job}",
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_registry,
                **extra,
            )
    except BrokenPipeError:  # `--help | head`
        flush()
        raise SystemExit(EXIT_OK) from None
    except SystemExit as e:
        if e.code == 0:
            flush()
            raise
        text = one_line(complaint.getvalue()) or "the options cannot be parsed"
        if more := re.fullmatch("Unrecognized options: ([^-].*)", text):
            text = f"{more[1]}: more arguments than {job} takes; {MANY}"
        raise UsageError(f"{text} (see splatshard {job} --help)") from None
    if getattr(found, "debug", False):
        os.environ["SPLATSHARD_DEBUG"] = "1"
    return found


def one_line(framed: str) -> str:
    """tyro's framed message as one line, without its help footers."""
    words: list[str] = []
    for raw in framed.splitlines()[1:]:  # the first one is the frame's title
        line = raw.strip("│ \t")
        if line.startswith(("Argument helptext", "For full helptext")):
            break
        if not set(line) <= set("─╭╮╰╯│- "):  # dashes where the terminal knows ASCII only
            words.append(line)
    return plain(re.sub(r"^Error parsing (config[.\w]*|\w*Options|) ?: ", "", " ".join(words)))


NUMBERS = {"INT": "a whole number", "FLOAT": "a number", "int": "a whole number"}


def plain(message: str) -> str:
    """`--workers x: must be auto or a whole number`, where tyro tells in Python's words why a value
    is none of the types; other messages as they are."""
    several = r"Error parsing (\S+): no type matching (\S+) could be .* from \['(.*?)'\]"
    one = r"Error parsing (\S+): (?:invalid literal for (int)\(\).*|could not convert .*): '(.*)'"
    if not (found := re.match(several, message) or re.match(one, message)):
        return message
    flag, kinds, value = found.groups("FLOAT")
    wanted = [NUMBERS.get(k, k.strip("{}").replace(",", " or ")) for k in kinds.split("|")]
    wanted = [kind for kind in reversed(wanted) if kind != "None"]
    return f"{flag} {value}: must be {' or '.join(wanted)}"


def run(body: Callable[[], int]) -> int:
    """The exit code of `body`; errors become one line on stderr, with `--debug` a traceback too."""
    with log_to_stderr():
        return _run(body)


def _run(body: Callable[[], int]) -> int:
    try:
        return body()
    except SplatshardError as e:
        complain(str(e))
        return EXIT_ERROR
    except Interrupted as e:
        log("interrupted", f"splatshard: {e}", level="warning")
        return e.code
    except KeyboardInterrupt:
        message = "splatshard: interrupted; run the same command again to continue"
        log("interrupted", message, level="warning")
        return EXIT_INTERRUPTED
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else EXIT_OK if e.code is None else EXIT_ERROR
    except Exception as e:
        if name := missing(e):
            extra = " with its extra `train`" if name in TRAIN_EXTRA else ""
            complain(f"this needs {name}: install it, or splatshard{extra}")
        else:
            complain(f"internal error, {type(e).__name__}: {e} (--debug shows where)")
        return EXIT_ERROR


def missing(error: BaseException | None) -> str:
    """The package that is not installed, if that is why; transformers says so in its own words."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
            return error.name
        error = error.__cause__
    return ""


def complain(message: str) -> None:
    """`splatshard: error: message` on stderr, below the traceback when debugging."""
    trace = traceback.format_exc() if debugging() else ""
    log("error", f"splatshard: error: {message}", level="error", trace=trace)
