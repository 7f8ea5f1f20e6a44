"""How many files a process may open, in processes of their own, for a limit cannot be raised again."""

from __future__ import annotations

import subprocess
import sys

from runs import ENVIRON

from ddrl_bus.launch.start import plan_of

CODE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1])))
from ddrl_bus.errors import UsageError
from ddrl_bus.launch.files import raise_limit
from ddrl_bus.launch.start import plan_of
try:
    raise_limit(plan_of("quickstart", ["nodes.actor.count=200"], probe=False), [sys.argv[2]])
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
except UsageError as error:
    print(error)
"""


def said(most: int, name: str) -> str:
    argv = [sys.executable, "-c", CODE, str(most), name]
    return subprocess.run(argv, env=ENVIRON, capture_output=True, text=True, timeout=100, check=True).stdout.strip()


def test_each_end_of_a_connection_is_counted_where_it_is_bound() -> None:
    plan = plan_of("quickstart", ["nodes.actor.count=200"], probe=False)
    assert plan.connections("learner-0") == 200 * 3 + 1  # unrolls, credits, weights; the evaluator's weights
    assert plan.connections("controller-0") == 2 * (200 + 2)  # progress and control of all others
    assert plan.connections("actor-0") == plan.connections("actor-200.far") == 0


def test_a_process_takes_what_it_may_and_says_what_to_type_where_that_is_too_little() -> None:
    assert said(900, "learner-0") == "900"
    words = "learner-0 has 601 connections, but its process may open 700 files; type  ulimit -n 729  in the shell"
    assert said(700, "learner-0").startswith(words)
