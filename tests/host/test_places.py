# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Patches beside those of other tools, over reloads, threads and tasks: undone in any order."""

import asyncio
import contextlib
import gc
import importlib
import inspect
import itertools
import os
import pickle
import subprocess
import sys
import threading
from unittest import mock

import brainstate
import braintrace
import jax
import pytest

import traceops
from tests.host.test_patch import fast
from tests.parity.nets import NETS
from traceops.host import patch, upstream

SCAN, INIT = jax.lax.scan, upstream.VjpAlgorithm.__init__


@pytest.fixture(autouse=True)
def as_found():
    yield
    traceops.uninstall()
    assert jax.lax.scan is SCAN and upstream.VjpAlgorithm.__init__ is INIT
    assert '__init__' not in vars(upstream.ETraceVmap)


def made():
    return braintrace.D_RTRL(NETS['lif'].make())


def count(n=3):
    return int(jax.lax.scan(lambda c, _: (c + 1, None), 0, None, length=n)[0])


class Other:
    """Another tool that patches jax.lax.scan for a block, and keeps to itself what it wraps."""

    def __init__(self):
        self.calls = 0

    def __enter__(self):
        self.before = jax.lax.scan

        def counted(*args, **kwargs):
            self.calls += 1
            return self.before(*args, **kwargs)
        jax.lax.scan = counted
        return self

    def __exit__(self, *exc):
        jax.lax.scan = self.before


def test_installed_inside_the_block_of_another_tool():
    with Other() as other:
        traceops.install()
        assert count() == 3 and other.calls == 1
    assert jax.lax.scan is SCAN                     # it has put back what it found ...
    assert fast(made()) and jax.lax.scan is not SCAN        # ... and the next learner mends it
    traceops.uninstall()
    assert jax.lax.scan is SCAN


def test_undone_inside_the_block_of_another_tool():
    traceops.install()
    with Other() as other:
        traceops.uninstall()
        assert count() == 3 and other.calls == 1    # not ours to take away
    assert count() == 3 and not traceops.installed()
    traceops.install()
    assert count() == 3
    traceops.uninstall()
    assert jax.lax.scan is SCAN


@pytest.mark.parametrize('order', list(itertools.permutations(range(3))))
def test_three_that_leave_in_any_order(order):
    """Two other tools, and install() between them: calls go through, and at the end ours is off."""
    with contextlib.ExitStack() as left:
        one, two = Other(), Other()
        one.__enter__()
        traceops.install()
        two.__enter__()
        ends = [lambda: one.__exit__(), traceops.uninstall, lambda: two.__exit__()]
        for i in order:
            ends[i]()
            assert count() == 3
        left.callback(setattr, jax.lax, 'scan', SCAN)       # what the others leave is theirs
        assert not traceops.installed() and not fast(made())


def test_mocked():
    with traceops.enabled(), mock.patch.object(jax.lax, 'scan', wraps=jax.lax.scan) as scan:
        assert count() == 3 and scan.called
    with mock.patch.object(jax.lax, 'scan', wraps=jax.lax.scan), traceops.enabled():
        assert count() == 3


def test_the_patched_function_looks_as_it_did():
    held = [None]
    traceops.install()
    scan = held[0] = jax.lax.scan
    assert scan is not SCAN and scan.__wrapped__ is SCAN and scan.__name__ == 'scan'
    assert inspect.signature(scan) == inspect.signature(SCAN) and scan.__doc__ == SCAN.__doc__
    assert pickle.loads(pickle.dumps(scan)) is scan
    sent = pickle.dumps(scan)
    init = upstream.VjpAlgorithm.__init__
    assert pickle.loads(pickle.dumps(init)) is init
    traceops.uninstall()
    assert pickle.loads(sent) is SCAN
    carry, _ = held[0](lambda c, _: (c + 1, None), 0, None, length=2)   # a reference from then
    assert carry == 2


@pytest.mark.parametrize('end', ['thread', 'task', 'uninstall', 'lost'])
def test_a_block_that_is_left_elsewhere(end):
    def fixture():
        with traceops.enabled(window=7):
            yield
    block = fixture()
    next(block)
    assert traceops.installed() and traceops.settings().window == 7
    if end == 'thread':
        thread = threading.Thread(target=block.close)
        thread.start()
        thread.join()
    elif end == 'task':
        async def close():
            block.close()
        asyncio.run(close())
    elif end == 'uninstall':
        traceops.uninstall()
    else:
        del block
        gc.collect()
    assert not traceops.installed() and jax.lax.scan is SCAN
    if end == 'uninstall':
        block.close()
    assert traceops.settings().window is None


def test_blocks_that_end_in_the_order_they_began():
    def fixture(window):
        with traceops.enabled(window=window):
            yield
    one, two = fixture(3), fixture(4)
    next(one), next(two)
    one.close()
    assert traceops.installed() and traceops.settings().window == 4
    two.close()
    assert not traceops.installed() and traceops.settings().window is None


def test_a_task_that_outlives_the_block_it_began_in():
    async def ask():
        await asyncio.sleep(0)
        return traceops.installed(), traceops.settings().window

    async def main():
        with traceops.enabled(window=5):
            inside, outside = asyncio.create_task(ask()), asyncio.create_task(ask())
            found = await inside
        return found, await outside, await asyncio.create_task(ask())
    found, _, after = asyncio.run(main())
    assert found == (True, 5) and after == (False, None)


def test_an_error_on_the_way_in_or_out_leaves_nothing():
    with pytest.raises(traceops.errors.SettingsError), traceops.enabled(window=-1):
        pytest.fail('the block ran')
    for error in (KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), traceops.enabled():
            raise error
    assert not traceops.installed() and jax.lax.scan is SCAN


def test_reloaded_while_installed():
    traceops.install()
    importlib.reload(patch)
    assert traceops.installed() and patch.installed() and count() == 3
    patch.install()
    assert jax.lax.scan.__wrapped__ is SCAN             # not wrapped twice
    with patch.enabled():
        assert fast(made())
    traceops.uninstall()
    assert not patch.installed() and jax.lax.scan is SCAN


def test_an_import_leaves_other_programs_alone_and_may_be_made_again():
    """In a process of its own, one for both: to import what we import takes longest.

    Neither import nor install nor a setting has anybody's jitted function, traced before the
    import, traced again. All modules thrown away and imported anew while installed, twice.
    """
    code = '''
import collections, jax, brainstate, jax.numpy as jnp
traced = collections.Counter()
@jax.jit
def plain(x):
    traced['plain'] += 1
    return jax.lax.scan(lambda c, a: (c + a, a), 0., x)[0]
@brainstate.transform.jit
def stateful(x):
    traced['stateful'] += 1
    return x.sum()
def call():
    plain(x), stateful(x)
x = jnp.ones(3)
call()
import traceops
call()
traceops.install()
call()
with traceops.enabled(window=3):
    call()
with traceops.configured(backend='jax'):
    call()
traceops.configure(backend='jax', window=3)
call()
traceops.reset()
traceops.status()
call()
traceops.uninstall()
call()
print(dict(traced))

import sys, braintrace
scan, init = jax.lax.scan, braintrace.ETraceVmap.__init__
traceops.install()
for _ in range(2):
    for name in [n for n in sys.modules if n.split('.')[0] == 'traceops']:
        del sys.modules[name]
    import traceops
    assert traceops.installed()
    traceops.install()
    assert jax.lax.scan.__wrapped__ is scan
    assert jax.lax.scan(lambda c, x: (c + x, x), 0, jax.numpy.arange(4))[0] == 6
traceops.uninstall()
assert not traceops.installed()
assert jax.lax.scan is scan and braintrace.ETraceVmap.__init__ is init
print('as it was')
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], text=True,
                          capture_output=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    assert done.stdout == "{'plain': 1, 'stateful': 1}\nas it was\n", done.stdout + done.stderr


def test_what_has_no_constructor_of_its_own_follows_its_bases(monkeypatch):
    """Those of now, not those of when it was patched."""
    traceops.install()
    seen = []
    monkeypatch.setattr(brainstate.nn.Vmap, '__init__', lambda self, *args: seen.append(args))
    upstream.ETraceVmap('a module')
    assert seen == [('a module',)]
