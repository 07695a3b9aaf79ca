"""Commands in bad places: terminals that take ASCII alone, readers that leave, folders and disks that refuse."""

import errno
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import assert_one_sentence

from fused_kernels import __main__, bench, console, files, plots
from fused_kernels.bench import records

ROOT = Path(__file__).parent.parent


@pytest.fixture
def refuse(monkeypatch):
    """Give a function that takes away the permission to write one folder or file; root itself has all of them."""

    def refuse(refused):
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != refused and allowed(path, mode))

    return refuse


@pytest.fixture
def stdout(monkeypatch):
    """Give a function that puts a pipe in the place of stdout, and gives its other end."""
    opened = []

    def replace(encoding="utf-8"):
        reader, writer = os.pipe()
        opened.extend((os.fdopen(reader, "rb"), os.fdopen(writer, "w", encoding=encoding)))
        monkeypatch.setattr(sys, "stdout", opened[-1])
        return opened[-2]

    yield replace
    for file in opened:
        file.close()


def one_sentence(main, *arguments):
    with pytest.raises(SystemExit) as error:
        main(*arguments)
    assert_one_sentence(str(error.value))
    return str(error.value)


# The terminal.


def test_what_a_terminal_lacks_is_escaped(stdout):
    reader = stdout("ascii")
    console.run(lambda: print("1.2 · 3"))
    sys.stdout.close()
    assert reader.read() == b"1.2 \\xb7 3\n"


def test_a_reader_that_leaves_ends_the_command_silently(stdout):
    stdout().close()
    with pytest.raises(SystemExit) as error:
        console.run(lambda: print("a line"))
    assert error.value.code == 1
    sys.stdout.close()


def test_help_ends_silently_too(stdout):
    stdout().close()
    with pytest.raises(SystemExit) as error:
        console.run(lambda: __main__.main(["bench", "--help"]))
    assert error.value.code == 1


def test_a_file_that_refuses_is_said_in_one_sentence(tmp_path):
    assert one_sentence(console.run, (tmp_path / "absent").read_text) == f"{tmp_path / 'absent'}: No such file or directory"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_said_in_one_sentence():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "fused_kernels", "export"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, encoding="utf-8")
    assert (done.returncode, done.stderr) == (1, "No space left on device\n")


def test_without_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert console.run(lambda: 3) == 3


# Files.


def test_why_not(tmp_path, refuse):
    file = tmp_path / "file"
    assert files.why_not(file) is None
    assert files.why_not(tmp_path / "new" / "newer" / "file") is None
    assert files.why_not(tmp_path) == f"{tmp_path} is a folder"
    file.touch()
    assert files.why_not(file) is None
    assert files.why_not(file / "new" / "file") == f"{file} is not a folder"
    refuse(file)
    assert files.why_not(file) == f"{file} cannot be written"
    refuse(tmp_path)
    assert files.why_not(tmp_path / "new" / "file") == f"{tmp_path} cannot be written"


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="to become another user takes root")
def test_why_not_as_another_user():
    """In a folder of theirs, in one that they may not change, and in one that hides what is in it."""
    # NOTE: not pytest's folder, which is hidden itself.
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        _, shared, hidden = places = [Path(name) / of for of in ("theirs", "shared", "hidden")]
        for place, mode in zip(places, (0o777, 0o755, 0o700), strict=True):
            (place / "inner").mkdir(parents=True)
            place.chmod(mode)
        try:
            # The effective user stays root, so that the tests go on.
            os.setresuid(65534, 0, 0)
            found = [files.why_not(place / "file") for place in (*places, hidden / "inner")]
        finally:
            os.setresuid(0, 0, 0)
    assert found == [None, *(f"{place} cannot be written" for place in (shared, hidden, hidden / "inner"))]


def write_half(file):
    with files.whole(file) as partial:
        partial.write_text("half of", encoding="utf-8")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_cannot_be_written_whole_leaves_the_former_file(tmp_path):
    file = tmp_path / "table.md"
    files.write(file, "former · one\n")
    with pytest.raises(OSError, match="No space") as error:
        write_half(file)
    assert console.sentence(error.value) == f"{file}: No space left on device"
    assert file.read_text(encoding="utf-8") == "former · one\n"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to("file")
    files.write(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text(encoding="utf-8") == "text"


def test_an_append_to_a_full_disk_leaves_no_half_line(tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "records.csv"
    files.append(file, "a line\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            files.append(file, "another line\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_text(encoding="utf-8") == "a line\n"


# Asked before the work.


@pytest.fixture
def no_work(monkeypatch):
    def work(*_, **__):
        raise AssertionError("it began to work")

    monkeypatch.setattr(bench, "run", work)
    monkeypatch.setattr(plots, "save_all", work)


@pytest.mark.parametrize("options", [[], ["--layers"], ["--training"]], ids=str)
def test_bench_asks_for_a_place_before_it_measures(no_work, refuse, tmp_path, options):
    refuse(tmp_path)
    said = one_sentence(__main__.main, ["bench", *options, "--device", "cpu", "--record", "--data", str(tmp_path / "data")])
    assert said.startswith("--record: ")
    assert said.endswith(f"{tmp_path} cannot be written")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "abacus"], "--device: expected cuda or cpu, got 'abacus'"),
        (["--device", "meta"], "--device: expected cuda or cpu, got 'meta'"),
        (["--device", "cuda:99"], "--device: expected a GPU that torch sees on this machine, got 'cuda:99'"),
        (["--machine", "a/b"], "--machine: expected letters, digits, dots and dashes, got 'a/b'"),
        (["--choices", "--draw", "1", "--count", "0"], "--count: expected a whole number of at least 1, got '0'"),
        (["--choices", "--fit", "--folds", "1"], "--folds: expected a whole number of at least 2, got '1'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bench_refuses_what_it_cannot_measure(no_work, capsys, options, words):
    with pytest.raises(SystemExit):
        __main__.main(["bench", *options])
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: argument {words}")


def test_figures_asks_for_a_place_before_it_draws(no_work, tmp_path):
    (tmp_path / "taken").touch()
    said = one_sentence(__main__.main, ["figures", "--out", str(tmp_path / "taken")])
    assert said.startswith("--out: ")
    assert said.endswith(f"{tmp_path / 'taken'} is not a folder")


def test_notebooks_ask_for_a_place_before_they_run(refuse, tmp_path):
    main = runpy.run_path(str(ROOT / "notebooks" / "run.py"))["main"]
    folders = {"BUILD": tmp_path / "build", "EXECUTED": tmp_path / "build" / "notebooks", "run": None}
    main.__globals__.update(folders)
    refuse(tmp_path)
    said = one_sentence(main)
    assert f"got {tmp_path / 'build'}: {tmp_path} cannot be written" in said


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize("folder", [".", ".venv"])
def test_make_asks_for_a_place_before_it_installs(folder):
    """As another user where this one is root, whom no permission stops."""
    with tempfile.TemporaryDirectory() as checkout:
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, checkout)
        (Path(checkout) / ".venv").mkdir()
        os.chmod(checkout, 0o777)
        os.chmod(Path(checkout) / folder, 0o555)
        user = {} if os.getuid() else {"user": 65534}
        # Called by another make, it would say which folder it enters.
        command = ["make", "--no-print-directory", "run", "PYTHON=false"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, encoding="utf-8", **user)
        assert done.returncode == 2
        assert_one_sentence(done.stdout.strip())
        assert f"got {checkout};" in done.stdout
        assert not list(Path(checkout, ".venv").iterdir())
        os.chmod(checkout, 0o777)


def test_figures_names_a_file_that_holds_no_records(no_work, tmp_path):
    (tmp_path / "cpu.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    said = one_sentence(__main__.main, ["figures", "--data", str(tmp_path)])
    assert said.startswith("--data: ")
    assert str(tmp_path / "cpu.csv") in said


def test_records_are_utf_8_wherever_they_are_read(tmp_path):
    """As the name of a processor may be."""
    info = {"device": "a processor ™", "machine": "cpu", "shape": "1x2"}
    values = dict.fromkeys(records.RunInfo.__dataclass_fields__ | records.Subject.__dataclass_fields__, "")
    numbers = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "rms_error", "max_error"), 1.0)
    counts = {"bytes": 1, "flops": 1, "peak_bytes": 1, "correct": True}
    record = records.Record(**values | info | numbers | counts)
    for _ in range(2):
        records.append([record], tmp_path)
    assert "™".encode() in (tmp_path / "cpu.csv").read_bytes()
    assert records.read(data=tmp_path) == [record] * 2
