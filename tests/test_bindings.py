"""kvcapsule_gguf/native/header.py against the headers, as a C compiler reads them, and against the ctypes layer of llama-cpp-python."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
from conftest import ROOT, library

from kvcapsule_gguf.native import header

sys.path.insert(0, str(ROOT / "scripts"))
from setup_steps.common import LLAMA

SOURCE = LLAMA / "patched" / "source"
STRUCTS = [value for value in vars(header).values() if isinstance(value, type) and issubclass(value, ctypes.Structure)]
CONSTANTS = {name: value for name, value in vars(header).items() if isinstance(value, int)}


def bindings():
    pytest.importorskip("pycparser")
    if not SOURCE.is_dir() or not shutil.which("cc"):
        pytest.skip("needs the patched source (scripts/setup) and a C compiler")
    path = ROOT / "scripts" / "bindings"
    loader = SourceFileLoader("bindings", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("bindings", loader))
    loader.exec_module(module)
    return module


def test_the_file_is_what_the_script_makes_of_the_headers() -> None:
    module = bindings()
    assert module.OUTPUT.read_text() == module.generate(SOURCE), "run scripts/bindings"


def test_layouts_and_constants_are_those_of_the_compiler(tmp_path: Path) -> None:
    if not SOURCE.is_dir() or not shutil.which("cc"):
        pytest.skip("needs the patched source (scripts/setup) and a C compiler")
    assert STRUCTS and CONSTANTS
    wanted = dict(CONSTANTS)
    lines = [f'printf("{name} %lld\\n", (long long) {name});' for name in CONSTANTS]
    for struct in STRUCTS:
        c = f"(*(struct {struct.__name__} *) 0)" if struct.__name__ != "llama_token_data" and not struct.__name__.endswith("_array") else f"(*({struct.__name__} *) 0)"
        lines.append(f'printf("{struct.__name__} %zu\\n", sizeof{c});')
        wanted[struct.__name__] = ctypes.sizeof(struct)
        for name, kind in struct._fields_:
            if name not in getattr(struct, "_anonymous_", ()):
                lines.append(f'printf("{struct.__name__}.{name} %zu %zu\\n", (size_t) &{c}.{name}, sizeof({c}.{name}));')
                wanted[f"{struct.__name__}.{name}"] = (getattr(struct, name).offset, ctypes.sizeof(kind))
    includes = '#include "llama.h"\n#include "llama-capsule.h"\n#include "mtmd.h"\n#include "mtmd-helper.h"\n'
    (tmp_path / "x.c").write_text(f"#include <stdio.h>\n{includes}\nint main(void) {{\n" + "\n".join(lines) + "\nreturn 0;\n}\n")
    folders = [f"-I{SOURCE / name}" for name in ("include", "ggml/include", "tools/mtmd")]
    subprocess.run(["cc", "-w", *folders, "-o", tmp_path / "x", tmp_path / "x.c"], check=True)
    said = subprocess.run([tmp_path / "x"], capture_output=True, text=True, check=True).stdout
    found = {name: int(numbers[0]) if len(numbers) == 1 else tuple(map(int, numbers)) for name, *numbers in map(str.split, said.splitlines())}
    assert found == wanted


COMPARE = """
import ctypes as c, sys
from kvcapsule_gguf import native
from kvcapsule_gguf.native import header
ours = native.load()
theirs = native.llama_cpp()
import llama_cpp.mtmd_cpp as mtmd

def plain(kind):
    # what a type is to a caller: names of structs are the same on both sides, handles are addresses
    if kind is None or kind is c.c_void_p:
        return str(kind)
    if issubclass(kind, c._Pointer):
        return "void *" if issubclass(kind._type_, c.Structure) and kind._type_.__name__ == "llama_sampler" else f"{plain(kind._type_)} *"
    if issubclass(kind, c._CFuncPtr):
        return f"{plain(kind._restype_)} ({', '.join(map(plain, kind._argtypes_))})"
    return kind.__name__

def same(a, b):
    address = lambda t: t is c.c_void_p or t is not None and issubclass(t, (c._Pointer, c._CFuncPtr, c.c_char_p))
    return plain(a) == plain(b) or (address(a) and address(b) and c.c_void_p in (a, b))

compared = 0
for tables, left, right in (((header.LLAMA,), ours.llama, theirs), ((header.MTMD,), ours.mtmd, mtmd)):
    for table in tables:
        for name in table:
            a, b = getattr(left, name), getattr(right, name, None)
            if b is None:
                continue
            compared += 1
            if len(a.argtypes) != len(b.argtypes) or not all(map(same, [a.restype, *a.argtypes], [b.restype, *b.argtypes])):
                print(name, a.restype, a.argtypes, b.restype, b.argtypes)
print(compared > 80 or compared)
"""


def test_signatures_are_those_of_llama_cpp_python() -> None:
    from test_native import python

    assert python(COMPARE, library("patched")).stdout.splitlines() == ["True"]


def test_a_name_that_the_headers_do_not_have() -> None:
    from test_native import python

    assert "AttributeError" in python("from kvcapsule_gguf import native; native.load().llama.llama_no_such", library("patched")).stderr
