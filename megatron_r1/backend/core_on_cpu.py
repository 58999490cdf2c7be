"""An import hook that lets the real megatron-core run where CUDA does not exist.

megatron-core says 'cuda' and `torch.cuda` where it means "this rank's device". The hook is limited to
`megatron.core` and compiles its modules with those words bound to the CPU:

    'cuda'                       -> 'cpu'
    'torch.cuda.BFloat16Tensor'  -> 'torch.BFloat16Tensor'   (the optimizers compare type names)
    torch.cuda.NAME              -> a small namespace below
    x.cuda(...), x.pin_memory()  -> x.cpu()

torch itself, every other library and the files on disk stay as they are. Rejected: patching
`torch.cuda` (changes torch for everyone in the process), a TorchFunctionMode (threads miss it),
overriding megatron-core's classes one by one (33 places).
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types
from typing import Any

import torch

_CORE = "megatron.core"


class _InOrder:
    """A stream or an event: on the CPU work is already in order."""

    def __init__(self, *_: Any, **__: Any): ...
    def __enter__(self) -> _InOrder:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def record_event(self, *_: Any) -> _InOrder:
        return self

    def synchronize(self) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class _DefaultGenerators:
    def __getitem__(self, _: int) -> torch.Generator:
        return torch.default_generator


def _nothing(*_: Any, **__: Any) -> None: ...
def _zero(*_: Any, **__: Any) -> int:
    return 0


class _CpuAsCuda(types.ModuleType):
    """What megatron-core sees as `torch.cuda`. Names not given here come from the real one."""

    current_device = staticmethod(lambda: torch.device("cpu"))
    device_count = staticmethod(lambda: 1)
    default_generators = _DefaultGenerators()
    get_rng_state = staticmethod(lambda *_a, **_k: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_a, **_k: torch.set_rng_state(state))
    manual_seed = manual_seed_all = staticmethod(lambda seed: torch.default_generator.manual_seed(int(seed)))
    _lazy_call = staticmethod(lambda call, **_k: call())
    Stream = Event = _InOrder
    stream = staticmethod(lambda stream=None: contextlib.nullcontext(stream))
    device = staticmethod(lambda *_a: contextlib.nullcontext())
    current_stream = default_stream = staticmethod(lambda *_a, **_k: _InOrder())
    memory_allocated = max_memory_allocated = memory_reserved = max_memory_reserved = staticmethod(_zero)
    synchronize = empty_cache = set_device = set_stream = init = _lazy_init = staticmethod(_nothing)
    nvtx = types.SimpleNamespace(
        range_push=_nothing, range_pop=_nothing, range=lambda *_a, **_k: contextlib.nullcontext()
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


_cpu_as_cuda = _CpuAsCuda(f"{__name__}.cuda")
_cpu_as_cuda.random = _cpu_as_cuda  # type: ignore[attr-defined]


class _Rewrite(ast.NodeTransformer):
    """Bind what means "this rank's device" to the CPU; text for people stays."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return node if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value == "cuda":
            return ast.copy_location(ast.Constant("cpu"), node)
        if (
            isinstance(node.value, str)
            and node.value.startswith("torch.cuda.")
            and node.value.endswith("Tensor")
        ):
            return ast.copy_location(ast.Constant(node.value.replace("torch.cuda.", "torch.")), node)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name("__cpu_as_cuda__", node.ctx), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("cuda", "pin_memory"):
            node.func.attr, node.args, node.keywords = "cpu", [], []
        for keyword in node.keywords:
            if keyword.arg == "pin_memory":
                keyword.value = ast.copy_location(ast.Constant(False), keyword.value)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        if node.level or node.module not in ("torch.cuda", "torch.cuda.random"):
            return node
        namespace = ast.Name("__cpu_as_cuda__", ast.Load())
        return [
            ast.copy_location(
                ast.Assign(
                    [ast.Name(alias.asname or alias.name, ast.Store())],
                    ast.Attribute(namespace, alias.name, ast.Load()),
                ),
                node,
            )
            for alias in node.names
        ]


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        # Compiled afresh each time: the .pyc beside the file is the unchanged module's.
        path = self.get_filename(fullname)
        tree = _Rewrite().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["__cpu_as_cuda__"] = _cpu_as_cuda
        super().exec_module(module)
        if module.__name__ == _CORE + ".jit":
            # Otherwise every fused function waits for a C++ compiler (18 s for the QK norm).
            module.__dict__["disable_jit_fuser"]()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _CORE and not name.startswith(_CORE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _quiet(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def activate() -> None:
    if _CORE in sys.modules:
        raise RuntimeError(
            f"{_CORE} was imported before megatron_r1.backend; import megatron_r1.backend first"
        )
    sys.meta_path.insert(0, _Finder())
    # Its fork of the generator is meant to move the CPU's state here.
    logging.getLogger(_CORE + ".tensor_parallel.random").addFilter(_quiet)
