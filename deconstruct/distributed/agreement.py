"""What all processes of a run must agree on is compared before it can make them wait for each other for ever.

Through the key-value store of JAX's coordination service, which needs no compiled program and has time limits. Process
0 reads what the others have written and writes one verdict, so that all of them end with the same words.
"""

from __future__ import annotations

import collections
import itertools
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the client is not public; `multihost_utils` has only barriers without a time limit

from deconstruct.distributed import lifeline
from deconstruct.types import PeerError, UserError

_ROOT = "deconstruct"
_POLL = 0.2  # seconds
_MISSING = "nothing"
_numbers = itertools.count()
_limit = 600.0


def limit_waiting(seconds: float) -> None:
    """How long `agree` waits for the others from now on, in this process. Default: 600 s."""
    global _limit
    _limit = seconds


def agree(what: str, value: Callable[[], dict[str, Any]], remedy: str = "start the same command everywhere") -> None:
    """Compares what `value` gives (JSON, by its keys) with that of the other processes, which all call this in the same
    order. Alone, does nothing.

    Raises UserError, naming the process, its host and both values, where one differs; PeerError, naming the process,
    where one has ended or has not come within the limit.
    """
    client = distributed.global_state.client
    if client is None or jax.process_count() == 1:
        return
    topic = f"{_ROOT}/{next(_numbers)}/{what}"
    process = jax.process_index()
    client.key_value_set(f"{topic}/said/{process}", json.dumps({"host": socket.gethostname(), "value": value()}))
    if process == 0:
        verdict = _judge(client, topic, what, remedy)
        client.key_value_set(f"{topic}/verdict/0", json.dumps(verdict))
    else:
        verdict = _await_verdict(client, topic, what)
    if verdict["message"]:
        raise (UserError if verdict["mistake"] else PeerError)(verdict["message"])


def _judge(client: Any, topic: str, what: str, remedy: str) -> dict[str, Any]:
    deadline = time.monotonic() + _limit
    while True:
        said = {_process(key): json.loads(text) for key, text in client.key_value_dir_get(f"{topic}/said/")}
        if len(said) == jax.process_count():
            message = _difference([said[process] for process in range(jax.process_count())])
            return {"message": message and f"{message}; {remedy}", "mistake": True}
        failure = _failure()
        if failure:
            return failure
        if time.monotonic() > deadline:
            missing = sorted(set(range(jax.process_count())) - set(said))
            names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            return {
                "message": f"process {names} has not come to the check of '{what}' within {_limit:g} s",
                "mistake": False,
            }
        time.sleep(_POLL)


def _await_verdict(client: Any, topic: str, what: str) -> dict[str, Any]:
    deadline = time.monotonic() + _limit + 10  # process 0 notices first, and knows more
    while True:
        for _, text in client.key_value_dir_get(f"{topic}/verdict/"):
            return json.loads(text)
        failure = _failure()
        if failure:
            return failure
        if time.monotonic() > deadline:
            return {"message": f"process 0 has not come to the check of '{what}' within {_limit:g} s", "mistake": False}
        time.sleep(_POLL)


def _failure() -> dict[str, Any] | None:
    failure = lifeline.failure()
    return failure and {"message": lifeline.sentence(failure), "mistake": failure["mistake"]}


def _difference(said: list[dict[str, Any]]) -> str:
    """The first key on which a process differs from most; "" where there is none."""
    for key in dict.fromkeys(key for one in said for key in one["value"]):
        values = [json.dumps(one["value"].get(key, _MISSING)) for one in said]
        usual = collections.Counter(values).most_common(1)[0][0]  # of equally many, that of the lower process
        odd = [process for process, value in enumerate(values) if value != usual]
        if odd:
            others = f" (and {len(odd) - 1} more processes)" if len(odd) > 1 else ""
            return (
                f"process {odd[0]} ({said[odd[0]]['host']}){others} has {key}={_plain(values[odd[0]])} where process "
                f"{values.index(usual)} has {_plain(usual)}"
            )
    return ""


def _plain(value: str) -> str:
    loaded = json.loads(value)
    return loaded if isinstance(loaded, str) else value


def _process(key: str) -> int:
    return int(key.rpartition("/")[2])
