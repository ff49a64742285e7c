"""The rules of docs/ARCHITECTURE.md about who may import whom, held."""

import ast
import inspect
import re
import subprocess
import sys
import types
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kvstore
import turboquant

ROOT = Path(kvstore.__file__).parent.parent

# Who may import whom: a package imports from lower lines only.
ORDER = [
    {"errors"},
    {"format", "blas"},
    {"storage", "codecs"},
    {"caches"},
    {"fingerprint"},
    {"ops"},
    {"remote"},
    {"store"},
    {"models"},
    {"server"},
    {"cli"},
    {"__main__"},
]
OPS = {  # and inside of ops
    "calibrate": {"bases"},
    "save": {"bases", "commit"},
    "commit": {"quality", "upkeep.prune"},
    "explain": {"load"},
    "transfer.admit": {"commit"},
    "adopt": {"commit", "save"},
    "recompress": {"bases", "commit", "save"},
    "transfer.import_bundle": {"bases", "transfer.admit"},
    "load": {"bases"},
    "near": {"load"},
    "recognise": {"load"},
    "transfer.export_bundle": {"bases"},
    "stats": {"speeds"},
    "usage": {"load", "scores", "speeds", "worth"},
    "worth": {"speeds"},
    "upkeep.doctor": {"upkeep.selftest"},
    "upkeep.prune": {"worth"},
    "upkeep.purge": {"upkeep.check", "upkeep.prune"},
}
# Where more than the name of the module says is imported from a package of others;
# `top` is the module level, so at import time.
ALLOWED = {
    "apsw": {"storage.index"},
    "click": {"cli"},
    "rich": {"cli"},
    "mlx_lm": {"caches", "fingerprint", "models", "server", "cli"},
    "transformers": {"models", "server"},
    "turboquant": {
        *("codecs.turbo", "codecs.planes", "codecs.fit", "codecs.kept"),
        *("caches", "models"),
    },
    "zstandard": {"codecs.zstd"},
    "safetensors": {"ops.upkeep.check"},
    "obstore": {"remote.client"},
    "cryptography": {"format.signature", "storage.cipher"},
    "keyring": {"storage.vault"},
    "pyrage": {"storage.vault"},
}
ALLOWED_AT_TOP = {
    "mlx_lm": {
        "models.calibrate",
        "models.session",
        "models.generate",
        "server.generator",
        "server.prompt_cache",
        "server.provider",
    },
    "obstore": set(),
    "cryptography": set(),
    "keyring": set(),
    "rich": set(),
    "transformers": set(),
}


def modules(package):
    """Return the syntax tree of every module of a package, by dotted name."""
    folder = ROOT / package
    found = {}
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def is_checking(node):
    """Say whether a statement is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def statements(tree, *, top):
    """Yield a module's nodes; with `top`, only those that run when it is imported."""
    for node in ast.iter_child_nodes(tree):
        is_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if top and (is_later or is_checking(node)):
            continue
        yield node
        yield from statements(node, top=top)


def imports(name, tree, *, top=False, package="kvstore"):
    """Yield what a module imports, as dotted names."""
    home = [package, *name.split(".")]
    is_package = (ROOT.joinpath(*home) / "__init__.py").exists()
    for node in statements(tree, top=top):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + is_package] if node.level else []
            base = [*base, *(node.module or "").split(".")]
            base = [part for part in base if part]
            for alias in node.names:
                full = [*base, alias.name]
                is_module = ROOT.joinpath(*full).with_suffix(".py").exists()
                is_module |= ROOT.joinpath(*full).is_dir()
                yield ".".join(full if is_module else base)


def part_of(dotted):
    """Return the part of kvstore that a module is in: itself, or its package."""
    return dotted.split(".")[0]


OURS = modules("kvstore")
THEIRS = modules("turboquant")


def inner_imports(name):
    """Return what a module imports of kvstore, without the package's own name."""
    found = {full for full in imports(name, OURS[name]) if full.startswith("kvstore")}
    return {full.removeprefix("kvstore").removeprefix(".") for full in found}


@pytest.mark.parametrize("name", sorted(OURS))
def test_imports_go_down(name):
    """A package imports only from the packages below it."""
    level = {part: number for number, parts in enumerate(ORDER) for part in parts}
    if name == "__init__":
        return  # it offers names and imports none of them
    mine = part_of(name)
    above = {
        other
        for other in inner_imports(name) - {"", "__init__"}
        if part_of(other) != mine and level[part_of(other)] >= level[mine]
    }
    assert set() == above


@pytest.mark.parametrize("name", sorted(n for n in OURS if n.startswith("ops.")))
def test_jobs_know_few_other_jobs(name):
    """A job calls another job only where the list says so."""
    job = name.removeprefix("ops.")
    known = {n for n in inner_imports(name) if n.startswith("ops.")}
    assert {n.removeprefix("ops.") for n in known} <= OPS.get(job, set())


def test_there_are_no_cycles():
    """No module imports itself by way of others, not even inside functions."""
    graph = {name: inner_imports(name) - {name, "", "__init__"} for name in OURS}
    del graph["__init__"]
    order = list(TopologicalSorter(graph).static_order())
    assert set(graph) <= set(order)


def test_chains_of_imports_are_short():
    """Below no module lie more than nine others, one on the other, when it is read."""
    graph = {
        f"{package}.{name}".removesuffix(".__init__"): set(
            imports(name, tree, top=True, package=package)
        )
        for package, trees in (("kvstore", OURS), ("turboquant", THEIRS))
        for name, tree in trees.items()
    }

    @cache
    def level(name):
        below = graph[name].intersection(graph) - {name}
        return 1 + max(map(level, below), default=0)

    assert max(map(level, graph)) <= 10


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_of_others_is_imported_by_few(package):
    """What comes from outside enters at one place, or a few."""
    users = {
        name
        for name, tree in OURS.items()
        for full in imports(name, tree)
        if full.split(".")[0] == package
    }
    allowed = ALLOWED[package]
    assert set() == {n for n in users if n not in allowed and part_of(n) not in allowed}


@pytest.mark.parametrize("package", sorted(ALLOWED_AT_TOP))
def test_what_is_slow_to_import_is_imported_late(package):
    """What takes long to import is imported inside functions."""
    users = {
        name
        for name, tree in OURS.items()
        for full in imports(name, tree, top=True)
        if full.split(".")[0] == package
    }
    assert users <= ALLOWED_AT_TOP[package]


NO_ARRAYS = {"format", "storage", "errors"}


@pytest.mark.parametrize("name", sorted(n for n in OURS if part_of(n) in NO_ARRAYS))
def test_what_keeps_books_knows_no_arrays(name):
    """Files, names, hashes and locations are kept without MLX."""
    found = {full.split(".")[0] for full in imports(name, OURS[name])}
    assert set() == found & {"mlx", "mlx_lm"}


def test_turboquant_does_not_know_kvstore():
    """The mathematics stands alone, and needs mlx-lm only for its live cache."""
    for name, tree in THEIRS.items():
        found = {
            full.split(".")[0] for full in imports(name, tree, package="turboquant")
        }
        assert "kvstore" not in found
        assert name == "kv_cache" or "mlx_lm" not in found


def test_nothing_imports_the_live_cache_at_module_level():
    """`turboquant.kv_cache` brings mlx-lm, so it is imported inside functions."""
    for package, trees in (("kvstore", OURS), ("turboquant", THEIRS)):
        for name, tree in trees.items():
            if name == "models.session":
                continue  # which brings mlx-lm itself
            found = imports(name, tree, top=True, package=package)
            assert "turboquant.kv_cache" not in set(found), (package, name)


CALLS = {"fsync", "fdatasync", "replace", "rename", "renames", "link", "truncate"}


def test_only_one_module_renames_and_syncs():
    """`os.replace`, `os.fsync` and their like are called in `storage.files` only."""
    users = {
        name
        for name, tree in OURS.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and node.attr in CALLS
    }
    assert {"storage.files"} == users


def test_nothing_is_swallowed():
    """No handler takes every error and says nothing."""
    for name, tree in OURS.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                kind = getattr(node.type, "id", None)
                is_broad = node.type is None or kind in ("Exception", "BaseException")
                told = any(
                    isinstance(n, ast.Raise) or getattr(n, "attr", "") == "exception"
                    for n in ast.walk(node)
                )
                assert not is_broad or told or name.startswith("cli"), (
                    name,
                    node.lineno,
                )


@pytest.mark.parametrize("package", ["kvstore", "turboquant"])
def test_every_module_says_what_it_knows(package):
    """Every module has a docstring."""
    bare = {n for n, tree in modules(package).items() if not ast.get_docstring(tree)}
    assert set() == bare


PUBLIC = {
    "ArgumentError", "Chat", "CodecError", "DiskPromptCache", "Entry",
    "EntryExistsError", "EntryNotFoundError", "Explanation",
    "Finding", "Fingerprint", "FingerprintError", "FormatError", "IndexDamagedError",
    "IntegrityError", "KVStoreError", "KeyNotFoundError", "LoadedModel", "Match",
    "Reanchoring", "RemoteError", "SignerError", "Speeds", "Stats",
    "Store", "StoreLockedError",
    "StoreNotFoundError", "Tier", "UnsupportedCacheError", "__version__", "codec_names",
    "get_codec", "register_kind", "save_prompt", "stream_generate", "tier",
}  # fmt: skip


def test_the_public_names_are_these():
    """A name is made public, or taken away, on purpose."""
    assert sorted(PUBLIC) == kvstore.__all__ == dir(kvstore)
    assert {"TurboQuantKVCache", "quantize_prompt_cache"} <= set(dir(turboquant))


def test_every_error_is_public():
    """Whatever the store raises can be caught by name."""
    from kvstore import errors

    raised = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.KVStoreError)
    }
    assert raised <= PUBLIC
    tree = inspect.getdoc(errors)
    assert set() == {name for name in raised if name not in tree}


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_public_name_has_a_docstring(name):
    """Every public name says what it is, and its public methods too."""
    value = getattr(kvstore, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        kinds = (property, classmethod, staticmethod, types.FunctionType)
        bare = [
            key
            for key, member in vars(value).items()
            if not key.startswith("_")
            and isinstance(member, kinds)
            and not member.__doc__
        ]
        assert [] == bare


def test_an_unknown_name_is_an_attribute_error():
    """The lazy package has no more names than it says."""
    with pytest.raises(AttributeError, match="no attribute 'Stoore'"):
        kvstore.Stoore  # noqa: B018


LIGHT = """
import sys
{statement}
heavy = {{"mlx", "mlx_lm", "numpy", "transformers", "rich", "torch"}}
print(*sorted(heavy & {{name.split(".")[0] for name in sys.modules}}))
"""


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import kvstore", ""),
        ("import kvstore; kvstore.KVStoreError", ""),
        ("import kvstore.cli", ""),
        ("import kvstore; kvstore.Fingerprint", ""),
        ("import kvstore; kvstore.Store", ""),
    ],
)
def test_importing_is_cheap(statement, expected):
    """Nothing heavy is imported before it is needed."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(statement=statement)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert expected == done.stdout.strip()


def test_every_invariant_names_tests_that_exist():
    """The table of invariants points at tests of the suite."""
    table = (
        (ROOT / "docs" / "ARCHITECTURE.md").read_text().partition("## Invariants")[2]
    )
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", table))
    suite = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 10
    assert set() == {name for name in named if f"def {name}(" not in suite}
