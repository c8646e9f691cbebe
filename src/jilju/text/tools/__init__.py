"""Tools: how families of models write a call of a function, and how it is read, held to its schema and told to the model.

    family = family_of(template.source)
    prompt = render(family.messages_for_template(messages, tools), tools=template_tools(tools) if family.reads_tools else None)
    lark = family.grammar(tools, choice="auto", parallel=True, reasoning=style, special_ids=tokenizer.special_texts)
    parser = make_parser(family, tools, style)

Knows nothing of tokens, HTTP or templates beyond their source.
"""

from jilju.text.tools.family import ToolFamily, family_of, make_parser
from jilju.text.tools.held import held_tools
from jilju.text.tools.spec import ToolSpec, template_tools

__all__ = ["ToolFamily", "ToolSpec", "family_of", "held_tools", "make_parser", "template_tools"]
