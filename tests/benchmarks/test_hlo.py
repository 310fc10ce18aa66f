# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""Launches and bytes of a program's text, worked out by hand."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from traceops.benchmarks import hlo

#: What compilers of XLA print, cut down: a loop of 5 steps, in which a fusion reads a slice of
#: what it is given and writes a slice in place, and a kernel of ours runs; an asynchronous copy
#: and a product with a workspace outside of it.
TEXT = (pathlib.Path(__file__).parent / 'loop.hlo').read_text()
WHOLE, ROW = 50 * 8 * 4, 8 * 4


@pytest.fixture
def found():
    return {k.name: k for k in hlo.kernels(TEXT, bandwidth=1e6)}


def test_only_what_launches_is_counted_as_often_as_it_runs(found):
    assert {name: k.times for name, k in found.items()} == {
        'copied': 1, 'step': 5, 'ours': 5, 'product': 1}
    total = hlo.total(list(found.values()), TEXT)
    assert total.launches == 12 and total.unknown_loops == 0
    assert total.bytes == sum(k.times * (k.read + k.written) for k in found.values())
    assert total.microseconds == sum(k.times * k.microseconds for k in found.values())


def test_a_fusion_is_charged_for_the_slices_it_touches(found):
    step = found['step']
    assert (step.read, step.written) == (ROW + 4, ROW + ROW)
    assert (step.microseconds, step.basis) == (2.5, 'model')
    assert step.source == 'jit(f)/while/body/add'


def test_a_custom_call_counts_operands_and_results_at_full_bandwidth(found):
    ours = found['ours']
    assert ours.operation == 'triton_kernel_call_ffi'
    assert (ours.read, ours.written) == (ROW + WHOLE, 2 * ROW)
    assert (ours.microseconds, ours.basis) == (ours.read + ours.written, 'bytes')


@pytest.mark.parametrize('operations, microseconds, basis', [
    (10_000, 5000., 'operations'), (100, None, 'bytes')])
def test_a_product_of_ours_counts_its_operations_where_they_take_longer(
        operations, microseconds, basis):
    line = next(line for line in TEXT.splitlines() if '%ours =' in line)
    name = f'op_name="jit(f)/etp_trace_gradient/tf32_operations_{operations}/call"'
    text = TEXT.replace(line, f'{line}, metadata={{{name}}}')
    peaks = {'tf32': 2e6, 'bf16': 4e6}
    ours = next(k for k in hlo.kernels(text, 1e6, peaks) if k.name == 'ours')
    assert ours.basis == basis
    assert ours.microseconds == (microseconds or ours.read + ours.written)
    other = text.replace('tf32_', 'int8_')          # units that the device is not known to have
    assert next(k for k in hlo.kernels(other, 1e6, peaks) if k.name == 'ours').basis == 'bytes'


def test_neither_a_workspace_nor_an_operand_is_a_result(found):
    assert (found['product'].read, found['product'].written) == (WHOLE + 8 * 8 * 2, WHOLE)
    assert (found['copied'].read, found['copied'].written) == (WHOLE, WHOLE)


def test_an_asynchronous_fusion_is_one_launch_of_what_it_computes():
    text = TEXT.replace('(f32[50,8]{1,0}, f32[8]{0}) fusion(', '((f32[50,8], f32[50,8], s32[]), '
                        '(f32[50,8], f32[8]), s32[]) fusion-start(')
    step = next(k for k in hlo.kernels(text, 1e6) if k.name == 'step')
    assert (step.times, step.read, step.written) == (5, ROW + 4, 2 * ROW)


def test_a_loop_of_unknown_length_is_said_to_be_one():
    text = TEXT.replace(', backend_config={"known_trip_count":{"n":"5"}}', '')
    kernels = hlo.kernels(text, 1e6)
    assert {k.name: k.times for k in kernels}['step'] == 1
    assert 'less' in {k.name for k in kernels}          # a launch of its own, as often as it loops
    assert hlo.total(kernels, text).unknown_loops == 1


def test_of_branches_the_most_expensive_counts():
    text = TEXT.replace('''  %product = ''', '''  %maybe = f32[8] conditional(%start, %a), \
branch_computations={%cheap, %expensive}
  %product = ''').replace('ENTRY', '''%cheap (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %one = f32[8]{0} negate(%q)
}

%expensive (q.1: f32[50,8]) -> f32[50,8] {
  %q.1 = f32[50,8]{1,0} parameter(0)
  ROOT %other = f32[50,8]{1,0} negate(%q.1)
}

ENTRY''')
    names = {k.name for k in hlo.kernels(text, 1e6)}
    assert 'other' in names and 'one' not in names


@pytest.mark.parametrize('shape, size', [
    ('f32[3,5]{1,0}', 60), ('pred[7]', 7), ('bf16[]', 2), ('s4[3]', 2), ('f8e4m3fn[9]', 9),
    ('(f64[2], token[], (c64[1], u8[3]))', 16 + 8 + 3), ('f32[0,4]', 0)])
def test_sizes(shape, size):
    assert hlo._bytes(shape) == size


def test_a_program_of_this_machine():
    """The text of a real compilation parses, nested loops multiply."""
    def f(x):
        inner = lambda c, _: (jnp.sin(c) @ c, None)  # noqa: E731
        outer = lambda c, _: (jax.lax.scan(inner, c, None, 3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, 7)[0]
    text = jax.jit(f).lower(jnp.zeros((40, 40))).compile().as_text()
    kernels = hlo.kernels(text, 1e9)
    assert 21 in {k.times for k in kernels} and hlo.total(kernels, text).unknown_loops == 0


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match='has no ENTRY'):
        hlo.kernels('HloModule nothing', 1e9)
