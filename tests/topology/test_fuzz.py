"""Whatever the text, `load` returns a plan or refuses with one of its own errors."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddrl_bus.errors import SecurityError, UsageError
from ddrl_bus.topology import Plan
from ddrl_bus.topology.schema import KINDS, PORTS, SECTIONS, LinkSettings, Settings, field_names

from .fakes import APEX, BASE, TOPOLOGIES, Config, load_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def survive(folder: Path, text: str | bytes, *overrides: str) -> None:
    """Loads; a plan must hold together, an error must be one of ours and fit to be printed."""
    try:
        plan = load_text(folder, text, *overrides)
    except (UsageError, SecurityError) as error:
        str(error).encode()
    else:
        hold(folder, plan)


def hold(folder: Path, plan: Plan) -> None:
    for name in list(plan.nodes)[:8]:
        assert plan.ports(name)
    assert load_text(folder, plan.lock()) == plan


keys = st.sampled_from(
    [*field_names(Settings), *SECTIONS, *KINDS, *field_names(LinkSettings), *field_names(Config), *PORTS]
    + [name for options in KINDS.values() for name in field_names(options)]
    + ["control", "progress", "id", "kwargs", "local", "steps", "every"]
) | st.text(max_size=6)
words = st.sampled_from(
    [
        "impala",
        "actor",
        "learner",
        "evaluator",
        "inference",
        "param_server",
        "replay",
        "queue",
        "latest",
        "local",
        "127.0.0.1",
        "10.0.0.1:1",
        "${A}",
        "${",
        "1s",
    ]
)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=12, alphabet=st.characters())
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=6), max_leaves=20
)
SEEDS = [BASE, APEX, *(path.read_text() for path in sorted(TOPOLOGIES.glob("*.yaml")))]
SEEDS = [text.replace("name: a2c,", "name: impala,").replace("name: a2c}", "name: impala}") for text in SEEDS]


@settings(max_examples=80, deadline=None)
@given(text=st.text() | st.binary())
@example(text="a: !!timestamp 2020-99-99")
@example(text='"\\xff\\uD800": 1')
@example(text="? ")
@example(text="%TAG ! tag:x,2000:\n---\n!a b")
def test_arbitrary_text_never_surprises(folder: Path, text: str | bytes) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        survive(folder, text if isinstance(text, bytes) else text.encode())


@settings(max_examples=80, deadline=None)
@given(seed=st.sampled_from(SEEDS), data=st.data())
def test_damaged_files_never_surprise(folder: Path, seed: str, data: st.DataObject) -> None:
    text = seed
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 6))
        new = data.draw(st.text(alphabet=":-?{}[]&*!#|>'\"%@`, \n\t\\~0123aeE_.$", max_size=4))
        text = text[:start] + new + text[start + length :]
    survive(folder, text)


@settings(max_examples=80, deadline=None)
@given(tree=st.dictionaries(keys, trees, max_size=8))
def test_arbitrary_trees_never_surprise(folder: Path, tree: dict[str, object]) -> None:
    survive(folder, json.dumps(tree, ensure_ascii=True))


@settings(max_examples=80, deadline=None)
@given(path=st.lists(keys, min_size=1, max_size=4), value=trees)
def test_arbitrary_values_in_a_good_file_never_surprise(folder: Path, path: list[str], value: object) -> None:
    survive(folder, BASE, f"{'.'.join(path)}={json.dumps(value)}")


@settings(max_examples=80, deadline=None)
@given(override=st.text(max_size=40, alphabet=st.characters(categories=None)))
def test_arbitrary_overrides_never_surprise(folder: Path, override: str) -> None:
    survive(folder, BASE, override)


def test_topology_loads_without_torch_zmq_or_gymnasium() -> None:
    heavy = "{'torch', 'zmq', 'gymnasium', 'ddrl_bus.algos'}"
    code = f"import sys, ddrl_bus.topology; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
