"""How long an optimizer step takes on n GPUs: what they compute, what they send and over which link, what their loaders deliver.

    step = max(computing + sending that it doesn't cover + a GPU's share of Muon + Muon's exchange, loading)

FSDP2 and DDP send while the GPU computes. Muon begins when the gradients are complete and ends before the next step; that its
iterations run beside most of its exchange is left out.
"""

import math
from dataclasses import dataclass

from prx_composer.commands.plan.communication import Traffic, muon_plan, traffic
from prx_composer.commands.plan.conditions import Conditions, Measured
from prx_composer.commands.plan.planned_model import PlannedModel
from prx_composer.commands.plan.timeline import Span
from prx_composer.common.errors import UserError
from prx_composer.recipe.config import Recipe

LINK_SHARE = 0.8  # of a link's bandwidth that collectives of large messages reach: about 360 of NVLink 4's 450 GB/s


@dataclass(frozen=True)
class Links:
    """What GPUs send over, in bytes per second in one direction.

    Args:
        inside: of a node, per GPU. between: nodes, per GPU.
        per_node: GPUs of one node; neighbours in rank share it.
    """

    inside: float
    between: float
    per_node: int

    @classmethod
    def of(cls, conditions: Conditions, num_gpus: int) -> "Links":
        network = conditions.network if conditions.network is not None else conditions.gpu.network
        return cls(conditions.gpu.link * 1e9, network * 1e9, min(conditions.gpus_per_node, num_gpus))

    def seconds(self, sent: Traffic) -> float:
        """Of a step's collectives of one kind, one after the other, without latency.

        A ring crosses a node's border once, however many of its members are in the node, and may use the adapters of all of them
        for it. In a pairwise exchange each byte for another node goes through the sender's own.
        """
        span = sent.ranks * sent.stride
        aligned = math.gcd(span, self.per_node)
        if aligned == span:
            return sent.bytes / (LINK_SHARE * self.inside)
        together = max(aligned // sent.stride, 1)  # members of a group that share a node
        if sent.pairwise:
            outside = sent.bytes * (sent.ranks - together) / (sent.ranks - 1)
            return max((sent.bytes - outside) / self.inside, outside / self.between) / LINK_SHARE
        return sent.bytes / (LINK_SHARE * min(self.inside, self.between * together))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one GPU.

    Args:
        compute: forward and backward passes.
        beside: sending that runs while it computes. uncovered: what of it goes on when computing could.
        optimizer: its share of Muon's iterations. exchange: of Muon's matrices, as if nothing ran beside it.
        loader: in which the loaders of its node deliver the step's images; 0: training never waits for them.
        sent: bytes by purpose.
    """

    compute: float
    beside: float
    uncovered: float
    optimizer: float
    exchange: float
    loader: float
    sent: dict[str, float]

    @property
    def alone(self) -> float:
        """If sending took no time and the data were there."""
        return self.compute + self.optimizer

    @property
    def waiting(self) -> float:
        """For data."""
        return max(self.loader - self.alone - self.uncovered - self.exchange, 0.0)

    @property
    def total(self) -> float:
        return self.alone + self.uncovered + self.exchange + self.waiting

    @property
    def efficiency(self) -> float:
        """Speed, as a share of that of a GPU that sends nothing and waits for nothing."""
        return self.alone / self.total


class StepTimes:
    """Of a recipe's stages.

    Args:
        conditions: with a utilisation, a step alone takes its FLOPs ÷ (utilisation × reachable peak), Muon's share included. With
            a measured throughput, computing is what remains of the measured step without Muon's share and exchange on the GPUs
            that were measured; on as many GPUs as planned the step takes what was measured.
    """

    def __init__(self, planned: PlannedModel, recipe: Recipe, conditions: Conditions):
        self._planned, self._recipe, self._conditions = planned, recipe, conditions
        measured_on = {one.gpus for one in (conditions.throughput or {}).values() if one.gpus}
        self._plans = {n: muon_plan(planned, recipe, n) for n in {conditions.num_gpus, *measured_on}}
        plan = self._plans[conditions.num_gpus]
        self.muon_flops = 0 if plan is None else plan.cost * int(recipe.optimizer.get("newton_schulz_steps", 5))

    def of(self, span: Span, flops: float) -> StepTime:
        """Of a stage with `flops` of training per image; raises UserError if nothing was measured at its image size."""
        c = self._conditions
        batch = span.batch_size // c.num_gpus
        found = self._traffic(c.num_gpus, batch // span.microbatch_size)
        beside = [(one.window, seconds) for one, seconds in found if one.window]
        optimizer, exchange = self._muon(c.num_gpus)
        if c.throughput is None:
            assert c.utilisation is not None
            alone = batch * flops / (c.utilisation * c.gpu.reachable_tflops * 1e12)
            optimizer = min(optimizer, alone)  # near the peak there may be no room for all of it
            compute = alone - optimizer
            late = uncovered(compute, beside)
        else:
            measured = self._measured(span.image_size)
            gpus, own = measured.gpus or c.num_gpus, measured.batch or batch
            compute = max(own / measured.images_per_second - sum(self._muon(gpus)), 0.0) * batch / own
            late = 0.0 if (gpus, own) == (c.num_gpus, batch) else uncovered(compute, beside)
        return StepTime(
            compute=compute,
            beside=sum(seconds for _, seconds in beside),
            uncovered=late,
            optimizer=optimizer,
            exchange=exchange,
            loader=0.0 if c.loader is None else batch * c.per_node / c.loader,
            sent={one.purpose: one.bytes for one, _ in found},
        )

    def _traffic(self, num_gpus: int, microbatches: int) -> list[tuple[Traffic, float]]:
        """With seconds."""
        links = Links.of(self._conditions, num_gpus)
        found = traffic(self._planned, self._recipe, num_gpus, microbatches, self._plans[num_gpus])
        return [(one, links.seconds(one)) for one in found]

    def _muon(self, num_gpus: int) -> tuple[float, float]:
        """Seconds of a GPU's share, of the one with most to do, and of the exchange."""
        plan = self._plans[num_gpus]
        work = 0.0 if plan is None else plan.largest_share * self.muon_flops
        exchange = sum(seconds for one, seconds in self._traffic(num_gpus, 1) if not one.window)
        return work / (self._conditions.gpu.reachable_tflops * 1e12), exchange

    def _measured(self, image_size: int) -> Measured:
        there = self._conditions.throughput or {}
        if image_size not in there:
            sizes = ", ".join(map(str, sorted(there)))
            raise UserError(
                f"--throughput: nothing was measured at image_size {image_size}, only at {sizes}; measure it, or give --mfu."
            )
        return there[image_size]


def uncovered(compute: float, sending: list[tuple[float, float]]) -> float:
    """Seconds by which sending outlasts what it runs beside.

    Args:
        compute: seconds of forward and backward passes.
        sending: (share of them, counted from their end, that it can run beside; its seconds). One is sent after the other.
    """
    return max(0.0, *(sum(s for w, s in sending if w <= window) - window * compute for window, _ in sending), 0.0)
