# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""A kernel is checked before the automatic choice uses it; kernels that go wrong are injected.

The interpreter's place in the program is taken by loops in NumPy: no Triton is needed.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import traceops
from tests.ops import oracle
from tests.ops.suites import AdjointWindowSuite, close
from traceops import ops
from traceops.ops import choice, interpreter, verify
from traceops.ops.primitive import OPERATIONS
from traceops.ops.states import join, join_rows, unflatten


def adjoint(L, D, f):
    return ops.adjoint_window(L, D, [f])


@pytest.fixture
def launches(monkeypatch):
    """Kernels run as loops; ``launches.error`` and ``.factor`` make them go wrong."""
    class Launches(list):
        factor, error = 1., None

    seen = Launches()

    def launch(call, operands):
        seen.append(call.kernel)
        if seen.error:
            raise seen.error
        kappa, S = call.constants['KAPPA'], call.constants['S']
        leaving = 'leaving' in call.kernel
        if 'x' in call.kernel.rsplit('_', 1)[-1]:           # one operand a state
            given = unflatten(operands, ('m' if leaving else 'vm') + 'v', S)
            operands = [np.asarray(join_rows(a) if isinstance(a[0], tuple) else join(a))
                        for a in given]
        if leaving:
            deltas, totals, *others = oracle.leaving_window(operands[0], operands[1:], kappa)
            others = [*totals, *([] if call.constants['START'] else others)]
        else:
            deltas, *others = oracle.adjoint_window(
                operands[0], operands[1], operands[2:],
                kappa if call.constants['FILTER'] else None)
        results = [*(seen.factor * d for d in deltas), *others]
        results += [np.zeros(1)] * (len(call.outputs) - len(results))
        return [np.asarray(a, d) for a, (_, d) in zip(results, call.outputs, strict=True)]
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    monkeypatch.setattr(interpreter, 'launch', launch)
    monkeypatch.setattr(choice, '_warned', set())
    verify.forget()
    jax.clear_caches()
    yield seen
    verify.forget()
    jax.clear_caches()


@pytest.fixture
def operands():
    return AdjointWindowSuite().operands(R=1)


def want(operands):
    return oracle.adjoint_window(operands[0], operands[1], operands[2:])


def test_a_right_kernel_is_checked_once_and_used(launches, operands):
    close(jax.jit(adjoint)(*operands), want(operands), 2e-6)
    checked = len(OPERATIONS['adjoint_window'].cases())
    assert len(launches) == checked + 1
    close(jax.jit(lambda *a: adjoint(*a))(*operands), want(operands), 2e-6)
    assert len(launches) == checked + 2                 # not checked again
    found = ops.why('adjoint_window')
    assert found.backend == 'triton' and 'checked on this device' in found.reason
    assert traceops.status().kernels['adjoint_window on interpreter'].startswith('passed')


def test_a_wrong_kernel_is_not_used(launches, operands):
    launches.factor = 1.001
    with pytest.warns(ops.BackendWarning, match='differs from the reference by 1.0e-03') as seen:
        close(jax.jit(adjoint)(*operands), want(operands), 2e-6)
        close(jax.jit(lambda *a: adjoint(*a))(*operands), want(operands), 2e-6)
    assert len(seen) == 1 and 'report this line' in str(seen[0].message)
    found = ops.why('adjoint_window')
    assert found.backend == 'jax' and 'differs from the reference' in found.reason
    now = traceops.status()
    assert now.kernels['adjoint_window on interpreter'].startswith('FAILED: it differs')
    assert 'adjoint_window on interpreter' in str(now) and 'FAILED' in str(now)


def test_a_kernel_that_leaves_nan_is_not_used(launches, operands):
    launches.factor = np.nan
    with pytest.warns(ops.BackendWarning, match='differs from the reference by nan'):
        close(jax.jit(adjoint)(*operands), want(operands), 2e-6)
    assert ops.why('adjoint_window').backend == 'jax'


def test_a_launch_that_fails(launches, operands):
    launches.error = RuntimeError('no such kernel image')
    with pytest.warns(ops.BackendWarning, match='failed on a small case.*') as seen:
        close(adjoint(*operands), want(operands), 2e-6)
    assert len(seen) == 1


def test_a_kernel_that_does_not_compile(launches, operands, monkeypatch):
    """Where there was no check, it shows when the program is made."""
    monkeypatch.setenv('TRACEOPS_CHECK_KERNELS', '0')

    def broken(*args):
        def run(*operands):
            raise RuntimeError('ptxas says no')
        return run
    monkeypatch.setattr(interpreter, 'runner', broken)
    with pytest.warns(ops.BackendWarning, match='ptxas says no') as seen:
        close(jax.jit(adjoint)(*operands), want(operands), 2e-6)
        close(jax.jit(lambda *a: adjoint(*a))(*operands), want(operands), 2e-6)
    assert len(seen) == 1 and not launches
    with pytest.raises(ops.BackendError, match='does not compile.*ptxas says no'):
        ops.adjoint_window(*operands[:2], operands[2:], backend='triton')


def test_a_wrong_kernel_that_is_named_runs(launches, operands):
    """Who names a backend gets it."""
    launches.factor = 2.
    (delta,), _ = ops.adjoint_window(*operands[:2], operands[2:], backend='triton')
    close(delta, 2 * want(operands)[0][0], 2e-6)
    assert len(launches) == 1


def test_switched_off_nothing_is_checked(launches, operands, monkeypatch):
    monkeypatch.setenv('TRACEOPS_CHECK_KERNELS', '0')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        close(adjoint(*operands), want(operands), 2e-6)
    assert len(launches) == 1 and not verify.verdicts()


def test_the_check_may_happen_while_tracing(launches, operands):
    """Under jit, vmap and scan, in float64 mode or not, the check is a program of its own."""
    stacked = [jnp.stack([a, a]) for a in operands]
    got = jax.jit(lambda *a: jax.lax.scan(lambda c, x: (c, jax.vmap(adjoint)(*x)), 0, a)[1])(
        *[a[None] for a in stacked])
    close(jax.tree.map(lambda a: a[0, 1], got), want(operands), 2e-6)
    assert verify.verdicts()['adjoint_window', 'interpret', 'interpreter'].passed
