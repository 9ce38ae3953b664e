"""The simulated ring of the warp-specialised kernel."""

from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon")


def test_it_saves_time_where_groups_are_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from score_ring import Ring, cycles, lockstep

    floor, whole = 2 * 512 * 4, lockstep(4 * 64)
    together, apart = (cycles(4 * 64, Ring(64, 4, lead), 600, 500, tiles=6) for lead in (1, 2))
    finer = cycles(4 * 64, Ring(32, 9, 6), 600, 500, tiles=6)
    assert floor < finer < apart < together <= whole
    assert cycles(4 * 64, Ring(64, 4, 2), 2000, 500, tiles=6) >= 4 * 2000  # bound by what arrives
