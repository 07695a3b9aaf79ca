"""``python -m fused_kernels doctor | bench | figures | export``."""

import argparse
import contextlib
import getpass
import importlib.util
import os
import platform
import re
import shlex
import shutil
from pathlib import Path

import torch

from . import __version__, bench, build, cleaning, console, export, files, measured, places, toolchain
from .bench import records
from .candidates import FUSED, Hardware, read_hardware
from .check import DTYPES
from .rungs import LADDER


def clean(_):
    """Remove builds that this version would not load here."""
    try:
        count, size = cleaning.clean()
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    print(f"removed {count} old builds, {size / 1e6:.1f} MB, from {_in_home(places.cache_dir())}")


def doctor(_):
    """Say what this machine has, and for each rung whether it runs here, else what is missing."""
    broken = {"cpu": toolchain.why_no_compiler() or build.why_nothing_builds("cpu")}
    try:
        toolkit = toolchain.cuda_toolkit()
        found = f"{'.'.join(map(str, toolkit.version))} in {toolkit.home}" if toolkit else "none: nvcc was not found"
        broken["cuda"] = broken["cpu"] or (build.why_nothing_builds("cuda") if toolkit else None)
    except RuntimeError as error:
        found = broken["cuda"] = error
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "fused_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none: a build for CPUs",
        "GPU": ", ".join(gpus) or "none that torch sees",
        "C++ compiler": _compiler(broken["cpu"]),
        "CUDA toolkit": found,
        "built kernels": places.why_none() or places.why_not_wanted() or _in_home(places.cache_dir()),
        "Triton": toolchain.why_no_triton() or "ready",
        "torch.compile": _why_no_torch_compile(broken["cpu"]) or "ready",
    }
    for name, fact in facts.items():
        print(f"{name:<22}{fact}")
    print()
    for rung in LADDER:
        try:
            state = _state(rung, broken.get(rung.device))
        except RuntimeError as error:
            state = broken.get(rung.device) or error
        print(f"{rung.name:<22}{state}")


def _state(rung, broken):
    """Say whether a rung runs here, or for which dtypes alone, or why not."""
    if missing := rung.why_unavailable():
        ready = [str(dtype).removeprefix("torch.") for dtype in rung.dtypes if not rung.why_unavailable(dtype=dtype)]
        return f"ready for {', '.join(ready)} alone: {missing}" if ready else missing
    if rung.device is None:
        return "ready"
    built = [build.find(**rung.library(*variant)) for variant in rung.variants]
    # What is built already needs no compiler.
    if broken and not all(built):
        return broken
    return next(filter(None, (build.why_not_loading(library) for library in built if library)), "ready")


def _compiler(broken):
    """Name the C++ compiler, and its version; or say what is wrong with it."""
    command = toolchain.cxx()
    path = shutil.which(command[0])
    if not path:
        return broken
    with contextlib.suppress(RuntimeError):
        version = next(iter(toolchain.compiler_version().splitlines()), "").strip()
        return "; ".join(filter(None, [shlex.join([path, *command[1:]]), version, broken]))
    return "; ".join(filter(None, [path, broken]))


def _why_no_torch_compile(broken):
    """Say in one sentence what torch.compile lacks here beside this package's needs, or None."""
    if broken:
        return broken
    try:
        getpass.getuser()
    except (KeyError, OSError):
        # It keeps what it compiles in a folder of the user's name.
        if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            return "it lacks the user's name; set USER, or TORCHINDUCTOR_CACHE_DIR to a folder"
    if not (header := toolchain.python_header()).exists():
        return f"it lacks {header}; install Python's headers (Debian: apt install python3-dev)"
    if torch.cuda.is_available() and not importlib.util.find_spec("triton"):
        return "it lacks Triton for the GPU; pip install triton"
    return None


def _in_home(path):
    with contextlib.suppress(RuntimeError, ValueError):
        return Path("~", path.relative_to(Path.home()))
    return path


def run_bench(options):
    """Check and time every rung that runs here beside its peers."""
    if options.choices:
        return run_choices(options)
    if options.draw is not None or options.fit or options.folds or options.anew:
        raise SystemExit("--draw, --anew, --fit, --folds: expected --choices beside them")
    dtypes = options.dtypes and [getattr(torch, name) for name in options.dtypes]
    # Apart, for the newest run of a machine's file is what all figures show.
    apart = "-".join(name for name in ("training", "layers") if getattr(options, name))
    data = options.data or records.data_dir() / apart
    machine = options.machine or bench.machine(options.device)
    if options.record:
        if reason := files.why_not(records.file_of(machine, data)):
            raise SystemExit(f"--record: expected a folder for records that can be written, got {data}: {reason}")
        # What tells of permissions does not tell of all that refuses.
        data.mkdir(parents=True, exist_ok=True)
    keep = (lambda part: records.append(part, data)) if options.record else None
    how = {"quick": options.quick, "layers": options.layers, "training": options.training, "machine": machine}
    new = bench.run(options.device, dtypes=dtypes, each=keep, **how)
    print(bench.summary(new))
    if options.record:
        print(f"\nrecorded in {records.file_of(machine, data)}")


def run_choices(options):
    """Time every candidate on many layers, or fit the estimates to what was timed, and say how good the choice is."""
    from .bench import choices, fit, regret

    if options.fit:
        for file in sorted(measured.FOLDER.glob("*.csv")):
            if reason := files.why_not(file.with_suffix(".npz")):
                raise SystemExit(f"--fit: expected a folder that can be written, got {measured.FOLDER}: {reason}")
            rows, hardware = measured.read(file), Hardware(*measured.hardware_facts(file))
            print(fit.fit(rows, hardware))
            if options.folds:
                print(fit.lost_on_layers_left_out(rows, hardware, options.folds))
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench --choices: expected a CUDA GPU, torch sees none on this machine")
    rows = choices.run(options.draw, options.count, options.record, anew=options.anew)
    if not rows:
        print("nothing was timed that was not recorded before")
    elif options.draw is not None:
        print(regret.summary(regret.judge(rows, read_hardware(torch.device("cuda", torch.cuda.current_device())))))


def figures(options):
    """Draw every machine's figures from its newest run, and write the tables of README.md and figures/README.md."""
    from . import plots, tables
    from .bench import regret

    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("figures: expected matplotlib, found none; pip install 'fused-kernels[notebooks]'")
    data = options.data or records.data_dir()
    try:
        parts = "", "training", "layers", "training-layers"
        forward, training, layers, training_layers = (records.read(data=data / part) for part in parts)
    except ValueError as error:
        raise SystemExit(f"--{error}") from error
    if not forward:
        raise SystemExit(f"no records in {data}; make some with: python -m fused_kernels bench --record")
    out = options.out or data.parent
    page, readme = out / "README.md", out.parent / "README.md"
    if reason := files.why_not(page):
        raise SystemExit(f"--out: expected a folder that can be written, got {out}: {reason}")
    if page.exists() and not page.read_text(encoding="utf-8").startswith(tables.GENERATED):
        raise SystemExit(f"--out: expected a folder whose README.md was made by this command, got {page}, written by someone")
    has_ladder = readme.exists() and tables.BEGIN in readme.read_text(encoding="utf-8")
    if has_ladder and (reason := files.why_not(readme)):
        raise SystemExit(f"--out: expected a folder beside a README.md that can be written, got {out}: {reason}")
    for path in plots.save_all(forward, out, training):
        print(path)
    files.write(page, tables.figures_page(forward, training, layers, training_layers))
    print(page)
    if has_ladder:
        tables.update_readme(readme, forward, regret.sentences(data / "draws"))
        print(readme)


def run_export(options):
    """Print a rung as one file in KernelBench's form."""
    print(export.kernelbench(options.rung), end="")


def _device(name):
    """Read an option that names a device on which something is timed."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cuda or cpu, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"expected a GPU that torch sees on this machine, got {name!r}")
    return device


def _file_name(name):
    """Read an option that becomes a file's name."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise argparse.ArgumentTypeError(f"expected letters, digits, dots and dashes, got {name!r}")
    return name


def _at_least(least):
    """Make a function that reads an option that is a count."""

    def read(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return read


def main(arguments=None):
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m fused_kernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="doctor | bench | figures | export")
    parser_doctor = commands.add_parser("doctor", help=doctor.__doc__)
    parser_doctor.add_argument("--clean", dest="command", action="store_const", const=clean, help=clean.__doc__)
    parser_doctor.set_defaults(command=doctor)

    parser_bench = commands.add_parser("bench", help=run_bench.__doc__)
    parser_bench.add_argument("--record", action="store_true", help="append the measurements to figures/data")
    parser_bench.add_argument("--quick", action="store_true", help="float32 alone, without sustained times and max-autotune")
    parser_bench.add_argument(
        "--layers", action="store_true", help="conv2d_scale_min alone, on many layers of networks; records: figures/data/layers"
    )
    parser_bench.add_argument(
        "--training", action="store_true", help="training steps, of the whole model (figures/data/training) or of layers"
    )
    parser_bench.add_argument(
        "--choices",
        action="store_true",
        help="every candidate on many layers; records: fused_kernels/choices, figures/data/draws",
    )
    parser_bench.add_argument("--draw", type=int, metavar="SEED", help="with --choices: on random layers, beside torch.compile")
    parser_bench.add_argument("--count", type=_at_least(1), default=34, help="with --draw: how many layers")
    again = "with --choices: time these once more, as they have become faster"
    parser_bench.add_argument("--anew", nargs="+", choices=FUSED["cuda"], default=(), metavar="RUNG", help=again)
    parser_bench.add_argument("--fit", action="store_true", help="with --choices: make the estimates' networks from the record")
    parser_bench.add_argument(
        "--folds", type=_at_least(2), help="with --fit: also say what is lost on layers left out, in so many turns"
    )
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES["conv2d_scale_min"]]
    parser_bench.add_argument("--dtypes", nargs="+", choices=names, help="which to run, in this order")
    parser_bench.add_argument("--device", type=_device, help="cuda or cpu; by default the GPU if a CUDA rung runs on it")
    parser_bench.add_argument("--machine", type=_file_name, help="name for the records, by default the GPU's, or cpu")
    parser_bench.add_argument("--data", type=Path, help="folder of the records, by default figures/data")
    parser_bench.set_defaults(command=run_bench)

    parser_figures = commands.add_parser("figures", help=figures.__doc__)
    parser_figures.add_argument("--out", type=Path, help="folder of the pictures and their page, by default figures")
    parser_figures.add_argument("--data", type=Path, help="folder of the records, by default figures/data")
    parser_figures.set_defaults(command=figures)

    parser_export = commands.add_parser("export", help=run_export.__doc__)
    parser_export.add_argument("rung", nargs="?", choices=export.EXPORTABLE, default="conv_wgmma", help="by default conv_wgmma")
    parser_export.set_defaults(command=run_export)

    options = parser.parse_args(arguments)
    options.command(options)


if __name__ == "__main__":
    console.run(main)
