"""Names of the arguments of classes, read from their source files: nothing is imported, so that a misspelt key is
answered before torch is loaded."""

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Source(NamedTuple):
    """A module as text.

    Args:
        module: its dotted name.
        path: its file.
        classes: classes that it defines, by name.
        imports: names that it takes from other modules → (module, name there).
    """

    module: str
    path: Path
    classes: Mapping[str, ast.ClassDef]
    imports: Mapping[str, tuple[str, str]]


def arguments(path: str) -> list[str] | None:
    """Names of the arguments of a class, with those that its **options hand on to the classes it inherits.

    Args:
        path: the dotted path of the class.

    Returns:
        The names, or None where the source does not tell or is a file of the user's own: `build` imports the class.
    """
    module, _, name = path.rpartition(".")
    names: dict[str, None] = {}
    file = _file(module)
    own = file is not None and "." not in module and file.name != "__init__.py"
    return list(names) if not own and _collect(module, name, names) else None


def takes(path: str, name: str) -> bool:
    """Whether a class, of the user's own too, has an argument of this name, as far as its source tells."""
    module, _, cls = path.rpartition(".")
    names: dict[str, None] = {}
    _collect(module, cls, names)
    return name in names


def _collect(module: str, name: str, names: dict[str, None]) -> bool:
    """Add the arguments of a class; False if they cannot be told."""
    found = _find(module, name)
    if found is None:
        return False
    source, cls = found
    constructor = next((n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if constructor is not None:
        given = constructor.args
        names.update(dict.fromkeys(arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)[1:]))
        if given.kwarg is None:
            return True
    elif cls.decorator_list:
        return _collect_fields(source, cls, names)
    return len(cls.bases) == 1 and _collect(source.module, ast.unparse(cls.bases[0]), names)


def _collect_fields(source: Source, cls: ast.ClassDef, names: dict[str, None]) -> bool:
    """Add the fields of a dataclass and of those it inherits; False if they cannot be told."""
    for base in map(ast.unparse, cls.bases):
        if base in ("ABC", "Protocol"):
            continue
        found = _find(source.module, base)
        if found is None or not _collect_fields(*found, names):
            return False
    if not cls.decorator_list:
        return True  # its annotations are no fields
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar"):
            if node.value is not None and "init=" in ast.unparse(node.value):
                return False
            names[ast.unparse(node.target)] = None
    return ast.unparse(cls.decorator_list[0]) in ("dataclass", "dataclass(frozen=True)")


def _find(module: str, name: str) -> tuple[Source, ast.ClassDef] | None:
    """A class and the module that defines it, through `from … import …`."""
    for _ in range(10):
        source = _read(module)
        if source is None:
            return None
        if name in source.classes:
            return source, source.classes[name]
        if name not in source.imports:
            return None
        module, name = source.imports[name]
    return None


@functools.cache
def _read(module: str) -> Source | None:
    """A module's source; None if there is none."""
    path = _file(module)
    if path is None:
        return None
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    imports = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*parents, node.module] if node.module else parents)
            imports.update({alias.asname or alias.name: (origin, alias.name) for alias in node.names})
    return Source(module, path, {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}, imports)


def _file(module: str) -> Path | None:
    """The file of a module; only where its package lies is asked for, which imports nothing."""
    top, *parts = module.split(".")
    try:
        found: Any = importlib.util.find_spec(top) if top else None
    except (ImportError, ValueError):
        return None
    if found and not found.submodule_search_locations and not parts and (found.origin or "").endswith(".py"):
        return Path(found.origin)
    for folder in found.submodule_search_locations or () if found else ():
        place = Path(folder, *parts)
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                return path
    return None
