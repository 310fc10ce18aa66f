# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
import mmap
import re
import types

import braintrace
import pytest
from packaging.version import Version

import traceops
from traceops import doctor, memory
from traceops.benchmarks import measure


def test_versions():
    assert doctor.check_versions().passed
    old = Version(braintrace.__version__) < Version('0.2.8')
    assert ('Linear readout' in doctor.check_versions().found) == old
    check = doctor.check_versions({'braintrace': '0.2.8', 'jax': '0.14'})
    assert not check.passed
    assert 'jax 0.14' in check.found and 'pip install' in check.advice


@pytest.mark.parametrize('check', [doctor.check_import_name, doctor.check_command])
def test_a_name_has_one_owner(check):
    assert check().passed                               # of the environment that runs the tests
    assert check(['braintrace-traceops', 'braintrace_traceops']).passed
    both = check(['braintrace-traceops', 'traceops'])
    assert not both.passed
    assert both.found.startswith('traceops installs') and 'pip uninstall traceops;' in both.advice
    assert not check(['traceops']).passed
    absent = check([])
    assert not absent.passed and 'is not installed' in absent.found


def test_another_distribution_is_found_by_its_files(tmp_path, monkeypatch):
    """What PyPI's ``traceops`` would leave behind if it had our import name."""
    info = tmp_path / 'traceops-0.5.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: traceops\nVersion: 0.5.0\n')
    (info / 'top_level.txt').write_text('traceops\n')
    (info / 'entry_points.txt').write_text('[console_scripts]\ntraceops = trace_ops.cli:main\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    for check in (doctor.check_import_name(), doctor.check_command()):
        assert not check.passed and check.found.startswith('traceops installs')


@pytest.mark.usefixtures('compiled_quickly')
@pytest.mark.parametrize('rule, vmap', [('D_RTRL', False), ('ES_D_RTRL', True)])
def test_parity_on_this_machine(rule, vmap):
    check = doctor.check_parity(rule, vmap)
    assert check.passed, check.found
    assert 'gradient difference' in check.found and 'spikes a neuron' in check.found
    assert not traceops.installed()


def test_parity_fails_where_gradients_differ(monkeypatch):
    monkeypatch.setattr(measure, 'check', lambda want, got: 1e-3)
    check = doctor.check_parity('D_RTRL', False)
    assert not check.passed
    assert 'differ by 1.0e-03' in check.found and 'report' in check.advice


def test_parity_that_cannot_run_is_a_finding(monkeypatch):
    def run(*args, **kwargs):
        raise RuntimeError('no memory left')
    monkeypatch.setattr(measure, 'run', run)
    check = doctor.check_parity('D_RTRL', True)
    assert not check.passed and check.found == 'RuntimeError: no memory left'


def parity(passed):
    return lambda rule, vmap: doctor.Check(f'{rule} {vmap}', passed, 'a finding', 'an advice')


def test_the_exit_status_and_the_table(monkeypatch, capsys):
    monkeypatch.setattr(doctor, 'check_parity', parity(True))
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert 'traceops status' in out and 'none of 11 checks failed' in out and 'FAILED' not in out
    assert all(name in out for name in ('ES_D_RTRL True', 'D_RTRL False', 'command'))
    monkeypatch.setattr(doctor, 'check_parity', parity(False))
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert '4 of 11 checks failed' in out and out.count('FAILED') == 4 and 'an advice' in out


@pytest.mark.parametrize('check', ['check_versions', 'check_devices'])
def test_parity_is_not_tried_where_it_cannot_run(check, monkeypatch, capsys):
    monkeypatch.setattr(doctor, check, lambda: doctor.Check(check, False, 'found', 'install'))
    monkeypatch.setattr(doctor, 'check_parity', lambda *a: pytest.fail('tried'))
    assert doctor.main([]) == 1
    assert '1 of 6 checks failed' in capsys.readouterr().out


@pytest.mark.parametrize('platforms, nvidia, found, advice', [
    (['cpu'], False, 'jax runs on cpu', ''),
    (['cpu'], True, 'jax runs on cpu; it does not see the NVIDIA GPU of this machine',
     "pip install 'braintrace-traceops[gpu]' brings the jax that does"),
    (['gpu', 'gpu', 'cpu'], True, 'jax runs on cpu, gpu', '')])
def test_devices(platforms, nvidia, found, advice, monkeypatch):
    devices = [types.SimpleNamespace(platform=platform) for platform in platforms]
    monkeypatch.setattr(doctor.jax, 'devices', lambda: devices)
    assert doctor.check_devices(nvidia) == doctor.Check('devices', True, found, advice)


@pytest.mark.parametrize('enabled, libc, environ, found, advised', [
    ('always [madvise] never', ('glibc', '2.36'), {}, 'pages of 4 KiB', True),
    ('always [madvise] never', ('glibc', '2.36'),
     {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}, 'large pages are on', False),
    ('[always] madvise never', ('glibc', '2.31'), {}, 'large pages are on', False),
    ('always madvise [never]', ('glibc', '2.36'), {}, 'pages of 4 KiB', False),
    ('always [madvise] never', ('glibc', '2.31'), {}, 'pages of 4 KiB', False),
    ('', ('', ''), {}, 'pages of 4 KiB', False)])
def test_pages(enabled, libc, environ, found, advised):
    check = doctor.check_pages(enabled, libc, environ)
    assert check.passed and 's a GiB' in check.found and check.found.endswith(found)
    assert ('GLIBC_TUNABLES=glibc.malloc.hugetlb=1' in check.advice) == advised


def test_a_jax_that_cannot_start_is_a_finding(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda'")
    monkeypatch.setattr(doctor.jax, 'devices', devices)
    check = doctor.check_devices()
    assert not check.passed and "backend 'cuda'" in check.found
    assert 'JAX_PLATFORMS=cpu' in check.advice


@pytest.mark.parametrize('right', [True, False])
def test_on_a_gpu_every_kernel_is_compared_and_timed(right, monkeypatch, capsys):
    from traceops.benchmarks import operations
    row = operations.OperationRow('d_trace_update S=2', 34, {'jax': 20., 'triton': 10.}, 7.,
                                  1e-7 if right else 1e-2, None, 'triton' if right else 'jax', '')
    monkeypatch.setattr(operations, 'run', lambda: [row])
    monkeypatch.setattr(doctor.jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(doctor, 'check_parity', parity(True))
    assert doctor.main([]) == (0 if right else 1)
    out = capsys.readouterr().out
    assert 'limit us' in out and ('wrong: d_trace_update S=2' in out) == (not right)
    assert ('of 13 checks failed' in out) and ('report this, with all' in out) == (not right)


def test_kernels_that_cannot_be_timed_are_a_finding(monkeypatch):
    from traceops.benchmarks import operations

    def run():
        raise RuntimeError('out of memory')
    monkeypatch.setattr(operations, 'run', run)
    check, text = doctor.check_operations()
    assert not check.passed and check.found == 'RuntimeError: out of memory' and text == ''


def test_page_faults_are_counted_with_and_without():
    check = doctor.check_reuse()
    if not memory.able():
        pytest.skip('the allocator of this Python is not glibc\'s')
    without, kept = (int(n) for n in re.findall(r'^(\d+) .*; (\d+) with', check.found)[0])
    assert without >= 2 ** 26 // mmap.PAGESIZE > 10 * kept
    assert 'reuse_memory=True' in check.advice and check.passed
    assert 'glibc' in doctor.check_reuse(able=False).found


def test_a_learner_made_with_it_has_memory_reused(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, 'reuse', lambda: asked.append(1))
    net = braintrace.nn.GRUCell(2, 2)
    traceops.D_RTRL(net)
    assert not asked
    with traceops.configured(reuse_memory=True):
        traceops.D_RTRL(net)
    assert asked
