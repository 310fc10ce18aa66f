# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Programs of operations, compiled for GPUs that are not there: kernels, memory, what is sent."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tests.gpufree import TARGETS, quick_first
from traceops import ops
from traceops.benchmarks import hlo
from traceops.benchmarks.targets import (
    collectives,
    compile_for,
    kernel_calls,
    mesh_of,
)
from traceops.ops import choice, gpu
from traceops.ops.primitive import OPERATIONS

T, B, I, O, S = 20, 8, 256, 512, 2      # noqa: E741
TRACE, GRADIENT = B * I * O * S * 4, I * O * 4


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


SCAN = (shape(T, B, O, S), shape(T, B, O, S, S), shape(T, B, O, S), shape(B, O, S), shape(T))


def scans(L, D, f, g, c):
    """Both element-wise scans."""
    return (ops.adjoint_window(L, D, [f], backend='triton'),
            ops.es_trace_window(L, D, f, g, correction=c, decay_x=.9, decay_f=.8,
                                backend='triton'))


UPDATES = (shape(B, I, O, S), shape(T, B, I), shape(T, B, O, S), shape(T, B, O, S, S),
           shape(T, B, O, S))


def updates(trace, *steps):
    """D-RTRL step by step: what upstream's loop does, with one kernel in its body."""
    def body(carry, step):
        trace, total = carry
        trace, gradient = ops.d_trace_update(trace, *step, backend='triton')
        return (trace, total + gradient), None
    return jax.lax.scan(body, (trace, jnp.zeros((I, O))), steps)[0]


def summary(compiled):
    memory = compiled.memory_analysis().temp_size_in_bytes
    sent = ', '.join(f'{n} {kind}' for kind, n in collectives(compiled).items()) or 'nothing sent'
    return f'{len(kernel_calls(compiled))} kernels, temporary memory {memory / 1e6:.2f} MB, {sent}'


@pytest.mark.parametrize('target', quick_first('h100', TARGETS))
def test_one_kernel_a_scan_and_no_memory(target, proof):
    compiled = compile_for(target, scans, *SCAN)
    assert len(kernel_calls(compiled)) == 2
    assert compiled.memory_analysis().temp_size_in_bytes < 4096
    assert ' while(' not in compiled.as_text()
    proof('both scans', target, summary(compiled))


@pytest.mark.parametrize('target', quick_first('h100', TARGETS))
def test_vmap_of_vmap_is_one_kernel(target, proof):
    many = [shape(3, 2, *a.shape) for a in SCAN[:4]]
    compiled = compile_for(target, jax.vmap(jax.vmap(scans, (0, 0, 0, 0, None)),
                                            (0, 0, 0, 0, None)), *many, SCAN[4])
    assert len(kernel_calls(compiled)) == 2 and ' while(' not in compiled.as_text()
    proof('both scans, vmap of vmap', target, summary(compiled))


@pytest.mark.parametrize('alone', quick_first(True, [True, False]), ids=['alone', 'all but one'])
@pytest.mark.parametrize('name', OPERATIONS)
def test_whatever_is_mapped_is_one_launch(name, alone, proof):
    """Each operand mapped alone, or all but each; the compiled program has no loop.

    Exceptions are stated in ``_LANES``.
    """
    operation = OPERATIONS[name]
    operands, params = operation.cases()[-1]
    count = len(operands)
    for axes in [tuple(0 if (i == k) == alone else None for i in range(count))
                 for k in range(count)]:
        given = [shape(*(3,) * (d == 0), *a.shape, dtype=a.dtype)
                 for a, d in zip(operands, axes, strict=True)]
        compiled = compile_for('h100', jax.vmap(functools.partial(
            operation.primitive.bind, request='triton', devices=None, **params), axes), *given)
        expected = _LANES.get(name, lambda *_: (1, False))(*axes)
        assert (len(kernel_calls(compiled)), ' while(' in compiled.as_text()) == expected, axes
    proof(f'{name}, {count} ways of mapping', 'h100', 'as many kernels and loops as stated')


#: Of operations that are not one launch whatever is mapped: kernels, and whether there is a loop.
_LANES = {
    # lanes with weights of their own: a launch each
    'simulate_window': lambda W, x, h: (1 if W is None else 3, False),
    # a pattern of each lane: a call for each lane
    'sparse_trace_gradient': lambda x, delta, sources, targets:
        (1, not sources is targets is None)}


@pytest.mark.parametrize('target', quick_first('h100', TARGETS))
def test_the_trace_is_updated_in_place(target, proof):
    """In a scan, with the trace donated: no second trace anywhere."""
    compiled = compile_for(target, updates, *UPDATES, donate_argnums=0)
    assert len(kernel_calls(compiled)) == 1             # in the body of the loop
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == TRACE
    assert memory.temp_size_in_bytes < TRACE / 2
    proof('D-RTRL updates in a scan', target, summary(compiled))


@pytest.mark.parametrize('target', quick_first('h100', TARGETS))
@pytest.mark.parametrize('gradient', quick_first('entering', ['entering', 'leaving']))
def test_the_sum_over_lanes_makes_no_array_of_lanes(target, gradient, proof):
    """Upstream's vmap mode sums weight gradients over lanes."""
    V = 16

    def lanes(*a):
        trace, gradients = jax.vmap(lambda *b: ops.d_trace_window(
            *b, gradient=gradient, backend='triton'))(*a)
        return trace, gradients.sum(0)
    compiled = compile_for(target, lanes, shape(V, 1, I, O, S), shape(V, 4, 1, I),
                           shape(V, 4, 1, O, S), shape(V, 1, O, S, S), shape(V, 1, O, S),
                           donate_argnums=0)
    assert len(kernel_calls(compiled)) == 1
    assert compiled.memory_analysis().temp_size_in_bytes < V * GRADIENT / 2
    proof(f'sum over lanes, {gradient}', target, summary(compiled))


@pytest.mark.parametrize('precision', quick_first('highest', ops.PRECISIONS))
def test_lanes_in_the_batch_are_one_product(precision, proof):
    """Summed by the product itself. (XLA for GPUs does not fold a sum over lanes that follows a
    batched product into it, as it does for CPUs: who sums over lanes puts them in the batch.)
    """
    V = 64
    product = lambda *a: ops.trace_gradient(*a, precision=precision)  # noqa: E731
    # the automatic choice: XLA's own product where it is as fast (of terms, on an H200)
    for target, ours in (('a100', precision != 'tf32'), ('h100', precision == 'highest')):
        compiled = compile_for(target, product, shape(4, V, I), shape(4, V, O))
        assert compiled.memory_analysis().temp_size_in_bytes < V * GRADIENT / 8    # partial sums
        assert len(kernel_calls(compiled)) == ours
        proof(f'product over lanes, {precision}', target, summary(compiled))


@pytest.mark.parametrize('precision', quick_first('highest', ops.PRECISIONS))
def test_a_product_reads_its_operands_once_and_adds_in_place(precision, proof):
    """Nothing is made of them before: no terms, no transposed copy, no zeros to add to."""
    x, delta, total = shape(T, B, 2048), shape(T, B, 2048), shape(2048, 2048)
    product = functools.partial(ops.trace_gradient, precision=precision, backend='triton')
    plain = compile_for('h100', product, x, delta)
    onto = compile_for('h100', product, x, delta, total, donate_argnums=2)
    for compiled in (plain, onto):
        launched = hlo.kernels(compiled.as_text(), 1e12)
        assert [k.operation for k in launched] == ['triton_kernel_call_ffi']
    assert onto.memory_analysis().alias_size_in_bytes == 2048 * 2048 * 4
    proof(f'product onto a total, {precision}', 'h100', summary(onto))


def test_rows_shared_out_are_added_in_the_same_order():
    """Few tiles: parts, and one sum over them; nothing is added atomically."""
    compiled = compile_for('h100', functools.partial(ops.trace_gradient, backend='triton'),
                           shape(50, 32, 128), shape(50, 32, 128))
    launched = hlo.kernels(compiled.as_text(), 1e12)
    assert len(launched) == 2 and launched[0].written == 7 * 128 * 128 * 4
    assert 'reduce' in launched[1].name


@pytest.mark.parametrize('layout', quick_first(('b', 'i', 'o'), [
    ('b', None, None), (None, 'i', 'o'), ('b', 'i', 'o')]), ids=str)
def test_a_sharded_product_sends_its_sum_alone(layout, proof):
    """What it is added to enters once, after the sum."""
    b, i, o = layout
    product = functools.partial(ops.trace_gradient, backend='triton')
    compiled = compile_for(
        'h100', product, shape(T, 32, 256), shape(T, 32, 512), shape(256, 512),
        mesh=mesh_of('h100', b=2, i=2, o=2), specs=[P(None, b, i), P(None, b, o), P(i, o)])
    (call,) = kernel_calls(compiled)
    assert call.split('custom-call(')[1].split(')')[0].count('%') == 2      # not the total
    assert set(collectives(compiled)) == ({'all-reduce'} if b else set())
    proof(f'product, sharded {layout}', '8 x h100', summary(compiled))


LAYOUTS = [('b', None, None), (None, None, 'o'), (None, 'i', None), ('b', 'i', 'o')]


@pytest.mark.parametrize('layout', quick_first(('b', 'i', 'o'), LAYOUTS), ids=str)
@pytest.mark.parametrize('target', quick_first('h100', ['h100', 'a100']))
def test_eight_devices_keep_what_they_have(target, layout, proof):
    """Sharded operands: nothing is gathered, and only the sum over the batch is sent."""
    b, i, o = layout
    mesh = mesh_of(target, b=2, i=2, o=2)
    specs = [P(b, i, o), P(None, b, i), *[P(None, b, o)] * 3]
    compiled = compile_for(target, updates, *UPDATES, mesh=mesh, specs=specs, donate_argnums=0)
    assert len(kernel_calls(compiled)) == 1
    assert set(collectives(compiled)) == ({'all-reduce'} if b else set())
    proof(f'D-RTRL updates, sharded {layout}', f'8 x {target}', summary(compiled))


@pytest.mark.parametrize('layout', quick_first(('b', 'o'), [('b', None), (None, 'o'), ('b', 'o')]),
                         ids=str)
@pytest.mark.parametrize('mapped', quick_first(True, [False, True]))
def test_scans_on_eight_devices_send_nothing(layout, mapped, proof):
    run = jax.vmap(scans, (1, 1, 1, 0, None)) if mapped else scans
    compiled = compile_for('h100', run, *SCAN, mesh=mesh_of('h100', b=2, o=4),
                           specs=[P(None, *layout)] * 3 + [P(*layout), P()])
    assert len(kernel_calls(compiled)) == 2 and not collectives(compiled)
    proof(f'both scans, {"vmap, " * mapped}sharded {layout}', '8 x h100', summary(compiled))


@pytest.mark.parametrize('layout', quick_first(('b', 'i', 'o'), LAYOUTS), ids=str)
def test_shard_map(layout, proof):
    """The same by hand: the sum over the batch is the caller's."""
    b, i, o = layout
    mesh = mesh_of('h100', b=2, i=2, o=2)
    specs = (P(b, i, o), P(b, i), *[P(b, o)] * 3)

    def local(*a):
        trace, gradient = ops.d_trace_update(*a, backend='triton')
        return trace, jax.lax.psum(gradient, b) if b else gradient
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(b, i, o), P(i, o)))
    compiled = compile_for('h100', run, shape(B, I, O, S), shape(B, I), shape(B, O, S),
                           shape(B, O, S, S), shape(B, O, S), mesh=mesh, specs=specs)
    assert len(kernel_calls(compiled)) == 1
    assert set(collectives(compiled)) == ({'all-reduce'} if b else set())
    proof(f'shard_map {layout}', '8 x h100', summary(compiled))


@pytest.mark.parametrize('target', quick_first('h100', TARGETS))
def test_the_automatic_choice_is_the_kernel(target):
    auto = compile_for(target, lambda L, D, f: ops.adjoint_window(L, D, [f]), *SCAN[:3])
    assert len(kernel_calls(auto)) == 1
    wide = compile_for(target, lambda L, D, f: ops.adjoint_window(L, D, [f]), *[
        shape(T, B, O, 5), shape(T, B, O, 5, 5), shape(T, B, O, 5)])
    assert not kernel_calls(wide)


def test_a_kernel_that_does_not_compile_falls_back(monkeypatch):
    """With one warning; a named backend raises."""
    def broken(*args):
        def run(*operands):
            raise RuntimeError('ptxas says no')
        return run
    monkeypatch.setattr(gpu, 'runner', broken)
    monkeypatch.setattr(choice, '_warned', set())
    fn = lambda L, D, f, backend: ops.adjoint_window(L, D, [f], backend=backend)  # noqa: E731
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            for size in (2, 3):
                compiled = compile_for('h100', lambda *a: fn(*a, 'auto'), shape(T, size, O, S),
                                       shape(T, size, O, S, S), shape(T, size, O, S))
                assert not kernel_calls(compiled)
        assert [w.category for w in seen].count(ops.BackendWarning) == 1
        assert any('ptxas says no' in str(w.message) for w in seen)
        row = next(r for r in ops.report().rows if r.name == 'adjoint_window')
        assert 'FAILED' in row.check and 'ptxas says no' in row.check
        with pytest.raises(ops.BackendError, match='does not compile.*ptxas says no'):
            compile_for('h100', lambda *a: fn(*a, 'triton'), *SCAN[:3])
    finally:
        choice.verify.forget()
