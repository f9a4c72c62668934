"""The Jinja template by which a checkpoint writes a conversation as one text, rendered as a program that nobody trusts.

A template comes with weights from anywhere, so it gets values and gives text, nothing else:

    reach    Jinja's immutable sandbox, narrowed: a dot reads the keys of a dictionary, a `namespace()` and a loop's counters, never an
             attribute of a Python object, and a subscript never becomes one. No files, no other templates, no functions but `namespace`,
             `range`, `raise_exception` and `strftime_now`; the filters and tests of `template_filters.py`.
    time     each turn of a loop, each call and each filter asks the clock (`Budget`); what lies between two of them is bounded by the
             template's own length, since every value is
    size     checked wherever a value can grow: joining, repeating, building lists, capturing, printing

`strftime_now` is a fixed day unless one is given, so that a prompt does not change overnight.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache
from types import GeneratorType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import LoopControlExtension
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from flamingo_export.errors import PromptError, first_line
from flamingo_export.runtime.template_filters import FILTERS, MAX_SIZE, TESTS, TemplateLimit, bounded, measured, plain_text

MAX_SOURCE = 200_000
"""Characters of a template. Published ones have a few thousand."""
MAX_SECONDS = 5.0
"""A rendering takes milliseconds."""
DAY = datetime.date(2024, 7, 26)
"""What `strftime_now` says: the day that Llama's published templates name where they know none."""
_DAY_FORMAT = re.compile(r"(?:[^%]|%-?[A-Za-z%]){0,100}", re.DOTALL)
_LOOP = ("index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem", "depth", "depth0")
_TICK = "_tick"


class _Raised(Exception):
    """What the template says against the conversation."""


class Budget:
    """What one rendering has left."""

    def __init__(self, seconds: float, characters: int, day: datetime.date) -> None:
        self.day = day
        self._seconds, self._end = seconds, time.monotonic() + seconds
        self._characters = self._most = characters

    def tick(self) -> bool:
        """True. Raises TemplateLimit once the time is over."""
        if time.monotonic() > self._end:
            raise TemplateLimit(f"it does not end within {self._seconds:g} seconds")
        return True

    def write(self, text: str) -> str:
        """The text, counted. Raises TemplateLimit once more was written than may be."""
        self._characters -= len(text)
        if self._characters < 0:
            raise TemplateLimit(f"it writes more than {self._most} characters")
        return text


_BUDGET: ContextVar[Budget] = ContextVar("budget of the rendering under way")


class ChatTemplate:
    """A template, compiled."""

    def __init__(self, source: str) -> None:
        """Raises PromptError if it is not a template, too long, or calls for what is not offered."""
        if len(source) > MAX_SOURCE:
            raise PromptError(f"the chat template has {len(source)} characters, expected at most {MAX_SOURCE}")
        self.source = source
        environment = _Environment()
        try:
            tree = environment.parse(source)
            other = next(iter(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends))), None)
            if other is not None:
                raise PromptError(f"the chat template reads another file (line {other.lineno}), which templates may not")
            self._reads_tools = any(node.name in ("tools", "custom_tools") for node in tree.find_all(nodes.Name))
            _Guard().generic_visit(tree)
            self._template = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise PromptError(f"the chat template cannot be read: line {error.lineno}: {first_line(error)}") from error
        except (RecursionError, SyntaxError, MemoryError, ValueError, OverflowError) as error:
            raise PromptError(f"the chat template cannot be read: {first_line(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        special: Mapping[str, str],
        open_turn: bool = True,
        day: datetime.date = DAY,
        seconds: float = MAX_SECONDS,
        characters: int = MAX_SIZE,
    ) -> str:
        """The conversation as a text.

        messages: dictionaries of role and content, as transformers' apply_chat_template takes them. special: bos_token and eos_token.
        open_turn: whether the model's own turn is begun at the end. day: what strftime_now says.
        Raises PromptError with the template's own words where it refuses the conversation, and where it does not end, grows too long,
        reaches outside or fails.
        """
        values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": open_turn, **special}
        token = _BUDGET.set(Budget(seconds, characters, day))
        try:
            return "".join(self._template.generate(values))
        except _Raised as error:
            raise PromptError(f"the model's chat template refuses this conversation: {error}") from None
        except (TemplateLimit, jinja2.exceptions.SecurityError) as error:
            raise PromptError(f"the chat template was stopped: {first_line(error)}. {_ADVICE}") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            tools = " It reads tools, which are not offered here." if self._reads_tools else ""
            raise PromptError(f"the chat template fails: {first_line(error)}.{tools} {_ADVICE}") from error
        except (RecursionError, MemoryError) as error:
            raise PromptError(f"the chat template was stopped: it does not end ({type(error).__name__}). {_ADVICE}") from error
        finally:
            _BUDGET.reset(token)


_ADVICE = "Build the bundle with another chat_template.jinja beside the tokenizer, or write the whole prompt."


@lru_cache(maxsize=16)
def chat_template(source: str) -> ChatTemplate:
    """The compiled template. Raises PromptError as ChatTemplate does."""
    return ChatTemplate(source)


class _Guard(jinja2.visitor.NodeTransformer):
    """Has the budget asked in each turn of a loop, literal text counted when it is written, and each new list measured."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        """The node that stands in place of this one, its children first."""
        self.generic_visit(node)
        if isinstance(node, nodes.For):
            tick = _call("tick", node)
            node.test = tick if node.test is None else nodes.And(tick, node.test, lineno=node.lineno)
        elif isinstance(node, nodes.TemplateData):
            return nodes.Const(node.data, lineno=node.lineno)
        elif isinstance(node, nodes.Concat):
            return _call("joined", node, *node.nodes)
        elif isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            return _call("measured", node, node)
        return node


def _call(name: str, at: nodes.Node, *arguments: nodes.Expr) -> nodes.Call:
    """A call of the environment's own function, which a template has no name for."""
    lineno = at.lineno
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=lineno), list(arguments), [], None, None, lineno=lineno)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which training finds the assistant's words: its body as it stands."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_written,
            extensions=[LoopControlExtension, _Generation],
        )
        self.filters = {name: _counted(function) for name, function in FILTERS.items()}
        self.tests = {name: _counted(function) for name, function in TESTS.items()}
        self.globals = {
            "namespace": Namespace,
            "range": jinja2.sandbox.safe_range,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.tick = _tick
        self.joined = _joined
        self.measured = measured
        self._callable = (*self.globals.values(), _tick, _joined, measured)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """What a dot reads."""
        if isinstance(obj, LoopContext) and attribute in _LOOP:
            return getattr(obj, attribute)
        if not isinstance(obj, Mapping | Namespace | Undefined) and hasattr(obj, attribute):
            raise jinja2.exceptions.SecurityError(f"it reads .{attribute} of a {type(obj).__name__}")
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """What a subscript reads."""
        try:
            if isinstance(obj, Namespace) and isinstance(argument, str) and not argument.startswith("_"):
                return getattr(obj, argument)
            if isinstance(obj, Undefined | Mapping | list | tuple | str | range):
                return obj[argument]
        except (LookupError, TypeError, AttributeError):
            pass
        return self.undefined(obj=obj, name=argument)

    def is_safe_callable(self, obj: Any) -> bool:
        """Macros, a recursive loop, and the functions that templates are given."""
        return isinstance(obj, Macro | LoopContext) or any(obj is each for each in self._callable)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call from within a template."""
        _tick()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, of whose result the size is known first."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if numbers and max(abs(left), abs(right)) <= (1 << 32 if operator != "**" else 64):
            return super().call_binop(context, operator, left, right)
        joins = operator == "+" and type(left) is type(right) and isinstance(left, str | list | tuple)
        if joins and len(left) + len(right) <= MAX_SIZE:
            return measured(left + right)
        if joins or numbers:
            raise TemplateLimit(f"the result of {operator} is too large")
        raise jinja2.exceptions.SecurityError(f"it uses {operator} on {type(left).__name__} and {type(right).__name__}")


def _counted(function: Any) -> Any:
    """A filter or test that asks the clock first, and whose result is measured."""
    from functools import wraps

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _tick()
        found = function(*args, **kwargs)
        return bounded(found) if isinstance(found, GeneratorType) else measured(found)

    return counted


def _tick() -> bool:
    return _BUDGET.get().tick()


@jinja2.pass_context
def _written(context: Context, value: Any) -> str:
    """What `{{ value }}` writes; given the context so that Jinja does not ask it while compiling."""
    return _BUDGET.get().write(plain_text(value))


def _joined(*parts: Any) -> str:
    """What `a ~ b` is."""
    texts = [plain_text(part) for part in parts]
    if sum(map(len, texts)) > MAX_SIZE:
        raise TemplateLimit(f"a text grows beyond {MAX_SIZE} characters")
    return "".join(texts)


def _raise_exception(message: Any = "") -> NoReturn:
    raise _Raised(plain_text(message))


def _strftime_now(form: Any) -> str:
    if not isinstance(form, str) or not _DAY_FORMAT.fullmatch(form):
        raise TemplateLimit("strftime_now is asked for a form that is not one of a date")
    return _BUDGET.get().day.strftime(form)
