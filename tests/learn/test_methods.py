"""Objectives by name: one word in Python, in recipes and on the command line."""

from __future__ import annotations

import pytest

from trimtab import learn
from trimtab.learn import Objective, methods


@pytest.mark.parametrize("name", methods.names())
def test_a_word_is_its_class_everywhere(name):
    cls = methods.find(name)
    assert issubclass(cls, Objective)
    assert getattr(learn, name) is cls
    assert cls.__name__ in learn.__all__ and name in dir(learn)
    assert name == name.lower() and name.isidentifier()


def test_options_reach_the_objective():
    made = methods.make("classify", smoothing=0.2)
    assert type(made) is learn.Classify and made.smoothing == 0.2


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("magic", {}, "objective must be one of bias_loss, classify, .*, got 'magic'"),
        ("lsskd", {"branch": 2}, "lsskd has no option 'branch'; it has teacher, branches, extractor, T, beta"),
        ("kd", {}, "kd needs teacher"),
        ("classify", {"smoothing": "much"}, "classify: .*'str'"),
        ("classify", {"smoothing": 2}, r"smoothing must be in \[0, 1\), got 2"),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        methods.make(name, **options)
