# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""What differs between versions, each with a test."""

import sys
import types

import pytest
from packaging.version import Version

from traceops.kernels.launch import KernelCall, Tile
from traceops.ops import traps


@pytest.mark.parametrize('release, ptx', [
    ('11.8', 78), ('12.0', 80), ('12.4', 84), ('12.5', 85), ('12.6', 85), ('12.8', 87),
    ('12.9', 88), ('13.0', 90), ('13.4', 94)])
def test_ptx_of_a_cuda_release(release, ptx):
    assert traps.ptx_of_cuda(release) == ptx


def fake_ptxas(tmp_path, monkeypatch, release):
    path = tmp_path / 'ptxas'
    path.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.1"\n')
    path.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
    traps._release.cache_clear()
    return str(path)


def test_the_first_ptxas_on_the_path_counts(tmp_path, monkeypatch):
    path = fake_ptxas(tmp_path, monkeypatch, '12.9')
    assert traps.find_ptxas() == path and traps.ptx_version() == 88


@pytest.mark.parametrize('have, capability, expected', [
    (88, 90, 88), (94, 90, 88), (85, 80, 85), (None, 90, 88), (94, 100, 88), (84, 90, 84)])
def test_no_newer_ptx_than_ptxas_knows(have, capability, expected, monkeypatch):
    monkeypatch.setattr(traps, 'ptx_version', lambda: None)
    options = traps.call_options(capability, Version('0.4.1'), have)
    assert options['backend_options'] == {'enable_fp_fusion': True, 'ptx_version': expected}


def test_fusion_is_named_in_both_vocabularies():
    assert traps.call_options(90, Version('0.3.1'), 88) == {'enable_fp_fusion': True}
    assert traps.call_options(90, Version('0.4.1'), 88)['backend_options']['enable_fp_fusion']


def everything_installed(monkeypatch, jax_triton='0.4.1'):
    monkeypatch.setattr(traps.importlib.util, 'find_spec', lambda name: object())
    monkeypatch.setattr(traps, 'version', lambda name: Version(jax_triton))


def test_a_ptxas_too_old_for_the_device_is_a_problem(monkeypatch):
    everything_installed(monkeypatch)
    monkeypatch.setattr(traps, 'find_ptxas', lambda: '/old/ptxas')
    monkeypatch.setattr(traps, 'ptx_version', lambda: 82)
    assert 'knows PTX 8.2, and compute capability 10.0 needs 8.6' in traps.problem(100)
    assert '/old/ptxas' in traps.problem(100) and traps.problem(90) is None


def test_jax_triton_0_3_cannot_ask_for_less(monkeypatch):
    everything_installed(monkeypatch, '0.3.1')
    monkeypatch.setattr(traps, 'ptx_version', lambda: 88)
    monkeypatch.setattr(traps, '_triton_ptx', lambda capability: 94)
    assert 'triton emits PTX 9.4' in traps.problem(90) and '0.4' in traps.problem(90)
    monkeypatch.setattr(traps, '_triton_ptx', lambda capability: 88)
    assert traps.problem(90) is None


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(traps.importlib.util, 'find_spec',
                        lambda name: None if name == 'jax_triton' else object())
    assert traps.problem(90) == ("jax-triton is not installed: pip install "
                                 "'braintrace-traceops[gpu]' brings it")


@pytest.mark.parametrize('capability, words', [
    (0, 'TRACEOPS_COMPUTE_CAPABILITY'), (75, 'need compute capability 8.0, the device has 7.5')])
def test_a_device_without_kernels(monkeypatch, capability, words):
    everything_installed(monkeypatch)
    assert words in traps.problem(capability)


@pytest.fixture
def jax_triton(monkeypatch):
    """A stand-in for jax_triton that keeps what it is called with."""
    calls = []
    module = types.ModuleType('jax_triton')
    module.triton_call = lambda *a, **k: calls.append((a, k)) or list(k.get('out_shape') or
                                                                     k['out_type'])
    module.triton_lib = types.SimpleNamespace(triton_kernel_call_p=object())
    monkeypatch.setitem(sys.modules, 'jax_triton', module)
    monkeypatch.setattr(traps, 'ptx_version', lambda: 88)
    monkeypatch.setattr(traps, 'register_dce_rule', lambda: False)
    monkeypatch.setattr(traps, 'kernel_function', lambda name: name)
    return calls


CALL = KernelCall('op.kernel', (((4,), 'float32'),), (2,), (7,), {'N': 4},
                  Tile((32,), warps=1, stages=2), {0: 0})


@pytest.mark.parametrize('version, out, other, kernel', [
    ('0.3.1', 'out_shape', 'out_type', 'op.kernel_two_pointers'),
    ('0.4.1', 'out_type', 'out_shape', 'op.kernel')])
def test_the_words_of_each_version(jax_triton, monkeypatch, version, out, other, kernel):
    monkeypatch.setattr(traps, 'version', lambda name: Version(version))
    traps.triton_call(['x'], ['result'], CALL, 90)
    (args, options), = jax_triton
    assert args == ('x', 7) and options['kernel'] == kernel
    assert options[out] == ['result'] and other not in options
    assert options['num_warps'] == 1 and options['compute_capability'] == 90
    assert options['N'] == 4 and options['input_output_aliases'] == {0: 0}


IN_PLACE = KernelCall('op.kernel', (((4,), 'float32'), ((3,), 'float32'), ((2,), 'float32')), (2,),
                      (7,), {}, Tile((32,)), {0: 0})


@pytest.mark.parametrize('version, given, aliases', [
    ('0.3.1', ['trace', 'gradient', 'rest'], {0: 0}),
    ('0.4.1', ['gradient', 'rest', 'trace'], {0: 2})])
def test_what_is_written_in_place_has_no_pointer_before_others(jax_triton, monkeypatch, version,
                                                               given, aliases):
    """On a GPU the launch of 0.4.1 gave ``gradient`` the trace's buffer otherwise."""
    monkeypatch.setattr(traps, 'version', lambda name: Version(version))
    outputs = traps.triton_call(['x'], ['trace', 'gradient', 'rest'], IN_PLACE, 90)
    (_, options), = jax_triton
    assert options['out_shape' if version < '0.4' else 'out_type'] == given
    assert options['input_output_aliases'] == aliases
    assert outputs == ['trace', 'gradient', 'rest']


def test_the_rule_for_dead_code_is_replaced_on_jax_0_12_alone(monkeypatch):
    pytest.importorskip('jax_triton', reason='jax-triton is not installed: make test-gpufree')
    from jax.interpreters import partial_eval
    from jax_triton import triton_lib
    primitive = triton_lib.triton_kernel_call_p
    rules = dict(partial_eval.dce_rules)
    monkeypatch.setattr(partial_eval, 'dce_rules', rules)
    assert not traps.register_dce_rule(Version('0.11.2'))
    assert traps.register_dce_rule(Version('0.12.0'))
    eqn = types.SimpleNamespace(invars=[1, 2])
    assert rules[primitive]([True], [True], eqn) == ([True, True], eqn)
