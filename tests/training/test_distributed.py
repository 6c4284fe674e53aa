"""How a process learns of the others, and of the wish to stop."""

import os
import re
import signal

import pytest

from dreamlite_jax.errors import UserError
from dreamlite_jax.parallel import distributed


def test_flags_go_before_the_environment():
    environment = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert distributed.resolve(environment=environment) == ("a:1", 4, 3)
    assert distributed.resolve("b:2", "2", "0", environment) == ("b:2", 2, 0)
    assert distributed.resolve(environment={}) is None and distributed.resolve(environment={"HOME": "/"}) is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (("", "2", "0"), "JAX_COORDINATOR_ADDRESS must be set too"),
        (("a:1", "", ""), "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set too"),
        (("a", "2", "0"), "JAX_COORDINATOR_ADDRESS is 'a'; it must be host:port"),
        (("a:port", "2", "0"), "JAX_COORDINATOR_ADDRESS is 'a:port'"),
        (("a:1", "2", "2"), "JAX_NUM_PROCESSES is '2' and JAX_PROCESS_ID '2'"),
        (("a:1", "two", "0"), "JAX_NUM_PROCESSES is 'two'"),
        (("a:1", "2", "-1"), "JAX_PROCESS_ID '-1'"),
    ],
)
def test_what_does_not_fit_together_is_named(values, says):
    with pytest.raises(UserError, match=re.escape(says)):
        distributed.resolve(*values, environment={})


def test_a_machine_alone_needs_nothing():
    assert not distributed.on_tpu_host()
    distributed.initialize()
    assert distributed.primary()
    distributed.wait_for_all("nobody")


def test_sigterm_is_a_request_while_a_run_listens():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.StopRequest() as stop:
        assert not stop.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reached(2) and stop.reached(3)
    assert signal.getsignal(signal.SIGTERM) == before
    with distributed.StopRequest() as again:
        assert not again.reached(4)
