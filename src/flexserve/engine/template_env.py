"""Renders chat templates of Hugging Face's conventions with Jinja's immutable sandbox.

The templates come from a model's vendor and are not trusted beyond that: this runs in a process with limits
(template.py). What is special here is that the result says which of its characters the template wrote, see
marked.py: every string constant and all text of the template is made a `Marked` when it is compiled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.environment import Template
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .marked import Marked, concat, literal, ranges
from .spans import Span, spans_of


class RefusedError(Exception):
    """The template cannot be compiled or rendered; the message says why, without a client's text."""


class OutputLimitError(RefusedError):
    """The prompt became longer than allowed."""


class _RaisedByTemplateError(TemplateError):
    """The template called raise_exception."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _MarkingGenerator(CodeGenerator):
    """Writes every string constant of a template as `environment.literal(...)`."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802 - Jinja's name
        if isinstance(node.value, str):
            self.write(f"environment.literal({node.value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:  # noqa: N802 - Jinja's name
        self.write(f"environment.literal({node.data!r})")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.literal({''.join(group)!r})"

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        # nothing but text and constants is computed at compile time
        if isinstance(node, nodes.TemplateData | nodes.Const):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - Jinja's name
        self.write("environment.concat_values((")
        for value in node.nodes:
            self.visit(value, frame)
            self.write(", ")
        self.write("))")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, set up as `transformers` does: its options, extensions, filters and functions."""

    code_generator_class = _MarkingGenerator
    concat = staticmethod(concat)
    literal = staticmethod(literal)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # no evaluation of expressions while compiling
            extensions=[_Generation, loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.filters["join"] = _join
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def handle_exception(self, source: str | None = None) -> NoReturn:
        """Jinja would open files to write a better traceback here."""
        raise  # noqa: PLE0704 - called from an except clause

    @staticmethod
    def concat_values(values: Iterable[object]) -> str:
        """Jinja's operator `~`."""
        return concat([str(value) for value in values])

    def compile_template(self, source: str) -> Template:
        """Raises `RefusedError`."""
        try:
            return self.from_string(source)
        except TemplateSyntaxError as error:
            raise RefusedError(f"line {error.lineno}: {error.message}") from None
        except RecursionError:
            raise RefusedError("it is nested too deeply") from None
        except (MemoryError, OutputLimitError):
            raise
        except Exception as error:  # whatever a hostile template makes the compiler trip over
            raise RefusedError(f"it cannot be compiled ({type(error).__name__})") from None


def render(
    template: Template,
    messages: Sequence[Mapping[str, str]],
    *,
    bos: str,
    eos: str,
    add_generation_prompt: bool,
    max_chars: int,
) -> tuple[Span, ...]:
    """Render to spans. Roles are trusted, since there are only a few; contents are not.

    Raises `RefusedError`, `MemoryError`.
    """
    variables = {
        "messages": [{"role": literal(m["role"]), "content": m["content"]} for m in messages],
        "bos_token": literal(bos),
        "eos_token": literal(eos),
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
    }
    parts: list[str] = []
    length = 0
    try:
        for part in template.root_render_func(template.new_context(variables)):
            length += len(part)
            if length > max_chars:
                raise OutputLimitError(f"the prompt became longer than {max_chars} characters")
            parts.append(part)
    except RefusedError:
        raise
    except _RaisedByTemplateError as error:
        raise RefusedError(f"it refuses these messages: {_trusted_part(error.args[0])}") from None
    except UndefinedError:
        raise RefusedError("it uses something that is not defined") from None
    except SecurityError:
        raise RefusedError("it does something the sandbox forbids") from None
    except RecursionError:
        raise RefusedError("it calls itself too deeply") from None
    except MemoryError:
        raise
    except Exception as error:  # messages of errors may contain a client's text
        raise RefusedError(f"it failed with {type(error).__name__}") from None
    return spans_of(concat(parts))


def _trusted_part(message: str) -> str:
    """A message with everything a client wrote left out."""
    kept = [str.__getitem__(message, slice(start, stop)) for start, stop in ranges(message)]
    return " ... ".join(kept)[:500] or "(no reason given)"


def _raise_exception(message: object = "") -> None:
    raise _RaisedByTemplateError(message if isinstance(message, Marked) else "")


def _strftime_now(form: str) -> str:
    return time.strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _join(values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        get: Callable[[Any], Any] = lambda item: item[attribute]  # noqa: E731
        values = map(get, values)
    return Marked.join(d if isinstance(d, Marked) else Marked(d), [str(value) for value in values])
