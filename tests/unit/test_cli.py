"""The command line: flags from the configuration, one-line errors, exit codes."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from splatshard.jobs import convert, status, verify
from splatshard.jobs.__main__ import JOBS, main
from splatshard.jobs.cli.command import Interrupted, one_line, run
from splatshard.jobs.cli.text import count, duration, size
from splatshard.pipeline.storage.fs import use_options
from splatshard.pipeline.storage.options import options_of
from splatshard.schemas.config import PRESETS, ConvertConfig
from splatshard.schemas.errors import StorageError, UsageError
from tests.make import image_folder


def options(*arguments: str) -> convert.ConvertOptions:
    return convert.parse_options(["in.tar", "out", *arguments])


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that fails with exit code 1."""
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("splatshard: error: ")
    assert err.count("\n") == 1
    return err


def test_flags_are_flat_and_have_the_defaults_of_the_configuration() -> None:
    parsed = options()
    assert (parsed.src, parsed.dst) == ("in.tar", "out")
    assert parsed.config == ConvertConfig()
    assert parsed.workers == "auto"
    assert parsed.limit is None


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_destination_inside_of_the_source_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    root = image_folder(tmp_path / "photos")
    before = sorted(root.rglob("*"))
    error = error_of(["convert", str(root), f"{root}/splats", *flags], capsys)
    assert f"DST {root}/splats lies in SRC {root}, " in error
    assert "choose a DST outside of SRC" in error
    assert sorted(root.rglob("*")) == before


def test_a_pattern_that_the_shell_expanded_says_to_quote_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = error_of(["convert", "a.png", "b.png", "c.png", "out", "--steps", "3"], capsys)
    assert "c.png, out: more arguments than convert takes; quote patterns" in error
    assert "Unrecognized options: --step" in error_of(["convert", "a", "out", "--step=3"], capsys)


def test_explicit_flags_override_the_preset() -> None:
    parsed = options("--preset", "paper", "--steps", "7", "--no-whitened", "--prune", "none")
    paper = PRESETS["paper"]
    assert parsed.config.fit.steps == 7
    assert parsed.config.prune.prune == "none"
    assert parsed.config.fit.init == paper.fit.init == "grid"
    assert parsed.config.fit.l1_colors == paper.fit.l1_colors
    assert options("--preset=paper").config == paper


def test_job_flags() -> None:
    parsed = options("--workers", "3", "--limit", "5", "--overwrite-stale", "--dry-run", "--json")
    assert (parsed.workers, parsed.limit) == (3, 5)
    assert parsed.overwrite_stale
    assert parsed.dry_run
    assert parsed.json


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-gaussians", "0"], "--num-gaussians 0: choose 1 to 65536"),
        (["--num-gaussians", "-5"], "--num-gaussians"),
        (["--num-gaussians", "many"], "error: --num-gaussians many: must be a whole number (see"),
        (["--num-gaussian", "5"], "--num-gaussians"),
        (["--steps", "-1"], "--steps -1: choose 0 to 1000000"),
        (["--image-size", "4"], "--image-size 4: choose 8 to 4096"),
        (["--target-psnr", "-3"], "--target-psnr"),
        (["--workers", "0"], "--workers 0: must be auto or at least 1"),
        (["--workers", "-2"], "--workers -2: must be auto or at least 1"),
        (["--workers", "x"], "error: --workers x: must be auto or a whole number (see"),
        (["--limit", "1.5"], "error: --limit 1.5: must be a whole number (see"),
        (["--cutoff", "wide"], "error: --cutoff wide: must be a number (see"),
        (["--target-psnr", "good"], "error: --target-psnr good: must be a number (see"),
        (["--nested", "4,9", "--num-gaussians", "4"], "does not go with --nested"),
        (["--num_gaussians=9", "--nested=4,9"], "does not go with --nested"),
        (["--resize=none", "--image-size=64"], "--image-size does not go with --resize none"),
        (["--resize", "short"], "--resize"),
        (["--limit", "-1"], "--limit -1: must be at least 1"),
        (["--samples-per-shard", "0"], "--samples-per-shard 0: must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--preset", "best"], "--preset best: choose default or paper"),
        (["--format", "zip"], "--format"),
        (["--backend", "cuda"], "--backend"),
        (["third"], "third"),
    ],
)
def test_absurd_options_are_one_line_and_exit_1(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in error_of(["convert", "in.tar", "out", *flags], capsys)


@pytest.mark.parametrize("job", sorted(set(JOBS) - {"demo"}))
def test_every_job_has_help_and_needs_its_arguments(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([job, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"splatshard {job}" in out
    assert "--storage-options JSON" in out
    assert "--debug" in out
    assert "''" not in out
    assert "{None}" not in out
    needed = {"train": "RECIPE", "evaluate": "CKPT", "explain": "CKPT"}.get(job, "DST")
    assert needed in out
    assert needed in error_of([job], capsys)


def test_help_shows_the_groups_and_no_prefixes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", "--help"])
    out = capsys.readouterr().out
    for words in ("fit options", "decode options", "--num-gaussians INT", "--preset"):
        assert words in out
    assert "--config" not in out
    assert "--fit." not in out


def test_no_job_and_unknown_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    capsys.readouterr()
    assert main(["fly"]) == 1
    assert "no job 'fly'; choose convert, status, verify, repair" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("splatshard ")


def in_other_words(cause: Exception) -> Exception:
    """As transformers says what it misses."""
    error = ModuleNotFoundError("Could not import module 'CLIPVisionModel'.")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("no such thing"), 1, "splatshard: error: no such thing"),
        (StorageError("disk full"), 1, "splatshard: error: disk full"),
        (RuntimeError("oops"), 1, "internal error, RuntimeError: oops"),
        (ModuleNotFoundError("no", name="transformers"), 1, "needs transformers: install it, or"),
        (ModuleNotFoundError("no", name="ray"), 1, "needs ray: install it, or splatshard"),
        (in_other_words(ModuleNotFoundError("no", name="safetensors")), 1, "needs safetensors: "),
        (ModuleNotFoundError("oops", name="x"), 1, "internal error, ModuleNotFoundError: oops"),
        (KeyboardInterrupt(), 130, "run the same command again"),
        (Interrupted(143, "terminated"), 143, "splatshard: terminated"),
        (SystemExit(3), 3, ""),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> int:
        raise error

    assert run(body) == code
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


def test_debugging_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> int:
        raise UsageError("no such thing")

    monkeypatch.setenv("SPLATSHARD_DEBUG", "1")
    assert run(body) == 1
    assert "Traceback" in capsys.readouterr().err


def test_every_job_can_debug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPLATSHARD_DEBUG", "")
    assert main(["status", f"{tmp_path}/nothing", "--debug"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("no such folder; give the DST of a splatshard convert\n")


@pytest.mark.parametrize(
    ("job", "usage"),
    [("embed", "DST [SRC]"), ("evaluate", "CKPT [NAME=]DATA ..."), ("explain", "CKPT IMAGE ...")],
)
def test_usage_tells_what_is_optional_and_what_is_a_list(
    job: str, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([job, "--help"])
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith(usage)
    assert "(default: )" not in out


def test_training_takes_the_options_of_the_store(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        error_of(["train", "nothing.py", '--storage-options={"anon": true}'], capsys)
        assert options_of("s3")["anon"] is True
    finally:
        use_options({})
    assert "not JSON" in error_of(["train", "nothing.py", "--storage-options=x"], capsys)


def test_a_missing_dst_is_named(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    for job in ("status", "verify", "report", "view"):
        assert f"{tmp_path}/nothing: no such folder" in error_of(
            [job, f"{tmp_path}/nothing"], capsys
        )


def test_a_dst_that_is_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.jpg").touch()
    for job in ("status", "verify", "repair"):
        error = error_of([job, f"{tmp_path}/0.jpg"], capsys)
        assert f"{tmp_path}/0.jpg: is a file; give the DST of a splatshard convert" in error


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_store_that_is_never_written_asks_for_no_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    src = image_folder(tmp_path / "photos")
    error = error_of(["convert", str(src), "gs://bucket/splats", *flags], capsys)
    assert "DST gs://bucket/splats: only local folders and s3://bucket/... can be" in error


def test_an_empty_dst_is_not_a_verified_dataset(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    assert "holds no shard" in err
    assert json.loads(out.splitlines()[-1])["ok"] is False
    assert verify.main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert ("holds no shard: run splatshard convert first" in out, err) == (True, "")
    assert "repair" not in out
    assert "holds no finished shard" in error_of(["report", str(tmp_path)], capsys)
    for job in ("repair", "retry-failed"):
        assert "neither shards nor a plan" in error_of([job, str(tmp_path)], capsys)
    assert status.main([str(tmp_path)]) == 0
    assert "neither shards nor a plan" in capsys.readouterr().out


def test_no_dst_is_not_the_present_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a variable that is not set."""
    src = image_folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    for arguments in (["convert", str(src), ""], ["status", ""], ["repair", ""]):
        assert "DST is empty" in error_of(arguments, capsys)


def test_framed_messages_become_one_line() -> None:
    body = "│ Error parsing config.fit: --x 1: no │\n│ ──── │\n│ For full helptext │"
    framed = f"╭─ Value error ─╮\n{body}\n╰────╯"
    assert one_line(framed) == "--x 1: no"
    in_ascii = " Value error \n ---- \n  Error parsing ConvertOptions: --x 1: no  \n  ----  \n"
    assert one_line(in_ascii) == "--x 1: no"


def test_words_for_numbers() -> None:
    assert [count(1, "shard"), count(1288, "shard")] == ["1 shard", "1,288 shards"]
    assert [duration(8.31), duration(250), duration(11100)] == ["8.3 s", "4 min 10 s", "3 h 05 min"]
    assert [size(6400), size(12_345_678), size(2.5e12)] == ["6,400 B", "12.3 MB", "2.5 TB"]


# What commands share

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(path.stem for path in (ROOT / "jobs").glob("[a-z]*.py"))
ONE_DECLARATION = {
    "storage_options": "StorageOptions",
    "log_format": "LogFormat",
    "json": "Json",
    "debug": "Debug",
    "device": "Device",
    "weights": "Weights",
    "ckpt": "Checkpoint",
    "workers": None,
    "sample_timeout": None,
}
"""Options that commands share: the type in jobs/cli/options that declares it, or None where only a
class there does."""


def test_every_job_is_a_command() -> None:
    assert {name.replace("-", "_") for name in JOBS} | {"demo"} == set(COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])
def test_no_command_imports_another(command: str) -> None:
    for node in ast.walk(ast.parse((ROOT / f"jobs/{command}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            modules = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules = {alias.name for alias in node.names}
        else:
            continue
        assert not modules & {f"splatshard.jobs.{name}" for name in COMMANDS}


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").rglob("*.py")), ids=lambda p: p.stem)
def test_shared_options_are_declared_once(path: Path) -> None:
    """Wherever a command has one, it is of the type in jobs/cli/options."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Options")):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                name = field.target.id
                if name not in ONE_DECLARATION:
                    continue
                declared = ONE_DECLARATION[name]
                if declared is None:
                    assert path.parts[-2:] == ("cli", "options.py"), f"{node.name}.{name}"
                else:
                    assert ast.unparse(field.annotation).find(declared) >= 0, f"{node.name}.{name}"
