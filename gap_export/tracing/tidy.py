"""A graph without what a converter leaves behind.

    f(x), f a helper          -> the nodes of f
    op(constants)             -> a constant of at most 65,536 values
    Identity(x)               -> x
    a = op(x), b = op(x)      -> a = op(x), and a for b
    Constant                  -> initializer
    what nothing reads        -> nothing

Parameters have no values yet, so nothing is computed from them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes import PassManager, common
from onnxscript.optimizer import _constant_folding

from gap_export.tracing.graph import Traced


def tidy(traced: Traced, *, is_folded: bool = False) -> Traced:
    """Leave only nodes that compute something which is used.

    Args:
        traced: A graph, which is changed.
        is_folded: Whether it is made of graphs that were tidied, with no constants between them.
    """
    if not is_folded:
        with quiet():
            _Folding(
                shape_inference=True,
                input_size_limit=1024,
                output_size_limit=65536,
                should_fold=_decide_nothing,
            )(traced.model)
    passes = PassManager(
        [
            common.InlinePass(),
            common.IdentityEliminationPass(),
            common.CommonSubexpressionEliminationPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            common.RemoveUnusedOpsetsPass(),
            # A constant output (all patches kept) needs a node that gives it.
            common.OutputFixPass(),
        ]
    )
    passes(traced.model)
    return traced


class _Folding(_constant_folding.FoldConstantsPass):
    """The library's pass, which would infer what the converter has said already."""

    def _do_inference(self, node: ir.Node) -> None:
        if not all(_is_known(value) for value in node.outputs):
            super()._do_inference(node)


def _is_known(value: ir.Value) -> bool:
    return value.type is not None and value.shape is not None and value.shape.is_static()


def _decide_nothing(node: ir.Node) -> None:
    """Leave what is folded to the library."""
    del node


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress text and warnings off the user's screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
