"""Rules of reading that no other tool holds: sizes, names, docstrings, parameters, and who reads the environment."""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "galaxydist"
FLOORS_THAT_KNOW_THE_ENVIRONMENT = {"api.py", "cli", "doctor", "training", "cluster", "serving"}
MAX_LINES, MAX_FUNCTION = 500, 60
# A module of fewer lines is a slice of another subject, but for these.
MIN_LINES = 80
SHORT = {
    "__main__.py": "entry point",
    "bench/peers/imagefolder.py": "runs in an environment of its own",
    "bench/peers/litdata.py": "runs in an environment of its own",
    "bench/peers/mosaic.py": "runs in an environment of its own",
    "bench/peers/transforms.py": "runs in environments of its own",
    "bench/peers/webdataset.py": "runs in an environment of its own",
    "cli/train.py": "what launch.py imports",
    "cluster/snapshot.py": "the code that a job runs",
    "cluster/task.py": "entry point of a rank",
    "log.py": "lowest layer",
    "recipe/identity.py": "a subject of its own",
    "serving/app/onnx_runtime.py": "the only importer of onnxruntime",
    "surveys/official_split.py": "reader of shipped data",
    "training/health/guard_process.py": "a script that imports nothing of the package",
    "version.py": "read by the build",
}
# A function of eight or more parameters takes a dataclass of options; a class of five or more is a dataclass.
MAX_PARAMETERS, MAX_CONSTRUCTOR = 7, 4
MANY_PARAMETERS = {
    "write_shards": "public API, keyword-only options",
    "TrainLoader": "public API; computes its order and starts threads",
    "EvalLoader": "public API; starts threads",
    "_Loader": "base of the two loaders",
    "PrefetchedShards": "starts threads",
    "open_shard_source": "the parameters of PrefetchedShards",
    "open_survey": "public API, keyword-only options",
    "EpochOrder": "computes tables from its arguments",
    "Augment": "computes tables from its arguments",
    "Normalise": "computes tables from its arguments",
    "CustomCNN": "numbers of the architecture, as PyTorch's layers take them",
    "D4Conv": "the parameters of a convolution, as PyTorch's layers take them",
    "MlpHead": "numbers of the architecture, as PyTorch's layers take them",
    "Labelling": "computes a plan from its arguments",
    "Follower": "opens the files that it follows",
    "evaluate_split": "called with names by the trainer and the evaluator",
    "save_sharded": "the parameters of store.save, and the ranks",
    "draw_edge_on": "one number for each property of a disc",
}
# Each folder that has one calls its HTML page so.
SHARED_NAMES = {"__init__.py", "page.py"}
MAX_MODULES = 22
RELATIVE_CLAUSES = ("What ", "Which ", "Whether ", "Where ", "How ", "Who ")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_functions_have_at_most_60_lines_and_docstrings_are_sentences(path: Path) -> None:
    assert ast.get_docstring(parsed(path)) or not path.stat().st_size, "a module says what it is for"
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno - len((ast.get_docstring(function) or "").splitlines())
        assert lines <= MAX_FUNCTION, f"{function.name}: {lines} lines"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            assert not text.startswith(RELATIVE_CLAUSES), f"not a sentence of its own: {text.splitlines()[0]}"


def test_modules_have_80_to_500_lines_and_folders_at_most_22_modules() -> None:
    modules = [path for path in sources() if path.name != "__init__.py"]
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
    short = {name for name, count in lines.items() if count < MIN_LINES}
    assert short == set(SHORT), "fold it into its subject, or add it to SHORT with the reason; take out what has grown"
    folders = Counter(path.parent for path in modules)
    assert {str(folder): count for folder, count in folders.items() if count > MAX_MODULES} == {}


def test_functions_and_constructors_have_few_parameters_or_a_reason() -> None:
    many = set()
    for path in sources():
        constructors = {
            id(function): node.name
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.ClassDef)
            for function in node.body
            if isinstance(function, ast.FunctionDef) and function.name == "__init__"
        }
        for function in functions(path):
            name = constructors.get(id(function))
            arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            if count > (MAX_PARAMETERS if name is None else MAX_CONSTRUCTOR):
                many.add(name or function.name)
    assert many == set(MANY_PARAMETERS)


def test_module_and_public_class_names_are_unique() -> None:
    modules = [path for path in sources() if path.name != "__init__.py"]
    names = Counter(path.name for path in modules)
    assert {name for name, count in names.items() if count > 1} <= SHARED_NAMES
    classes = [node.name for path in modules for node in parsed(path).body if isinstance(node, ast.ClassDef)]
    assert {name for name, count in Counter(classes).items() if count > 1 and not name.startswith("_")} == set()


def test_modules_below_the_trainer_do_not_read_the_environment() -> None:
    for path in sources():
        if path.relative_to(PACKAGE).parts[0] in FLOORS_THAT_KNOW_THE_ENVIRONMENT:
            continue
        for name, line in _names(path):
            assert name not in ("os.environ", "os.getenv", "environ", "getenv"), (
                f"{path.relative_to(ROOT)}:{line} reads the environment"
            )


def _names(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted attributes and imported names of a file, with their lines."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}", node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from ((alias.name, node.lineno) for alias in node.names)
