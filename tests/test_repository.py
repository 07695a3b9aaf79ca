"""The repository agrees with itself: environments, README and records, notebooks, sources."""

import ast
import csv
import re
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from conftest import project_files
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from fused_kernels import build, tables
from fused_kernels.bench import records
from fused_kernels.rungs import BACKWARD, COPY, LADDER

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
TEXT = {".py", ".md", ".toml", ".yml", ".txt", ".cpp", ".cu", ".cuh", ".h", ".ipynb", ".csv", ""}


def requirements(extra=None):
    """Give the names that pip would be asked for, extras of the package itself followed."""
    found = set()
    for line in PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            found.update(*(requirements(inner) for inner in requirement.extras))
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def text_files():
    return [path for path in project_files() if path.suffix in TEXT]


def test_environment_installs_this_package_with_extras_that_exist():
    (pip,) = (entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))
    (editable,) = (line for line in pip if line.startswith("-e"))
    extras = re.fullmatch(r"-e \.\[(.+)\]", editable)[1].split(",")
    assert {"dev", "cuda"} <= set(extras) <= set(PROJECT["optional-dependencies"])
    assert "-c constraints.txt" in pip


def test_environment_brings_a_compiler_and_a_python_that_the_package_accepts():
    conda = dict(re.match(r"([\w-]+)=?(.*)", entry).groups() for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str))
    assert conda["python"] in SpecifierSet(PROJECT["requires-python"])
    assert {"pip", "make", "cxx-compiler"} <= set(conda)


def test_constraints_pin_every_requirement_to_a_version_that_it_accepts():
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[\w.+]+", str(requirement.specifier)), line
            pinned.setdefault(canonicalize_name(requirement.name), []).append(str(requirement.specifier)[2:])
    assert pinned["torch"] == ["2.11.0"]
    for extra in (None, *PROJECT["optional-dependencies"]):
        assert requirements(extra) <= set(pinned)
        for line in PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]:
            for version in pinned.get(canonicalize_name(Requirement(line).name), []):
                assert Requirement(line).specifier.contains(version), line


def test_nvcc_follows_the_cuda_libraries_of_torch():
    """torch requires one version of the same package: another one here would replace torch."""
    (ours,) = map(Requirement, PROJECT["optional-dependencies"]["cuda"])
    assert not ours.specifier
    of_torch = [Requirement(line) for line in metadata.requires("torch") if line.startswith(ours.name)]
    if torch.version.cuda and not of_torch:
        pytest.skip("this build of torch requires other packages")
    assert all(str(requirement.specifier).startswith("==") for requirement in of_torch)


def test_pre_commit_runs_the_ruff_that_is_pinned():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert repository["rev"] == f"v{pinned}"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]
    assert all("jupyter" in hook["types_or"] for hook in repository["hooks"])


PARTS = ("", "training", "layers", "training-layers")


def recorded(part):
    return records.read(data=records.data_dir() / part)


def test_readme_opens_with_the_ladders_figure_and_recorded_table(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    tables.update_readme(copy, recorded(""))
    assert copy.read_text(encoding="utf-8") == text, "README.md's table differs from figures/data: run make figures"
    figure = re.search(r"(!\[|<img )[^\n]*figures/\S+\.png", text)
    assert figure.start() < text.index(tables.BEGIN) < text.index("\n## ")


def test_figures_page_is_made_from_the_records_and_shows_every_machine_and_picture():
    page = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
    assert page == tables.figures_page(*map(recorded, PARTS)), "figures/README.md differs from figures/data: run make figures"
    for part in PARTS:
        for device in {r.device for r in recorded(part)}:
            assert device in page
    pictures = re.findall(r"!\[([^\]]+)\]\((.+?)\)", page)
    assert sorted(file for _, file in pictures) == sorted(path.name for path in (ROOT / "figures").glob("*.png"))
    assert all(len(alt) > 40 for alt, _ in pictures)


def test_recorded_gradients_are_as_exact_as_the_librarys():
    """The page of figures says so."""
    backward = records.select(recorded("training"), direction="backward")
    for r in backward:
        same = {name: getattr(r, name) for name in ("run", "operator", "precision", "layout")}
        (library,) = records.select(backward, rung="library", **same)
        assert r.rms_error <= 1.01 * library.rms_error


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", "figures/README.md", *(f"notebooks/{n.name}" for n in NOTEBOOKS)]
)
def test_links_lead_to_files(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".ipynb"):
        text = "\n".join(cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#\s]+)|(?:src|href)=\"([^\"#]+)", text)
    local = [
        link for pair in links for link in pair if link and "://" not in link and not link.startswith(("mailto:", "data:"))
    ]
    missing = [link for link in local if not ((ROOT / file).parent / link).exists()]
    assert not missing


def test_notebooks_are_there():
    assert [n.name[:2] for n in NOTEBOOKS][:4] == ["00", "01", "02", "03"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_is_valid_and_runs_anywhere(self, path):
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3"

    def test_was_executed_top_to_bottom(self, path):
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert all(cell.source.strip() for cell in cells)

    def test_stores_no_error_and_no_stderr(self, path):
        outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
        assert outputs
        assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]

    def test_skips_nothing(self, path):
        tags = {tag for cell in nbformat.read(path, 4).cells for tag in cell.metadata.get("tags", [])}
        assert tags <= {"nbval-ignore-output"}


def test_inline_assembly_is_in_ptx_headers_alone():
    """One wrapper per instruction, under include/ptx."""
    sources = [path for path in build.CSRC.rglob("*") if path.is_file() and "ptx" not in path.parts]
    assert sources
    assert not [
        path for path in sources if re.search(r"\b(__)?asm(__)?\b\s*(volatile)?\s*\(", path.read_text(encoding="utf-8"))
    ]


def calls_without_encoding(tree):
    """Find the calls that read or write text in the encoding of the locale."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        owner = getattr(getattr(call.func, "value", None), "id", "")
        given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
        words = [*(getattr(argument, "value", None) for argument in call.args), given.get("mode")]
        modes = [word for word in words if isinstance(word, str) and re.fullmatch(r"[rwaxbt+]+", word)]
        if name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
            binary_by_default = owner in ("gzip", "bz2", "lzma", "tempfile")
            is_text = "t" in "".join(modes) if binary_by_default else "b" not in "".join(modes)
            is_text &= (owner, name) != ("os", "open") and owner not in ("tarfile", "zipfile")
        else:
            is_text = name in ("read_text", "write_text") or given.keys() & {"text", "universal_newlines"}
        if is_text and "encoding" not in given and None not in given:
            yield call.lineno


@pytest.mark.parametrize("line", ["p.read_text()", "open(p)", "p.open('a')", "gzip.open(p, 'wt')", "run(c, text=True)"])
def test_a_call_without_encoding_is_found(line):
    assert list(calls_without_encoding(ast.parse(line))) == [1]


@pytest.mark.parametrize("line", ["p.read_text(encoding='ascii')", "open(p, 'rb')", "os.open(p, 0)", "gzip.open(p)", "run(c)"])
def test_a_call_of_bytes_or_with_an_encoding_passes(line):
    assert not list(calls_without_encoding(ast.parse(line)))


def test_text_is_read_and_written_in_one_encoding_wherever_the_locale_is_another():
    found = {
        str(path.relative_to(ROOT)): lines
        for path in project_files()
        if path.suffix == ".py" and (lines := [*calls_without_encoding(ast.parse(path.read_text(encoding="utf-8")))])
    }
    assert not found


def test_no_file_names_a_place_on_one_machine():
    found = []
    for path in text_files():
        if path != Path(__file__):
            hits = re.findall(r"(?<![\w.$}])/(?:work|root|home|Users)/\S*", path.read_text(encoding="utf-8", errors="ignore"))
            found += [(str(path.relative_to(ROOT)), hit) for hit in hits]
    assert not found


def test_ladder_and_sources_agree():
    """A rung's name is its file's name, and every kernel is on the ladder, of the backward pass, or the layout copy."""
    files = {path for path in build.CSRC.rglob("*") if path.suffix in (".cpp", ".cu")}
    files -= {*(build.CSRC / "autograd").glob("*.cpp"), build.CSRC / "cpu" / "plans.cpp"}  # which have no kernel
    triton_kernels = build.CSRC.parent / "triton_kernels"
    files |= {*triton_kernels.glob("*_triton.py")}
    assert files == {rung.source_file for rung in (*LADDER, COPY, *BACKWARD) if rung.device}
    assert len({rung.name for rung in LADDER}) == len(LADDER)


@pytest.mark.parametrize("rung", [rung.name for rung in LADDER])
def test_every_rung_says_its_idea(rung):
    (rung,) = (r for r in LADDER if r.name == rung)
    assert rung.operator in ("scale_min", "conv2d_scale_min")
    assert 10 < len(rung.idea) < 120
    if rung.in_triton:
        assert "\n@triton.jit" in rung.source
    elif rung.device:
        assert re.search(rf'm\.impl\((FORWARD|OPERATOR)\("{rung.name}"', rung.source)
        assert "FUSED_KERNELS_NAMESPACE" in rung.source


def test_records_are_of_rungs_and_peers_that_are_named():
    known = {rung.name for rung in LADDER} | {"eager", "compile", "compile-max-autotune", "cudnn-graph", "library"}
    known |= {rung.name for rung in BACKWARD}
    for record in [r for part in PARTS for r in recorded(part)]:
        also = {"host": {"operator"}, "ceiling": {"copy", "read", "read-sum", "matmul"}}.get(record.operator, set())
        assert record.rung in known | also
        assert record.correct
        assert 0 < record.p20_ms <= record.p50_ms <= record.p80_ms


@pytest.mark.parametrize("folder", ["triton-tiles", "triton-layers"])
def test_tritons_records_name_their_commit(folder):
    for file in (records.data_dir() / folder).glob("*.csv"):
        with file.open(newline="", encoding="utf-8") as lines:
            assert all(
                re.fullmatch(r"[0-9a-f]{7,}", row["commit"]) and float(row["p50_us"]) > 0 for row in csv.DictReader(lines)
            )


def test_errors_beside_outliers_are_of_rungs_that_are_named_and_the_last_run_keeps_the_promise():
    for file in (records.data_dir() / "outliers").glob("*.csv"):
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        for row in rows:
            assert row["machine"] == file.stem
            assert row["rung"] in {rung.name for rung in LADDER} | {"eager"}
            assert row["rung"] == "eager" or row["run"] != rows[-1]["run"] or float(row["share"]) <= 1


def test_profiles_are_of_kernels_that_are_named():
    files = [*(records.data_dir() / "profiles").glob("*.csv")]
    assert files
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                assert row["machine"] == file.stem
                assert row["kernel"] in {rung.name for rung in LADDER} | {"the bare main loop"}
                assert float(row["ms"]) > 0
                assert all(0 < float(share) < 100 for name, share in row.items() if name.endswith("pct"))
