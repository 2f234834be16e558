"""What imports what: no circle, of modules or of the packages in kvcapsule_gguf, not even by way of an import inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT


def names(path: Path, package: list[str]) -> Iterator[str]:
    """What a file imports, with all names that could be modules; what is for type checkers only does not count."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom):
            source = [*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])] if node.level else [node.module or ""]
            yield from (".".join([*source, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            waiting += ast.iter_child_nodes(node)


def imports() -> dict[str, set[str]]:
    """Of each module of kvcapsule_gguf, those of kvcapsule_gguf."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in (ROOT / "kvcapsule_gguf").rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        modules = {module if module in files else module.rpartition(".")[0] for module in names(path, package)}
        found[name] = {module for module in modules if module in files and module != name}
    return found


@pytest.mark.parametrize("parts", [None, 2], ids=["modules", "packages"])
def test_no_import_leads_back(parts: int | None) -> None:
    graph: dict[str, set[str]] = {}
    for name, modules in imports().items():
        short = ".".join(name.split(".")[:parts])
        graph.setdefault(short, set()).update({".".join(module.split(".")[:parts]) for module in modules} - {short})
    assert len(graph) > 12 and graph["kvcapsule_gguf.format" if parts else "kvcapsule_gguf.format.reader"]
    graph.pop("kvcapsule_gguf")  # its names are loaded when they are asked for
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
