"""Imports point one way. The tables are docs/architecture.md's; to change one is to change the other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddrl_bus

PACKAGE = Path(ddrl_bus.__file__).parent

# room -> the rooms of ours and the libraries that it may import, function-level imports included
BELOW_NODES = {
    "errors",
    "keys",
    "topology",
    "transport",
    "messages",
    "experience",
    "metrics",
    "checkpoint",
    "algos",
    "envs",
}
BELOW_NODES |= {"rate_limiter", "replay_buffer", "versions"}
ROOMS = {
    "errors": set(),
    "console": {"errors"},
    "keys": {"errors"},
    "versions": set(),
    "topology": {"errors", "rate_limiter"},
    "transport": {"errors", "keys"},
    "messages": {"errors", "transport"},
    "experience": {"errors", "transport", "messages"},
    "sum_tree": {"errors"},
    "rate_limiter": {"errors"},
    "replay_buffer": {"errors", "experience", "sum_tree"},
    "metrics": {"errors", "transport"},
    "checkpoint": {"errors", "transport"},
    "algos": {"errors"},
    "envs": {"errors", "algos.spaces"},
    "nodes": BELOW_NODES,
    "launch": BELOW_NODES | {"nodes"},
    "bench": BELOW_NODES | {"nodes", "launch", "sum_tree", "console"},
    "planning": BELOW_NODES | {"nodes", "launch", "bench"},
    "cli": BELOW_NODES | {"nodes", "launch", "bench", "planning", "console"},
}
LIBRARIES = {
    "errors": set(),
    "console": {"click"},
    "keys": {"zmq"},
    "versions": set(),
    "topology": {"pydantic", "pydantic_core", "ruamel"},
    "transport": {"zmq", "msgpack", "numpy", "lz4", "xxhash"},
    "messages": {"pydantic"},
    "experience": {"numpy"},
    "sum_tree": {"numpy"},
    "rate_limiter": set(),
    "replay_buffer": {"numpy"},
    "metrics": set(),
    "checkpoint": {"numpy", "safetensors"},
    "algos": {"numpy", "torch", "xxhash"},
    "envs": {"numpy", "gymnasium", "ale_py"},
    "nodes": {"numpy", "torch", "psutil"},
    "launch": {"rich", "uvloop"},
    "bench": {"numpy", "torch", "zmq", "msgpack", "psutil", "matplotlib", "gymnasium", "grpc", "ray", "redis", "click"},
    "planning": {"numpy", "psutil"},
    "cli": {"click", "rich"},
}


HEAVY = {"torch", "zmq", "numpy", "pydantic", "rich", "asyncio"}


def room_of(module: str) -> str:
    return module.split(".")[1]


def modules() -> dict[str, Path]:
    """Every module of the package but the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found["ddrl_bus"]
    return found


def imports(source: str) -> Iterator[str]:
    """Dotted names of everything imported anywhere in `source`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=0):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.ImportFrom():
                raise AssertionError("relative imports hide the direction")


def may(module: str, imported: str) -> bool:
    """Whether the tables let `module` import the dotted name `imported`."""
    room, (top, *rest) = room_of(module), imported.split(".")
    if top != "ddrl_bus":
        return top in sys.stdlib_module_names or top in LIBRARIES[room]
    if not rest or rest[0] == "__version__" or rest[0] == room:
        return True
    return any(rest[: len(allowed.split("."))] == allowed.split(".") for allowed in ROOMS[room])


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    wrong = [name for name in imports(modules()[module].read_text()) if not may(module, name)]

    assert not wrong, f"{module} must not import {', '.join(wrong)}"


def test_tables_name_every_room() -> None:
    rooms = {room_of(module) for module in modules()}

    assert rooms <= ROOMS.keys()
    assert ROOMS.keys() == LIBRARIES.keys()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ddrl_bus.transport.links", "import torch"),
        ("ddrl_bus.topology.plan", "def late():\n    import zmq"),
        ("ddrl_bus.nodes.actor", "from zmq import Context"),
        ("ddrl_bus.envs", "from ddrl_bus.algos import acting"),
        ("ddrl_bus.algos.impala", "from ddrl_bus import messages"),
        ("ddrl_bus.transport.bus", "from ddrl_bus.nodes.base import Node"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert not any(may(module, name) for name in imports(source))


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import ddrl_bus", {"torch", "zmq", "numpy", "gymnasium", "pydantic"}),
        ("from ddrl_bus.cli import ddrl; ddrl(['--help'])", {*HEAVY, "ddrl_bus.bench"}),
        ("from ddrl_bus.cli import ddrl; ddrl(['keys', 'list'])", {"ddrl_bus.bench", "torch", "numpy"}),
        ("from ddrl_bus.cli import ddrl; ddrl(['bench', '--help'])", HEAVY),
        ("import ddrl_bus.topology", {"torch", "zmq", "numpy", "gymnasium"}),
        ("import ddrl_bus.algos", {"torch", "gymnasium", "zmq"}),
        ("import ddrl_bus.envs", {"torch", "zmq", "ale_py", "minatar", "minigrid", "cv2", "pygame", "matplotlib"}),
        ("import ddrl_bus.launch.node, ddrl_bus.launch.catalog, ddrl_bus.nodes.base", {"torch", "rich", "click"}),
    ],
)
def test_what_is_not_imported(code: str, absent: set[str]) -> None:
    """In a fresh interpreter."""
    code = f"import sys, atexit\natexit.register(lambda: print('\\n', *sys.modules))\n{code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    loaded = set(result.stdout.splitlines()[-1].split())
    assert "ddrl_bus" in loaded
    assert not loaded & absent
