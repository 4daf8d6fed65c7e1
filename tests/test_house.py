"""The house: seven scripts at the top, one-way imports, short functions and files, one name for one thing."""

import ast
import functools

import pytest
from conftest import ROOT

# A file imports only from its own rank or a lower one. What shares a rank and is a script is not imported at all.
ORDER = [
    ["core"],
    ["model"],
    ["generate"],
    ["training", "verification"],
    ["curation"],
    ["evaluation"],
    ["merging"],
    ["train_sft", "train_kto", "merge", "make_data", "eval"],
    ["demo", "variants", "tools"],
    ["experiments"],  # draws its pictures with tools.svg
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
SCRIPTS = ORDER[7]
FILES = sorted(path for path in ROOT.glob("**/*.py") if path.relative_to(ROOT).parts[0].removesuffix(".py") in RANK)
PARALLEL = {"train", "with_eval", "micro_loss", "add_flags"}  # the same role in each training script
TABLES = {"demo/words.py", "demo/tasks.py", "curation/task_types.py"}  # data, not code


def name(path):
    return str(path.relative_to(ROOT))


@functools.cache
def parsed(path):
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_rooms(path):
    for node in ast.walk(parsed(path)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        yield from (module.split(".")[0] for module in modules if module.split(".")[0] in RANK)


def test_no_two_test_files_share_a_name():
    names = [path.name for path in (ROOT / "tests").glob("**/*.py")]  # pytest imports them by name alone
    assert len(names) == len(set(names))


def test_seven_scripts_at_the_top():
    assert sorted(p.stem for p in ROOT.glob("*.py")) == sorted(["model", "generate", *SCRIPTS])


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in set(imported_rooms(path)) - {room}:
        assert RANK[other] < RANK[room], f"{room} imports {other}"
        assert other not in SCRIPTS or RANK[room] > RANK[other], f"{room} imports the script {other}"


@pytest.mark.parametrize("room", [room for rooms in ORDER for room in rooms if (ROOT / room).is_dir()])
def test_no_circles_in_a_room(room):
    files = {f"{room}.{p.stem}": p for p in (ROOT / room).glob("*.py")}
    edges = {module: set() for module in files}
    for module, path in files.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.module:
                edges[module] |= {node.module} & files.keys() | {
                    f"{node.module}.{a.name}" for a in node.names
                } & files.keys()
    while leaves := [module for module, others in edges.items() if not others]:
        for leaf in leaves:
            del edges[leaf]
            for others in edges.values():
                others.discard(leaf)
    assert not edges, f"a circle: {edges}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400 or name(path) in TABLES
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


@pytest.mark.parametrize("path", [p for p in FILES if name(p) not in TABLES], ids=name)
def test_only_tables_are_not_formatted(path):
    text, tables = path.read_text(encoding="utf-8"), set()
    for node in parsed(path).body:  # a table is a literal of three rows and more
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict | ast.List | ast.Tuple):
            rows = node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
            tables |= {node.end_lineno} if len(rows) >= 3 else set()
    assert {n for n, line in enumerate(text.splitlines(), 1) if "# fmt: " in line} <= tables


@pytest.mark.parametrize("path", FILES, ids=name)
def test_public_functions_are_typed(path):
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            a = node.args
            parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            untyped = [p.arg for p in parameters if p.annotation is None] + ["the result"] * (node.returns is None)
            assert not untyped, f"{node.name}: {', '.join(untyped)}"


def test_one_name_for_one_thing():
    places = {}
    for path in FILES:
        for node in parsed(path).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                places.setdefault(node.name, []).append(name(path))
    for shared in PARALLEL:
        places[shared] = [p for p in places[shared] if not p.startswith(("train_", "variants/"))]
    repeated = {k: v for k, v in places.items() if len(v) > 1 and k not in {"main", "parse_args"}}
    assert not repeated, f"two definitions of one name: {repeated}"


def test_every_name_is_used():
    """A function, class or constant at the top of a file is read in that file or in one that imports it."""
    made, read = set(), set()
    for path in FILES:
        module, imported = name(path).removesuffix(".py").replace("/", "."), {}
        for node in parsed(path).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                made.add((module, node.name))
            elif isinstance(node, ast.Assign):
                made |= {(module, n.id) for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom):
                imported |= {a.asname or a.name: (node.module, a.name) for a in node.names}
            elif isinstance(node, ast.Import):
                imported |= {a.asname or a.name: tuple(a.name.rsplit(".", 1)) for a in node.names}
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                read.add(imported.get(node.id, (module, node.id)))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
                read.add((".".join(imported[node.value.id]), node.attr))
    assert made - read - {("variants.asft", "asft_loss")} == set()  # asft_loss: the loss as a function, for other code


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_local_name_hides_one_of_its_file(path):
    own = set()
    for node in parsed(path).body:
        own |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
        own |= {a.asname or a.name for a in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
    for function in (node for node in parsed(path).body if isinstance(node, ast.FunctionDef)):
        inside = list(ast.walk(function))
        local = {node.arg for node in inside if isinstance(node, ast.arg)}
        local |= {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        assert not local & own, f"{function.name}: {', '.join(local & own)}"


def test_the_readme_is_read_in_two_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
