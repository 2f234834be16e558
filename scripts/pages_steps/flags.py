"""docs/reference/flags.md, from the parsers of the programs and the first lines of the scripts."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from importlib import import_module
from pathlib import Path

HEAD = """# Flags

`scripts/pages` makes this page from the parsers of the programs, so it says what `--help` says. Environment variables are read first, so a flag wins over its variable.
All other variables are in [environment](environment.md).
"""
SCRIPTS = """
## Scripts for developers

Each has a `--help` or says at its top what it takes.
"""
ENV = re.compile(r" \(env: (\w+)([^)]*)\)")


def parsers(root: Path) -> list[argparse.ArgumentParser]:
    """Of all programs for users. Their help does not depend on the machine or its environment."""
    from setup_steps.cli import parser as setup

    from kvcapsule_gguf.bench.cli import parser as bench
    from kvcapsule_gguf.chat.args import _parser as chat
    from kvcapsule_gguf.eval.cli import parser as evaluate
    from kvcapsule_gguf.inspect.cli import parser as inspect
    from kvcapsule_gguf.server.args import parser as server
    from kvcapsule_gguf.train.cli import parser as train

    out = [setup(), chat()[0], server({}), train(), evaluate(), inspect(), bench()]
    sys.path.insert(0, str(root / "converters"))
    for name in ("convert_kvcapsule_to_gguf", "embed_kvcapsule"):
        converter = import_module(name).parser()
        converter.prog = f"converters/{name}.py"
        out.append(converter)
    return out


def page(root: Path) -> str:
    return HEAD + "".join(section(p) for p in parsers(root)) + scripts(root)


def section(parser: argparse.ArgumentParser, level: int = 2) -> str:
    text = f"\n{'#' * level} {parser.prog}\n\n{_sentence(parser.description)}\n"
    if parser.epilog:
        text += f"\n{_sentence(parser.epilog)}\n"
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    rows = [row(parser, a) for a in parser._actions if a not in below and not isinstance(a, argparse._HelpAction) and a.help != argparse.SUPPRESS]
    if any(cells[2] for cells in rows):
        text += table("flag", "meaning", "environment", rows=rows)
    elif rows:
        text += table("flag", "meaning", rows=[cells[:2] for cells in rows])
    return text + "".join(section(p, level + 1) for action in below for p in action.choices.values())


def table(*head: str, rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in cells) for cells in rows)]
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def row(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, ...]:
    """Flag, meaning, environment variable."""
    formatter = parser._get_formatter()
    if action.option_strings:
        value = "" if action.nargs == 0 else " " + formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
        name = ", ".join(f"`{flag}`" for flag in action.option_strings[:-1])
        name += (", " if name else "") + f"`{action.option_strings[-1]}{value}`"
    else:
        name = f"`{formatter._format_args(action, formatter._get_default_metavar_for_positional(action))}`"
    assert action.help, f"{parser.prog}: {name} has no help"
    help = formatter._expand_help(action)
    env = ENV.search(help)
    meaning = re.sub(r"[<>*]", r"\\\g<0>", ENV.sub("", help))
    return name, meaning, f"`{env[1]}`{env[2]}" if env else ""


def scripts(root: Path) -> str:
    rows: list[tuple[str, ...]] = []
    for path in sorted((root / "scripts").iterdir()):
        if path.is_file():
            first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
            assert first, f"{path} does not say what it does"
            rows.append((f"`scripts/{path.name}`", _sentence(first)))
    return SCRIPTS + table("script", "what it does", rows=rows)


def _sentence(text: str | None) -> str:
    text = " ".join((text or "").split())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ")", ":", "?")) else ".")
