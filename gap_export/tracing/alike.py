"""Which layers of a stack are alike: proved by what each of them does, not by what is said of it.

The whole module is run once on tensors of the device "meta", which have no values and cost least,
and every operator is written down with all that it reads: constants, the layer's own parameters,
what comes in as arguments, what was computed before the stack. Two layers are alike where these
records are the same but for the layer's number. So an attribute, a size, one more operator or
another mask makes a layer of its own, whoever built it and for whatever reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

Reference: TypeAlias = tuple[Any, ...]
"""Where a tensor comes from: its kind, and which of them it is."""
_INPUT: Final = "input"
_PARAMETER: Final = "parameter"
_BUFFER: Final = "buffer"
_VALUE: Final = "value"
_META: Final = torch.device("meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class Joints:
    """How one layer is joined to the rest of the module.

    `hidden` is the leaf of its arguments that comes from the layer before. `inputs` are the
    inputs of the graph that no other layer reads, in the order of the arguments. `like` says for
    each leaf of its `result` which leaf of the arguments has its shape and dtype, `outputs` which
    output of the graph it is (None: what comes behind the layer reads it). `is_chained`: only the
    next layer does.
    """

    number: int
    hidden: int
    inputs: tuple[int, ...]
    like: tuple[int, ...]
    outputs: tuple[int | None, ...]
    result: TreeSpec
    is_chained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A layer, and the earlier one that it is like."""

    layer: Joints
    source: Joints


def find_copies(module: nn.Module, stack: str, arguments: Sequence[Any]) -> dict[int, Copy]:
    """The layers of a stack that are proved to be like an earlier one, by number.

    Neither is the first layer a source, as what it reads comes from outside, nor a layer that is
    looked into from outside.

    Args:
        module: Whole; its parameters are tensors without values.
        stack: Path of its list of layers.
        arguments: Of the module, without values as well.
    """
    with unset_fake_temporarily():
        held = dict(module.named_parameters()) | dict(module.named_buffers())
        empty = {name: _empty(each) for name, each in held.items() if isinstance(each, FakeTensor)}
        inputs = tree_map_only(Tensor, _empty, tuple(arguments))
        record = _Record(module, stack, inputs, empty)
        with torch.no_grad(), record:
            given = functional_call(module, empty, inputs)
        record.close(given)
    sources: dict[Any, Joints] = {}
    copies: dict[int, Copy] = {}
    for number in sorted(record.calls)[1:]:
        found = record.describe(number)
        if found is None:
            continue
        lines, layer = found
        source = sources.setdefault(lines, layer)
        if source is not layer:
            copies[number] = Copy(layer=layer, source=source)
    return copies


@dataclass(slots=True, kw_only=True)
class _Call:
    """One run of a layer: operators `first` to `last` (exclusive) are its own."""

    first: int
    last: int
    arguments: list[Any]
    results: list[Any]
    result: TreeSpec

    def holds(self, reference: Reference | None) -> bool:
        """Whether a value was made in this run."""
        if reference is None or reference[0] != _VALUE:
            return False
        made: int = reference[1]
        return self.first <= made < self.last


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operator:
    """One operator: its name and constants, and where the tensors that it reads come from."""

    name: str
    form: Any
    reads: tuple[Reference, ...]
    writes: tuple[Reference, ...]
    gives: tuple[Any, ...]


class _Record(TorchDispatchMode):
    """Writes down all operators of a run, and which of them run in which layer."""

    def __init__(
        self,
        module: nn.Module,
        stack: str,
        arguments: Sequence[Any],
        empty: Mapping[str, Tensor],
    ) -> None:
        """Watch the layers of a module that is about to be run.

        `empty` are the tensors that stand for its own.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = stack
        self.operators: list[_Operator] = []
        self.calls: dict[int, _Call] = {}
        self.open: set[int] = set()
        """Layers that run several times, or one in another, or are told arguments by name.

        Nothing is said of them.
        """
        self._now: int | None = None
        self._begin: int | None = None
        self._references: dict[int, Reference] = {}
        # What operators give follows from kinds of tensors; finding it costs most of a run.
        self._known: dict[Any, tuple[list[Any], TreeSpec]] = {}
        # As long as a tensor lives, its identity is not given to another.
        self._alive: list[Any] = []
        for k, leaf in enumerate(tree_leaves(list(arguments))):
            self._know(leaf, (_INPUT, k))
        parameters = {name for name, _ in module.named_parameters()}
        for name, each in empty.items():
            shape, dtype = tuple(each.shape), each.dtype
            is_parameter = name in parameters
            self._know(each, (_PARAMETER, name, shape, dtype) if is_parameter else (_BUFFER, name))
        layers: Any = module.get_submodule(stack)
        self._hooks = [
            hook
            for k, layer in enumerate(layers)
            for hook in (
                layer.register_forward_pre_hook(self._enter(k), with_kwargs=True),
                layer.register_forward_hook(self._leave(k)),
            )
        ]

    def close(self, given: Any) -> None:
        """Stop watching; `given` is what the module gave."""
        for hook in self._hooks:
            hook.remove()
        self._given = [self._refer(leaf) for leaf in tree_leaves(given)]
        scopes: list[int | None] = [None] * len(self.operators)
        for number, call in self.calls.items():
            scopes[call.first : call.last] = [number] * (call.last - call.first)
        self._scopes = scopes
        self._readers: dict[Reference, set[int | None]] = {}
        for scope, operator in zip(scopes, self.operators, strict=True):
            for reference in operator.reads:
                self._readers.setdefault(reference, set()).add(scope)
        self._held: dict[int | None, list[Reference]] = {}
        for reference in dict.fromkeys([*self._readers, *self._given]):
            self._held.setdefault(self._find_layer(reference), []).append(reference)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and write it down."""
        del types
        kwargs = kwargs or {}
        leaves, form = tree_flatten((args, kwargs))
        reads = [self._refer(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        constants = tuple(None if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        writes = self._written(func, args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = func, str(form), constants, tuple(map(_describe, tensors))
        if key in self._known and not writes:
            kinds, given_form = self._known[key]
            given = tree_unflatten([_make(each) for each in kinds], given_form)
        else:
            leaves = [_empty(leaf) if _has_values(leaf) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(leaves, form)
            if any(each.name == "device" for each in func._schema.arguments):  # noqa: SLF001
                kwargs["device"] = _META
            given = func(*args, **kwargs)
            found, given_form = tree_flatten(given)
            self._known[key] = [_describe(each) for each in found], given_form
        results = tree_leaves(given)
        for k, result in enumerate(results):
            self._know(result, (_VALUE, len(self.operators), k))
        self.operators.append(
            _Operator(
                name=str(func),
                form=(constants, key[1]),
                reads=tuple(reads),
                writes=writes,
                gives=tuple(
                    (tuple(each.shape), each.dtype) if isinstance(each, Tensor) else repr(each)
                    for each in results
                ),
            )
        )
        return given

    def describe(self, number: int) -> tuple[Any, Joints] | None:
        """What a layer does, said without its number, and how it is joined to the rest.

        None where it cannot be taken out of the whole: where it reads or writes what is neither
        its own, nor an argument, nor from before the stack, or where others look into it.
        """
        call = self.calls[number]
        if number in self.open or self._is_looked_into(number):
            return None
        arguments = [self._refer(each) if _is_tensor(each) else None for each in call.arguments]
        results = [self._refer(each) if _is_tensor(each) else None for each in call.results]
        lines, used = [], dict[int, Reference]()
        for operator in self.operators[call.first : call.last]:
            reads = [self._relate(each, number, arguments, used) for each in operator.reads]
            if None in reads or not all(call.holds(each) for each in operator.writes):
                return None
            lines.append((operator.name, operator.form, tuple(reads), operator.gives))
        hidden = [place for place, each in used.items() if each[0] == _VALUE]
        own = sorted(place for place, each in used.items() if each[0] == _INPUT)
        outputs = [self._given.index(each) if each in self._given else None for each in results]
        like = [_find_like(each, call.arguments, (*hidden, *own)) for each in call.results]
        if not all(call.holds(each) for each in results) or None in like:
            return None
        if len(hidden) != 1 or outputs.count(None) != 1:
            return None
        readers = self._readers.get(results[outputs.index(None)], set())  # type: ignore[arg-type]
        layer = Joints(
            number=number,
            hidden=hidden[0],
            inputs=tuple(used[place][1] for place in own),
            like=tuple(each for each in like if each is not None),
            outputs=tuple(outputs),
            result=call.result,
            is_chained=readers == {number + 1},
        )
        # All that a copy takes over from its source, so that either stands for both.
        places = [each and (each[1] - call.first, each[2]) for each in results]
        joints = (hidden[0], *own), layer.like, str(call.result), tuple(map(_is_none, outputs))
        return (tuple(lines), tuple(places), joints), layer

    def _relate(
        self,
        reference: Reference,
        number: int,
        arguments: list[Reference | None],
        used: dict[int, Reference],
    ) -> Reference | None:
        """What a layer reads, said without its number; None where that cannot be.

        Arguments that may differ from layer to layer are put into `used`, by their place.
        """
        kind, call = reference[0], self.calls[number]
        own = f"{self.stack}.{number}."
        if kind == _PARAMETER and reference[1].startswith(own):
            return "own", reference[1].removeprefix(own), *reference[2:]
        if call.holds(reference):
            return "inside", reference[1] - call.first, reference[2]
        assert self._begin is not None
        is_chained = kind == _VALUE and reference[1] >= self._begin
        if not is_chained and not (kind == _INPUT and self._readers[reference] == {number}):
            return reference
        if reference not in arguments:
            return None
        place = arguments.index(reference)
        used[place] = reference
        return "argument", place

    def _is_looked_into(self, number: int) -> bool:
        """Whether others read a layer's parameters, or a value inside that it does not give."""
        results = {self._refer(each) for each in self.calls[number].results if _is_tensor(each)}
        return any(
            each not in results and (each in self._given or self._readers[each] != {number})
            for each in self._held.get(number, ())
        )

    def _find_layer(self, reference: Reference) -> int | None:
        """The layer that a value was made in, or that a parameter or buffer is of."""
        if reference[0] == _VALUE:
            return self._scopes[reference[1]]
        if reference[0] in {_PARAMETER, _BUFFER} and reference[1].startswith(f"{self.stack}."):
            return int(reference[1].removeprefix(f"{self.stack}.").partition(".")[0])
        return None

    def _enter(self, number: int) -> Any:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            if number in self.calls or self._now is not None:
                self.open |= {number} | ({self._now} - {None})  # type: ignore[operator]
            self._now = number
            first = len(self.operators)
            self._begin = first if self._begin is None else self._begin
            if kwargs:
                self.open.add(number)
            arguments, form = tree_flatten(args)
            self._alive.append(arguments)
            self.calls[number] = _Call(
                first=first, last=first, arguments=arguments, results=[], result=form
            )

        return enter

    def _leave(self, number: int) -> Any:
        def leave(_: nn.Module, args: Any, given: Any) -> None:
            del args
            call = self.calls[number]
            call.results, call.result = tree_flatten(given)
            call.last = len(self.operators)
            self._now = None

        return leave

    def _know(self, tensor: Any, reference: Reference) -> None:
        if isinstance(tensor, Tensor):
            self._alive.append(tensor)
            self._references[id(tensor)] = reference

    def _refer(self, tensor: Any) -> Reference:
        """Where a tensor comes from; of a constant its values."""
        found = self._references.get(id(tensor))
        if found is None:
            assert _has_values(tensor), "made where nobody was looking"
            found = ("constant", tuple(tensor.shape), tensor.dtype, _hash(tensor))
            self._know(tensor, found)
        return found

    def _written(self, func: Any, args: Any, kwargs: Any) -> tuple[Reference, ...]:
        """The tensors that an operator changes in place."""
        places = [each for each in func._schema.arguments if each.is_write]  # noqa: SLF001
        if not places:
            return ()
        names = [each.name for each in func._schema.arguments]  # noqa: SLF001
        named = dict(zip(names, args, strict=False)) | kwargs
        touched = [named.get(each.name) for each in places]
        return tuple(self._refer(leaf) for leaf in tree_leaves(touched) if _is_tensor(leaf))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _has_values(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta


@dataclass(frozen=True, slots=True)
class _Kind:
    """All of a tensor without values but its identity."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def _describe(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Kind(tuple(value.shape), value.stride(), value.dtype)


def _make(kind: Any) -> Any:
    if not isinstance(kind, _Kind):
        return kind
    return torch.empty_strided(kind.shape, kind.strides, dtype=kind.dtype, device=_META)


def _empty(tensor: Tensor) -> Tensor:
    """A tensor's likeness without values."""
    return _make(_describe(tensor))  # type: ignore[no-any-return]


def _is_none(value: Any) -> bool:
    return value is None


def _hash(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def _find_like(result: Any, arguments: Sequence[Any], given: Sequence[int]) -> int | None:
    """The first of the given arguments with the shape and dtype of a result."""
    for place in given:
        known = arguments[place]
        if known.shape == result.shape and known.dtype == result.dtype:
            return place
    return None
