# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0

import functools

import pytest

#: One device of each generation that the launch tables know, by its name in ``targets.GPUS``.
TARGETS = ('a100', 'h100', 'b200')


def quick_first(quick, values):
    """Values to parametrize with, of which all but one are slow."""
    return [pytest.param(v, marks=[] if v == quick else pytest.mark.slow) for v in values]


def slow(*names):
    """Of a subclass of a suite, marks those tests; the suite's own stay as they are."""
    def mark(cls):
        for name in names:
            test = getattr(cls, f'test_{name}')

            @functools.wraps(test)
            def marked(*args, test=test, **kwargs):
                return test(*args, **kwargs)
            setattr(cls, f'test_{name}', pytest.mark.slow(marked))
        return cls
    return mark
