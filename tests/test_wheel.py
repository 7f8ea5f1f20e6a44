"""No byte received and no file loaded can run code: looked for in the wheel, as it is installed."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNSAFE = {
    *("eval", "exec", "compile", "__import__", "pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"),
    *("joblib", "jsonpickle", "runpy", "code", "yaml"),
}
UNSAFE_CALLS = {
    *("torch.load", "torch.hub.load", "torch.jit.load", "np.load", "numpy.load", "recv_pyobj", "recv_serialized"),
    *("os.system", "os.popen", "yaml.load", "yaml.unsafe_load"),
}
UNSAFE_WORDS = {("allow_pickle", None), ("shell", True), ("typ", "unsafe"), ("weights_only", False)}
"""Keyword and what it must not be; None: anything."""
IMPORTERS = {  # whoever imports by a name that is computed, and what the name is
    "algos/lazy.py": "of this package's own choice",
    "envs/making.py": "of a package known here, or of the topology: typed on this host, by -t or by --import",
    "console.py": "of this package's own choice",
    "nodes/base.py": "of this package's own choice",
}


def unsafe(source: str) -> Iterator[str]:
    """Names in `source` that load or run what they are given."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.partition(".")[0] in UNSAFE)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in UNSAFE:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in UNSAFE:
                yield name
            case ast.Call(func=ast.Attribute(attr=attr) as func):
                if ast.unparse(func) in UNSAFE_CALLS or attr in UNSAFE_CALLS:
                    yield ast.unparse(func)
            case ast.keyword(arg=str(arg), value=value):
                given = value.value if isinstance(value, ast.Constant) else None
                yield from (arg for word, wrong in UNSAFE_WORDS if word == arg and wrong in (None, given))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """What is installed, built from this checkout; nothing is fetched."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=100)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as found:
        yield found


def test_nothing_in_the_wheel_can_run_what_it_is_sent(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {Path(name).suffix for name in names} <= {".py", ".yaml", ".typed", ".c"}  # and no .pth, .pkl, .pt, .so
    assert all(name.startswith("ddrl_bus/") for name in names)
    sources = {name: wheel.read(name).decode() for name in names}
    found = {name: list(unsafe(text)) for name, text in sources.items() if name.endswith(".py")}
    assert len(found) > 100
    assert {name: words for name, words in found.items() if words} == {}
    assert not any("!!" in text for name, text in sources.items() if name.endswith(".yaml"))
    importers = {name for name, text in sources.items() if "import_module(" in text and name.endswith(".py")}
    assert {name.removeprefix("ddrl_bus/") for name in importers} == IMPORTERS.keys()


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import torch.x, marshal", "eval(x)", "torch.load(f)"),
        *("yaml.load(f)", "socket.recv_pyobj()", "np.load(f)", "read(f, allow_pickle=True)"),
        *("YAML(typ='unsafe')", "run(x, shell=True)", "import yaml", "os.system(x)", "load(f, weights_only=False)"),
    ],
)
def test_what_could_is_seen(source: str) -> None:
    assert list(unsafe(source))
