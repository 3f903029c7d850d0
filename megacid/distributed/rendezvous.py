"""The rendezvous of all ranks at start: reports ranks that are late, and ends when some never come.

Every rank connects to the store at MASTER_ADDR:MASTER_PORT and registers there. Rank 0 waits for all registrations and
publishes the outcome, so every rank that has started raises the same error.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from megacid.errors import UserError

START_TIMEOUT_S = 600.0
_REPORT_EVERY_S = 30.0
_LONGEST_POLL_S = 0.5
_OUTCOME, _ALL_HERE = "outcome", "all ranks are here"


def rendezvous(rank: int, world: int, timeout_s: float) -> dist.Store:
    """Wait until all ranks have started. Returns the store for `init_process_group`.

    Args:
        timeout_s: seconds to wait for the others.

    Raises:
        UserError: a rank has not started in time, two processes have the same rank, the ranks disagree about their
            number, the port is in use, or the launcher has not set the address.
    """
    if not 0 <= rank < world:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world}, expected 0 <= RANK < WORLD_SIZE: correct the launch")
    store = _connect(rank, world, timeout_s)
    store.add("processes", 1)
    failure = None
    if (of_first := store.compare_set("world", "", str(world)).decode()) != str(world):
        failure = f"WORLD_SIZE is {world} on rank {rank} and {of_first} on another, expected the same on all"
    elif store.add(f"rank/{rank}", 1) > 1:
        failure = f"two processes are rank {rank} of {world}, expected one: give every process its own RANK"
    if failure is not None:
        _publish(store, failure)
    elif rank == 0:
        _publish(store, _wait_for_all(store, world, timeout_s))
    store.wait([_OUTCOME], timedelta(seconds=timeout_s + _REPORT_EVERY_S))
    outcome = store.get(_OUTCOME).decode()
    if outcome == _ALL_HERE and failure is None:
        return store
    store.add("readers", 1)
    if rank == 0:
        _let_others_read(store)
    error = UserError(failure or outcome)
    error.on_every_rank = failure is None
    raise error


def _publish(store: dist.Store, outcome: str) -> None:
    """Publish the outcome for all ranks, unless one is published already."""
    store.compare_set(_OUTCOME, "", outcome)


def _connect(rank: int, world: int, timeout_s: float) -> dist.Store:
    """The store at the launcher's address, hosted by rank 0 or by torchrun."""
    host, port = _address()
    # torchrun hosts the store itself and keeps it over restarts, so each attempt has its own keys.
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if by_agent else "0"
    late = threading.Timer(
        _REPORT_EVERY_S, _say, [f"rank {rank} cannot reach rank 0 at {host}:{port} yet, it waits up to {timeout_s:g} s"]
    )
    late.daemon = True
    late.start()
    try:
        tcp_store = dist.TCPStore(
            host,
            port,
            world,
            is_master=rank == 0 and not by_agent,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistNetworkError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(
                f"port {port} is in use on this host, expected a free one for the rendezvous at {host}:{port}: choose "
                "another with --master_port"
            ) from None
        if rank == 0:
            raise
        raise UserError(
            f"rank {rank} could not reach rank 0 at {host}:{port} within {timeout_s:g} s: see the output of rank 0, "
            "and check that this host can connect to the address"
        ) from None
    finally:
        late.cancel()
    return dist.PrefixStore(f"megacid/{attempt}", tcp_store)


def _address() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"environment variables MASTER_ADDR and MASTER_PORT are {host!r} and {port!r}, expected the address of "
            "rank 0 and a port: start with deepspeed or torchrun, or set them"
        )
    return host, int(port)


def _wait_for_all(store: dist.Store, world: int, timeout_s: float) -> str:
    """Wait for the registrations of all ranks, and name late ones now and then. Returns the outcome."""
    missing = list(range(world))
    began = reported = time.monotonic()
    pause_s = 0.01
    while True:
        missing = [rank for rank in missing if not store.check([f"rank/{rank}"])]
        if store.check([_OUTCOME]):  # a second process of a rank
            return store.get(_OUTCOME).decode()
        if not missing:
            return _ALL_HERE
        shown = f"rank {', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''} of {world}"
        now = time.monotonic()
        if now - began >= timeout_s:
            return (
                f"{shown} did not start within {timeout_s:g} s: see the output of those ranks, and check that their "
                "hosts can reach rank 0 (the limit is megacid.run.start_timeout_s in training)"
            )
        if now - reported >= _REPORT_EVERY_S:
            reported = now
            _say(f"waiting for {shown} to start, {now - began:.0f} of {timeout_s:g} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_POLL_S)


def _let_others_read(store: dist.Store) -> None:
    """Keep the store of rank 0 alive until every process that has started knows the outcome, at most 5 s."""
    deadline = time.monotonic() + 5
    while store.add("readers", 0) < store.add("processes", 0) and time.monotonic() < deadline:
        time.sleep(0.05)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
