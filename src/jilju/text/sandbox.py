"""A jinja2 sandbox with a meter, for chat templates: they come with model files, so they are untrusted programs.

Owns what a template may name (filters, methods, globals), and the bounds on its time and memory. A sandboxed template can
still loop and multiply, so every loop turn, call, filter, operator, literal and output is charged to the meter of its
rendering: a value is refused once it would be too big, before it is made where an operation multiplies, and the deadline is
looked at with every charge. No single step outruns that, since its operands are bounded. Knows nothing of messages or tokens.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from jilju.clock import Clock

METER = "jilju:meter"  # no template can spell a name with a colon, here and in the filters below
MAX_INT_BITS = 4096
MAX_INDENT = 16
MAX_TIME_FORMAT = 256

FILTERS = """
    abs capitalize count d default dictsort e escape first float indent int items join last length list lower
    map max min reject rejectattr replace reverse safe select selectattr sort string title trim unique upper
"""
STR_METHODS = """
    capitalize count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace
    istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit
    rstrip split splitlines startswith strip swapcase title upper
"""
METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(STR_METHODS.split()),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"index", "count"}),
    tuple: frozenset({"index", "count"}),
    LoopContext: frozenset({"cycle", "changed"}),
}


class TemplateRefusal(TemplateRuntimeError):
    """The template's own `raise_exception`: its message is for the caller."""


class DeadlinePassed(SecurityError):
    """The rendering was given no more time; with more it might have come to its end."""


class Meter:
    """What one rendering may still do. A unit is a loop turn, a call, an element or a character that is made."""

    def __init__(self, units: int, clock: Clock, deadline_ns: int):
        self._limit = units
        self._left = units
        self._clock = clock
        self._deadline_ns = deadline_ns

    def spend(self, units: int) -> None:
        self._left -= units
        if self._left < 0:
            raise SecurityError(f"it does more work than the {self._limit} units that these messages allow")
        if self._clock.now_ns() > self._deadline_ns:
            raise DeadlinePassed("it runs longer than the time a rendering may take")

    def admit(self, value: Any) -> Any:
        """Charge a value that the template has made. Iterators become lists, so that nothing runs unseen later."""
        if type(value) is str:
            self.spend(1 + len(value))
            return value
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            value = list(self._drawn(value))
        elif isinstance(value, type({}.items()) | type({}.keys()) | type({}.values())):
            value = list(value)
        self._weigh(value)
        return value

    def _drawn(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(1)
            yield item

    def _weigh(self, value: Any) -> None:
        """Characters and elements with all repetitions, as printing or comparing would meet them: [x, x] weighs x twice."""
        weight, num_nodes, waiting = 0, 0, [value]
        while waiting:
            num_nodes += 1
            if num_nodes % 1024 == 0:
                self.spend(0)  # the deadline holds inside a long walk too
            match waiting.pop():
                case str() as text:
                    weight += len(text)
                case dict() as mapping:
                    waiting += mapping.keys()
                    waiting += mapping.values()
                case list() | tuple() | set() | frozenset() as sequence:
                    waiting += sequence
                case range() as numbers:
                    weight += len(numbers)
                case int() as number:
                    weight += number.bit_length() // 8
            if weight + num_nodes > self._limit:
                raise SecurityError(f"it makes a value of more than {self._limit} elements and characters")
        self.spend(num_nodes)


def _meter(context: Context) -> Meter:
    meter = context.resolve(METER)
    assert isinstance(meter, Meter), "a rendering without a meter"
    return meter


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The dialect of chat templates: blocks trimmed, break and continue, `generation` tags, tojson, raise_exception,
    strftime_now. Render with a Meter under the name METER."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: Callable[[], datetime]):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[LoopControlExtension, GenerationTag]
        )

        def strftime_now(time_format: str) -> str:
            # a width in the format would make a text of that width
            if len(time_format) > MAX_TIME_FORMAT or re.search(r"%[^A-Za-z%]*[0-9]", time_format):
                raise SecurityError(
                    f"strftime_now takes formats of at most {MAX_TIME_FORMAT} characters, without widths"
                )
            return now().strftime(time_format)

        self.globals = {
            "range": safe_range,
            "dict": dict,
            "namespace": PlainNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": strftime_now,
        }
        self._callable_globals = tuple(self.globals.values())
        kept = {name: self.filters[name] for name in FILTERS.split()} | {"tojson": _tojson}
        self.filters = {name: _metered(name, function) for name, function in kept.items()}
        self.filters |= {"jilju:turn": _turn, "jilju:text": _text, "jilju:made": _made}

    def compile_metered(self, source: str) -> Any:
        """The template, with the meter's charges written into its syntax tree."""
        tree = self.parse(source)
        return self.from_string(_Charges().visit(tree))

    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, Macro | LoopContext | Undefined) or any(obj is known for known in self._callable_globals):
            return True
        owner = getattr(obj, "__self__", None)
        return getattr(obj, "__name__", "") in METHODS.get(_plain_type(owner), frozenset())

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        meter.spend(1)
        if not self.is_safe_callable(obj):
            raise SecurityError(
                f"{getattr(obj, '__name__', type(obj).__name__)!r} may not be called in a chat template"
            )
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            args = _bounded_args(meter, obj.__name__, (owner, *args), kwargs)[1:]
        return meter.admit(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _meter(context)
        match operator, left, right:
            case "+", (str() | list() | tuple()), (str() | list() | tuple()):
                meter.spend(len(left) + len(right))
            case "*", (str() | list() | tuple()), int():
                meter.spend(len(left) * max(right, 0))
            case "*", int(), (str() | list() | tuple()):
                meter.spend(len(right) * max(left, 0))
            case "*", int(), int() if left.bit_length() + right.bit_length() > MAX_INT_BITS:
                raise SecurityError(f"it makes a number of more than {MAX_INT_BITS} bits")
            case "**", int(), int() if left.bit_length() * abs(right) > MAX_INT_BITS:
                raise SecurityError(f"it makes a number of more than {MAX_INT_BITS} bits")
            case "%", str(), _:
                raise SecurityError("the % operator on text is not allowed in a chat template; use ~")
        return meter.admit(super().call_binop(context, operator, left, right))


class PlainNamespace(Namespace):
    """A namespace that does not print what it holds: that could be a tree of itself."""

    def __repr__(self) -> str:
        return "<namespace>"


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model wrote, for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Charges(NodeTransformer):
    """Writes the charges into a template: a turn into every loop body and loop condition, a weight around whatever is
    printed, joined, listed or sliced. Calls, filters and operators are charged by the environment."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter("jilju:turn", nodes.Const(1), node.lineno)).set_lineno(node.lineno))
        if node.test is not None:
            # "" and the condition: `turn` gives "", so `not turn` is true
            turn = nodes.Not(_filter("jilju:turn", nodes.Const(1), node.lineno)).set_lineno(node.lineno)
            node.test = nodes.And(turn, node.test).set_lineno(node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        plain = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        charge: list[nodes.Expr] = [_filter("jilju:turn", nodes.Const(1 + plain), node.lineno)]
        node.nodes = charge + [
            child if isinstance(child, nodes.TemplateData) else _filter("jilju:text", child, node.lineno)
            for child in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        node.nodes = [_filter("jilju:text", operand, node.lineno) for operand in node.nodes]
        return _filter("jilju:made", node, node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("jilju:made", node, node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("jilju:made", node, node.lineno) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("jilju:made", node, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("jilju:made", node, node.lineno) if isinstance(node.arg, nodes.Slice) else node


def _filter(name: str, operand: nodes.Expr, line: int) -> nodes.Filter:
    node = nodes.Filter(operand, name, [], [], None, None)
    node.set_lineno(line)
    return node


@pass_context
def _turn(context: Context, units: int) -> str:
    _meter(context).spend(units)
    return ""


@pass_context
def _made(context: Context, value: Any) -> Any:
    return _meter(context).admit(value)


@pass_context
def _text(context: Context, value: Any) -> Any:
    """A value on its way into text: charged with the whole of it."""
    meter = _meter(context)
    if isinstance(value, str | Undefined):
        meter.spend(len(value))
        return value
    value = meter.admit(value)
    return meter.admit(str(value))


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with its work bounded before and its result weighed after."""
    wants = getattr(function, "jinja_pass_arg", None)

    @pass_context
    def metered(context: Context, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        meter.spend(1)
        args = _bounded_args(meter, name, args, kwargs)
        match wants.name if wants is not None else None:
            case "context":
                first: tuple[Any, ...] = (context,)
            case "eval_context":
                first = (context.eval_ctx,)
            case "environment":
                first = (context.environment,)
            case _:
                first = ()
        return meter.admit(function(*first, *args, **kwargs))

    return metered


def _bounded_args(meter: Meter, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a filter or text method, iterators as lists. Where the result can be larger than the arguments, its
    size is charged before it is made."""
    args = tuple(meter.admit(arg) if isinstance(arg, Iterator) else arg for arg in args)
    if name not in ("join", "replace", "indent"):
        return args
    if kwargs and name != "indent" and set(kwargs) - {"attribute", "count"}:
        raise SecurityError(f"{name} takes its arguments by position in a chat template")
    match name, args:
        case "join", (str() as between, items):  # the method
            meter.admit(items)
            meter.spend(len(between) * len(items))
        case "join", (items, *rest):  # the filter
            meter.admit(items)
            meter.spend(len(str(rest[0]) if rest else "") * len(items))
        case "replace", (value, old, new, *_):
            text = str(meter.admit(value))
            num_places = text.count(str(old)) if old else len(text) + 1
            meter.spend(len(text) + num_places * len(str(new)))
        case "indent", (value, *rest):
            text, width = str(meter.admit(value)), kwargs.get("width", rest[0] if rest else 4)
            meter.spend((text.count("\n") + 1) * (width if isinstance(width, int) else len(width)))
    return args


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as `json.dumps` writes it: no HTML escapes, other than jinja2's own filter."""
    meter = _meter(context)
    meter.admit(value)
    if not (indent is None or (isinstance(indent, int) and 0 <= indent <= MAX_INDENT)):
        raise SecurityError(f"tojson takes an indent of 0 to {MAX_INDENT} in a chat template")
    if separators is not None and [len(part) <= MAX_INDENT for part in separators] != [True, True]:
        raise SecurityError(f"tojson takes two separators of at most {MAX_INDENT} characters in a chat template")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=None if separators is None else (separators[0], separators[1]),
        sort_keys=sort_keys,
    )
    chunks: list[str] = []
    for chunk in encoder.iterencode(value):
        meter.spend(len(chunk))
        chunks.append(chunk)
    return "".join(chunks)


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(message)


def _plain_type(owner: object) -> type:
    """The type whose methods count: a Markup is a str, a str subclass of the file's making there is none."""
    return str if isinstance(owner, str) else type(owner)
