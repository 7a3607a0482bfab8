"""The planted faults: each is found once in the sources as they are, and however they are moved or formatted."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.faults.planted import FAULTS, HERE, SOURCES, Fault, Misplaced, read
from tests.faults.syntax import CPP, PYTHON, definitions, tokens

ROOT = HERE.parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}-{fault.backend}-{fault.within}")
def test_a_fault_has_its_place_and_its_tests(fault: Fault) -> None:
    path, begin, end = fault.place(ROOT)
    assert fault.test_files(ROOT)
    text = path.read_text()
    broken = text[:begin] + fault.new + text[end:]
    language = PYTHON if path.suffix == ".py" else CPP
    assert [token.text for token in tokens(broken, language)] != [token.text for token in tokens(text, language)]
    if language is PYTHON:
        ast.parse(broken)


def test_a_fault_is_named_once() -> None:
    names = [(fault.name, fault.backend, fault.within) for fault in FAULTS]
    assert len(set(names)) == len(names) > 150
    assert {fault.backend for fault in FAULTS} == set(SOURCES)


CALL = Fault("", "cpp", "row", (), "r < rows.size(0, 1)", "r <= rows.size(0)")
ONE_LINE = "namespace vpt { struct Target { T* row(int r) const { return r < rows.size(0, 1) ? at(r) : nullptr; } }; }"
LINES = """
// row: r < rows.size(0, 1)
#define row(r) r < rows.size(0, 1)
template <void (*project)(const Call&), typename T = int>
__global__ void __launch_bounds__(32) row(
    const T r) {
  static const char* text = "} row( {";
  store(r <  // the last
        rows.size(
            0,
            1,
        ));
}
bool other(int r) { return r < rows.size(0, 1); }
"""


@pytest.mark.parametrize("text", [ONE_LINE, LINES])
@pytest.mark.parametrize("file", ["csrc/cpu/project.cpp", "csrc/math/rows.h"])
def test_a_place_in_cpp_survives_formatting_and_moves(tmp_path: Path, file: str, text: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    found, begin, end = CALL.place(tmp_path)
    assert found == path
    assert "".join(token.text for token in tokens(text[begin:end], CPP)) == "r<rows.size(0,1)"
    assert text[:begin].rstrip().endswith(("return", "store("))


def test_a_place_that_is_gone_or_there_twice_is_told(tmp_path: Path) -> None:
    path = tmp_path / "csrc" / "cpu" / "rows.cpp"
    path.parent.mkdir(parents=True)
    for text, count in ((ONE_LINE.replace("<", "<="), 0), (ONE_LINE.replace("row(", "column("), 0), (2 * ONE_LINE, 2)):
        path.write_text(text)
        with pytest.raises(Misplaced, match=f"{count} times in row"):
            CALL.place(tmp_path)


def test_definitions_of_python() -> None:
    text = "LIMIT, SIZE = 3, 4  # limit\nclass A:\n    def f(self, x,): # f\n        y = x + 1\n"
    found = definitions(text, PYTHON)
    assert set(found) == {"LIMIT", "SIZE", "A", "f"}
    assert [token.text for token in found["f"][0]] == "def f ( self , x ) : y = x + 1".split()


def test_definitions_of_cpp() -> None:
    text = """
    #include <vector>
    constexpr int kParts = 3;
    enum class Filter : int { kBox };
    struct Axis {
      Axis(int n) : size{n, n}, half(n / 2) { check(n); }
      int end() const { return half; }
      int size[2], half;
    };
    Tensor operator+(const Tensor& a, const Tensor& b) { return add(a, b); }
    const Simd kBest = {pack, unpack};
    inline std::vector<std::pair<int, int>> ranges(int n = 3) { return {}; }
    """
    found = definitions(text, CPP)
    assert {"kParts", "Filter", "Axis", "end", "operator", "kBest", "ranges"} <= set(found)
    assert [len(found[name]) for name in ("Axis", "end", "ranges")] == [2, 1, 1]
    assert [token.text for token in found["end"][0]][-4:] == ["return", "half", ";", "}"]


@pytest.mark.parametrize("line", ["@@ cpp", "- ", "+ y", "-x"])
def test_a_line_that_says_nothing_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="is neither"):
        read(f"an invariant\n{line}\n")
