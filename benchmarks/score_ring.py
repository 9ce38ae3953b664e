"""Cycles of a tile of scores in the warp-specialised kernel, by a simulation. Nothing here is measured.

    PYTHONPATH=.:kernels python benchmarks/score_ring.py

Of head/warp_specialized.py: two groups of warps multiply 64 x 256 tiles from one ring of stages, and finish them. The
figures below are counted, for NOTES.md; what the compilers' loops cost besides, and L2, is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from amopo_kernels.head.warp_specialized import Ring

FULL_STEP = 512  # cycles of a group for 64 features of 64 x 256 scores, while the other one does not multiply
ALONE, TOGETHER = 1800, 2750  # cycles of an epilogue: of one group, of each where both are in theirs
ISSUE = 120  # cycles from a product that is asked for to the next one at the earliest
TICK = 8
FEATURES = {"B": 896, "A and C": 5120}
MEMORY = ((600, 500), (600, 800), (900, 700))  # cycles between two arrivals of 64 features, and of latency


@dataclass
class Group:
    ring: Ring
    steps: int  # of a tile
    started: bool
    asked: int = 0  # products
    done: int = 0
    left: float = 0.0  # of the product that is multiplied
    epilogue: float = 0.0  # what is left of it, 1 to 0
    ask_again: int = 0  # not before this cycle

    @property
    def given_back(self) -> int:
        """Stages: a product's, once the next one is asked for or the tile is at its end."""
        at_end = self.asked == self.done and self.done % self.steps == 0
        return self.done if at_end else min(self.done, self.asked - 1)

    def may_ask(self, now: int, arrived: int) -> bool:
        same_tile = self.asked // self.steps == self.done // self.steps
        free = self.started and not self.epilogue and self.ask_again <= now
        return free and same_tile and self.asked - self.done < 2 and self.asked < arrived


def cycles(features: int, ring: Ring, between: float, latency: float, tiles: int = 24) -> float:
    """Of a tile, in the second half of `tiles`."""
    share = ring.depth / 64
    steps = -(-features // ring.depth)
    first, second = groups = [Group(ring, steps, True, left=FULL_STEP * share),
                              Group(ring, steps, False, left=FULL_STEP * share)]  # fmt: skip
    arrivals: list[float] = []
    ends: list[int] = []
    now = 0
    while len(ends) < tiles:
        while len(arrivals) < min(group.given_back for group in groups) + ring.stages:
            asked = max(now, arrivals[-1] - latency) if arrivals else now
            arrivals.append(asked + between * share + latency)
        lead = min(ring.lead, steps)
        second.started = second.started or (first.asked >= lead and first.done >= lead - 1)
        arrived = sum(time <= now for time in arrivals[-ring.stages :]) + max(0, len(arrivals) - ring.stages)
        for group in groups:
            if group.may_ask(now, arrived):
                group.asked, group.ask_again = group.asked + 1, now + ISSUE
        multiplying = [group for group in groups if group.asked > group.done]
        finishing = [group for group in groups if group.epilogue]
        for group in multiplying:
            group.left -= TICK / len(multiplying)
            if group.left <= 0:
                group.left, group.done = group.left + FULL_STEP * share, group.done + 1
                group.epilogue = 1.0 if group.done % steps == 0 else 0.0
        for group in finishing:
            group.epilogue = max(0.0, group.epilogue - TICK / (ALONE if len(finishing) == 1 else TOGETHER))
            if group is second and not group.epilogue:
                ends.append(now)
        now += TICK
    return (ends[-1] - ends[tiles // 2]) / (tiles - 1 - tiles // 2)


def lockstep(features: int) -> float:
    """The same in Triton's kernel, whose eight warps multiply and finish together."""
    return features / 64 * 2 * FULL_STEP + TOGETHER


def main() -> None:
    for case, features in FEATURES.items():
        whole = lockstep(features)
        print(f"{case}: {whole:.0f} in lockstep")
        for ring in (Ring(64, 4, 1), Ring(64, 4, 2), Ring(64, 4, 3), Ring(32, 9, 6)):
            found = [cycles(features, ring, *memory, tiles=24 if case == "B" else 8) for memory in MEMORY]
            saved = [f"{1 - one / whole:.1%}" for one in found]
            print(f"  {ring}: {', '.join(f'{one:.0f}' for one in found)}; saved {', '.join(saved)}")


if __name__ == "__main__":
    main()
