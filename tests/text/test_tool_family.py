"""Families: found by what a template contains, and how the messages of one that knows no tools tell of them."""

import json

import pytest

from jilju.errors import InvalidValue, TemplateFailed
from jilju.text.message import PlainText
from jilju.text.reasoning import ReasoningParser, ReasoningStyle
from jilju.text.template import ChatTemplate
from jilju.text.tools import ToolSpec, family_of, make_parser, template_tools
from jilju.text.tools.family import Generic
from tests.text.tool_answers import FORMATS, TOOLS, calls_of, parse, text_of

# Templates of our own with the markup of each kind of model.
HERMES = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>\n"
    'Write <tool_call>{"name": …, "arguments": …}</tool_call>\n{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}'
)
XML_CALLS = HERMES.replace('{"name": …, "arguments": …}', "<function=…><parameter=…>…</parameter></function>")
OTHER_VARIABLE = HERMES.replace("if tools", "if xml_tools").replace("in tools", "in xml_tools")
LLAMA = (
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}{{ m.tool_calls[0].function.arguments | tojson }}'
    "{{ '}' }}{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>{% endif %}{{ m.content }}{% endfor %}"
)
MISTRAL = (
    "{% if tools is not none %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('nine characters') }}{% endif %}{{ call.function | tojson }}, {{ call.id }}{% endfor %}]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.tool_call_id }}: {{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
NAMED_MISTRAL = MISTRAL.replace(
    "{{ call.function | tojson }}", "{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('not in turn') }}{% endif %}"
    "<start_of_turn>{{ m.role }}\n{% if loop.first %}{{ first }}{% endif %}{{ m.content }}<end_of_turn>\n{% endfor %}"
)
GEMMA_2 = GEMMA.replace("{% set first = messages[0].content %}", "{{ raise_exception('System role not supported') }}")
NO_SYSTEM = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('users and others take turns') }}"
    "{% endif %}[INST] {{ m.content }} [/INST]{% endfor %}"
)

CALLS = [("get_weather", {"city": "서울"}), ("get", {"a": [1]})]
HISTORY = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for index, (name, arguments) in enumerate(CALLS)
        ],
    },
    {"role": "tool", "content": "Sunny", "tool_call_id": "call_0"},
    {"role": "tool", "content": "{}", "tool_call_id": "call_1", "name": "get"},
    {"role": "user", "content": "And?"},
]


@pytest.mark.parametrize(
    ("source", "name", "reads_tools"),
    [
        (HERMES, "hermes", True),
        (XML_CALLS, "generic", False),
        (OTHER_VARIABLE, "generic", False),
        (LLAMA, "llama", True),
        (MISTRAL, "mistral", True),
        (NAMED_MISTRAL, "mistral", True),
        (GEMMA, "gemma", False),
        (NO_SYSTEM, "generic", False),
        ("{{ messages }}", "generic", False),
    ],
)
def test_a_template_shows_its_family(source, name, reads_tools):
    family = family_of(source)
    assert (family.name, family.reads_tools) == (name, reads_tools)


def test_families_of_one_name_differ_where_their_templates_do():
    assert family_of(LLAMA).parallel is False
    assert family_of(LLAMA.replace("single tool-calls", "calls")).parallel is True
    answers = {name: FORMATS[name].write([("get", {})]) for name in ("mistral", "named mistral")}
    for source, name in ((MISTRAL, "mistral"), (NAMED_MISTRAL, "named mistral")):
        assert calls_of(parse(family_of(source).parser(TOOLS), answers[name])) == [("get", "{}")]
        assert ("[ARGS]" in family_of(source).grammar(TOOLS, choice="auto")) == (name == "named mistral")


def test_named_models_are_known(model):
    name, metadata = model
    source = metadata.get("tokenizer.chat_template", "")
    assert family_of(source).name == {"qwen2.5-coder-0.5b": "hermes"}.get(name, "generic")


@pytest.mark.parametrize("source", [HERMES, LLAMA])
def test_messages_stay_where_the_template_reads_them(source):
    assert family_of(source).messages_for_template(HISTORY, TOOLS) == HISTORY


def test_a_real_template_writes_calls_that_are_read_back(model):
    name, metadata = model
    source = metadata.get("tokenizer.chat_template", "")
    family = family_of(source)
    if not family.reads_tools:
        pytest.skip(f"the template of {name} reads no tools")
    messages = family.messages_for_template(HISTORY[:2], TOOLS)
    prompt = ChatTemplate(source).render(messages, tools=template_tools(TOOLS), add_generation_prompt=False)
    assert json.dumps(template_tools(TOOLS)[1]) in prompt
    answer = prompt.rpartition("assistant\n")[2].partition("<|im_end|>")[0]
    found = [(tool, json.loads(arguments)) for tool, arguments in calls_of(parse(family.parser(TOOLS), answer))]
    assert found == CALLS


@pytest.mark.parametrize(
    "source", [GEMMA, GEMMA_2, NO_SYSTEM, "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"]
)
def test_templates_without_tools_are_told_of_them(source):
    """Every kind takes the messages, and the model sees tools, calls and results; calls as it is asked to write them."""
    family = family_of(source)
    messages = family.messages_for_template(HISTORY, TOOLS)
    assert all(set(message) == {"role", "content"} for message in messages)
    prompt = ChatTemplate(source).render(messages)
    for tool in TOOLS:
        assert f'"name": "{tool.name}"' in prompt and tool.description in prompt
    assert "Sunny" in prompt and "And?" in prompt
    said = next(message["content"] for message in messages if message["role"] == "assistant")
    found = calls_of(parse(family.parser(TOOLS), said))
    assert [(name, json.loads(arguments)) for name, arguments in found] == CALLS
    with pytest.raises(TemplateFailed):  # that the test has a template of this kind
        ChatTemplate(source if "raise" in source else "{{ raise_exception('x') }}").render(HISTORY)


def test_results_in_a_row_and_the_users_next_words_are_one_message():
    generic = Generic().messages_for_template(HISTORY, ())
    assert [message["role"] for message in generic] == ["user", "assistant", "user"]
    assert generic[-1]["content"] == (
        "<tool_response>\nSunny\n</tool_response>\n<tool_response>\n{}\n</tool_response>\nAnd?"
    )


def test_tools_join_the_system_message():
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi", "name": "Ada"}]
    told = Generic().messages_for_template(messages, TOOLS[:1])
    assert [message["role"] for message in told] == ["system", "user"]
    assert told[0]["content"].startswith("Be kind.\n\n") and '"name": "get"' in told[0]["content"]
    assert Generic().messages_for_template(messages, ()) == messages
    told = Generic(system_role=False).messages_for_template(messages[1:], TOOLS[:1])
    assert [message["role"] for message in told] == ["user"] and told[0]["content"].endswith("\n\nHi")
    assert [message["role"] for message in Generic().messages_for_template([], TOOLS)] == ["system"]


def test_text_beside_calls_stays_before_them():
    message = {**HISTORY[1], "content": "Let me see."}
    (said,) = Generic().messages_for_template([message], ())
    parts = parse(Generic().parser(TOOLS), said["content"])
    assert text_of(parts) == "Let me see." and [name for name, _ in calls_of(parts)] == ["get_weather", "get"]


@pytest.mark.parametrize("source", [MISTRAL, NAMED_MISTRAL])
def test_mistrals_ids_have_nine_characters(source):
    messages = family_of(source).messages_for_template(HISTORY, TOOLS)
    assert len(ChatTemplate(source).render(messages, tools=template_tools(TOOLS))) > 0
    ids = [call["id"] for call in messages[1]["tool_calls"]]
    assert ids == [message["tool_call_id"] for message in messages[2:4]] and len(set(ids)) == 2
    assert family_of(source).messages_for_template(messages, TOOLS) == messages
    assert HISTORY[2]["tool_call_id"] == "call_0"


def test_what_reads_an_answer_depends_on_what_it_may_hold():
    style = ReasoningStyle("<think>", "</think>")
    hermes = FORMATS["hermes"].family
    call = FORMATS["hermes"].write([("get", {})])
    assert isinstance(make_parser(hermes, ()), PlainText)
    assert parse(make_parser(hermes, ()), call) == [("text", 0, call)]
    assert isinstance(make_parser(hermes, (), style), ReasoningParser)
    assert parse(make_parser(hermes, TOOLS, style), f"<think>{call}</think>{call}") == [
        ("reasoning", 0, call),
        ("call", 0, "get"),
        ("arguments", 0, "{}"),
    ]


@pytest.mark.parametrize("name", ["", "a b", 'a"b', "<f>", "f" * 65, "함수"])
def test_names_that_no_format_carries_are_refused(name):
    with pytest.raises(InvalidValue, match="name"):
        ToolSpec(name)


@pytest.mark.parametrize("kind", ["string", ["object", "null"], None])
def test_arguments_are_an_object(kind):
    with pytest.raises(InvalidValue, match="object"):
        ToolSpec("f", parameters={"type": kind})
    assert ToolSpec("f").schema == {"type": "object"}
