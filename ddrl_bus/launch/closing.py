"""The end of a run: its books, and the one object that says how it went."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ddrl_bus.launch.run_dir import read_json, write
from ddrl_bus.metrics import COMMUNICATION, WAITS, WORK
from ddrl_bus.transport import ledger

RESULT: Final = "result.json"
CLOSING: Final = "closing.json"
_FROM_RESULT: Final = ("return", "env_steps", "updates", "steps_per_s", "first_update_s", "overhead", "shares")


def close(run_dir: Path, *, seed: int, started: float, restarts: int, reason: str | None = None) -> dict[str, Any]:
    """The closing object of a run that is over, which is also kept as `closing.json`.

    Args:
        started: seconds since 1970 at which the user gave the command.
        reason: how it ended, where the controller could not say so.
    """
    result = read_json(run_dir / RESULT) or {}
    closing = {
        "run_dir": str(run_dir),
        "reason": reason or result.get("reason"),
        **{key: result.get(key) for key in _FROM_RESULT},
        "wall_s": round(time.time() - started, 3),
        "ledger": books(run_dir),
        "restarts": restarts,
        "seed": seed,
    }
    write(run_dir / CLOSING, json.dumps(closing, indent=2) + "\n")
    return closing


def books(run_dir: Path) -> dict[str, Any]:
    """`{closed, lost, links: {name: counts}}` over all lives of the run, none of which goes on."""
    links = ledger.audit(lives(run_dir))
    return {
        "closed": all(balance.closed for balance in links.values()),
        "lost": sum(balance.lost for balance in links.values()),
        "links": {name: dataclasses.asdict(balance) for name, balance in links.items()},
    }


def lives(run_dir: Path) -> Iterator[Mapping[str, int]]:
    """The counters of every life: from its page, or from what the controller heard of it on another host."""
    folder = run_dir / "ledger"
    for page in sorted(folder.glob("*.page")):
        yield ledger.read(page)
    for told in sorted(folder.glob("*.json")):
        if not told.with_suffix(".page").exists():
            yield read_json(told) or {}


def as_text(closing: Mapping[str, Any]) -> str:
    """The closing object for people."""
    lines = [
        f"{closing['reason'] or 'ended'}: return {_number(closing['return'], 1)} after {_number(closing['env_steps'])} "
        f"env steps and {_number(closing['updates'])} updates in {_number(closing['wall_s'], 1)} s "
        f"({_number(closing['steps_per_s'])} steps/s, first update after {_number(closing['first_update_s'], 1)} s)"
    ]
    if shares := {node: share for node, share in (closing["overhead"] or {}).items() if share is not None}:
        lines.append("communication overhead: " + ", ".join(f"{node} {share:.1%}" for node, share in shares.items()))
    for node, parts in sorted((closing.get("shares") or {}).items()):
        lines += [f"  {node}: {_split(parts)}"] if parts else []
    for name, link in closing["ledger"]["links"].items():
        state = "closed" if link["closed"] else "DOES NOT CLOSE"
        counts = ", ".join(
            f"{key} {count:,}" for key, count in link.items() if key != "closed" and (count or key == "lost")
        )
        lines.append(f"ledger of {name}: {state}; {counts}")
    if closing["restarts"]:
        lines.append(f"restarts: {closing['restarts']}")
    return "\n".join([*lines, f"everything is in {closing['run_dir']}"])


def _split(parts: Mapping[str, float]) -> str:
    """Where a node's busy time went, communication first, and apart from it the waits for its peers."""

    def named(names: Sequence[str]) -> str:
        return ", ".join(f"{name} {parts[name]:.1%}" for name in names if parts.get(name))

    waits = named(WAITS)
    texts = (named(COMMUNICATION), named(WORK), f"waiting for peers: {waits}" if waits else "")
    return "; ".join(text for text in texts if text)


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
