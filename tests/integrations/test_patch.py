"""Unified diffs, applied exactly or not at all; and llama.cpp's patch as it ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from gdn2_edge.errors import BackendError
from gdn2_edge.integrations.build_llama_cpp import PATCH
from gdn2_edge.integrations.patch import apply_patch, read_patch

OLD = "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\n"
DIFF = """diff --git a/src/a.txt b/src/a.txt
index 0000000..1111111 100644
--- a/src/a.txt
+++ b/src/a.txt
@@ -1,3 +1,4 @@
 one
+one and a half
 two
 three
@@ -7,3 +8,2 @@ six
-seven
 eight
 nine
diff --git a/src/new/b.txt b/src/new/b.txt
new file mode 100644
--- /dev/null
+++ b/src/new/b.txt
@@ -0,0 +1,2 @@
+first
+--- second
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.txt").write_text(OLD)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_changes_and_adds(folder: Path) -> None:
    apply_patch(DIFF, folder, "this")
    assert contents(folder) == {
        "src/a.txt": b"one\none and a half\ntwo\nthree\nfour\nfive\nsix\neight\nnine\n",
        "src/new/b.txt": b"first\n--- second\n",
    }


@pytest.mark.parametrize(
    ("text", "names"),
    [
        pytest.param(OLD.replace("eight", "ate"), ("src/a.txt", "at 7"), id="another line"),
        pytest.param("zero\n" + OLD, ("src/a.txt", "at 7"), id="moved"),
        pytest.param("one\n", ("src/a.txt",), id="too short"),
        pytest.param(None, ("src/a.txt", "not there"), id="missing"),
    ],
)
def test_what_does_not_fit_is_left_alone(text: str | None, names: tuple[str, ...], folder: Path) -> None:
    path = folder / "src" / "a.txt"
    path.unlink()
    if text is not None:
        path.write_text(text)
    before = contents(folder)
    with pytest.raises(BackendError, match=r"does not fit version 9") as error:
        apply_patch(DIFF, folder, "version 9")
    assert all(name in str(error.value) for name in names)
    assert contents(folder) == before


def test_a_file_to_add_must_not_be_there(folder: Path) -> None:
    (folder / "src" / "new").mkdir()
    (folder / "src" / "new" / "b.txt").write_text("")
    before = contents(folder)
    with pytest.raises(BackendError, match=r"adds src/new/b\.txt, which is there already"):
        apply_patch(DIFF, folder, "this")
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/outside.txt"])
def test_no_file_outside(name: str, folder: Path) -> None:
    with pytest.raises(BackendError, match="not a file below"):
        apply_patch(DIFF.replace("b/src/new/b.txt", name), folder, "this")


def source_for(diff: str, folder: Path) -> None:
    """A folder that has exactly the lines that `diff` expects, and others between them."""
    for file in read_patch(diff):
        lines: list[str] = []
        for start, old, _ in file.hunks:
            lines += [f"// {i}" for i in range(len(lines), start)] + old
        if not file.is_new:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join([*lines, "// last", ""]))


def test_the_patch_for_llama_cpp_fits_what_it_expects(tmp_path: Path) -> None:
    diff = PATCH.read_text()
    source_for(diff, tmp_path)
    apply_patch(diff, tmp_path, "llama.cpp")
    model = (tmp_path / "src" / "models" / "gdn2.cpp").read_text()
    assert model.startswith('#include "models.h"\n')
    assert model.endswith("}\n")
    assert model in "\n".join(line[1:] for line in diff.splitlines())
    assert '"gdn2"' in (tmp_path / "src" / "llama-arch.cpp").read_text()
    assert all(file.name.startswith(("src/", "tests/test-llama-archs.cpp")) for file in read_patch(diff))


def test_the_patch_for_llama_cpp_refuses_another_version(tmp_path: Path) -> None:
    diff = PATCH.read_text()
    source_for(diff, tmp_path)
    table = tmp_path / "src" / "llama-arch.cpp"
    table.write_text("// a line more\n" + table.read_text())
    before = contents(tmp_path)
    with pytest.raises(BackendError, match=r"does not fit llama-cpp-python 0\.4\.0: src/llama-arch\.cpp"):
        apply_patch(diff, tmp_path, "llama-cpp-python 0.4.0")
    assert contents(tmp_path) == before
