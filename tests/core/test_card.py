import pytest

from trimtab.core import card
from trimtab.core.card import Card, Claim, _cards, catalogue, level
from trimtab.core.errors import MissingExtra, TrimtabError, need


def test_cards_are_read_from_the_source_and_equal_the_imported_ones():
    from importlib import import_module

    found = catalogue()
    assert {"cct", "simplenet"} <= set(found)
    for entry in found.values():
        assert entry.card == import_module(entry.module).CARD
        assert entry.module.endswith(entry.card.slug)
        assert len({c.id for c in entry.card.claims}) == len(entry.card.claims)
        assert 0 <= level(entry.card.slug) <= 4


def test_a_card_that_is_not_literal_is_named(tmp_path):
    file = tmp_path / "x.py"
    file.write_text('CARD = Card(slug="x", title=open("y"), kind="k", tasks=(), claims=(Claim("a", "b"),))')
    with pytest.raises(TrimtabError, match="literals only"):
        list(_cards(file))
    file.write_text('CARD: Card = Card(slug="x", title="T", kind="k", tasks=(), claims=(Claim("a", "b"),))')
    assert list(_cards(file)) == [Card("x", "T", "k", (), (Claim("a", "b"),))]


def test_two_systems_of_one_name_are_refused(tmp_path, monkeypatch):
    for room in ("a", "b"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "x.py").write_text('CARD = Card(slug="x", title="T", kind="k", tasks=(), claims=())')
    monkeypatch.setattr(card, "PACKAGE", tmp_path)
    with pytest.raises(TrimtabError, match="two systems"):
        catalogue()


def test_a_missing_extra_names_the_command():
    with pytest.raises(MissingExtra, match=r"pip install 'trimtab\[serve\]'"):
        need("no_such_module_anywhere", "serve")
