"""Templates as hostile programs: none reaches outside, and whatever one multiplies or repeats ends in a refusal.

Time is a clock that moves 100 microseconds a look, so "a second" is a number of steps and no test depends on the machine."""

import resource

import pytest

from jilju.clock import VirtualClock
from jilju.errors import ModelFileError, TemplateFailed
from jilju.text.template import FREE_OUTPUT_CHARS, ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}]
GROW = "{% set n = namespace(v='ab') %}{% for i in range(64) %}{% set n.v = STEP %}{% endfor %}"


class StepClock(VirtualClock):
    def now_ns(self) -> int:
        self.advance_ns(100_000)
        return super().now_ns()


def render(source):
    return ChatTemplate(source, clock=StepClock()).render(MESSAGES)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ messages[0].__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ range.__globals__.sys }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ strftime_now.__closure__[0].cell_contents }}",
    "{{ joiner.__init__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum(1000) }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ '%s' % messages }}",
    "{{ ('%s' | format(1)) }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{{ messages[0]['__class__'].mro() }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages.sort() }}",
    "{{ dict(a=1).setdefault('b', 2) }}",
    "{{ messages[0].content.encode() }}",
    "{{ messages[0].content.translate({}) }}",
    "{{ (1).to_bytes(10, 'big') }}",
    "{{ messages[0].fromkeys('ab') }}",
    "{{ namespace.mro() }}",
    "{{ loop.__call__ }}{% for x in [1] %}{{ loop._recurse.x }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% set x = namespace() %}{{ x._Namespace__attrs.items() }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ undefined_thing.x.y }}",
    "{{ undefined_thing() }}",
    "{{ (messages | tojson).__class__.__name__.x }}",
    "{{ messages | map(attribute='__class__.__name__.x.y') | list | tojson }}",
]

BOMBS = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 10 ** (10 ** 9) }}",
    "{{ 2 ** 4000 * 2 ** 4000 }}",
    GROW.replace("STEP", "n.v + n.v"),
    GROW.replace("STEP", "n.v ~ n.v"),
    GROW.replace("STEP", "n.v * 2"),
    GROW.replace("STEP", "[n.v, n.v]"),
    GROW.replace("STEP", "(n.v, n.v)"),
    GROW.replace("STEP", "{'a': n.v, 'b': n.v}") + "{{ n.v | tojson }}",
    GROW.replace("STEP", "dict(a=n.v, b=n.v)") + "{{ n.v }}",
    GROW.replace("STEP", "[n.v, n.v] | map('string') | join"),
    GROW.replace("STEP", "n.v.replace('a', 'aaaa')"),
    GROW.replace("STEP", "n.v | replace('b', 'bbbb')"),
    GROW.replace("STEP", "n.v.join(['', n.v, ''])"),
    "{% set a %}{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}",
    "{% set a %}{% for i in range(100000) %}" + "a" * 10000 + "{% endfor %}{% endset %}",
    "{% macro m() %}" + "a" * 10000 + "{% endmacro %}{% for i in range(100000) %}{% set a = m() %}{% endfor %}",
    "{% for i in range(100000) %}aaaaaaaaaaaaaaaaaaaa{% endfor %}",
    "{% set a = 'a' * 1000000 %}{{ [a" + " ~ a" * 200 + "] | length }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.rjust(10**9) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a\nb' | indent(10**9) }}",
    "{{ 'a' | indent(width=10**9, first=true) }}",
    "{% filter indent(10**9) %}a\nb{% endfilter %}",
    "{{ ('a' * 100000).replace('', 'b' * 1000) }}",
    "{{ ('a' * 100000) | replace('', 'b' * 1000) }}",
    "{{ ('b' * 100000).join([''] * 100000) }}",
    "{{ ([''] * 100000) | join('b' * 100000) }}",
    "{{ ([''] * 100000) | join(d='b' * 100000) }}",
    "{{ range(100000) | map('replace', '', 'x' * 10000) | join }}",
    "{{ range(100000) | map(attribute='x', default='y' * 100000) | join }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ [[1]] | tojson(indent=10**9) }}",
    "{{ range(100000) | list | tojson(separators=('b' * 100000, ':')) }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ strftime_now('%Y' * 100000) }}",
    "{{ 1.5 | round(10**9, 'ceil') }}",
    "{{ [1] | batch(10**9, 0) | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ 'a' | wordwrap(1) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{{ " + "(" * 6000 + "1" + ")" * 6000 + " }}",
    "{{ " + "[" * 6000 + "]" * 6000 + " }}",
    "{{ " + "not " * 6000 + "1 }}",
    "{{ 1" + " + 1" * 20000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{% set a = 'x' * 2000000 %}{% for i in range(100000) %}{{ 'y' in a }}{% endfor %}",
    "{% set a = ('<' * 100000) %}{{ a | e | e | e | e | e | e | e | e | e }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_template_reaches_outside(source):
    """Refused, or nothing but what is not defined: no name of Python's inside is ever printed."""
    before = [dict(message) for message in MESSAGES]
    try:
        rendered = render(source)
    except (TemplateFailed, ModelFileError):
        rendered = ""
    assert not any(word in rendered for word in ("class", "function", "object", "module", "method", "root:", "/")), (
        rendered
    )
    assert before == MESSAGES


def test_enough_ways_out_are_tried():
    assert len(set(ESCAPES)) >= 40


@pytest.mark.parametrize("source", BOMBS)
def test_what_multiplies_or_repeats_is_refused_in_bounded_memory(source):
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((TemplateFailed, ModelFileError)):
        render(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 128 << 10


def test_output_is_in_proportion_to_the_input():
    template = ChatTemplate("{{ messages[0].content * 5 }}")
    assert len(template.render([{"role": "user", "content": "a" * 50_000}])) == 250_000
    with pytest.raises(TemplateFailed, match="writes more than"):
        template.render([{"role": "user", "content": "a" * (FREE_OUTPUT_CHARS + 1000)}])


def test_a_large_conversation_is_within_the_meter():
    source = (
        "{% set ns = namespace(seen=[]) %}{% for m in messages %}{% set ns.seen = ns.seen + [m.role] %}"
        "{{ '<|' + m['role'] + '|>\n' + m['content'] | trim + '<|end|>' + '\n' }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 100} for _ in range(512)]
    assert ChatTemplate(source, clock=VirtualClock()).render(messages).count("<|end|>") == 512
    assert (
        len(ChatTemplate(source, clock=VirtualClock()).render([{"role": "user", "content": "a" * (8 << 20)}])) > 8 << 20
    )
