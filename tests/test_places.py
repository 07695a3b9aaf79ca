"""Bad places: no home, folders that refuse, cut libraries, odd characters in paths. A call computes; one warning says why."""

import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import assert_one_sentence

import fused_kernels as fk
from fused_kernels import build, places, progress, toolchain
from fused_kernels.__main__ import main
from fused_kernels.problem import winners_dtype

# The module: the package has the ladder by this name.
rungs = sys.modules["fused_kernels.rungs"]
pytestmark = pytest.mark.skipif(toolchain.why_no_compiler() is not None, reason=str(toolchain.why_no_compiler()))

# A library that loads and registers nothing, built in a moment.
EMPTY = {"name": "scale_min", "source": "// nothing\n", "device": "cpu", "namespace": "fused_kernels_places"}


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Start with an empty cache, an empty temporary folder, and no place known as bad."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("FUSED_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("_refused", "_whole"):
        monkeypatch.setattr(places, name, {})
    monkeypatch.setattr(places, "_not_loadable", set())
    monkeypatch.setattr(places, "spoiled", set())
    monkeypatch.setattr(progress, "_warned", set())
    return tmp_path


@pytest.fixture
def nowhere(fresh, monkeypatch):
    """Have no folder at all."""
    (fresh / "file").touch()
    monkeypatch.setattr(places, "folders", lambda: [fresh / "file" / "cache"])
    for name in ("_availability", "_failed"):
        monkeypatch.setattr(rungs, name, {})


def no_home(monkeypatch):
    for name in ("FUSED_KERNELS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))


def no_place_written(folder):
    return not folder.exists() or not list(folder.iterdir())


# ---- where libraries lie ----


def test_without_a_home_a_private_folder_under_the_temporary_one_is_used(fresh, monkeypatch):
    no_home(monkeypatch)
    with pytest.warns(UserWarning, match=r"no home folder; name another folder in FUSED_KERNELS_CACHE"):
        library = build.load(**EMPTY)
    assert library.parent == fresh / "tmp" / f"fused_kernels-{os.getuid()}"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.load(**EMPTY) == library


def test_without_a_home_the_chosen_cache_is_used(fresh, monkeypatch):
    no_home(monkeypatch)
    monkeypatch.setenv("FUSED_KERNELS_CACHE", str(fresh / "chosen"))
    assert build.make(**EMPTY).parent == fresh / "chosen"


def test_what_lies_under_the_temporary_folder_is_not_used_where_the_cache_can_be(fresh, monkeypatch):
    with monkeypatch.context() as elsewhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        no_home(elsewhere)
        assert build.make(**EMPTY).parent.parent == fresh / "tmp"
    assert build.make(**EMPTY).parent == fresh / "cache"


def test_a_relative_folder_stays_where_it_was(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    monkeypatch.setenv("FUSED_KERNELS_CACHE", "relative")
    library = build.make(**EMPTY)
    assert library.parent == fresh / "relative"
    monkeypatch.chdir(fresh / "tmp")
    assert build.find(**EMPTY) == library


def test_with_no_folder_at_all_the_sentence_says_so(fresh, monkeypatch):
    no_home(monkeypatch)
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError("no usable directory")))
    assert places.cache_dir() is None
    assert places.why_not_wanted() is None
    assert_one_sentence(places.why_none())
    with pytest.raises(build.UnavailableError, match="neither a home nor a temporary folder"):
        build.make(**EMPTY)


def test_a_link_into_somebody_elses_folder(fresh, monkeypatch):
    (fresh / "cache").symlink_to(fresh / "hidden" / "cache")
    plain = os.stat

    def refused(path, *args, **options):
        if str(path) == str(fresh / "cache") and options.get("follow_symlinks", True):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *args, **options)

    monkeypatch.setattr(os, "stat", refused)
    assert places.why_not(fresh / "cache") == f"{fresh / 'cache'} cannot be written"


def test_a_home_of_nobody_known(run_python, tmp_path):
    """As in a container whose user has no entry and no HOME: import, call, explain and doctor all work."""
    code = """
import os, pwd, runpy, sys, tempfile
for name in ("HOME", "FUSED_KERNELS_CACHE", "XDG_CACHE_HOME"): os.environ.pop(name, None)
def unknown(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
import torch, fused_kernels as fk
x = torch.ones(1, 2, 3, 3)
print(fk.scale_min(x, 2.0).unique().item(), fk.explain(x, torch.ones(2, 2, 1, 1)).rung)
sys.argv[1:] = ["doctor"]
runpy.run_module("fused_kernels", run_name="__main__", alter_sys=True)
"""
    out = run_python(code, TMPDIR=str(tmp_path)).splitlines()
    assert out[0] == "2.0 conv2d_scale_min"
    assert any(line.startswith("built kernels") and "no home" in line for line in out)
    assert any(line.split() == ["scale_min", "ready"] for line in out)


def test_a_folder_that_cannot_be_looked_into_is_not_there(fresh, monkeypatch):
    """As another user's home: every question about what is in it is refused."""
    library = build.make(**EMPTY)
    plain = os.stat

    def refused(path, *args, **kwargs):
        if str(library.parent) in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refused)
    monkeypatch.setattr(os, "lstat", refused)
    monkeypatch.setattr(Path, "stat", lambda path, **options: refused(path, **options))
    monkeypatch.setattr(os, "access", lambda path, mode: str(fresh / "tmp") in str(path))
    assert build.find(**EMPTY) is None
    assert places.cache_dir().parent == fresh / "tmp"


@pytest.mark.parametrize("refuses", ["mkdir", "lock", "build", "keep"])
def test_a_cache_that_refuses_after_all_is_left_for_the_temporary_folder(fresh, monkeypatch, refuses):
    """Permissions do not tell of quotas, sticky folders, network shares and full disks."""
    wanted = fresh / "cache"

    def refuse(plain, at):
        def function(*args, **options):
            if any(str(wanted) in str(arg) for arg in (*args[at:], *options.values())):
                raise PermissionError(13, "Permission denied")
            return plain(*args, **options)

        return function

    target, name, at = {
        "mkdir": (places.tempfile, "TemporaryFile", 0),
        "lock": (build.filelock, "FileLock", 0),
        "build": (build.tempfile, "mkdtemp", 0),
        "keep": (places, "keep", 0),
    }[refuses]
    monkeypatch.setattr(target, name, refuse(getattr(target, name), at))
    with pytest.warns(UserWarning, match=r"cache cannot be written \(Permission denied\)"):
        library = build.make(**EMPTY)
    assert library.parent.parent == fresh / "tmp"
    assert places.is_whole(library)
    assert not list(wanted.glob("*.build-*"))


def test_a_full_disk_is_left_for_the_temporary_folder(fresh, monkeypatch):
    def fails_there(commands, folder):
        if (fresh / "cache") in folder.parents:
            raise RuntimeError("the compiler failed: fatal error: error writing to x.o: No space left on device")
        return run_all(commands, folder)

    run_all = build.jobs.run_all
    monkeypatch.setattr(build.jobs, "run_all", fails_there)
    with pytest.raises(RuntimeError, match="No space"):
        build.make(**EMPTY)  # the disk has room: it is the compiler's own error
    plain = os.statvfs

    class Full:
        f_bavail, f_frsize, f_flag = 1, 4096, 0

    monkeypatch.setattr(os, "statvfs", lambda path: Full if (fresh / "cache") in Path(path).parents else plain(path))
    with pytest.warns(UserWarning, match="No space left"):
        assert build.make(**EMPTY).parent.parent == fresh / "tmp"


def test_a_noexec_mount_is_seen_before_anything_is_built(fresh, monkeypatch):
    (fresh / "cache").mkdir()
    plain = os.statvfs

    class Noexec:
        f_flag = os.ST_NOEXEC

    monkeypatch.setattr(os, "statvfs", lambda path: Noexec if Path(path) == fresh / "cache" else plain(path))
    with pytest.warns(UserWarning, match="noexec"):
        assert build.load(**EMPTY).parent.parent == fresh / "tmp"
    assert no_place_written(fresh / "cache")


def test_a_library_that_cannot_be_mapped_is_made_elsewhere(fresh, monkeypatch):
    def load_library(path):
        if str(fresh / "cache") in path:
            raise OSError(f"Could not load this library: {path}") from OSError(
                f"{path}: failed to map segment from shared object"
            )
        return plain(path)

    plain = torch.ops.load_library
    monkeypatch.setattr(torch.ops, "load_library", load_library)
    with pytest.warns(UserWarning, match="no library can be loaded from"):
        assert build.load(**EMPTY).parent.parent == fresh / "tmp"


def test_somebody_elses_temporary_folder_is_not_trusted(fresh, monkeypatch):
    no_home(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = build.make(**EMPTY)
    for change in (lambda: library.parent.chmod(0o777), lambda: monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)):
        change()
        if change is not None and os.getuid() != os.geteuid():
            library.parent.rename(places.folders()[0])
            places.folders()[0].chmod(0o700)
        assert build.find(**EMPTY) is None
        with pytest.raises(build.UnavailableError, match="not this user's alone") as error:
            build.make(**EMPTY)
        assert_one_sentence(str(error.value))


def test_a_link_in_place_of_the_temporary_folder_is_not_trusted(fresh, monkeypatch):
    no_home(monkeypatch)
    (fresh / "elsewhere").mkdir(mode=0o700)
    places.folders()[0].symlink_to(fresh / "elsewhere")
    with pytest.raises(build.UnavailableError, match="not this user's alone"):
        build.make(**EMPTY)


# ---- nowhere: PyTorch's operations ----


def test_without_any_place_a_call_computes_and_one_warning_says_why(fresh, nowhere):
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    fk.choice._decisions.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert fk.scale_min(x, 2.0).equal(torch.min(x * 2.0, 1, keepdim=True).values)
            layer = fk.Conv2dScaleMin(3, 4, 3, 2.0, dtype=torch.float64)
            layer(x).sum().backward()
    (warning,) = said
    assert "PyTorch's own operations" in str(warning.message)
    assert "FUSED_KERNELS_CACHE" in str(warning.message)
    fk.choice._decisions.clear()


def test_without_any_place_explain_and_doctor_say_the_same(fresh, nowhere, capsys):
    reason = places.why_none()
    assert_one_sentence(reason)
    fk.choice._decisions.clear()
    assert reason in fk.explain(torch.ones(1, 2, 3, 3), torch.ones(4, 2, 1, 1)).why
    fk.choice._decisions.clear()
    rung = fk.edit("scale_min", fk.rungs["scale_min"].source + "// nowhere")
    assert rung.why_unavailable() == reason
    main(["doctor"])
    assert f"built kernels         {reason}" in capsys.readouterr().out
    with pytest.raises(build.UnavailableError, match="FUSED_KERNELS_CACHE"):
        rung(torch.ones(1, 2, 3, 3), 2.0)


def test_what_is_there_needs_no_place_to_build(fresh, monkeypatch):
    """As a cache that was made with an image and is read-only where it runs: this library is there, that one is not."""
    rung = fk.rungs["scale_min"]
    build.make(**rung.library("float32"))
    monkeypatch.setattr(rungs, "_failed", {})
    plain = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: fresh not in Path(path).parents and plain(path, mode))
    assert rung.why_unavailable(dtype=torch.float32) is None
    assert "cannot be written" in rung.why_unavailable(dtype=torch.float16)
    assert "cannot be written" in rung.why_unavailable()


NOT_LOADING = """
import warnings, torch, fused_kernels as fk
from fused_kernels import build
tries = []
def fails(path):
    tries.append(path)
    raise OSError(f"{path}: undefined symbol: nothing")
torch.ops.load_library = fails
x = torch.randn(2, 3, 5, 4, requires_grad=True)
weight = torch.randn(4, 3, 1, 1, requires_grad=True)
def reference(x, weight): return torch.min(torch.conv2d(x, weight) * 2.0, 1, keepdim=True).values
expected = torch.autograd.grad(reference(x, weight).sum(), (x, weight))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(3):
        y = fk.conv2d_scale_min(x, weight, None, 2.0)
        torch.testing.assert_close(y, reference(x, weight))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, weight)), expected)
        torch.testing.assert_close(torch.ops.fused_kernels.scale_min_auto(x, 2.0), torch.min(x * 2.0, 1, keepdim=True).values)
print(len(said), "undefined symbol" in str(said[0].message), len(tries) == len(set(tries)))
print("undefined symbol" in fk.explain(x, weight).why)
"""


def test_libraries_that_do_not_load_are_tried_once_each_and_done_without(run_python):
    """Forward, backward and in a program; explain says what the warning said."""
    assert run_python(NOT_LOADING).split() == ["1", "True", "True", "True"]


def spoil(library):
    """Put something else in a library's place, with its digest."""
    library.write_text("no library", encoding="utf-8")
    places.digest_file(library).write_text(places._digest(library), encoding="ascii")


def test_what_does_not_load_is_named_with_the_loaders_reason_and_what_to_do(fresh):
    library = build.make(**EMPTY)
    spoil(library)
    with pytest.raises(
        build.UnavailableError, match=r"file too short.*remove .*scale_min-\w+\.\* to have it built anew"
    ) as error:
        build.load(**EMPTY)
    assert build.why_not_loading(library) == str(error.value)


def test_a_prebuilt_library_that_does_not_load_is_built_here(fresh, few, monkeypatch):
    monkeypatch.setenv("FUSED_KERNELS_CACHE", str(fresh / "ready"))
    for library in fk.prebuild(fresh / "ready"):
        spoil(library)
    wanted = {**fk.rungs["scale_min"].library("float32"), "arch": None}
    assert build.load(**wanted).name == build.Library(**wanted).native_file()


def test_the_place_and_a_lost_kernel_are_two_things_to_warn_of(fresh):
    with pytest.warns(UserWarning, match="one"):
        progress.warn_once("places", "one")
    with pytest.warns(UserWarning, match="two"):
        progress.warn_once("kernels", "two")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        progress.warn_once("places", "three")


KINDS = {
    "scale_min": lambda x, w, b: ((x, 2.0),),
    "scale_min_bias": lambda x, w, b: ((x, b[:3], 2.0, False),),
    "conv2d_scale_min": lambda x, w, b: ((x, w, b, -2.0, (2, 1), (0, 1, 2, 0), (1, 2), 1, "ieee"),),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["", "_winners"])
def test_in_place_of_a_kernel_the_same_is_computed(kind, suffix):
    """Values, winners, layout and dtypes are the operator's; only what comes from a real kernel is compared with it."""
    from fused_kernels import operators

    x, w, b = torch.randn(2, 3, 9, 8).to(memory_format=torch.channels_last), torch.randn(5, 3, 2, 3), torch.randn(5)
    (args,) = KINDS[kind](x, w, b)
    found = operators._by_library(kind + suffix, args)
    value = x + b[:3].view(-1, 1, 1) if kind == "scale_min_bias" else x
    if kind == "conv2d_scale_min":
        value = torch.conv2d(torch.nn.functional.pad(x, (2, 0, 0, 1)), w, b, (2, 1), 0, (1, 2))
    expected = torch.min(value * args[1 if kind == "scale_min" else -2 if "bias" in kind else 3], 1, keepdim=True)
    output = found[0] if suffix else found
    torch.testing.assert_close(output, expected.values)
    assert output.is_contiguous()
    if suffix:
        assert found[1].long().equal(expected.indices)
        assert found[1].dtype == winners_dtype(3)


# ---- cut libraries ----


@pytest.mark.parametrize("damage", ["cut", "zeros", "no digest"])
def test_a_damaged_library_is_built_anew(fresh, damage):
    library = build.make(**EMPTY)
    whole = library.read_bytes()
    if damage == "no digest":
        places.digest_file(library).unlink()
    else:
        library.write_bytes(whole[: len(whole) // 2] if damage == "cut" else bytes(len(whole)))
    assert build.find(**EMPTY) is None
    assert build.load(**EMPTY) == library
    assert places.is_whole(library)


def test_a_damaged_library_does_not_kill_the_next_process(run_python, tmp_path):
    code = "import torch, fused_kernels as fk; print(fk.scale_min(torch.ones(1, 2, 3, 3), 2.0).unique().item())"
    assert run_python(code).strip() == "2.0"
    (library,) = (tmp_path / "cache").glob("scale_min.float32-*.so")
    os.truncate(library, 8192)
    assert run_python(code).strip() == "2.0"
    assert library.stat().st_size > 8192


def test_leftovers_that_cannot_be_removed_are_in_nobodys_way(fresh, monkeypatch):
    """As .nfs files, or another user's in a sticky folder."""
    stem = build.Library(**EMPTY).native_file().removesuffix(".so")
    left = fresh / "cache" / f"{stem}.build-left"
    left.mkdir(parents=True)
    (left / ".nfs0001").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
    library = build.make(**EMPTY)
    assert places.is_whole(library)
    assert (left / ".nfs0001").exists()


# ---- odd characters ----

ODD = "a b$HOME:c'd&(e)"


@pytest.mark.parametrize("where", ["cache", "sources", "torch", "libstdc++"])
def test_any_character_in_a_path(fresh, monkeypatch, where):
    odd = fresh / ODD
    odd.mkdir()
    if where == "cache":
        monkeypatch.setenv("FUSED_KERNELS_CACHE", str(odd / "cache"))
    elif where == "sources":
        shutil.copytree(toolchain.CSRC, odd / "csrc")
        monkeypatch.setattr(toolchain, "CSRC", odd / "csrc")
    elif where == "torch":
        (odd / "torch").symlink_to(Path(torch.__file__).parent)
        monkeypatch.setattr(torch, "__file__", str(odd / "torch" / "__init__.py"))
    else:
        (runtime,) = toolchain._cxx_runtime()
        (odd / "libstdc++.so.6").symlink_to(runtime)
        maps = f"7f0000000000-7f0000001000 r-xp 00000000 08:01 1   {odd / 'libstdc++.so.6'}\n"
        plain = Path.read_text
        monkeypatch.setattr(
            Path, "read_text", lambda path, **options: maps if str(path) == "/proc/self/maps" else plain(path, **options)
        )
        assert toolchain._cxx_runtime() == [str(odd / "libstdc++.so.6")]
    namespace = f"fused_kernels_odd_{where.replace('+', '')}"
    library = build.load(**{**fk.rungs["scale_min"].library("float32"), "namespace": namespace})
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::scale_min.float32", "CPU")
    assert library.exists()


@pytest.mark.skipif(toolchain.cuda_toolkit() is None or torch.version.cuda is None, reason="no nvcc, or torch without CUDA")
def test_any_character_in_the_cuda_toolkits_path_and_in_what_nvcc_reads(fresh, monkeypatch):
    odd = fresh / ODD
    (odd / "cuda").mkdir(parents=True)
    for path in toolchain.cuda_toolkit().home.iterdir():
        (odd / "cuda" / path.name).symlink_to(path)
    for path in toolchain.include_paths("cuda"):
        shutil.copytree(path, odd / "csrc" / path.relative_to(toolchain.CSRC))
    monkeypatch.setattr(toolchain, "CSRC", odd / "csrc")
    monkeypatch.setenv("FUSED_KERNELS_CACHE", str(odd / "cache"))
    monkeypatch.setattr(toolchain, "cuda_toolkit", lambda: toolchain.Toolkit(odd / "cuda", (13, 0), frozenset({80})))
    source = '#include "launch.cuh"\n__global__ void kernel() {}\nvoid call() { kernel<<<1, 1>>>(); }\n'
    assert build.load("probe", source, device="cuda", arch="80", namespace="fused_kernels_odd_cuda").exists()


def test_a_toolkit_is_named_whole(tmp_path, monkeypatch):
    home = tmp_path / "my cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={home}'\necho 'release 13.0, V13'\necho sm_80\n", encoding="utf-8")
    nvcc.chmod(0o755)
    monkeypatch.setattr(toolchain, "_nvcc_candidates", lambda: [str(nvcc)])
    assert toolchain.cuda_toolkit.__wrapped__() == toolchain.Toolkit(home, (13, 0), frozenset({80}))


# ---- compilers that speak, and compilers that fail ----


def compiler(path, text):
    path.write_bytes(b"#!/bin/sh\n" + text + b'\nexec c++ "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_what_a_compiler_says_need_not_be_utf_8(fresh, monkeypatch):
    monkeypatch.setenv(
        "CXX", compiler(fresh / "latin", b'case "$*" in *" -c "*) printf "schlie\\337ende Klammer"; exit 1;; esac')
    )
    with pytest.raises(RuntimeError, match=r"schlie.ende Klammer"):
        build.make(**EMPTY)


def test_a_version_need_not_be_utf_8(fresh, monkeypatch):
    assert "Gr\N{REPLACEMENT CHARACTER}n" in toolchain.say(["printf", r"Gr\374n"])


def test_an_ascii_locale(run_python):
    """Sources have other characters; a compiler's error is shown all the same."""
    code = """
import torch, fused_kernels as fk
print(fk.scale_min(torch.ones(1, 2, 3, 3), 2.0).unique().item())
try:
    fk.edit("scale_min", fk.rungs["scale_min"].source + "// \\u00fc\\nnonsense \\u00df")(torch.ones(1, 2, 3, 3), 2.0)
except RuntimeError as error:
    print("nonsense" in str(error))
"""
    assert run_python(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").split() == ["2.0", "True"]


def test_a_compilers_launcher_is_quiet(fresh, monkeypatch, capfd):
    ccache = compiler(fresh / "ccache", b'compiler=$1; shift; exec $compiler "$@"')
    monkeypatch.setenv("CXX", f"{ccache} c++")
    monkeypatch.setenv("CC", f"{ccache} gcc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build.load(**EMPTY)
    assert capfd.readouterr() == ("", "")
    assert toolchain.host_compiler() == ["-ccbin", "gcc"]


BROKEN = {
    "nothing works": (b"echo no licence; exit 1", "no licence"),
    "no linker": (b'case "$*" in *-shared*) echo "ld: cannot find -lfoo"; exit 1;; esac', "ld: cannot find -lfoo"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_doctor_tries_the_compiler(run_python, tmp_path, kind):
    script, said = BROKEN[kind]
    code = (
        "import sys, runpy; sys.argv[1:] = ['doctor']; runpy.run_module('fused_kernels', run_name='__main__', alter_sys=True)"
    )
    out = run_python(code, CXX=compiler(tmp_path / "broken", script)).splitlines()
    lines = {line[:22].strip(): line[22:] for line in out}
    for name in ("C++ compiler", "torch.compile", "scale_min", "conv2d_scale_min"):
        assert said in lines[name], lines[name]
    assert lines["composite"] == "ready"


@pytest.mark.parametrize("value", [" ", 'g++ "', "/nonexistent/c++"])
def test_a_compilers_name_that_is_none(run_python, value):
    code = "import torch, fused_kernels as fk; print(fk.scale_min(torch.ones(1, 2, 3, 3), 2.0).unique().item())"
    assert run_python(code, CXX=value).strip() == "2.0"


def test_a_compiler_that_cannot_be_started_is_a_sentence(fresh, monkeypatch):
    path = fresh / "compiler"
    path.write_bytes(b"\x7fELF of another machine")
    path.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"compiler is there but cannot be started: .*Exec format error") as error:
        toolchain.say([str(path), "--version"])
    assert_one_sentence(str(error.value))


def test_doctor_says_which_dtypes_are_there(fresh, monkeypatch, capsys):
    build.make(**fk.rungs["scale_min"].library("float32"))
    monkeypatch.setattr(rungs, "_failed", {})
    plain = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: fresh not in Path(path).parents and plain(path, mode))
    main(["doctor"])
    assert "scale_min             ready for float32 alone: no place for built kernels" in capsys.readouterr().out


def test_doctor_says_that_torch_compile_lacks_a_users_name(capsys, monkeypatch):
    from fused_kernels import __main__

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(__main__.getpass, "getuser", lambda: (_ for _ in ()).throw(KeyError("uid not found")))
    main(["doctor"])
    assert "the user's name; set USER" in capsys.readouterr().out


def test_doctor_names_the_compiler_and_its_version(capsys):
    main(["doctor"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("C++ compiler"))
    assert shutil.which("c++") in line
    assert toolchain.compiler_version().splitlines()[0].strip() in line


def test_doctor_says_that_torch_compile_lacks_pythons_headers(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "python_header", lambda: tmp_path / "Python.h")
    main(["doctor"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("torch.compile"))
    assert "Python.h" in line
    assert "install" in line


# ---- a CPU's tensors on a machine with a GPU ----

NO_CUDA = """
import os, torch
def started(*args, **kwargs): raise AssertionError("CUDA was started")
torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = torch.cuda.device_count = torch.cuda.is_available = started
torch.cuda.get_device_capability = torch.cuda.get_device_properties = torch.cuda.current_device = started
import fused_kernels as fk
from fused_kernels import dispatch
x, layer = torch.randn(2, 3, 9, 8, requires_grad=True), fk.Conv2dScaleMin(3, 5, 3, 2.0)
"""
BUILDS = "with torch.no_grad(): print(fk.scale_min(x, 2.0).shape[1], fk.explain(x, layer.weight).rung)"
TRAINS = """
for _ in range(2):
    fk.scale_min(x, 2.0).sum().backward()
    layer(x).sum().backward()
    with torch.no_grad(): torch.ops.fused_kernels.scale_min_auto(x, 2.0)
    dispatch.finish_builds()
print(dispatch.auto.is_loaded(), dispatch.from_winners.is_loaded())
"""


def test_a_call_on_cpu_tensors_asks_nothing_of_cuda(run_python):
    """Neither to build a kernel, nor to load and train."""
    assert run_python(NO_CUDA + BUILDS).split() == ["1", "conv2d_scale_min"]
    assert run_python(NO_CUDA + TRAINS, FUSED_KERNELS_CACHE=str(places.cache_dir())).split() == ["True", "True"]


CUDA_IN_A_CHILD = """
import os, torch, fused_kernels as fk
x, layer = torch.randn(2, 3, 9, 8), fk.Conv2dScaleMin(3, 5, 3, 2.0)
with torch.no_grad(): fk.scale_min(x, 2.0), layer(x), fk.explain(x, layer.weight)
if (child := os.fork()) == 0:
    expected = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.gpu
def test_a_child_may_use_cuda_after_a_call_on_cpu_tensors(run_python):
    assert run_python(CUDA_IN_A_CHILD).strip() == "0"


FORK_LATER = """
import os, sys, threading, time, torch, fused_kernels as fk
from fused_kernels import dispatch, jobs, operators
x, layer = torch.randn(1, 3, 4, 4), fk.Conv2dScaleMin(3, 5, 3, 2.0)
calls = (lambda: fk.scale_min(x, 2.0)), (lambda: layer(x).sum().backward())
threads = [threading.Thread(target=call, daemon=True) for call in calls]
for thread in threads: thread.start()
while len([job for job in jobs._jobs if job._processes]) < 2: time.sleep(0.01)
if (child := os.fork()) == 0:
    fk.scale_min(x, 2.0), layer(x).sum().backward(), fk.explain(x, layer.weight)
    os._exit(0)
deadline = time.monotonic() + 100
while not (ended := os.waitpid(child, os.WNOHANG))[0]:
    if time.monotonic() > deadline: os.kill(child, 9)
    time.sleep(0.05)
print(ended[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_threads_build_for_calls_of_their_own(run_python):
    """The child needs the same libraries: it waits for no thread, and for no longer than it takes."""
    assert run_python(FORK_LATER).strip() == "0"


# ---- libraries for other machines ----


@pytest.fixture
def few(monkeypatch):
    """Prebuild two libraries in place of some hundred."""
    from fused_kernels import prebuilt

    def libraries(with_cuda):
        yield build.Library(**fk.rungs["scale_min"].library("float32"))
        if with_cuda:
            yield build.Library(**fk.rungs["scale_min_coalesced"].library("float32"))

    monkeypatch.setattr(prebuilt, "_libraries", libraries)


WITHOUT_A_COMPILER = """
import torch, fused_kernels as fk
x = torch.randn(1, 3, 5, 5)
rung = fk.rungs["scale_min"]
print(rung.why_unavailable(dtype=x.dtype), rung(x, 2.0).equal(torch.min(x * 2, 1, True).values))
print(rung.why_unavailable(dtype=torch.float16))
"""


def test_prebuilt_libraries_need_no_compiler_where_they_run(fresh, few, run_python):
    made = fk.prebuild(fresh / "ready")
    assert len(made) == len(toolchain.cpu_levels())
    before = {path: path.stat().st_mtime_ns for path in made}
    assert fk.prebuild(fresh / "ready") == made
    assert {path: path.stat().st_mtime_ns for path in made} == before
    (fresh / "bin").mkdir()
    where = {"FUSED_KERNELS_CACHE": str(fresh / "ready"), "PATH": str(fresh / "bin"), "CXX": "nothing"}
    first, second = run_python(WITHOUT_A_COMPILER, **where).splitlines()
    assert first == "None True"
    assert "no C++ compiler" in second


def test_a_prebuilt_library_goes_before_one_that_is_built_here(fresh, few, monkeypatch):
    monkeypatch.setenv("FUSED_KERNELS_CACHE", str(fresh / "ready"))
    wanted = fk.rungs["scale_min"].library("float32")
    native = build.make(**wanted)
    made = fk.prebuild(fresh / "ready")
    assert native not in made
    assert build.make(**wanted) in made


def test_a_prebuilt_library_is_for_cpus_that_can_run_it(fresh, few, monkeypatch):
    monkeypatch.setenv("FUSED_KERNELS_CACHE", str(fresh / "ready"))
    made = fk.prebuild(fresh / "ready")
    monkeypatch.setattr(toolchain, "cpu_features", lambda: "flags : fpu sse2")
    if len(toolchain.cpu_levels()) > 1:
        assert toolchain.cpu_levels_here() == []
        assert build.Library(**fk.rungs["scale_min"].library("float32"))._find_prebuilt() is None
    assert made


@pytest.mark.skipif(toolchain.cuda_toolkit() is None or torch.version.cuda is None, reason="no nvcc, or torch without CUDA")
def test_prebuilt_gpu_libraries_serve_what_they_were_made_for(fresh, few, monkeypatch):
    monkeypatch.setenv("FUSED_KERNELS_CACHE", str(fresh / "ready"))
    made = fk.prebuild(fresh / "ready", archs=["90", "80"])
    (fat,) = (path for path in made if "sm_80.sm_90a" in path.name)
    rung = fk.rungs["scale_min_coalesced"]
    for visible, found in (([(9, 0)], fat), ([(8, 6), (9, 0)], fat), ([(10, 0)], None)):
        monkeypatch.setattr(toolchain, "visible_architectures", lambda visible=visible: [*map(toolchain.architecture, visible)])
        assert build.Library(**rung.library("float32"))._find_prebuilt() == found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(toolchain, "visible_architectures", lambda: ["90a"])
    monkeypatch.setattr(toolchain, "why_no_compiler", lambda: "no C++ compiler")
    assert rung.why_unavailable(dtype=torch.float32) is None
    assert rung.why_unavailable(dtype=torch.float16) == "no C++ compiler"


@pytest.mark.parametrize("archs", ["90a", ["sm_90"], [90], ["70"], ["999"]])
def test_prebuild_says_which_architectures_it_takes(tmp_path, archs):
    if torch.version.cuda is None or toolchain.cuda_toolkit() is None:
        pytest.skip("no nvcc, or torch without CUDA")
    with pytest.raises(ValueError, match="archs: expected") as error:
        fk.prebuild(tmp_path, archs)
    assert_one_sentence(str(error.value))


def test_prebuild_says_that_it_cannot_write():
    with pytest.raises(RuntimeError, match="folder: expected one that can be written") as error:
        fk.prebuild("/proc/nothing", [])
    assert_one_sentence(str(error.value))


def test_prebuild_makes_every_library():
    """All that a process may load, one for each CPU or GPU that it is made for."""
    from fused_kernels import prebuilt

    names = {library.name for library in prebuilt._libraries(True)}
    assert names == {"from_winners", "auto", "plans"} | {
        rung.name for rung in (*rungs.LADDER, rungs.COPY, *rungs.BACKWARD) if rung.device and not rung.in_triton
    }
    assert len([*prebuilt._libraries(True)]) > len([*prebuilt._libraries(False)])


def test_doctor_leaves_prebuilt_libraries(fresh, few, monkeypatch, capsys):
    monkeypatch.setenv("FUSED_KERNELS_CACHE", str(fresh / "ready"))
    made = fk.prebuild(fresh / "ready")
    main(["doctor", "--clean"])
    assert all(places.is_whole(path) for path in made)
