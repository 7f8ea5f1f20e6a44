"""Every mistake names its place, what came, and what was expected. `‹` stands before the place."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddrl_bus.errors import EnvError, SecurityError, TopologyError, UsageError
from ddrl_bus.topology import Catalog, EnvSettings, load

from .fakes import (
    A3C,
    APEX,
    BASE,
    CATALOG,
    DDPPO,
    GA3C,
    GORILA,
    GORILA_GLOBAL,
    HEAD,
    NODES,
    SEED,
    SEED_R2D2,
    load_text,
    problems,
)

LINKS = "links:\n  trajectories: {from: actor, to: learner}\n  weights: {to: [actor, evaluator]}\n"
GRADIENTS = "  gradients: {from: learner, to: param_server}\n"
PARAMETERS = "  parameters: {from: param_server, to: evaluator}\n"
HOSTS = "hosts: {a: 127.0.0.1, b: 127.0.0.2}\n"

MISTAKES = {
    # YAML
    "syntax": ("name: t\nenv: {id: x\nalgo‹: {name: impala}\n", "", "not YAML"),
    "empty": ("", "name", "missing"),
    "list": ("‹- name\n", "", "got a list, expected a mapping"),
    "scalar": ("‹quickstart\n", "", "got 'quickstart', expected a mapping"),
    "duplicate key": (BASE + "seed: 1\n‹seed: 2\n", "seed", "duplicate key; it stands first on line 5"),
    "duplicate group": (
        HEAD + "nodes:\n  learner: {}\n  actor: {}\n  ‹actor: {envs: 64}\n",
        "nodes.actor",
        "duplicate key",
    ),
    "duplicate in flow": (BASE + "stop: {steps: 1, ‹steps: 2}\n", "stop.steps", "duplicate key"),
    "anchor": (BASE + "stop: ‹&s {steps: 1}\n", "stop", "anchor &s: refused"),
    "alias": (BASE + "seed: ‹*s\n", "seed", r"alias \*s: refused"),
    "tag": (BASE + "seed: ‹!!int 3\n", "seed", "tag 'tag:yaml.org,2002:int': refused"),
    "python tag": (BASE + 'seed: ‹!!python/object/apply:os.system ["true"]\n', "seed", "refused"),
    "two documents": (BASE + "‹---\nname: u\n", "", "a second document"),
    "directive": ("%YAML 1.1\n‹---\nname: t\n", "", "directives"),
    "list as key": (BASE + "? ‹[a]\n: 1\n", "", "as a key, expected text"),
    "nan": (BASE + "stop: {reward: ‹.nan}\n", "stop.reward", "got .nan"),
    "control character": (BASE + "seed: ‹\x01\n", "", "is not allowed"),
    "surrogate": (BASE + 'preset: ‹"\\ud800"\n', "", "surrogate"),
    "too deep": (BASE + "x: " + "[" * 31 + "‹[", "", "deeper than 32"),
    "long key": (BASE + "‹" + "k" * 129 + ": 1\n", "", "a key of 129 characters"),
    # top level
    "no name": ("‹env: {id: x}\nalgo: {name: impala}\n" + NODES, "name", "missing"),
    "no env": ("‹name: t\nalgo: {name: impala}\n" + NODES, "env", "missing"),
    "no algo": ("‹name: t\nenv: {id: x}\n" + NODES, "algo", "missing"),
    "no nodes": ("‹" + HEAD, "nodes", "missing"),
    "no env id": ("name: t\nenv: ‹{}\nalgo: {name: impala}\n" + NODES, "env.id", "missing"),
    "no algo name": ("name: t\nenv: {id: x}\nalgo: ‹{}\n" + NODES, "algo.name", "expected one of dqn, impala"),
    "unknown key": (BASE + "‹sede: 1\n", "sede", "unknown key; expected one of algo, .*; did you mean 'seed'"),
    "name": (BASE.replace("name: t", "name: ‹My Run", 1), "name", "got 'My Run', expected text like"),
    "name is a number": (BASE.replace("name: t", "name: ‹12", 1), "name", r"got 12, expected text \(quote it\)"),
    "seed is text": (BASE + 'seed: ‹"1"\n', "seed", "got '1', expected a whole number"),
    "seed is a fraction": (BASE + "seed: ‹1.5\n", "seed", "got 1.5, expected a whole number"),
    "seed is true": (BASE + "seed: ‹true\n", "seed", "got true, expected a whole number"),
    "seed is negative": (BASE + "seed: ‹-1\n", "seed", "got -1, expected at least 0"),
    "yes is no bool": (BASE + "insecure: ‹yes\n", "insecure", "got 'yes', expected true or false"),
    "port": (BASE + "port: ‹65536\n", "port", "got 65536, expected at most 65,535"),
    "duration": (BASE + "grace: ‹10 sec\n", "grace", "got '10 sec', expected a duration such as"),
    "negative duration": (BASE + "grace: ‹-1\n", "grace", "expected at least 0"),
    "endless duration": (BASE + "grace: ‹.inf\n", "grace", "expected a finite number"),
    "run id": (BASE + "run_id: ‹../x\n", "run_id", "got '../x'"),
    "section": (BASE + "stop: ‹never\n", "stop", "got 'never', expected a mapping"),
    "unknown stop": (BASE + "stop: {‹step: 1}\n", "stop.step", "did you mean 'steps'"),
    "no steps": (BASE + "stop: {steps: ‹0}\n", "stop.steps", "got 0, expected at least 1"),
    "keep": (BASE + "checkpoint: {keep: ‹0}\n", "checkpoint.keep", "expected at least 1"),
    "vectorization": (
        BASE.replace("CartPole-v1", "CartPole-v1, vectorization: ‹nativ"),
        "env.vectorization",
        "got 'nativ', expected one of auto, native, sync; did you mean 'native'",
    ),
    # algo
    "unknown algorithm": (
        BASE.replace("name: impala", "name: ‹impalla"),
        "algo.name",
        "got 'impalla', expected one of dqn, impala; did you mean 'impala'",
    ),
    "algorithm is a list": (BASE.replace("name: impala", "name: ‹[impala]"), "algo.name", "got a list"),
    "unknown setting": (
        BASE.replace("impala", "impala, ‹unrol: 2"),
        "algo.unrol",
        "unknown key; .*; did you mean 'unroll'",
    ),
    "setting is text": (BASE.replace("impala", "impala, lr: ‹fast"), "algo.lr", "got 'fast', expected a number"),
    "setting in a list": (
        BASE.replace("impala", "impala, hidden: [64, ‹x]"),
        "algo.hidden[1]",
        "got 'x', expected a whole number",
    ),
    "setting is no list": (BASE.replace("impala", "impala, hidden: ‹64"), "algo.hidden", "got 64, expected a list"),
    "setting by the config's own check": (
        BASE.replace("{name: impala}", "‹{name: impala, gamma: 2}"),
        "algo",
        "gamma: got 2.0, expected at most 1",
    ),
    "choice": (BASE.replace("impala", "impala, reduction: ‹men"), "algo.reduction", "did you mean 'mean'"),
    # nodes
    "unknown kind by name": (
        HEAD + "nodes: {‹actr: {}, learner: {}}\n",
        "nodes.actr",
        "no kind is given, and the name is none; .*; did you mean 'actor'",
    ),
    "unknown kind": (
        HEAD + "nodes: {fast: {kind: ‹aktor}, learner: {}}\n",
        "nodes.fast.kind",
        "got 'aktor', expected one of actor, .*; did you mean 'actor'",
    ),
    "name of another kind": (
        HEAD + "nodes: {actor: {kind: ‹evaluator}, learner: {}}\n",
        "nodes.actor.kind",
        "rename the group",
    ),
    "group name": (BASE.replace("nodes: {", "nodes: {‹A B: {kind: actor}, "), "nodes.A B", "expected a name of a-z"),
    "unknown option": (BASE.replace("envs: 32", "‹env: 32"), "nodes.actor.env", "did you mean 'envs'"),
    "option of another kind": (BASE.replace("learner: {}", "learner: {‹envs: 2}"), "nodes.learner.envs", "unknown"),
    "count": (BASE.replace("count: 2", "count: ‹-2"), "nodes.actor.count", "got -2, expected at least 0"),
    "huge count": (BASE.replace("count: 2", "count: ‹1_000_000_000"), "nodes.actor.count", "at most 4,096"),
    "huge sum": (
        HEAD + "nodes: ‹{a: {kind: actor, count: 4096}, b: {kind: actor, count: 4096}, learner: {}}\n",
        "nodes",
        "8,195 nodes, expected at most 4,096",
    ),
    "device": (BASE.replace("learner: {}", "learner: {device: ‹gpu}"), "nodes.learner.device", "got 'gpu'"),
    "two controllers": (
        BASE.replace("learner: {}", "learner: {}, controller: {count: ‹2}"),
        "nodes.controller.count",
        "2 nodes of kind controller, expected 1",
    ),
    "two groups of controllers": (
        BASE.replace("learner: {}", "learner: {}, controller: {}, boss: ‹{kind: controller}"),
        "nodes.boss.count",
        "2 nodes of kind controller",
    ),
    "no controller": (
        BASE.replace("learner: {}", "learner: {}, controller: {count: ‹0}"),
        "nodes.controller.count",
        "got 0, expected 1",
    ),
    "no learner": (
        HEAD + "nodes: ‹{actor: {envs: 64}}\n",
        "links.trajectories.to",
        "no receiver: no group of kind learner has a node; add one under nodes",
    ),
    "no actor": (
        HEAD + "nodes: ‹{actor: {count: 0}, learner: {}}\n",
        "links.trajectories.from",
        "no sender: no group of kind actor",
    ),
    "predictors": (
        GA3C.replace("inference: {}", "inference: {predictors: ‹many}"),
        "nodes.inference.predictors",
        "got 'many', expected a whole number of at least 1, or auto",
    ),
    "trainers": (
        GA3C.replace("learner: {}", "learner: {trainers: ‹0}"),
        "nodes.learner.trainers",
        "got 0, expected a whole number of at least 1, or auto",
    ),
    "trainers with a bound": (
        GA3C.replace("learner: {}", "learner: {trainers: ‹auto}").replace("{from: actor}", "{from: actor, max_lag: 3}"),
        "nodes.learner.trainers",
        "got 'auto', expected 1: with max_lag",
    ),
    "trainers of a worker": (
        A3C.replace("learner: {count: 2", "learner: {trainers: ‹2, count: 2"),
        "nodes.learner.trainers",
        "got 2, expected 1: a worker computes one gradient at a time",
    ),
    # bundles
    "bundle name": (A3C.replace("2, bundle: w}", "2, bundle: ‹W}"), "nodes.learner.bundle", "expected text like"),
    "bundle of shards with who needs all of them": (
        A3C.replace("param_server: {}", "param_server: {count: 2, bundle: ‹w}"),
        "nodes.param_server.bundle",
        "got 'w', where actor would meet one of 2: each holds a part of the parameters",
    ),
    "bundle of a controller": (
        A3C.replace("param_server: {}", "param_server: {}, controller: {bundle: ‹w}"),
        "nodes.controller.bundle",
        "a controller runs in a process of its own",
    ),
    "bundle named as a group": (
        HEAD + "nodes: {actor: {envs: 64, bundle: ‹learner}, learner: {}}\n",
        "nodes.actor.bundle",
        "got 'learner', but a group has that name",
    ),
    "bundle with two groups of a kind": (
        HEAD + "nodes: {a: {kind: actor, envs: 64, bundle: w}, b: {kind: actor, bundle: ‹w}, learner: {}}\n",
        "nodes.b.bundle",
        "a and b are both of kind actor; a bundle holds one group of a kind",
    ),
    "bundle across hosts": (
        A3C.replace("2, bundle: w}", "2, host: b, bundle: ‹w}") + HOSTS,
        "nodes.learner.bundle",
        "learner and actor are on different hosts; a bundle needs the same `host`",
    ),
    "uneven bundle": (
        HEAD + "nodes:\n  actor: {count: 2, envs: 64, bundle: w}\n  learner: {bundle: ‹w}\n",
        "nodes.learner.bundle",
        "learner has 1 nodes and actor has 2; a bundle needs equal counts",
    ),
    # hosts
    "unknown host": (
        BASE.replace("envs: 32", "envs: 32, host: ‹c") + HOSTS,
        "nodes.actor.host",
        "no host 'c'; expected one of a, b",
    ),
    "unknown host in a list": (
        BASE.replace("envs: 32", "envs: 32, host: [a, ‹gpu]") + HOSTS.replace("b:", "gpu0:"),
        "nodes.actor.host",
        "did you mean 'gpu0'",
    ),
    "host without hosts": (BASE.replace("envs: 32", "envs: 32, host: ‹a"), "nodes.actor.host", "expected one of local"),
    "host is a number": (BASE.replace("envs: 32", "host: ‹3"), "nodes.actor.host", "a name or a list of names"),
    "wildcard address": (BASE + "hosts: {a: ‹0.0.0.0}\n", "hosts.a", "an address that other hosts can dial"),
    "star address": (BASE + 'hosts: {a: ‹"*"}\n', "hosts.a", r"got '\*'"),
    "address port": (BASE + "hosts: {a: ‹10.0.0.1:70000}\n", "hosts.a", "got '10.0.0.1:70000'"),
    "bad number address": (BASE + "hosts: {a: ‹10.0.0.300}\n", "hosts.a", "got '10.0.0.300'"),
    "address with a scheme": (BASE + "hosts: {a: ‹tcp://10.0.0.1}\n", "hosts.a", "expected an address"),
    "host name": (BASE + "hosts: {‹a b: 10.0.0.1}\n", "hosts.a b", "a host name is letters"),
    "hosts is a list": (BASE + "hosts: ‹[10.0.0.1]\n", "hosts", "got a list, expected a mapping of host names"),
    "ports run out": (
        BASE.replace("envs: 32", "envs: 32, host: b") + "port: 65533\nhosts: {a: ‹127.0.0.1, b: 127.0.0.2}\n",
        "hosts.a",
        "would get tcp port 65536, expected at most 65535",
    ),
    "same address and port": (
        HEAD
        + "nodes: {actor: {envs: 64, host: b}, learner: {host: c}, controller: {host: a}}\n"
        + "hosts: {a: 127.0.0.1, b: 127.0.0.2, c: ‹127.0.0.1}\n",
        "hosts.c",
        "127.0.0.1:7077 is taken twice, by controller-0.progress on a and by learner-0.trajectories on c",
    ),
    # links
    "unknown link": (
        BASE + LINKS + "  ‹weight: {}\n",
        "links.weight",
        "no such port; expected one of act, gradients, .*, weights; did you mean 'weights'",
    ),
    "missing link": (
        BASE.replace("actor: {", "actor: ‹{") + "links:\n  trajectories: {}\n",
        "nodes.actor",
        "holds no end of weights or act, but every actor does: .*name it in links.weights.to or links.act.from",
    ),
    "unknown link key": (BASE + LINKS.replace("to: l", "‹too: l"), "links.trajectories.too", "did you mean 'to'"),
    "unknown link kind": (
        BASE + LINKS.replace("{from", "{kind: ‹quue, from"),
        "links.trajectories.kind",
        "expected one of latest, queue, request; did you mean 'queue'",
    ),
    "wrong link kind": (
        BASE + LINKS.replace("{from", "{kind: ‹latest, from"),
        "links.trajectories.kind",
        "got 'latest', expected queue: trajectories is queue, actor, inference → learner, replay",
    ),
    "wrong kind of system link": (
        BASE + "links: " + "{control: {kind: ‹queue}, trajectories: {}, weights: {}}",
        "links.control.kind",
        "expected latest",
    ),
    "unknown group": (
        BASE + LINKS.replace("to: l", "to: ‹l").replace("learner}", "lerner}"),
        "links.trajectories.to",
        "no group 'lerner'; expected one of actor, controller, evaluator, learner; did you mean 'learner'",
    ),
    "unknown group in a list": (
        BASE + LINKS.replace("[actor, ev", "[actor, ‹ev").replace("evaluator]", "evaluater]"),
        "links.weights.to",
        "did you mean 'evaluator'",
    ),
    "wrong end": (
        BASE + LINKS.replace("from: actor", "from: ‹evaluator"),
        "links.trajectories.from",
        "'evaluator' is of kind evaluator, which does not send trajectories",
    ),
    "named twice": (BASE + LINKS.replace("[actor", "[actor, ‹actor"), "links.weights.to", "stands here twice"),
    "left out": (
        HEAD
        + "nodes: {fast: {kind: actor, envs: 64}, slow: {kind: actor}, learner: {}}\n"
        + LINKS.replace("from: actor", "from: ‹fast"),
        "links.trajectories.from",
        "slow is left out, but every actor holds an end .*name it here, or set nodes.slow.count: 0",
    ),
    "left out of a system link": (
        BASE + LINKS + "  control: {to: ‹[actor, learner]}\n",
        "links.control.to",
        "evaluator is left out, but every evaluator holds an end of control",
    ),
    "no end": (BASE + LINKS.replace("to: [actor, evaluator]", "to: ‹[]"), "links.weights.to", "a name or a list"),
    "codec": (
        BASE + LINKS.replace("{from", "{codec: ‹zip, from"),
        "links.trajectories.codec",
        "one of delta, lz4, none",
    ),
    "codec of weights": (
        BASE + LINKS.replace("{to", "{codec: ‹lz4, to"),
        "links.weights.codec",
        "got 'lz4', expected none or delta: weights is latest",
    ),
    "codec of unrolls": (
        BASE + LINKS.replace("{from", "{codec: ‹delta, from"),
        "links.trajectories.codec",
        "got 'delta', expected none or lz4",
    ),
    "relay": (BASE + LINKS.replace("{from", "{‹relay: true, from"), "links.trajectories.relay", "only weights has it"),
    "precision": (BASE + LINKS.replace("{to", "{precision: ‹half, to"), "links.weights.precision", "float16, float32"),
    "rate": (BASE + LINKS.replace("{from", "{rate: ‹10Mbit, from"), "links.trajectories.rate", "a size such as 64MiB"),
    "no rate": (BASE + LINKS.replace("{from", "{rate: ‹0, from"), "links.trajectories.rate", "more than 0"),
    "rate of requests": (
        BASE + "links: {progress: {‹rate: 1MiB}}",
        "links.progress.rate",
        "only a queue or a latest has it",
    ),
    "no window": (BASE + LINKS.replace("{to", "{‹window: 2, to"), "links.weights.window", "only a queue has it"),
    "window": (BASE + LINKS.replace("{from", "{window: ‹0, from"), "links.trajectories.window", "at least 1"),
    "loss": (BASE + LINKS.replace("{from", "{on_loss: ‹drop, from"), "links.trajectories.on_loss", "count, resend"),
    "lag": (BASE + LINKS.replace("{from", "{max_lag: ‹-1, from"), "links.trajectories.max_lag", "at least 0"),
    "links is a list": (BASE + "links: ‹[weights]\n", "links", "got a list, expected a mapping of links"),
    # roles
    "evaluator without weights": (
        BASE.replace("nodes: {", "nodes: ‹{") + LINKS.replace("[actor, evaluator]", "actor"),
        "nodes.evaluator",
        "holds no end of weights or parameters, .*or set nodes.evaluator.count: 0",
    ),
    "actor with weights and act": (
        GA3C.replace("act: {}", "act: {from: ‹actor}").replace("[inference", "[actor, inference"),
        "links.act.from",
        "actor holds weights and act, expected one of them: it plays by weights of its own, or asks",
    ),
    "learner without trajectories": (
        BASE.replace("learner: {}", "learner: ‹{}") + "links:\n  weights: {}\n",
        "nodes.learner",
        "holds no end of samples or trajectories, but every learner does: it trains on what replay nodes draw, or",
    ),
    "inference that nobody asks": (
        GA3C.replace("inference: {}", "inference: ‹{}").replace("  act: {}\n", "").replace("to: [", "to: [actor, "),
        "nodes.inference",
        "holds no end of act, but every inference does: actors ask it there",
    ),
    "inference without weights": (
        GA3C.replace("inference: {}", "inference: ‹{}").replace("[inference, evaluator]", "evaluator"),
        "nodes.inference",
        "holds no end of weights, but every inference does",
    ),
    "inference that stands idle": (
        BASE.replace("learner: {}", "learner: {}, inference: ‹{}"),
        "nodes.inference",
        "holds no end of act, .*or set nodes.inference.count: 0",
    ),
    "lock-step with central inference": (
        SEED.replace("{from: inference}", "{from: inference, max_lag: ‹0}"),
        "links.trajectories.max_lag",
        "got 0, but with act the weights may change within an unroll",
    ),
    "a gradient of other parameters": (
        A3C.replace("max_lag: 0", "max_lag: ‹1"),
        "links.trajectories.max_lag",
        "got 1, expected 0: a gradient is of the parameters that played its unrolls",
    ),
    "weights too late for lock-step": (
        BASE.replace("learner: {}", "learner: {publish_every: ‹2}")
        + LINKS.replace("{from: actor", "{max_lag: 0, window: 1, from: actor"),
        "nodes.learner.publish_every",
        "got 2, but weights up to 1 updates old would be the newest, expected at most .*max_lag, which is 0",
    ),
    "weights too late for the bound": (
        BASE.replace("learner: {}", "learner: {publish_every: 4, delay: ‹3}")
        + LINKS.replace("{from: actor", "{max_lag: 3, from: actor"),
        "nodes.learner.delay",
        "got 3, but weights up to 7 updates old would be the newest, expected at most .*max_lag, which is 3",
    ),
    "trajectories from both": (
        SEED.replace("{from: inference}", "{from: ‹[actor, inference]}"),
        "links.trajectories.from",
        "actor and inference nodes would both send what the same environments play",
    ),
    "trajectories from inference that nobody asks": (
        BASE.replace("learner: {}", "learner: {}, inference: ‹{}")
        + "links:\n  trajectories: {from: inference}\n  weights: {to: [actor, inference, evaluator]}\n",
        "nodes.inference",
        "holds no end of act, but every inference does",
    ),
    "environments in unequal parts": (
        GA3C.replace("envs: 32", "envs: 32, groups: ‹3"),
        "nodes.actor.groups",
        "got 3, expected a divisor of nodes.actor.envs, which is 32",
    ),
    "parameter server that stands idle": (
        BASE.replace("learner: {}", "learner: {}, param_server: ‹{}"),
        "nodes.param_server",
        "holds no end of gradients, but every param_server does",
    ),
    "evaluator with weights and parameters": (
        A3C.replace("to: evaluator", "to: ‹evaluator").replace("to: actor", "to: [actor, evaluator]"),
        "links.parameters.to",
        "evaluator holds weights and parameters, expected one of them",
    ),
    "evaluator of a worker": (
        A3C.replace("to: actor}", "to: ‹[actor, evaluator]}").replace(PARAMETERS, ""),
        "links.weights.to",
        "evaluator would play a worker's copy; name it in links.parameters.to instead",
    ),
    "two learners without a bundle": (
        A3C.replace("{count: 2, bundle: w}", "‹{count: 2}"),
        "nodes.learner.bundle",
        "got nothing, but each of 2 learners plays with actors of its own: give learner and all",
    ),
    "two learners with actors elsewhere": (
        A3C.replace("16, bundle: w", "16, bundle: ‹v"),
        "nodes.actor.bundle",
        "got 'v', but each of 2 learners plays with actors of its own",
    ),
    # replay
    "learner that draws and reads": (
        APEX.replace("to: replay}", "to: ‹[replay, learner]}"),
        "links.trajectories.to",
        "learner holds samples and trajectories, expected one of them: it trains on what replay nodes draw, or on",
    ),
    "replay that nobody fills": (
        BASE.replace("learner: {}", "learner: {}, replay: ‹{}") + LINKS,
        "nodes.replay",
        "holds no end of trajectories, but every replay does: it keeps what they bring",
    ),
    "replay that nobody draws from": (
        APEX.replace("replay: {count: 2}", "replay: ‹{count: 2}").replace("  samples: {}\n", ""),
        "nodes.replay",
        "holds no end of samples, but every replay does: learners draw from it there",
    ),
    "replay rule without replay": (
        BASE.replace("impala", "‹dqn") + LINKS,
        "algo.name",
        "it learns from samples, which replay nodes draw for it; add a group replay to nodes, name it in .*"
        "trajectories.to, and add links.samples",
    ),
    "newest experience from replay": (
        APEX.replace("dqn", "‹impala"),
        "algo.name",
        "it learns from what its newest policies played, .*; send links.trajectories to learner and leave",
    ),
    "no replay": (
        HEAD.replace("impala", "dqn") + "nodes: ‹{actor: {}, learner: {}}\n",
        "links.samples.to",
        "no receiver: no group of kind replay has a node; add one under nodes",
    ),
    "lag of what is replayed": (
        APEX.replace("to: replay}", "to: replay, max_lag: ‹3}"),
        "links.trajectories.max_lag",
        "got 3, but what is replayed grows older than any bound; leave it out",
    ),
    "lock-step of a worker that replays": (
        GORILA.replace("to: replay}", "to: replay, max_lag: ‹0}"),
        "links.trajectories.max_lag",
        "got 0, but what is replayed grows older",
    ),
    "trainers of samples": (
        APEX.replace("learner: {}", "learner: {trainers: ‹2}"),
        "nodes.learner.trainers",
        "got 2, expected 1: what is drawn next follows from the errors",
    ),
    "outliers without gradients": (
        APEX.replace("learner: {}", "learner: {outliers: ‹3}"),
        "nodes.learner.outliers",
        "got 3, but only with gradients a learner leaves batches out",
    ),
    "two learners of samples with actors elsewhere": (
        GORILA.replace("envs: 8, bundle: w", "envs: 8, bundle: ‹v"),
        "nodes.actor.bundle",
        "got 'v', but each of 2 learners plays with actors of its own: .* at its ends of weights one bundle",
    ),
    "two learners of a global replay without a bundle": (
        GORILA_GLOBAL.replace("learner: {count: 2, bundle: w, ", "learner: ‹{count: 2, "),
        "nodes.learner.bundle",
        "got nothing, but each of 2 learners plays with actors of its own",
    ),
    "min_size above capacity": (
        APEX.replace("replay: {", "replay: {capacity: 500, min_size: ‹501, "),
        "nodes.replay.min_size",
        "got 501, expected at most 500, its capacity: it would never hold so many",
    ),
    "min_size above capacity by default": (
        APEX.replace("replay: {", "replay: ‹{capacity: 999, "),
        "nodes.replay.min_size",
        "got 1,000, expected at most 999",
    ),
    "capacity below an unroll": (
        APEX.replace("replay: {", "replay: {min_size: 1, capacity: ‹159, "),
        "nodes.replay.capacity",
        "got 159, expected at least 160: an unroll brings so many items",
    ),
    "slack that both wait for": (
        APEX.replace("replay: {", "replay: {samples_per_insert: 4, slack: ‹351, "),
        "nodes.replay.slack",
        "got 351, expected at least 352, or both sides would wait for ever: 160 items come at once, each to be drawn 4 "
        "times, and 64 are drawn at once",
    ),
    "slack of the larger of two kinds of actors": (
        APEX.replace("nodes: {", "nodes: {many: {kind: actor, envs: 12}, ")
        .replace("from: actor", "from: [many, actor]")
        .replace("[actor, ev", "[many, actor, ev")
        .replace("replay: {", "replay: {samples_per_insert: 4, slack: ‹352, "),
        "nodes.replay.slack",
        "got 352, expected at least 512",
    ),
    "slack of a part of an actor's environments": (
        SEED_R2D2.replace("replay: {", "replay: {samples_per_insert: 4, slack: ‹191, "),
        "nodes.replay.slack",
        "got 191, expected at least 192, .*: 80 items come at once",
    ),
    "slack without a ratio": (
        APEX.replace("replay: {", "replay: {slack: ‹100, "),
        "nodes.replay.slack",
        "got 100, but without samples_per_insert nobody waits; leave it out",
    ),
    "ratio of nothing": (
        APEX.replace("replay: {", "replay: {samples_per_insert: ‹0, "),
        "nodes.replay.samples_per_insert",
        "got 0, expected more than 0",
    ),
    "codec of samples": (
        APEX.replace("samples: {", "samples: {codec: ‹lz4"),
        "links.samples.codec",
        "got 'lz4', expected no codec: samples is request",
    ),
    "samples from an actor": (
        APEX.replace("samples: {", "samples: {from: ‹actor"),
        "links.samples.from",
        "'actor' is of kind actor, which does not send samples: it is request, learner → replay",
    ),
    "bundle with another count of replays": (
        GORILA.replace("replay: {count: 2, bundle: w}", "replay: {count: 3, bundle: ‹w}"),
        "nodes.replay.bundle",
        "replay has 3 nodes and actor has 2; a bundle needs equal counts",
    ),
    # replicas
    "replicas of samples": (
        APEX.replace("learner: {}", "learner: {count: ‹2}"),
        "nodes.learner.count",
        "2 nodes of kind learner, expected 1: replicas train on unrolls as they come, and what is drawn is of nobody's",
    ),
    "one replica of samples": (
        APEX + "  sync: ‹{}\n",
        "links.sync",
        "replicas train on unrolls as they come, .*; leave it out",
    ),
    "replicas with a parameter server": (
        A3C + "  sync: ‹{}\n",
        "links.sync",
        "learners either have param_servers apply their gradients, or sum them .*; leave it or links.gradients out",
    ),
    "trainers of replicas": (
        BASE.replace("learner: {}", "learner: {count: 2, trainers: ‹auto}"),
        "nodes.learner.trainers",
        "got 'auto', expected 1: replicas apply one gradient at a time",
    ),
    "replicas in lock-step without a bundle": (
        DDPPO.replace("learner: {count: 2, bundle: w}", "learner: ‹{count: 2}").replace(
            "envs: 16, bundle: w", "envs: 8"
        ),
        "nodes.learner.bundle",
        "got nothing, but each of 2 learners plays with actors of its own: give learner and all .* one bundle",
    ),
    "deadline of replicas": (
        DDPPO.replace("learner: {", "learner: {deadline: ‹0, "),
        "nodes.learner.deadline",
        "got 0, expected more than 0",
    ),
    "votes for an actor": (
        DDPPO.replace("sync: {from: learner, to: learner}", "sync: {from: learner, to: ‹actor}"),
        "links.sync.to",
        "'actor' is of kind actor, which does not receive sync: it is latest, learner → learner",
    ),
    "a replica that does not vote": (
        HEAD
        + "nodes: {actor: {envs: 64}, a: {kind: learner}, b: {kind: learner}}\n"
        + LINKS.replace("to: learner", "to: [a, b]")
        + "  sync: {from: ‹a}\n",
        "links.sync.from",
        "b is left out, but every learner holds an end of sync",
    ),
    "preemption without a tally": (
        DDPPO.replace("preempt: ", "preempt: ‹").replace("  tally: {from: learner, to: actor}\n", ""),
        "algo.preempt",
        "got 0.6, but nobody tells actors how many have played; add links.sync and links.tally, or leave it out",
    ),
    "preemption without others": (
        DDPPO.replace("preempt: ", "preempt: ‹").replace("count: 2, ", "").partition("  sync")[0],
        "algo.preempt",
        "got 0.6, but nobody tells actors how many have played",
    ),
    "preemption that nobody waits for": (
        DDPPO.replace("preempt: ", "preempt: ‹").replace(", max_lag: 0", ""),
        "algo.preempt",
        "got 0.6, but nobody waits for a straggler's unroll; set links.trajectories.max_lag to 0",
    ),
    # does it fit
    "batch never fills": (
        BASE.replace("impala", "impala, batch: ‹129"),
        "algo.batch",
        r"can never fill: 129 columns are needed, but the actors wait after 128 .*\(2 × 32\) × 2\); "
        "set algo.batch to 128 or less, or raise nodes",
    ),
    "batch never fills by default": (
        "name: t\nenv: {id: x}\nalgo: ‹{name: impala}\nnodes: {actor: {envs: 8}, learner: {}}\n",
        "algo.batch",
        "64 columns are needed, but the actors wait after 16",
    ),
    "lock-step window": (
        BASE + LINKS.replace("{from", "{max_lag: 0, window: ‹2, from"),
        "links.trajectories.window",
        "got 2, expected 1: with max_lag 0",
    ),
    "lock-step batch too large": (
        BASE.replace("impala", "impala, batch: ‹65") + LINKS.replace("{from", "{max_lag: 0, window: 1, from"),
        "algo.batch",
        "got 65, expected 64 .*it can never fill; set algo.batch to 64",
    ),
    "lock-step batch too small": (
        BASE.replace("impala", "impala, batch: ‹32") + LINKS.replace("{from", "{max_lag: 0, window: 1, from"),
        "algo.batch",
        "got 32, expected 64 .*rounds would mix",
    ),
    "lock-step batch of a bundle": (
        A3C.replace("batch: 16", "batch: ‹32"),
        "algo.batch",
        r"got 32, expected 16 \(actors × envs: 1 × 16 in each w\)",
    ),
    "reward without evaluator": (
        BASE.replace("learner: {}", "learner: {}, evaluator: {count: 0}") + "stop: {reward: ‹475}\n",
        "stop.reward",
        "needs an evaluator",
    ),
    # variables
    "unset": (BASE + "seed: ‹${SEED}\n", "seed", r"\$\{SEED\} is not set; set it, or give a default"),
    "unset with a message": (BASE + 'hosts: {a: ‹"${A:?the head}"}\n', "hosts.a", r"\$\{A\} is not set: the head"),
    "empty with a message": (BASE + 'hosts: {a: ‹"${EMPTY:?the head}"}\n', "hosts.a", "is not set: the head"),
    "malformed": (BASE.replace("CartPole-v1", '‹"${1x}"'), "env.id", r"got '\$\{1x\}', expected \$\{VAR\}"),
    "unclosed": (BASE.replace("CartPole-v1", '‹"a${HOME"'), "env.id", "expected"),
    "nested": (BASE.replace("CartPole-v1", '‹"${A:-${B}}"'), "env.id", "expected"),
    "wrong type": (BASE + "seed: ‹${TEXT}\n", "seed", "got 'abc', expected a whole number"),
    "not text": (BASE + "run_id: ‹${BYTES}\n", "run_id", "expected UTF-8 text"),
    # extends
    "extends what is not there": (BASE + "extends: ‹nowhere.yaml\n", "", "cannot read .*No such file"),
    "extends itself": (BASE + "extends: ‹t.yaml\n", "extends", "extends itself"),
    "extends an absolute path": (BASE + "extends: ‹/etc/passwd\n", "extends", "a path relative to this file"),
    "extends a folder": (BASE + "extends: ‹.\n", "", "not a regular file"),
}
ENVIRON = {"EMPTY": "", "TEXT": "abc", "BYTES": "\udcff"}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_its_place(name: str, tmp_path: Path) -> None:
    marked, path, message = MISTAKES[name]
    before, _, after = marked.partition("‹")
    line, column = (before.count("\n") + 1, len(before) - before.rfind("\n")) if after else (1, 1)
    found = problems(tmp_path, before + after, environ=ENVIRON)
    at_place = [p for p in found if (p.line, p.column, p.path) == (line, column, path)]
    assert at_place, f"expected {line}:{column}: {path}, found:\n" + "\n".join(map(str, found))
    assert at_place[0].file == "t.yaml"
    assert re.search(message, at_place[0].message), at_place[0].message


SEVERAL = {  # rules are broken by these
    "empty",
    "uneven bundle",
    "no actor",
    "no learner",
    "missing link",
    "inference that stands idle",
    "evaluator with weights and parameters",
    "replay that nobody fills",
    "replay that nobody draws from",
    "no replay",
    "bundle with another count of replays",
}
LONE = set(MISTAKES) - SEVERAL


@pytest.mark.parametrize("name", sorted(LONE))
def test_one_mistake_is_told_once(name: str, tmp_path: Path) -> None:
    found = problems(tmp_path, MISTAKES[name][0].replace("‹", ""), environ=ENVIRON)
    assert len(found) == 1, "\n".join(map(str, found))


def test_all_mistakes_come_at_once_in_file_order(tmp_path: Path) -> None:
    text = (
        "name: My Run\n"
        "env: {id: 3}\n"
        "algo: {name: impala, unrol: 5}\n"
        "nodes: {actor: {env: 4}, learner: {}}\n"
        "links: {trajectories: {to: lerner}, weights: {kind: queue}}\n"
        "stop: {step: 3}\n"
        "seed: ${SEED}\n"
    )
    found = problems(tmp_path, text)
    assert [(p.line, p.column, p.path) for p in found] == [
        (1, 7, "name"),
        (2, 11, "env.id"),
        (3, 22, "algo.unrol"),
        (4, 17, "nodes.actor.env"),
        (5, 28, "links.trajectories.to"),
        (5, 53, "links.weights.kind"),
        (6, 8, "stop.step"),
        (7, 7, "seed"),
    ]
    assert str(found[0]).startswith("t.yaml:1:7: name: got 'My Run', expected")


def test_a_flood_of_mistakes_is_cut(tmp_path: Path) -> None:
    found = problems(tmp_path, BASE + "".join(f"x{i}: 1\n" for i in range(500)))
    assert len(found) == 101
    assert found[-1].message == "and 400 more problems"


@pytest.mark.parametrize(
    ("data", "place", "message"),
    [
        (b"name: t\nenv: {id: \xff}\n", (2, 11), "not UTF-8: byte 0xff"),
        (b"name: t\n" + b"#" * (1 << 20), (0, 0), "larger than 1 MiB"),
        (b"#" * 70_000, (1, 1), "a line of 70,000 characters"),
        (b"\n" * 30_000, (20001, 1), "more than 20,000 lines"),
        (b"x: [" + b"1," * 25_000 + b"]", None, "more than 10,000 values"),
        (b"[" * 60_000, (1, 33), "nested deeper than 32"),
        (b'x: "\\U0011FFFF"', (1, 1), "not YAML"),
        (b"%YAML 1" + b"1" * 5000 + b".2\n---\n", (1, 1), "not YAML"),
    ],
)
@pytest.mark.timeout(10)
def test_hostile_files_are_refused_quickly(
    data: bytes, place: tuple[int, int] | None, message: str, tmp_path: Path
) -> None:
    (found,) = problems(tmp_path, data)
    assert message in found.message
    assert place in (None, (found.line, found.column))


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("algo.lr=fast", "algo.lr", "got 'fast', expected a number"),
        ("algo.rl=1", "algo.rl", "unknown key"),
        ("nodes.actr.count=3", "nodes.actr", "did you mean 'actor'"),
        ("links.weight.insecure=true", "links.weight", "no such port"),
        ("seed.x=1", "seed.x", "seed is 1, not a mapping"),
        ("seed", "", "expected key.path=value"),
        ("=1", "", "expected key.path=value"),
        ("a..b=1", "", "expected key.path=value"),
        (".".join("abcdefghijklmnopq") + "=1", "", "expected key.path=value"),
        ("extends=u.yaml", "extends", "cannot be overridden"),
        ("seed=[1", "", "not YAML"),
        ("seed=*a", "seed", "alias"),
        ("name=\udcff", "name", "expected UTF-8"),
    ],
)
def test_a_bad_override_is_named(override: str, path: str, message: str, tmp_path: Path) -> None:
    (found,) = problems(tmp_path, BASE + "seed: 1\n", override)
    assert found.file == f"override {override!r}"
    assert (found.line, found.path) == (0, path)
    assert message in found.message


@pytest.mark.parametrize("path", ["nowhere.yaml", ".", "a\0b", "/dev/zero"])
def test_what_cannot_be_read_is_a_problem(path: str) -> None:
    with pytest.raises(TopologyError, match=r"cannot read|not a regular file"):
        load(path, catalog=CATALOG, environ={})


def test_mutual_extends_are_refused_where_the_circle_closes(tmp_path: Path) -> None:
    (tmp_path / "u.yaml").write_text("seed: 2\nextends: t.yaml\n")
    (found,) = problems(tmp_path, BASE + "extends: u.yaml\n")
    assert (found.file, found.line, found.path) == ("u.yaml", 2, "extends")
    assert "extends itself (t.yaml → u.yaml)" in found.message


def test_a_mistake_in_the_base_is_reported_there(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "u.yaml").write_text(BASE + "sede: 1\n")
    (found,) = problems(tmp_path, "extends: base/u.yaml\nseed: 2\n")
    assert (found.file, found.line, found.column) == ("base/u.yaml", 5, 1)


def test_a_bad_run_id_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run id: got '\.\./x'"):
        load_text(tmp_path, BASE, run_id="../x")


def test_an_ipc_path_that_no_socket_takes_is_refused(tmp_path: Path) -> None:
    (found, *_) = problems(tmp_path, BASE, environ={"TMPDIR": "/tmp/" + "d" * 70})
    assert "expected at most 106" in found.message
    assert "TMPDIR" in found.message
    load_text(tmp_path, BASE, environ={"TMPDIR": "/tmp/" + "d" * 70}, in_process=True)


# ── links that leave the machine ─────────────────────────────────────────────────────────────────────────────────

REMOTE = BASE.replace("envs: 32", "envs: 32, host: b") + "hosts: {a: 10.0.0.1, b: gpu.lan}\n"


def keys_of(**hosts: str) -> Catalog:
    """The catalog of a machine that allows these hosts, each for some kinds of node or, without any, for all."""
    return replace(CATALOG, keys=lambda host: frozenset(hosts[host].split()) if host in hosts else None)


def refused(tmp_path: Path, text: str, *overrides: str, **options: Any) -> list[str]:
    """The lines of the security error."""
    with pytest.raises(SecurityError) as caught:
        load_text(tmp_path, text, *overrides, **options)
    assert caught.value.exit_code == 77
    return str(caught.value).splitlines()


def test_a_link_into_the_open_is_a_security_error_that_says_what_to_type(tmp_path: Path) -> None:
    lines = refused(tmp_path, REMOTE)
    assert len(lines) == 2
    for line, host in zip(lines, "ab", strict=True):
        assert f"links: no key of {host} is allowed" in line
        assert "trajectories, weights" in line.replace("progress, control, ", "")
        for command in (f"`ddrl keys new {host}`", "insecure: true"):
            assert command in line


def test_keys_of_all_hosts_excuse_them(tmp_path: Path) -> None:
    assert load_text(tmp_path, REMOTE, catalog=keys_of(a="", b=""))
    (line,) = refused(tmp_path, REMOTE, catalog=keys_of(a=""))
    assert "links: no key of b" in line


def test_a_key_for_some_kinds_of_node_is_for_no_others(tmp_path: Path) -> None:
    assert load_text(tmp_path, REMOTE, catalog=keys_of(a="", b="actor relay"))
    (line,) = refused(tmp_path, REMOTE, catalog=keys_of(a="", b="actor"))
    assert "the key of b is allowed for actor only, not for relay;" in line
    (line,) = refused(tmp_path, REMOTE, catalog=keys_of(a="learner", b="actor relay"))
    assert "the key of a is allowed for learner only, not for controller;" in line


def test_one_secured_link_does_not_excuse_the_others(tmp_path: Path) -> None:
    assert not any("weights" in line for line in refused(tmp_path, REMOTE, "links.weights.insecure=true"))
    (first, _) = refused(tmp_path, REMOTE + "insecure: true\n", "links.weights.insecure=false")
    assert "leave theirs: weights;" in first


def test_no_key_protects_the_sums_of_learners_on_several_hosts(tmp_path: Path) -> None:
    text = BASE.replace("learner: {}", "learner: {count: 2, host: [a, b]}") + "hosts: {a: 10.0.0.1, b: gpu.lan}\n"
    (line,) = refused(tmp_path, text, catalog=keys_of(a="", b=""))
    assert "links.sync: learners on several hosts sum their gradients in plain text" in line
    assert load_text(tmp_path, text, "links.sync.insecure=true", catalog=keys_of(a="", b=""))


def test_exposed_links_come_with_the_other_problems(tmp_path: Path) -> None:
    found = problems(tmp_path, REMOTE + "port: 65533\n")
    assert any("no key of a" in p.message for p in found)
    assert any("expected at most 65535" in p.message for p in found)


@pytest.mark.parametrize("options", [{"in_process": True}, {}])
def test_nothing_is_exposed_on_loopback_or_in_one_process(options: dict[str, bool], tmp_path: Path) -> None:
    text = REMOTE if options else REMOTE.replace("10.0.0.1", "localhost").replace("gpu.lan", '"[::1]"')
    assert load_text(tmp_path, text, **options)


def test_the_votes_of_replicas_are_not_for_everybody(tmp_path: Path) -> None:
    """Where they vote they also sum gradients, over connections of torch's own."""
    text = DDPPO.replace("bundle: w", "bundle: w, host: [a, b]") + "hosts: {a: 10.0.0.1, b: 10.0.0.2}\n"
    others = [f"links.{name}.insecure=true" for name in ("trajectories", "weights", "tally", "control", "progress")]
    with pytest.raises(SecurityError, match=r"links.sync: learners on several hosts sum their gradients") as caught:
        load_text(tmp_path, text, *others)
    assert len(str(caught.value).splitlines()) == 3  # and neither host has a key for it
    assert load_text(tmp_path, text, *others, "links.sync.insecure=true")


# ── one process ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (DDPPO.replace("learner: {count: 2", "learner: {count: ‹2"), "nodes.learner.count"),
        (BASE.replace("learner: {}", "learner: {count: ‹3}"), "nodes.learner.count"),
        (HEAD + "nodes: {actor: {envs: 64}, a: {kind: learner}, b: ‹{kind: learner}}\n", "nodes.b.count"),
    ],
)
def test_replicas_cannot_share_a_process(text: str, path: str, tmp_path: Path) -> None:
    (found,) = problems(tmp_path, text.replace("‹", ""), in_process=True)
    before, _, _ = text.partition("‹")
    assert (found.line, found.column) == (4, len(before) - before.rfind("\n"))
    assert found.path == path
    assert re.search(r"[23] nodes of kind learner, expected 1: .*in one process nobody would come", found.message)
    assert load_text(tmp_path, text.replace("‹", ""))


@pytest.mark.parametrize("text", [BASE, A3C, BASE + LINKS + "  sync: {}\n"])
def test_one_replica_can_and_so_can_workers(text: str, tmp_path: Path) -> None:
    assert load_text(tmp_path, text, in_process=True)


# ── environments ─────────────────────────────────────────────────────────────────────────────────────────────────


def _refuse(env: EnvSettings) -> None:
    raise EnvError(f"no environment {env.id}")


def test_an_environment_that_cannot_be_made_is_an_env_error(tmp_path: Path) -> None:
    catalog = Catalog(CATALOG.algorithms, _refuse)
    with pytest.raises(EnvError, match=r"t.yaml:2:11: env.id: no environment CartPole-v1"):
        load_text(tmp_path, BASE, catalog=catalog)
    with pytest.raises(SecurityError, match="no environment CartPole-v1"):
        load_text(tmp_path, REMOTE, catalog=catalog)
    found = problems(tmp_path, REMOTE + "port: 65533\n", catalog=catalog)
    assert "env.id" in [p.path for p in found]


def test_an_algorithm_whose_ports_do_not_exist_yet_is_refused(tmp_path: Path) -> None:
    wiring = {"reduce": {"kind": "request", "from": "learner", "to": "learner"}}
    entry = dataclasses.replace(CATALOG.algorithms["impala"], wiring=wiring)
    (found,) = problems(tmp_path, BASE, catalog=Catalog({"impala": entry}))
    assert (found.path, found.message[:12]) == ("links.reduce", "no such port")


def test_a_rule_of_several_gradients_an_update_has_no_parameter_server(tmp_path: Path) -> None:
    entry = dataclasses.replace(CATALOG.algorithms["impala"], one_pass=False)
    (found,) = problems(tmp_path, A3C, catalog=Catalog({"impala": entry}))
    assert (found.path, found.line) == ("algo.name", 3)
    assert "several gradients each" in found.message


def test_a_rule_of_several_gradients_an_update_has_one_trainer(tmp_path: Path) -> None:
    entry = dataclasses.replace(CATALOG.algorithms["impala"], one_pass=False)
    (found,) = problems(tmp_path, GA3C, "nodes.learner.trainers=2", catalog=Catalog({"impala": entry}))
    assert (found.path, found.message[:20]) == ("nodes.learner.trainers", "got 2, expected 1: a")
