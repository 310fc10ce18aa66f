# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""install, uninstall, enabled: who is fast, and that nothing stays behind."""

import threading

import braintrace
import jax
import numpy as np
import pytest

import traceops
from tests.parity.harness import RULES, start
from tests.parity.nets import NETS
from traceops.errors import UnsupportedVersionError
from traceops.host import upstream, versions
from traceops.host.learners import is_fast

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CLASSES = (upstream.VjpAlgorithm, upstream.ETraceVmap, braintrace.D_RTRL, braintrace.ES_D_RTRL,
           braintrace.ParamDimVjpAlgorithm, braintrace.IODimVjpAlgorithm)


def fast(learner):
    return is_fast(getattr(learner, 'module', learner))


def learner(rule='d_rtrl', compiler=braintrace.compile, **kw):
    return start(compiler, NETS['lif'], rule, 3, **kw).learner


def test_undo_leaves_every_class_and_result_as_it_was():
    before = [dict(vars(c)) for c in CLASSES]
    grads = start(braintrace.compile, NETS['lif'], 'd_rtrl', 5).grad()
    traceops.install()
    traceops.install()
    assert traceops.installed() and fast(learner())
    assert [dict(vars(c)) for c in CLASSES] != before
    traceops.uninstall()
    assert not traceops.installed()
    assert [dict(vars(c)) for c in CLASSES] == before
    run = start(braintrace.compile, NETS['lif'], 'd_rtrl', 5)
    assert type(run.learner) is braintrace.D_RTRL
    jax.tree.map(np.testing.assert_array_equal, grads, run.grad())
    traceops.uninstall()


@pytest.mark.parametrize('rule', RULES)
def test_every_class_becomes_fast_and_stays_itself(rule):
    traceops.install()
    made = learner(rule)
    assert fast(made) and isinstance(made, RULES[rule][0])
    assert type(made).__name__ == RULES[rule][0].__name__


@pytest.mark.parametrize('how', ['d_rtrl', 'es_d_rtrl', braintrace.ETraceConfig(),
                                 braintrace.ETraceConfig(trace_factorization='io_factorized',
                                                         decay=0.9)],
                         ids=['name', 'name-es', 'config', 'config-es'])
@pytest.mark.parametrize('vmap', [False, True])
def test_every_way_to_ask(how, vmap):
    run = start(braintrace.compile, NETS['lif'], 'd_rtrl', 3)
    options = {'decay_or_rank': 0.9} if how == 'es_d_rtrl' else {}
    traceops.install()
    made = braintrace.compile(run.model, how, run.x[0], batch_size=4, vmap=vmap, **options)
    assert fast(made) and isinstance(made, braintrace.ETraceVmap) == vmap and is_fast(made)


def test_a_subclass_of_the_user_and_a_reference_taken_before():
    D_RTRL = braintrace.D_RTRL

    class Mine(D_RTRL):
        pass
    model = NETS['lif'].make()
    traceops.install()
    assert fast(Mine(model)) and isinstance(Mine(model), Mine) and fast(D_RTRL(model))


def test_blocks_nest_and_reach_no_other_thread():
    seen = []
    with traceops.enabled():
        with traceops.enabled(window=3):
            assert traceops.installed()
            thread = threading.Thread(target=lambda: seen.append(traceops.installed()))
            thread.start()
            thread.join()
        assert traceops.installed() and fast(learner())
    assert not traceops.installed() and not fast(learner()) and seen == [False]
    assert '__init__' not in vars(upstream.ETraceVmap)


def test_explicit_classes_and_compile_patch_nothing():
    assert fast(traceops.D_RTRL(NETS['lif'].make()))
    assert fast(traceops.ES_D_RTRL(NETS['lif'].make(), decay_or_rank=0.9))
    assert fast(learner(compiler=traceops.compile))
    assert not traceops.installed() and not fast(learner())


def test_learners_keep_what_they_were_made_with():
    traceops.install(window=2)
    made = learner()
    traceops.uninstall()
    traceops.configure(window=3)
    assert fast(made) and made.traceops_settings.window == 2


def test_other_engines_are_left_alone():
    traceops.install()
    run = start(traceops.compile, NETS['vanilla'], 'd_rtrl', 3)
    made = braintrace.compile(run.model, braintrace.UORO, run.x[0], batch_size=4)
    assert not fast(made)
    assert 'an engine of its own' in traceops.explain(made).rows[0].reason


def test_an_unsupported_version_patches_nothing(monkeypatch):
    monkeypatch.setattr(versions, 'installed_versions',
                        lambda: {'braintrace': '0.3.0', 'jax': '0.10.0'})
    with pytest.raises(UnsupportedVersionError, match='braintrace 0.3.0'):
        traceops.install()
    assert not traceops.installed() and '__init__' not in vars(upstream.ETraceVmap)


def test_the_constructor_passes_options_and_errors_through():
    traceops.install()
    with pytest.raises(TypeError):
        braintrace.D_RTRL(NETS['lif'].make(), no_such_option=1)
    with pytest.raises(AssertionError, match='single-step'):
        braintrace.D_RTRL(NETS['lif'].make(), vjp_method='neither')
