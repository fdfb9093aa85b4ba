"""The import graph is the architecture: the arrow points from programs to the library, models stand alone."""

import ast
import os
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
