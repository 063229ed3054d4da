"""What ranks agree on."""

from __future__ import annotations

from datetime import timedelta

from beit_dist.engine.ranks.distributed import Agreement, Ranks


def test_alone_a_rank_agrees_with_itself() -> None:
    agreement = Agreement(Ranks(), timedelta(seconds=1))
    agreement.post([3, True, False])
    assert agreement.result() == [3, 1, 0]
    assert agreement.gather("x") == ["x"]
    assert agreement.from_rank_0({"a": 1}) == {"a": 1}
