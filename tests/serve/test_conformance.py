"""Every cell of docs/conformance.md is tried: what is used makes a difference, what has no effect makes none, the rest is refused."""

import pytest

from .conformance import BASES, RULES, TABLE, TRIALS, outcome_of, table, values_without_effect

pytestmark = pytest.mark.anyio


def test_the_page_says_what_the_rules_say() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(), "write it anew: make conformance"


@pytest.mark.parametrize("path", RULES)
def test_every_used_field_has_a_trial(path: str) -> None:
    assert set(RULES[path].fields) <= set(TRIALS[path]), set(RULES[path].fields) - set(TRIALS[path])


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in RULES for name in sorted(RULES[path].fields)])
async def test_a_used_field_makes_a_difference(path: str, name: str) -> None:
    trial = TRIALS[path][name]
    base = BASES[path] | trial.base
    plain, given = await outcome_of(path, base), await outcome_of(path, base | {name: trial.value})
    assert plain == await outcome_of(path, base), "two equal calls are the same"
    assert plain != given, (name, given.text[:300])
    assert plain.status == 200 or path == "/v1/embeddings", plain.text
    if given.status != 200:
        assert given.status in (400, 404) and name in given.text, given.text
    null = await outcome_of(path, base | {name: None})
    if null.status == 200:
        assert null == await outcome_of(path, {key: value for key, value in base.items() if key != name}), (
            "null is left out"
        )


@pytest.mark.parametrize("path", RULES)
async def test_fields_without_effect_make_none(path: str) -> None:
    plain = await outcome_of(path, BASES[path])
    for name, allowed in RULES[path].no_ops.items():
        for value in values_without_effect(allowed):
            assert await outcome_of(path, BASES[path] | {name: value}) == plain, (name, value)


@pytest.mark.parametrize("path", RULES)
async def test_refused_fields_are_refused_unless_off(path: str) -> None:
    plain = await outcome_of(path, BASES[path])
    rules = RULES[path]
    for name, off in [*rules.later.items(), *((name, ()) for name in rules.content)]:
        for value in (*off, None):
            assert await outcome_of(path, BASES[path] | {name: value}) == plain, (name, value)
        given = await outcome_of(path, BASES[path] | {name: {"some": "value"}})
        assert given.status == 400 and name in given.text, (name, given.text)
    unknown = await outcome_of(path, BASES[path] | {"nonsense": None})
    assert unknown.status == 400 and "nonsense" in unknown.text
