"""Ranks know where to meet before they wait there; a place that cannot be is refused within seconds."""

from __future__ import annotations

import re
import socket
import time
from typing import Any

import pytest

from beit_dist.engine.ranks.distributed import Ranks
from beit_dist.engine.ranks.rendezvous import Meeting, look_up, meeting_point, waiting_said
from beit_dist.errors import ConfigError

RANKS = Ranks(1, 4, 1)
GIVEN = {"MASTER_ADDR": "node7", "MASTER_PORT": "29511"}
ONE_HOST = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


def test_ranks_meet_where_the_launcher_says() -> None:
    assert meeting_point(RANKS, GIVEN) == Meeting("node7", 29511)
    assert meeting_point(RANKS, {**GIVEN, "MASTER_ADDR": "fd00::7"}) == Meeting("fd00::7", 29511)


def test_ranks_of_an_mpi_launcher_on_one_host_meet_there() -> None:
    assert meeting_point(RANKS, ONE_HOST) == Meeting("127.0.0.1", 29500)
    assert meeting_point(RANKS, {**ONE_HOST, "MASTER_PORT": "4000"}) == Meeting("127.0.0.1", 4000)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR, MASTER_PORT: got None.*mpirun"):
        meeting_point(RANKS, {**ONE_HOST, "MPI_LOCALNRANKS": "2"})


def test_a_rank_that_is_alone_needs_no_place() -> None:
    assert meeting_point(Ranks(), {"MASTER_PORT": "tcp://10.0.0.1:80"}) is None


@pytest.mark.parametrize("missing", list(GIVEN))
def test_a_place_that_is_not_given_is_asked_for(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"^{missing}: got None.*For srun, mpirun"):
        meeting_point(RANKS, {**GIVEN, missing: ""})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("MASTER_PORT", port) for port in ("223270", "0", "-1", "x", "29500.0")),
        *(
            ("MASTER_ADDR", address)
            for address in ("tcp://10.0.0.1", "node7:29500", "node7 node8", "http://node7/")
        ),
    ],
)
def test_a_place_that_cannot_be_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: got '{re.escape(value)}'"):
        meeting_point(RANKS, {**GIVEN, name: value})


def test_kubernetes_own_variable_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"MASTER_PORT: got 'tcp://10.0.0.1:80'.*enableServiceLinks: false"):
        meeting_point(RANKS, {**GIVEN, "MASTER_PORT": "tcp://10.0.0.1:80"})


@pytest.mark.parametrize("address", ["no-such-host.invalid", "a" * 70 + ".invalid", "a..b"])
def test_a_name_that_cannot_be_looked_up_is_refused_in_time(address: str) -> None:
    since = time.monotonic()
    with pytest.raises(ConfigError, match=rf"MASTER_ADDR: got '{address}', expected a name that can be looked up"):
        look_up(Meeting(address, 29511), seconds=0.0)
    assert time.monotonic() - since < 20


def test_a_name_that_is_known_a_little_later_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def later(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        if len(asked) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", later)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    look_up(Meeting("pod-0.pods", 29511))
    assert asked == ["pod-0.pods"] * 3


def test_a_rank_that_waits_long_says_for_what(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting_said(RANKS, Meeting("node7", 29511), "timeouts.start_minutes=30", seconds=0.05):
        time.sleep(0.5)
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"rank 1 on \S+ is waiting for the other ranks at .*node7:29511 \(timeouts.start_minutes=30\)\n", said
    )
    with waiting_said(RANKS, Meeting("node7", 29511), "", seconds=0.2):
        pass
    time.sleep(0.4)
    assert capsys.readouterr().err == ""
