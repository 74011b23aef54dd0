"""A template in Ollama's language (Go's text/template), as a tree: `go` writes it, `text` renders it as Ollama would.

What a template sees (github.com/ollama/ollama, template/template.go): `.System`, all system texts; `.Messages` with `.Role`,
`.Content`, `.Thinking` and `.ToolCalls`, of which each has `.Function.Name` and `.Function.Arguments`; `.Tools`, each with
`.Function`; `.IsThinkSet` and `.Think`. Arguments and functions are written as JSON without spaces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass
class Scope:
    root: Mapping[str, Any]
    dot: Any
    """What a path without $ begins at."""
    variables: dict[str, Any] = field(default_factory=dict)

    def value(self, path: str) -> Any:
        """The value of a path such as `.Content`, `$.System` or `$before`; None if there is none."""
        start, _, rest = path.partition(".")
        found = self.dot if start == "" else self.root if start == "$" else self.variables[start]
        for name in filter(None, rest.split(".")):
            found = None if found is None else found.get(name)
        return found


class Node(Protocol):
    def go(self) -> str: ...

    def text(self, scope: Scope) -> str: ...


@dataclass(frozen=True)
class Test:
    go: str
    holds: Callable[[Scope], bool]


def given(path: str) -> Test:
    """The test that the path's value exists and is not empty."""
    return Test(path, lambda scope: bool(scope.value(path)))


def equal(path: str, text: str) -> Test:
    return Test(f"eq {path} {_quoted(text)}", lambda scope: scope.value(path) == text)


def negated(test: Test) -> Test:
    return Test(f"not ({test.go})", lambda scope: not test.holds(scope))


def both(first: Test, second: Test) -> Test:
    return Test(f"and ({first.go}) ({second.go})", lambda scope: first.holds(scope) and second.holds(scope))


@dataclass(frozen=True)
class Text:
    """A text that is written as a Go string, so that white space beside it stays as it is."""

    string: str

    def go(self) -> str:
        return f"{{{{ {_quoted(self.string)} }}}}" if self.string else ""

    def text(self, scope: Scope) -> str:
        return self.string


@dataclass(frozen=True)
class Mark:
    """Text that Ollama reads from the template, to find calls and thoughts in answers: it does not look into Go strings."""

    string: str

    @property
    def can_be_said(self) -> bool:
        return bool(self.string.strip()) and "{{" not in self.string and not self.string.endswith("{")

    def go(self) -> str:
        return self.string

    def text(self, scope: Scope) -> str:
        return self.string


@dataclass(frozen=True)
class Value:
    path: str

    def go(self) -> str:
        return f"{{{{ {self.path} }}}}"

    def text(self, scope: Scope) -> str:
        value = scope.value(self.path)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Nodes:
    nodes: Sequence[Node]

    def go(self) -> str:
        return "".join(node.go() for node in self.nodes)

    def text(self, scope: Scope) -> str:
        return "".join(node.text(scope) for node in self.nodes)


def nodes(*each: Node | str) -> Nodes:
    return Nodes([Text(node) if isinstance(node, str) else node for node in each])


IF = "{{ if "


@dataclass(frozen=True)
class When:
    test: Test
    then: Node
    other: Node = Text("")

    def go(self) -> str:
        then, other = self.then.go(), self.other.go()
        if then == other:
            return then
        if isinstance(self.other, When) and other.startswith(IF):
            return f"{IF}{self.test.go} }}}}{then}{{{{ else if {other.removeprefix(IF)}"
        return f"{IF}{self.test.go} }}}}{then}" + (f"{{{{ else }}}}{other}" if other else "") + "{{ end }}"

    def text(self, scope: Scope) -> str:
        return (self.then if self.test.holds(scope) else self.other).text(scope)


@dataclass(frozen=True)
class Each:
    """Repeats `node` for each of the path's values, which is the dot in it. `number` is the variable with its index."""

    path: str
    node: Node
    number: str

    def go(self) -> str:
        return f"{{{{ range {self.number}, $_ := {self.path} }}}}{self.node.go()}{{{{ end }}}}"

    def text(self, scope: Scope) -> str:
        parts = []
        for number, value in enumerate(scope.value(self.path) or ()):
            scope.variables[self.number] = number
            parts.append(self.node.text(Scope(scope.root, value, scope.variables)))
        return "".join(parts)


@dataclass(frozen=True)
class Begin:
    """Declares a variable."""

    variable: str
    value: str | int | bool

    def go(self) -> str:
        return f"{{{{ {self.variable} := {_quoted(self.value)} }}}}"

    def text(self, scope: Scope) -> str:
        scope.variables[self.variable] = self.value
        return ""


@dataclass(frozen=True)
class Keep:
    """Assigns the value of a path to a variable."""

    variable: str
    path: str

    def go(self) -> str:
        return f"{{{{ {self.variable} = {self.path} }}}}"

    def text(self, scope: Scope) -> str:
        scope.variables[self.variable] = scope.value(self.path)
        return ""


def _quoted(value: str | int | bool) -> str:
    """The value in Go's syntax, whose escapes are JSON's."""
    return json.dumps(value, ensure_ascii=False)
