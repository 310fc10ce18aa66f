# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end, on a few batches."""

import re

import jax
import numpy as np
import pytest

from traceops import demo
from traceops.demo import command, data

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def test_the_digits_are_the_same_spikes_every_time():
    a, b = data.load(), data.load()
    assert [part.spikes.shape for part in a] == [(data.STEPS, n, data.LINES)
                                                 for n in (1197, 200, 400)]
    jax.tree.map(np.testing.assert_array_equal, a, b)
    spikes = a.test.spikes
    assert set(np.unique(spikes)) == {0., 1.} and 0.02 < spikes[:32].mean() < 0.2
    assert not spikes[32:].any()


def test_no_digit_is_in_two_parts():
    """All 1797 are used once (two scans may be equal, so they are counted)."""
    from sklearn.datasets import load_digits
    whole = np.sort(load_digits().data / 16, axis=0)
    parts = np.concatenate([part.images.reshape(-1, 64) for part in data.load()])
    np.testing.assert_array_equal(np.sort(parts, axis=0), whole.astype(np.float32))
    labels = [np.bincount(part.labels, minlength=10) / len(part.labels) for part in data.load()]
    np.testing.assert_allclose(labels[0], labels[1], atol=0.01)


def test_selecting_never_looks_at_the_test_digits(monkeypatch, capsys):
    seen = []
    digits = data.load()
    blind = digits._replace(test=digits.test._replace(
        spikes=np.full_like(digits.test.spikes, np.nan), labels=None))
    monkeypatch.setattr(data, 'load', lambda: blind)
    monkeypatch.setattr(command, 'RATES', (1e-2,))
    monkeypatch.setattr(command.Run, 'accuracy', lambda self, part: seen.append(part) or 0.5)
    assert demo.main(['--select', '--quick', '--hidden', '8']) == 0
    assert seen and all(part is blind.validation for part in seen)
    assert 'rate 0.01: 50.0 % of the validation digits' in capsys.readouterr().out


def test_brighter_pixels_fire_more_and_only_in_their_row():
    image = np.zeros((1, 8, 8))
    image[0, 2] = np.linspace(0, 1, 8)
    spikes = data.encode(image)[:, 0].reshape(-1, 8, 8)
    counts = spikes.sum(0)[2]
    assert (np.diff(counts) >= 0).all() and counts[-1] == 4 and counts[0] == 0
    assert spikes[8:12].sum() == spikes.sum()


@pytest.mark.parametrize('images, text', [(np.zeros((8, 8)), r'image\[None\]'),
                                          (np.full((1, 8, 8), 16.), 'divide')])
def test_what_is_no_picture(images, text):
    with pytest.raises(ValueError, match=text):
        data.encode(images)


def test_a_quick_run_is_repeatable_and_draws(tmp_path, capsys):
    said = []
    for i in range(2):
        out = tmp_path / str(i)
        assert demo.main(['--quick', '--hidden', '16', '--out', str(out)]) == 0
        assert (out / 'demo.png').stat().st_size > 20_000
        said.append(capsys.readouterr().out)
    found = [re.search(r'accuracy: .*', s)[0] for s in said]
    assert found[0] == found[1] and 'validation' in found[0]
    losses = [re.search(r'mean loss of the epoch (.*)', s)[1] for s in said]
    assert losses[0] == losses[1]
    difference = float(re.search(r'difference of a leaf (\S+)', said[0])[1])
    assert difference <= 1e-5
    assert 'recurrent.weight' in said[0] and 'window' in said[0] and 'times faster' in said[0]
