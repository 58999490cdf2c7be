"""An import hook that lets the real megatron-core run where CUDA does not exist.

megatron-core says 'cuda' and `torch.cuda` where it means "this rank's device". The hook is limited to
`megatron.core` and compiles its modules with those words bound to the CPU:

    'cuda'                       -> 'cpu'
    'torch.cuda.BFloat16Tensor'  -> 'torch.BFloat16Tensor'   (the optimizers compare type names)
    torch.cuda.NAME              -> a small namespace below
    x.cuda(...), x.pin_memory()  -> x.cpu()

torch itself, every other library and the sources on disk stay as they are. Rejected: patching
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
import marshal
import re
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import torch

_CORE = "megatron.core"
_RULES = Path(__file__).read_bytes()


def _nothing(*_: Any, **__: Any) -> None: ...
def _zero(*_: Any, **__: Any) -> int:
    return 0


class _InOrder:
    """A stream or an event: on the CPU work is already in order."""

    __init__ = __exit__ = wait_stream = wait_event = record = synchronize = wait = _nothing
    elapsed_time = _zero

    def __enter__(self, *_: Any) -> _InOrder:
        return self

    record_event = __enter__

    def query(self) -> bool:
        return True


class _CpuAsCuda(types.ModuleType):
    """The `torch.cuda` of megatron-core. Names not given here come from the real one."""

    current_device = staticmethod(lambda: torch.device("cpu"))
    device_count = staticmethod(lambda: 1)
    default_generators: ClassVar[Any] = defaultdict(lambda: torch.default_generator)
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
            node.value = "cpu"
        elif isinstance(node.value, str):
            node.value = re.sub(r"^torch\.cuda\.(?=.*Tensor$)", "torch.", node.value)
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
        assigned = [f"{alias.asname or alias.name} = __cpu_as_cuda__.{alias.name}" for alias in node.names]
        return [ast.increment_lineno(ast.parse(line), node.lineno - 1).body[0] for line in assigned]


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        """Compile the rewritten module, or read it from a .pyc of its own beside the unchanged module's.

        Compiling takes longer than all else of an import. The .pyc holds for the same bytes of the module and
        of this file, and for the same Python.
        """
        path = self.get_filename(fullname)
        source = self.get_data(path)
        cached = importlib.util.cache_from_source(path, optimization="megatronr1cpu")
        holds_for = b"".join(map(importlib.util.source_hash, (source, _RULES, sys.version.encode())))
        with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
            data = self.get_data(cached)
            if data.startswith(holds_for):
                code = marshal.loads(data[len(holds_for) :])
                if isinstance(code, types.CodeType):
                    return code
        tree = _Rewrite().visit(ast.parse(source, path))
        code = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)
        if not sys.dont_write_bytecode:
            # Whole or not at all, and not an error where the folder is read-only.
            self.set_data(cached, holds_for + marshal.dumps(code))
        return code

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


def activate() -> None:
    if _CORE in sys.modules:
        raise RuntimeError(
            f"{_CORE} was imported before megatron_r1.backend; import megatron_r1.backend first"
        )
    sys.meta_path.insert(0, _Finder())
    # Its fork of the generator is meant to move the CPU's state here.
    noise = "CPU RNG state changed"
    random = logging.getLogger(_CORE + ".tensor_parallel.random")
    random.addFilter(lambda record: noise not in record.getMessage())
