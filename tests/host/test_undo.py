# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What install touches, undoing it, and many threads that do both."""

import os
import sys
import threading
import types

import braintrace
import pytest

import traceops
from tests.host.test_patch import fast, learner
from tests.parity.nets import NETS

pytestmark = pytest.mark.usefixtures('compiled_quickly')

HOSTS = ('braintrace', 'brainstate', 'brainpy', 'braintools', 'saiunit')


@pytest.fixture
def restless():
    """Threads take turns every few microseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def everything():
    """Each attribute of each module and class of the hosts, and what their registries hold."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        if module is None or name.split('.')[0] not in HOSTS:
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = id(value)
            if isinstance(value, type) and value.__module__.split('.')[0] in HOSTS:
                found[value, '__dict__'] = {k: id(v) for k, v in vars(value).items()
                                            if not k.startswith(('__abstract', '_abc'))}
            elif name.startswith('braintrace') and isinstance(value, dict | set | frozenset):
                pairs = value.items() if isinstance(value, dict) else ((k, None) for k in value)
                found[name, key, 'holds'] = [(id(k), id(v)) for k, v in pairs] \
                    if not key.startswith('__') else None
    return found


def ours_in_the_hosts():
    """Code of this package in a class of the hosts."""
    home = os.path.dirname(traceops.__file__)
    return {f'{cls.__name__}.{key}' for cls, _ in (k for k in everything() if len(k) == 2)
            if isinstance(cls, type) for key, value in vars(cls).items()
            if isinstance(value, types.FunctionType)
            and value.__code__.co_filename.startswith(home)}


def changes(before):
    now = everything()
    return sorted(str(k) for k in before.keys() | now.keys() if before.get(k) != now.get(k))


@pytest.mark.parametrize('way', ['install', 'enabled', 'compile', 'class'])
def test_undo_leaves_every_module_class_and_registry(way):
    learner(), learner(vmap=True)                       # whatever the hosts do lazily is done
    learner(compiler=traceops.compile), learner(compiler=traceops.compile, vmap=True)
    assert not ours_in_the_hosts()
    before = everything()
    if way == 'install':
        traceops.install()
        assert changes(before)                          # the comparisons see what they have to
        assert ours_in_the_hosts() == {'ETraceVjpAlgorithm.__init__', 'ETraceVmap.__init__'}
        learner(), learner('es', vmap=True)
        traceops.uninstall()
    elif way == 'enabled':
        with traceops.enabled(), traceops.enabled():
            learner(), learner('es', vmap=True)
    elif way == 'compile':
        assert fast(learner('eprop', compiler=traceops.compile))
    else:
        assert fast(traceops.D_RTRL(NETS['lif'].make()))
    assert changes(before) == []


def test_undo_after_an_error_in_a_block():
    before = everything()
    with pytest.raises(ZeroDivisionError), traceops.enabled():
        raise ZeroDivisionError
    assert changes(before) == [] and not traceops.installed()


def test_uninstall_ends_with_traceops_off_and_a_block_does_not_outlive_itself():
    with traceops.enabled():
        traceops.install()
        with traceops.enabled():
            traceops.uninstall()
            assert not traceops.installed() and not fast(learner())
        with traceops.enabled():
            assert traceops.installed()
    assert not traceops.installed()
    with traceops.enabled():
        traceops.install()
    assert traceops.installed() and fast(learner())


def test_threads_that_make_learners_at_once_get_what_their_block_says(restless):
    """Half of them inside ``enabled()``, all at once, again and again."""
    models = [NETS['lif'].make() for _ in range(4)]
    wrong, start = [], threading.Barrier(len(models))

    def work(inside, model):
        start.wait()
        for _ in range(100):
            if inside:
                with traceops.enabled():
                    made = braintrace.D_RTRL(model)
            else:
                made = braintrace.D_RTRL(model)
            if fast(made) != inside or not isinstance(made, braintrace.D_RTRL):
                wrong.append((inside, type(made)))

    before = everything()
    threads = [threading.Thread(target=work, args=(i % 2 == 0, model))
               for i, model in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and changes(before) == []


def test_threads_that_install_and_uninstall_leave_nothing(restless):
    start = threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(200):
            traceops.install()
            traceops.uninstall()

    before = everything()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert changes(before) == [] and not traceops.installed()


@pytest.mark.parametrize('name, options', [
    ('ParamDimVjpAlgorithm', {}), ('IODimVjpAlgorithm', {'decay_or_rank': 0.9}),
    ('pp_prop', {'decay_or_rank': 4}), ('D_RTRL', {'fast_solve': False})])
def test_the_engines_by_their_own_names(name, options):
    traceops.install()
    made = getattr(braintrace, name)(NETS['lif'].make(), **options)
    assert fast(made) and type(made).__name__ == getattr(braintrace, name).__name__


@pytest.mark.parametrize('name, options', [
    ('d_rtrl', {}), ('pp_prop', {'decay_or_rank': 0.9}), ('es_d_rtrl', {'decay_or_rank': 0.9}),
    ('esd_rtrl', {'decay_or_rank': 0.9}), ('eprop', {}), ('e_prop', {}), ('ostl_recurrent', {}),
    ('ostl_feedforward', {}), ('three_factor', {'modulator': 0.5})])
def test_every_registered_name(name, options):
    net = NETS['lif']
    with traceops.enabled(window=2):        # asked for: of so small a net upstream is as fast
        made = braintrace.compile(net.make(), name, net.inputs(2, 3)[0], batch_size=3, **options)
    assert fast(made)
    assert {r.engine for r in traceops.explain(made).rows} == {'window'}
