# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Every kernel in Triton's interpreter: the suites of the reference, through the primitive.

The interpreter runs a kernel on arrays whose surroundings are guarded and whose outputs are NaN
before it starts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import oracle, suites
from traceops import ops
from traceops.kernels.adjoint_window import launch as adjoint_launch
from traceops.kernels.d_trace_window import launch as d_launch
from traceops.kernels.es_trace_window import launch as es_launch
from traceops.ops import choice, interpreter, verify
from traceops.ops.primitive import OPERATIONS


class TestAdjointWindow(suites.AdjointWindowSuite):
    backend = 'triton'


class TestAdjointWindowFiltered(suites.AdjointWindowSuite):
    backend, kappa = 'triton', 0.6
    test_matches_a_loop = test_any_axes_of_positions = test_one_step_and_no_step = None
    test_an_empty_batch = test_states_may_be_separate = None


class TestEsTraceWindow(suites.EsTraceWindowSuite):
    backend = 'triton'


class TestDTraceWindow(suites.DTraceWindowSuite):
    backend = 'triton'

    @pytest.mark.parametrize('B, programs', [(5, 1), (5, 2), (7, 4)])
    @pytest.mark.parametrize('gradient', ['entering', 'leaving', 'none'])
    def test_a_program_walks_several_samples(self, B, programs, gradient, monkeypatch):
        """On a device that is busy with few tiles; here the table has to be told."""
        monkeypatch.setattr(d_launch, '_ENOUGH', programs)
        jax.clear_caches()
        operands = self.operands(2, B=B, I=17, O=21)
        got = ops.d_trace_window(*operands, gradient=gradient, backend='triton')
        jax.clear_caches()
        want = oracle.d_trace_window(*operands, gradient)
        suites.close(got[0], want[0], self.tolerance)
        if gradient != 'none':
            suites.close(got[1], want[1], self.tolerance)

    @pytest.mark.parametrize('I, O', [(1, 1000), (1000, 3), (63, 60)])
    def test_odd_sizes(self, I, O):  # noqa: E741
        operands = self.operands(3, T=2, B=1, I=I, O=O)
        suites.close(self.run(*operands), oracle.d_trace_window(*operands), self.tolerance)

    @pytest.mark.parametrize('storage, tolerance', [(jnp.bfloat16, 9e-3), (jnp.float16, 1e-3)])
    def test_narrow_update(self, storage, tolerance):
        """One step after another, each rounded once (the interpreter rounds towards zero)."""
        e, x, f, D, L = self.operands(2, T=1, storage=storage)
        got = jax.vmap(lambda *a: ops.d_trace_update(*a, backend='triton'))(
            *[jnp.stack([a, a]) for a in (e, x[0], f[0], D, L)])
        want = oracle.d_trace_window(e, x, f, D, L, 'leaving')
        suites.close(got[0][1], want[0], tolerance)
        suites.close(got[1][1], want[1], tolerance)


@pytest.mark.parametrize('S', [1, 2, 3, 4])
@pytest.mark.parametrize('suite, table', [(suites.AdjointWindowSuite, adjoint_launch),
                                          (suites.EsTraceWindowSuite, es_launch)])
def test_the_tile_for_many_positions(suite, table, S, monkeypatch):
    """That of a hidden group too large for the interpreter, on a small one."""
    monkeypatch.setattr(table, '_FEW', 0)
    jax.clear_caches()
    tried = suite()
    tried.backend = 'triton'
    operands = tried.operands(S, place=(3, 111), T=3)
    got = tried.run(*operands)
    jax.clear_caches()
    want = (oracle.adjoint_window(operands[0], operands[1], operands[2:])
            if suite is suites.AdjointWindowSuite else tried.expected(operands))
    suites.close(got, want, tried.tolerance)


@pytest.mark.parametrize('name', ['adjoint_window', 'es_trace_window', 'd_trace_window'])
def test_the_automatic_choice_checks_the_kernel_and_uses_it(name, proof):
    verify.forget()
    operation = OPERATIONS[name]
    operands, params = operation.cases()[0]
    found = choice.decide(operation, operands, params, 'auto', choice.current_place())
    assert found.backend == 'triton' and 'checked on this device' in found.reason
    proof(name, 'interpreter', found.reason)


def _call(name, **changes):
    operands, params = OPERATIONS[name].cases()[0]
    call = OPERATIONS[name].kernel(*operands, capability=90, **params)
    return dataclasses.replace(call, constants={**call.constants, **changes}), list(operands)


def test_a_write_outside_is_seen():
    """A kernel that believes in more positions than there are."""
    call, operands = _call('adjoint_window')
    interpreter.launch(call, operands)
    wrong, _ = _call('adjoint_window', N=call.constants['N'] - 1)
    assert np.isnan(interpreter.launch(wrong, operands)[0]).any()       # some were not written
    wrong, _ = _call('adjoint_window', N=call.constants['N'] + 5)
    with pytest.raises(RuntimeError, match='wrote outside of its outputs'):
        interpreter.launch(dataclasses.replace(wrong, grid=(8,)), operands)
    call, operands = _call('d_trace_window')
    wrong, _ = _call('d_trace_window', I=call.constants['I'] + 1)
    with pytest.raises(RuntimeError, match='wrote outside of its outputs'):
        interpreter.launch(wrong, operands)


def test_a_program_holds_one_call_a_launch():
    """vmap of vmap, compiled: one callback, and no loop around it."""
    many = [jnp.stack([jnp.stack([a, a])] * 3) for a in suites.AdjointWindowSuite().operands(R=1)]
    run = lambda L, D, f: ops.adjoint_window(L, D, [f], backend='triton')  # noqa: E731
    text = jax.jit(jax.vmap(jax.vmap(run))).lower(*many).compile().as_text()
    assert text.count('custom_call_target="xla_ffi_python_cpu_callback"') == 1
    assert ' while(' not in text
