"""Gradients to a parameter server: nodes/worker.py and param_server.py, as activities."""

from __future__ import annotations

from functools import partial

from ddrl_bus.planning.learning import Batches
from ddrl_bus.planning.places import Place
from ddrl_bus.planning.simulate import Activity, Mailbox
from ddrl_bus.planning.world import World


def worker(world: World, node: Place, batches: Batches) -> Activity:
    """A gradient up, the newest parameters down, and what they bring is played by."""
    trainer, thread = world.trainer(node), world.thread(node)
    servers, answers = world.of("param_server"), Mailbox(world.sim)
    up, down = world.size("gradients"), world.size("parameters")
    has_gradient, version = False, 0
    while True:
        for server in servers:
            yield thread.work(world.noisy(world.ends("gradients", node, server)[0]))
            reply = partial(world.carry("gradients", server, node), down, answers.put)
            question = has_gradient, version, reply
            world.carry("gradients", node, server)(up, world.questions[server.name].put, question)
        for _ in servers:
            version = max(version, (yield answers.take()))
        has_gradient, batches.version = True, version
        world.sim.start(world.publish(node, version, thread))
        yield trainer.work(world.noisy(world.costs.at("adopt")))
        yield batches.ready.take()
        yield from world.trained(node, world.costs.at("update", world.batch))
        batches.filled -= 1
        batches.free.put(None)
        world.updates += 1


def param_server(world: World, node: Place) -> Activity:
    """Applies what comes, and answers with what that made of its parameters."""
    thread, box, applied = world.thread(node), world.questions[node.name], 0
    serves, applies = world.costs.links["gradients"][1], world.costs.at("apply")
    while True:
        has_gradient, version, reply = yield box.take()
        yield thread.work(world.noisy(serves + applies * has_gradient))
        if has_gradient:
            if node.index == 0:
                world.lag += applied - version
                world.lagged += 1
            applied += 1
        reply(applied)
