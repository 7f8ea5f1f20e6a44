"""A topology, ready to run: what each of its nodes does, on simulated threads, cores, links and wires."""

from __future__ import annotations

from collections.abc import Iterator

from ddrl_bus.planning.acting import Predictor, actor, env_group, evaluator
from ddrl_bus.planning.costs import Costs
from ddrl_bus.planning.learning import SPARE, Batches, intake, samples, train
from ddrl_bus.planning.places import Place, Setting
from ddrl_bus.planning.replaying import replay
from ddrl_bus.planning.serving import param_server, worker
from ddrl_bus.planning.simulate import Activity
from ddrl_bus.planning.world import World
from ddrl_bus.topology.plan import Plan


def model(plan: Plan, costs: Costs, setting: Setting) -> World:
    """A world in which everybody has begun.

    Raises:
        UsageError: `setting` counts a group that the topology does not have.
    """
    world = World(plan, costs, setting)
    for node in world.nodes:
        for activity in _activities(world, node):
            world.sim.start(activity)
    return world


def _activities(world: World, node: Place) -> Iterator[Activity]:
    match node.kind:
        case "actor" if "act" in world.plan.links:
            for group in range(node.options.groups):
                yield env_group(world, node, group)
        case "actor":
            yield actor(world, node)
        case "inference":
            predictor = Predictor(world, node)
            world.asks[node.name] = predictor.ask
            yield predictor.predict()
        case "learner":
            yield from _learner(world, node)
        case "replay":
            yield from replay(world, node)
        case "param_server":
            yield param_server(world, node)
        case "evaluator":
            yield evaluator(world, node)


def _learner(world: World, node: Place) -> Iterator[Activity]:
    """Batches are filled and trained on at the same time."""
    by_gradients, replayed = "gradients" in world.plan.links, "samples" in world.plan.links
    batches = Batches(world, 1 if by_gradients else SPARE + (node.options.prefetch if replayed else 1))
    yield (samples if replayed else intake)(world, node, batches)
    yield (worker if by_gradients else train)(world, node, batches)
