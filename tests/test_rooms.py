"""Who may import whom: the package's modules stand in an order, and imports point downwards."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fused_kernels"
MAX_LINES = 450

# Bottom to top: a module imports only what stands before it. A new module gets its place here.
ORDER = [
    "files",
    "console",
    "progress",
    "reference",
    "arguments",
    "problem",
    "triton_kernels.__init__",
    "triton_kernels.common",
    "triton_kernels.conv_triton_plan",
    "triton_kernels.conv_triton",
    "triton_kernels.scale_min_triton",
    "jobs",
    "places",
    "toolchain",
    "build",
    "registry",
    "sharding",
    "subclasses",
    "flops",
    "dispatch",
    "rungs",
    "plans",
    "cleaning",
    "prebuilt",
    "measured",
    "candidates",
    "estimates",
    "choice",
    "gradients",
    "composite",
    "trials",
    "operators",
    "auto",
    "ops",
    "modules",
    "bounds",
    "check",
    "export",
    "maxout",
    "bench.records",
    "bench.views",
    "plots",
    "tables",
    "bench.report",
    "bench.environment",
    "bench.workloads",
    "bench.clock",
    "bench.peers",
    "bench.limits",
    "bench.comparison",
    "bench.forward",
    "bench.training",
    "bench.suite",
    "bench.regret",
    "bench.fit",
    "bench.choices",
    "bench.__init__",
    "__init__",
    "__main__",
]


def modules(folder):
    """Find a package's modules by their names inside it: ``ops``, ``bench.clock``, ``bench.__init__``."""
    return {".".join(path.relative_to(folder).with_suffix("").parts): path for path in sorted(folder.rglob("*.py"))}


def imports(folder):
    """Read from the sources which of its own modules each module imports, inside functions too.

    Not counted: that a sub-module's import first runs its package's ``__init__``.
    """
    files = modules(folder)
    return {
        name: _imports_of(name, ast.parse(path.read_text(encoding="utf-8")), folder.name, files) for name, path in files.items()
    }


def _imports_of(name, tree, package, files):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(
                _named([package, *alias.name.split(".")[1:]], files) for alias in node.names if _is_in(package, alias.name)
            )
        elif isinstance(node, ast.ImportFrom):
            here = [package, *name.split(".")[:-1]]
            base = here[: len(here) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            if base and base[0] == package:
                found.update(_named([*base, alias.name], files) for alias in node.names)
    return found - {name, None}


def _is_in(package, name):
    return name.split(".")[0] == package


def _named(path, files):
    """Give the module that a dotted path leads to: itself, a package's ``__init__``, or what holds the name at its end."""
    inside = path[1:]
    for parts in (inside, inside[:-1]):
        for candidate in (".".join(parts), ".".join([*parts, "__init__"])):
            if candidate in files:
                return candidate
    return None


def unplaced(folder, order):
    """Name in sentences the modules that have no place in the order."""
    return [
        f"{name}: expected a place in the order of tests/test_rooms.py, got a module that has none"
        for name in modules(folder)
        if name not in order
    ]


def arrows_upwards(folder, order):
    """Name in sentences the imports of what does not stand lower."""
    place = {name: number for number, name in enumerate(order)}
    return [
        f"{name} imports {other}, which stands above it"
        for name, others in imports(folder).items()
        for other in sorted(others)
        if name in place and other in place and place[other] > place[name]
    ]


def circle(folder):
    """Give a circle of imports as a list of modules, the first one again at the end; an empty list where there is none."""
    arrows, done = imports(folder), set()

    def walk(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(arrows[name]):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    for name in arrows:
        if found := walk(name, []):
            return found
    return []


def too_long(folder, limit):
    """Give the number of lines of each module that has more than the limit."""
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules(folder).items()}
    return {name: count for name, count in lines.items() if count > limit}


def test_every_module_has_its_place():
    assert not unplaced(PACKAGE, ORDER)


def test_imports_point_downwards():
    assert not arrows_upwards(PACKAGE, ORDER)


def test_imports_make_no_circle():
    assert not circle(PACKAGE)


def test_modules_are_short():
    assert not too_long(PACKAGE, MAX_LINES)


@pytest.fixture
def house(tmp_path):
    """Give a function that writes a small package, by default one that is in order."""

    def write(**changes):
        texts = {
            "bottom": "import torch",
            "sub.__init__": '"""A sub-package."""',
            "sub.inner": "from .. import bottom",
            "middle": "from .bottom import value\nfrom house.sub.inner import value",
            "__init__": "from .middle import value",
            "__main__": "from . import value, middle",
        }
        for name, text in (texts | changes).items():
            path = (tmp_path / "house").joinpath(*name.split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path / "house"

    return write


HOUSE = ["bottom", "sub.__init__", "sub.inner", "middle", "__init__", "__main__"]


class TestTheChecksThemselves:
    def test_read_imports_of_every_form(self, house):
        assert imports(house()) == {
            "bottom": set(),
            "sub.__init__": set(),
            "sub.inner": {"bottom"},
            "middle": {"bottom", "sub.inner"},
            "__init__": {"middle"},
            "__main__": {"__init__", "middle"},
        }
        assert imports(house(middle="import house.sub.inner, os.path\nfrom .sub import inner"))["middle"] == {"sub.inner"}
        assert imports(house(middle="from . import sub\nfrom house import value"))["middle"] == {"sub.__init__", "__init__"}

    def test_pass_a_package_that_is_in_order(self, house):
        folder = house()
        assert not unplaced(folder, HOUSE)
        assert not arrows_upwards(folder, HOUSE)
        assert not circle(folder)
        assert not too_long(folder, 10)

    def test_find_an_arrow_upwards_inside_a_function(self, house):
        folder = house(bottom="def late():\n    from .middle import value\n")
        assert arrows_upwards(folder, HOUSE) == ["bottom imports middle, which stands above it"]
        assert set(circle(folder)) == {"bottom", "middle"}

    def test_find_a_circle_through_the_package_itself(self, house):
        folder = house(**{"sub.inner": "import house"})
        assert arrows_upwards(folder, HOUSE) == ["sub.inner imports __init__, which stands above it"]
        assert set(circle(folder)) == {"__init__", "middle", "sub.inner"}

    def test_name_a_module_without_a_place(self, house):
        (sentence,) = unplaced(house(attic="import os"), HOUSE)
        assert sentence == "attic: expected a place in the order of tests/test_rooms.py, got a module that has none"

    def test_count_lines(self, house):
        assert too_long(house(middle="\n" * 11), 10) == {"middle": 11}
