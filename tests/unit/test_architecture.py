"""The import graph is the architecture: the arrow points from programs to the library, models stand alone."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TREES = ("tokenizer_training", "eval", "examples")  # beside the library, run from the checkout
PROGRAM_FOLDERS = (*TREES, "llamagen_dist.commands")
PROGRAMS = {"llamagen_dist.train_gpt", "llamagen_dist.preflight", "llamagen_dist.cli"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, module: str) -> set[str]:
    """Our own modules that ``source`` imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("llamagen_dist", *TREES)}


SOURCES = {module_name(p): p for folder in ("llamagen_dist", *TREES) for p in sorted((ROOT / folder).rglob("*.py"))}


# The rooms from the ground up, as the README lists them: a module imports its own floor and those before it.
FLOORS = (
    ("errors", "program", "files", "process", "console", "prng"),
    ("models",),
    ("config",),
    ("parallel",),
    ("build",),
    ("data",),
    ("checkpoint",),
    ("tracking",),
    ("planning",),
    ("training",),
    ("sampling",),
    ("evaluation",),
    ("scaling",),
    ("report",),
    ("hub",),
    ("launch",),
    ("serve",),
    ("commands",),
    ("cli", "train_gpt", "preflight", *TREES),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def is_program_code(module: str) -> bool:
    return module in PROGRAMS or any(module == f or module.startswith(f + ".") for f in PROGRAM_FOLDERS)


def room_of(module: str) -> str:
    """The room of a module; empty for the package itself."""
    parts = module.removeprefix("llamagen_dist").lstrip(".").split(".")
    return parts[0]


def violations(graph: dict[str, set[str]]) -> list[str]:
    bad = []
    for module, used in graph.items():
        room = room_of(module)
        for target in sorted(used):
            other = room_of(target)
            if other and FLOOR.get(other, -1) > FLOOR[room]:
                bad.append(f"{module} imports {target}, which stands on a higher floor")
            if room == "models" and other not in ("", "models", "prng"):
                bad.append(f"{module} imports {target}: models stand alone")
            if not is_program_code(module) and is_program_code(target):
                bad.append(f"{module} imports the program {target}")
            if is_program_code(module) and is_program_code(target) and room != other and room != "cli":
                bad.append(f"{module} imports {target} from another program's folder")
    return bad


def test_every_import_goes_down():
    graph = {m: imports(p.read_text(), m) for m, p in SOURCES.items() if m != "llamagen_dist"}
    assert violations(graph) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("llamagen_dist.models.gpt", "from llamagen_dist.config import load"),
        ("llamagen_dist.config.loader", "def f():\n    import llamagen_dist.parallel.engine"),
        ("llamagen_dist.training.fit", "from llamagen_dist import train_gpt"),
        ("llamagen_dist.training.run", "from llamagen_dist.launch import snapshot"),
        ("llamagen_dist.data.shards", "from tokenizer_training import losses"),
        ("eval.sample", "from tokenizer_training.losses import x"),
    ],
)
def test_a_wrong_arrow_is_noticed(module, source):
    assert violations({module: imports(source, module)})


HEAVY = {
    *("torch", "numpy", "pydantic", "yaml", "rich", "PIL", "matplotlib", "scipy", "safetensors", "tokenizers"),
    *("deepspeed", "megatron", "transformers", "webdataset", "lpips", "wandb", "submitit", "fsspec", "jinja2"),
    *("huggingface_hub", "h5py", "trackio", "google", "markdown_it", "plotly", "wandb_workspaces", "gradio"),
}
"""Packages that take a moment to load: what a program does not need, it should not wait for."""


def import_nodes(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def local_imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """The imports inside functions."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return list({id(node): node for function in functions for node in import_nodes(function)}.values())


def names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """What a statement imports, with the modules among the names of ``from package import module``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]


def modules_loaded(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
    """For every module of ours all modules and packages that importing it loads, however indirectly."""
    direct: dict[str, set[str]] = {}
    for module, tree in trees.items():
        local = {id(node) for node in local_imports(tree)}
        typing_only = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in import_nodes(block)
        }
        used = [name for node in import_nodes(tree) if id(node) not in local | typing_only for name in names(node)]
        direct[module] = {name if name in trees else name.split(".")[0] for name in used if name}
    loaded = {module: set(used) for module, used in direct.items()}
    growing = True
    while growing:
        growing = False
        for used in loaded.values():
            more = set().union(*(loaded[name] for name in used if name in loaded)) - used
            used |= more
            growing |= bool(more)
    return loaded


def needless_local_imports(sources: dict[str, str]) -> list[str]:
    """Imports inside functions that spare nobody a heavy package."""
    trees: dict[str, ast.AST] = {module: ast.parse(source) for module, source in sources.items()}
    loaded = modules_loaded(trees)
    bad = []
    for module, tree in trees.items():
        for node in local_imports(tree):
            brings: set[str] = set()
            for name in names(node):
                brings |= loaded.get(name, set()) | {name.split(".")[0]}
            if not (brings & HEAVY) - loaded[module]:
                bad.append(f"{module} imports {ast.unparse(node)!r} inside a function, which spares no heavy package")
    return bad


def circles(sources: dict[str, str]) -> list[str]:
    """Modules that end up importing themselves, imports inside functions included."""
    uses = {module: imports(source, module) & sources.keys() for module, source in sources.items()}
    found = []
    for start in uses:
        seen: set[str] = set()
        waiting = list(uses[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += uses[module]
        if start in seen:
            found.append(start)
    return sorted(found)


TEXTS = {m: p.read_text() for m, p in SOURCES.items()}


def test_no_module_imports_itself_in_a_circle():
    assert circles({m: s for m, s in TEXTS.items() if SOURCES[m].name != "__init__.py"}) == []


def test_a_circle_is_noticed():
    texts = {
        "llamagen_dist.a": "from llamagen_dist import b",
        "llamagen_dist.b": "def f():\n    import llamagen_dist.a",
    }
    assert circles(texts) == ["llamagen_dist.a", "llamagen_dist.b"]


def test_imports_stand_at_the_top_unless_they_spare_a_heavy_package():
    assert needless_local_imports(TEXTS) == []


def test_a_needless_import_inside_a_function_is_noticed():
    texts = {"llamagen_dist.a": "import torch", "llamagen_dist.b": "def f():\n    from llamagen_dist import a"}
    assert needless_local_imports(texts) == []
    assert needless_local_imports(texts | {"llamagen_dist.a": "import os"})
    assert needless_local_imports(texts | {"llamagen_dist.b": "import torch\n" + texts["llamagen_dist.b"]})


def test_no_room_without_a_name_and_no_huge_file():
    assert not [m for m in SOURCES if m.split(".")[-1] in ("utils", "util", "helpers", "common", "misc")]
    assert not {m: n for m, p in SOURCES.items() if (n := len(p.read_text().splitlines())) > 450}


# Names that mean something else in every module which has them, though their values happen to be equal.
COINCIDENCES = {"T", "FORMAT", "POLL_S", "MOST_CLASSES", "SUBMITTING_S", "NAME"}


def twins(sources: dict[str, str]) -> dict[str, list[str]]:
    """Constants that two modules define alike: ``NAME = value`` -> the modules. One of them will be forgotten."""
    defined: dict[str, list[str]] = {}
    for module, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id.strip("_")
                if name.isupper() and name not in COINCIDENCES:
                    defined.setdefault(f"{name} = {ast.unparse(node.value)}", []).append(module)
    return {constant: modules for constant, modules in defined.items() if len(modules) > 1}


def test_a_constant_has_one_home():
    assert twins({module: path.read_text() for module, path in SOURCES.items()}) == {}
    assert twins({"a": "_CHUNK = 1 << 22", "b": "CHUNK = 1 << 22  # as a has it"}) == {"CHUNK = 1 << 22": ["a", "b"]}


def readme_house() -> list[tuple[int, str, str]]:
    """(indentation, name, description) of every entry in the README's list of rooms."""
    block = (ROOT / "README.md").read_text().split("## The house")[1].split("```")[1]
    entries = [re.match(r"( *)(\S+) +(.*)", line) for line in block.splitlines()]
    return [(len(m[1]), m[2].rstrip("/"), m[3]) for m in entries if m and len(m[1]) <= 2]


def test_the_readmes_house_is_the_tree():
    rooms = {name: text for indent, name, text in readme_house() if indent == 2}
    assert len(rooms) == sum(indent == 2 for indent, _, _ in readme_house()), "a room is listed twice"
    package = ROOT / "llamagen_dist"
    there = {p.name for p in package.iterdir() if (p / "__init__.py").exists() or p.suffix == ".py"} - {"__init__.py"}
    assert set(rooms) == there
    heights = [FLOOR[name.removesuffix(".py")] for name in rooms]
    assert heights == sorted(heights), "the README lists the rooms from the ground up, as FLOORS does"
    assert {name for name in FLOOR if name not in ("serve", *PROGRAM_FOLDERS)} == {n.removesuffix(".py") for n in rooms}
    named = [package / room / file for room, text in rooms.items() for file in re.findall(r"\b\w+\.py", text)]
    folders = [name for indent, name, _ in readme_house() if indent == 0]
    assert {"llamagen_dist", "tokenizer_training", "eval", "examples", "configs", "slurm", "tests"} <= set(folders)
    assert [path for path in (*named, *(ROOT / folder for folder in folders)) if not path.exists()] == []


def test_the_readme_says_where_attention_is():
    (file,) = re.findall(r"change `Attention` in\s+`([\w/.]+)`", (ROOT / "README.md").read_text())
    assert re.search(r"^class Attention\b", (ROOT / file).read_text(), re.MULTILINE)


# Lines a room may have, all of them counted: what keeps the house small enough to be read.
BUDGETS = {
    "errors": 40,
    "program": 90,
    "files": 410,
    "process": 110,
    "console": 240,
    "prng": 110,
    "models": 2720,
    "config": 2560,
    "parallel": 2210,
    "build": 120,
    "data": 4710,
    "checkpoint": 1575,
    "tracking": 1280,
    "planning": 1260,
    "training": 2000,
    "sampling": 2360,
    "evaluation": 4390,
    "scaling": 3890,
    "report": 3030,
    "hub": 890,
    "launch": 5400,
    "commands": 1810,
    "cli": 90,
    "train_gpt": 170,
    "preflight": 140,
    "tokenizer_training": 1940,
    "eval": 1600,
    "examples": 410,
}


def over_budget(lines: dict[str, int], budgets: dict[str, int]) -> dict[str, str]:
    return {room: f"{n} of {budgets.get(room, 0)} lines" for room, n in lines.items() if n > budgets.get(room, 0)}


def test_every_room_keeps_to_its_budget():
    lines: dict[str, int] = {}
    for module, path in SOURCES.items():
        if room := room_of(module):
            lines[room] = lines.get(room, 0) + len(path.read_text().splitlines())
    assert over_budget(lines, BUDGETS) == {}
    assert set(BUDGETS) == set(lines)
    assert over_budget(lines, {**BUDGETS, "models": lines["models"] - 1}) == {
        "models": f"{lines['models']} of {lines['models'] - 1} lines"
    }, "sabotage twin: one line too many is seen"


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_help_and_import_load_nothing_heavy():
    heavy = "{'torch', 'numpy', 'deepspeed', 'megatron', 'pydantic', 'matplotlib', 'submitit', 'wandb', 'PIL'}"
    code = f"import sys; import llamagen_dist, llamagen_dist.cli; print(sorted({heavy} & set(sys.modules)))"
    assert fresh(code).stdout.strip() == "[]"
    out = subprocess.run(
        [sys.executable, "-m", "llamagen_dist.cli", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "quickstart" in out.stdout


def test_no_command_loads_torch_before_it_runs():
    code = (
        "import sys, importlib; from llamagen_dist.cli import COMMANDS; "
        "[importlib.import_module('llamagen_dist.commands.' + name.replace('-', '_')) for name in COMMANDS]; "
        "print('torch' in sys.modules)"
    )
    assert fresh(code).stdout.strip() == "False"


def test_a_single_process_model_needs_neither_megatron_nor_deepspeed():
    code = (
        "import sys, torch, llamagen_dist.training.gpt_task, llamagen_dist.training.fit; "
        "print(sorted({'deepspeed', 'megatron'} & set(sys.modules)))"
    )
    assert fresh(code).stdout.strip() == "[]"


def test_llamagen_runs_from_another_folder(tmp_path):
    script = Path(sys.executable).parent / "llamagen"
    config = ROOT / "configs" / "gpt" / "GPT-B.yaml"
    out = subprocess.run([script, "config", config], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "GPT-B" in out.stdout
    bad = subprocess.run(
        [script, "config", config, "optim.lrr=1"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (bad.returncode, len(bad.stderr.splitlines())) == (2, 1)
    assert "did you mean optim.lr?" in bad.stderr
