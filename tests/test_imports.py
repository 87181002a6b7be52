"""The architecture's arrow: harness -> baselines -> pisa, and pisa knows nothing but torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "pisa": {"harness", "baselines", "diffusers", "hydra", "omegaconf", "pandas", "matplotlib", "wandb"},
    "baselines": {"harness", "diffusers", "hydra", "omegaconf", "pandas", "matplotlib", "wandb"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        wrong = {name for name in imports(path) if name.split(".")[0] in FORBIDDEN[package]}
        assert not wrong, f"{path}: {wrong}"


def relative_imports(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {n.module or a.name for n in nodes if isinstance(n, ast.ImportFrom) and n.level for a in n.names}


def test_the_definition_shares_no_code_with_what_it_judges():
    for path in (ROOT / "pisa").rglob("*.py"):
        used = relative_imports(path) | imports(path)
        if path.name == "reference.py":
            assert relative_imports(path) <= {"blocks", "tail"}  # the data types, no arithmetic
        else:
            assert not {name for name in used if "reference" in name}, path
