"""Costs of a machine that there is not, in round figures."""

from ddrl_bus.planning.costs import Costs

MS = 1e-3
POINTS = {
    "play": [(8, 4 * MS), (32, 6 * MS)],
    "step": [(8, 0.1 * MS), (32, 0.2 * MS)],
    "infer": [(8, 0.1 * MS), (32, 0.2 * MS)],
    "update": [(32, 2 * MS), (128, 4 * MS)],
    **{
        name: [(1, 0.1 * MS)]
        for name in ("load", "copy", "insert", "draw", "prioritise", "apply", "inside", "asked", "adopt")
    },
    "evaluate": [(20, 0.1 * MS)],
    "subscriber": [(1, 1e-6)],
}
LINKS = dict.fromkeys(("trajectories", "weights", "act", "samples", "gradients"), (0.1 * MS, 0.1 * MS))
SIZES = {
    **dict.fromkeys(("weights", "trajectories", "act", "actions", "samples", "sample", "gradients", "parameters"), 1e4),
    "sums": 4,
    "items": 128.0,
    "node": 4e7,
    "learner": 2e8,
}
COSTS = Costs(POINTS, LINKS, SIZES, 2, {"2": (MS, 2 * MS)}, (), 1.0, "made up", "never", 0.0)
