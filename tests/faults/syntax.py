"""Where names are defined and where tokens stand inside of them, in Python, C++ and CUDA of any format."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

STRINGS = r"\"\"\"[\s\S]*?\"\"\"" r"|\"(?:\\.|[^\"\\\n])*\"" r"|'(?:\\.|[^'\\\n])*'"
NUMBERS = r"\d[\w.]*|\.\d\w*"
PYTHON = re.compile(rf"(?P<trivia>\s+|#[^\n]*|\\\n)|{STRINGS}|{NUMBERS}|\w+|.")
# The lines of the preprocessor count as comments: no definition is looked for in a macro.
CPP = re.compile(rf"(?P<trivia>\s+|//[^\n]*|/\*[\s\S]*?\*/|#(?:\\\n|[^\n])*)|{STRINGS}|{NUMBERS}|\w+|.")
OPENING, CLOSING = "([{", ")]}"
# Written like calls before the name that a declaration gives.
ATTRIBUTES = {"__launch_bounds__", "__attribute__", "alignas", "decltype"}


@dataclass(frozen=True)
class Token:
    text: str
    start: int
    end: int


def tokens(text: str, language: re.Pattern[str]) -> list[Token]:
    """Return every token with its place, without comments and the commas that may end a list."""
    found = [Token(m[0], *m.span()) for m in language.finditer(text) if m.lastgroup != "trivia"]
    closings = {i for i, token in enumerate(found) if token.text in CLOSING}
    return [token for i, token in enumerate(found) if not (token.text == "," and i + 1 in closings)]


def language(path: Path) -> re.Pattern[str]:
    return PYTHON if path.suffix == ".py" else CPP


@cache
def definitions(text: str, language: re.Pattern[str]) -> dict[str, list[list[Token]]]:
    """Return the tokens of every function, class and constant by its name; those inside of others count too."""
    found = tokens(text, language)
    result: dict[str, list[list[Token]]] = {}
    for name, body in _python(text, found) if language is PYTHON else _cpp(found):
        result.setdefault(name, []).append(body)
    return result


def places(path: Path, within: str, pattern: str) -> set[tuple[int, int]]:
    """Return where in the text of `path` the tokens of `pattern` stand inside a definition named `within`."""
    text = path.read_text()
    wanted = [token.text for token in tokens(pattern, language(path))]
    result = set()
    for body in definitions(text, language(path)).get(within, []):
        texts = [token.text for token in body]
        for i in range(len(texts) - len(wanted) + 1):
            if texts[i : i + len(wanted)] == wanted:
                result.add((body[i].start, body[i + len(wanted) - 1].end))
    return result


def _python(text: str, found: Sequence[Token]) -> Iterator[tuple[str, list[Token]]]:
    lines = [0, *accumulate(len(line) for line in text.splitlines(keepends=True))]
    module = ast.parse(text)
    constants = {node: node.targets[0] for node in module.body if isinstance(node, ast.Assign)}
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif node in constants:
            names = [name.id for name in ast.walk(constants[node]) if isinstance(name, ast.Name)]
        else:
            continue
        begin, end = lines[node.lineno - 1], lines[node.end_lineno or node.lineno]
        body = [token for token in found if begin <= token.start < end]
        yield from ((name, body) for name in names)


def _cpp(found: Sequence[Token]) -> Iterator[tuple[str, list[Token]]]:
    """The declarations of a namespace or a class, one after the other, and what is declared inside of classes."""
    i = 0
    while i < len(found):
        if found[i].text in (";", "}"):
            i += 1
            continue
        if found[i].text == "namespace":
            i = next(j for j in range(i, len(found)) if found[j].text in "{;") + 1
            continue
        end = _end(found, i)
        name, is_class = _declared([token.text for token in found[i:end]])
        yield name, list(found[i:end])
        if is_class:
            inside = next((j for j in range(i, end) if found[j].text == "{"), end)
            yield from _cpp(found[inside + 1 : end - 1])
        i = end


def _end(found: Sequence[Token], begin: int) -> int:
    """Behind the declaration: at a semicolon, or at a closing brace that nothing of it follows."""
    depth = 0
    for i in range(begin, len(found)):
        text = found[i].text
        depth += (text in OPENING) - (text in CLOSING)
        after = found[i + 1].text if i + 1 < len(found) else ""
        if depth == 0 and (text == ";" or (text == "}" and after not in (",", ";", "{"))):
            return i + 1
    return len(found)


def _declared(texts: list[str]) -> tuple[str, bool]:
    """The name that a declaration gives, and whether it is a class."""
    head = _outside_brackets(texts[_closing(texts, 1) + 1 :] if texts[0] == "template" else texts)
    for i, text in enumerate(head):
        if text in ("struct", "class", "union", "enum"):
            named = head[i + 1 + (head[i + 1] == "class")] if i + 1 < len(head) else ""
            return named, text != "enum"
        if text == "operator":
            return text, False
        if i and text in ("(", "=", "{", "[", ";") and head[i - 1] not in ATTRIBUTES:
            return head[i - 1], False
    return "", False


def _outside_brackets(texts: Iterable[str]) -> list[str]:
    """What stands outside of brackets, the angle ones of template arguments too, with the brackets' opening halves."""
    depth, result = 0, []
    for text in texts:
        depth -= text in (*CLOSING, ">") and depth > 0
        if depth == 0 and text not in (*CLOSING, "<", ">"):
            result.append(text)
        depth += text in (*OPENING, "<")
    return result


def _closing(texts: Sequence[str], begin: int) -> int:
    """The index of the angle bracket that closes the one at `begin`."""
    depths = accumulate((text == "<") - (text == ">") for text in texts[begin:])
    return begin + next(i for i, depth in enumerate(depths) if depth == 0)
