"""Topologies: a YAML file to a `Plan` of nodes, links and addresses, or every problem there is with it."""

from ddrl_bus.topology.loading import load, load_text
from ddrl_bus.topology.plan import LinkPlan, NodePlan, Plan, Port
from ddrl_bus.topology.schema import KINDS, AlgorithmEntry, Catalog, EnvSettings

__all__ = [
    "KINDS",
    "AlgorithmEntry",
    "Catalog",
    "EnvSettings",
    "LinkPlan",
    "NodePlan",
    "Plan",
    "Port",
    "load",
    "load_text",
]
