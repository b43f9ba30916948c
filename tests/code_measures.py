"""Measures the package's code: `make measure`, or `python tests/code_measures.py [--root DIR]`.

Prints lines per room, the size and documentation of functions, and what a reader of the training
program has to read. Everything comes from the syntax trees; nothing is imported.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "efficientnet_ns"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(folder: Path) -> dict[str, str]:
    """Returns source texts by module name relative to `folder`."""
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path.read_text()
        for path in sorted(folder.rglob("*.py"))
    }


def lines(modules: dict[str, str]) -> int:
    return sum(len(text.splitlines()) for text in modules.values())


def lines_per_room(modules: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Returns (modules, lines) by room; programs at the root count as the room `programs`."""
    rooms: dict[str, tuple[int, int]] = {}
    for name, text in modules.items():
        room = name.split(".")[0] if "." in name else "programs"
        count, total = rooms.get(room, (0, 0))
        rooms[room] = count + 1, total + len(text.splitlines())
    return rooms


def definitions(text: str) -> Iterator[tuple[ast.AST, bool]]:
    """Yields functions and classes of a module, and whether every name on their path is public."""
    waiting = [(ast.parse(text), True, False)]
    while waiting:
        node, public, inside_function = waiting.pop()
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, Function | ast.ClassDef)
            visible = public and not inside_function
            if named:
                visible = visible and not child.name.startswith("_")
                yield child, visible
            inside = inside_function or isinstance(child, Function)
            waiting.append((child, visible if named else public, inside))


def function_lengths(modules: dict[str, str]) -> list[int]:
    return sorted(
        node.end_lineno - node.lineno + 1
        for text in modules.values()
        for node, _ in definitions(text)
        if isinstance(node, Function)
    )


def documented(modules: dict[str, str]) -> tuple[float, float]:
    """Returns the percentage with a docstring of all functions and classes, and of public ones."""
    found = [(node, public) for text in modules.values() for node, public in definitions(text)]
    have = [(ast.get_docstring(node) is not None, public) for node, public in found]
    public = [has for has, is_public in have if is_public]
    return 100 * sum(has for has, _ in have) / len(have), 100 * sum(public) / len(public)


def typed(modules: dict[str, str]) -> tuple[float, float]:
    """Returns the percentage of public functions with any type hint, and with all of them."""
    some = every = count = 0
    for text in modules.values():
        for node, public in definitions(text):
            if not (public and isinstance(node, Function)):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments = [a for a in arguments if a.arg not in ("self", "cls")]
            hints = [a.annotation is not None for a in arguments] + [node.returns is not None]
            count, some, every = count + 1, some + any(hints), every + all(hints)
    return 100 * some / count, 100 * every / count


def comments_per_100_lines(modules: dict[str, str]) -> float:
    """Returns the number of comment tokens per 100 lines that hold code."""
    comments = code = 0
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for text in modules.values():
        occupied = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments += 1
            elif token.type not in layout:
                occupied.add(token.start[0])
        code += len(occupied)
    return 100 * comments / code


def own_imports(name: str, modules: dict[str, str]) -> set[str]:
    """Returns the package's modules that module `name` imports, including inside functions."""
    found = set()
    for node in ast.walk(ast.parse(modules[name])):
        targets = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names if alias.name.startswith(PACKAGE + ".")]
        for target in targets:
            parts = target.split(".")[1:]
            while parts and ".".join(parts) not in modules:
                if ".".join([*parts, "__init__"]) in modules:
                    parts.append("__init__")
                    break
                parts.pop()
            found.add(".".join(parts))
    return found & modules.keys()


def closure(start: str, modules: dict[str, str]) -> set[str]:
    """Returns the modules that `start` needs, including itself."""
    seen, waiting = {start}, [start]
    while waiting:
        new = own_imports(waiting.pop(), modules) - seen
        seen |= new
        waiting += new
    return seen


def table(root: Path) -> str:
    """Formats all measures as lines of text."""
    modules, tests = sources(root / PACKAGE), sources(root / "tests")
    lengths = function_lengths(modules)
    needed = closure("training.train", modules)
    ninth = statistics.quantiles(lengths, n=10)[-1]
    rows = {
        "lines of the package": f"{lines(modules):,} in {len(modules)} modules",
        "lines of tests / of the package": f"{lines(tests) / lines(modules):.2f}",
        "longest function": f"{lengths[-1]} lines",
        "median / 90th percentile": f"{statistics.median(lengths):.0f} / {ninth:.0f} lines",
        "docstrings, all / public": "{:.0f} / {:.0f} %".format(*documented(modules)),
        "type hints, any / all": "{:.0f} / {:.0f} %".format(*typed(modules)),
        "comments per 100 lines of code": f"{comments_per_100_lines(modules):.1f}",
        "training.train needs": f"{sum(len(modules[name].splitlines()) for name in needed):,} lines in {len(needed)} modules",
    }
    width = max(map(len, rows))
    text = [f"{label:{width}}  {value}" for label, value in rows.items()]
    rooms = sorted(lines_per_room(modules).items(), key=lambda item: -item[1][1])
    text += ["", *(f"{room:{width}}  {total:,} in {count}" for room, (count, total) in rooms)]
    return "\n".join(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    print(table(parser.parse_args().root))
