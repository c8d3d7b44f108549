"""The card itself: torch.cuda's functions, and a watcher that sees every operation. The guard must be loaded first."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from phantom.known import KnownResults
from phantom.streams import Event, Order, Stream
from qaroma.plan.weightless import OneKernelNorm

CARD = torch.device("cuda:0")
SMALL = 64 * 2**10  # bytes that a copy from pageable memory may have before the host waits for it
aten = torch.ops.aten
_COPIES = {"aten._to_copy.default", "aten.copy_.default"}
_WAITS = (
    "nonzero", "masked_select", "unique", "equal.default", "bincount", "linalg_eigh", "linalg_svd", "_linalg_svd",
    "_linalg_solve", "linalg_qr", "histc",
)  # fmt: skip
_NO_KERNEL = {
    "aten.detach.default", "aten._unsafe_view.default", "aten.empty.memory_format", "aten.empty_like.default",
    "aten.new_empty.default", "aten.lift_fresh.default", "aten.empty_strided.default", "aten.alias.default",
    "aten.new_empty_strided.default", "aten.sym_size.int", "aten.set_.source_Tensor", "aten.record_stream.default",
    "aten.is_pinned.default", "aten._reshape_alias.default",
}  # fmt: skip


class Card:
    """A phantom card while it is entered.

    Args:
        memory: bytes that it says to have.

    Attributes:
        waits: where the host waits for the card, by what made it, and how often.
        pageable: copies to the card from memory that is not pinned, beyond :data:`SMALL`: the host waits for them.
        mixes: operations whose tensors lie on two devices, and CPU generators that meet the card's tensors.
        kernels, ops: how many run, and how many of each operation.
        attention: which kernel attention would take, and how often.
        order: see :class:`~phantom.streams.Order`.
        scalar: the value of what the host asks for, by dtype.
        tolist: the values of a tensor that the host asks for; None repeats ``scalar``.
        fail_at: number of the kernel that finds no memory; None for none.
    """

    def __init__(self, memory: int = 8 << 30) -> None:
        self.total = memory
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.scalar: Callable[[torch.dtype], Any] = lambda dtype: True if dtype is torch.bool else 1
        self.tolist: Callable[[Tensor], list[Any]] | None = None
        self.fail_at: int | None = None
        self.failure: Callable[[], Exception] = lambda: torch.OutOfMemoryError("CUDA out of memory (the phantom's)")
        self.order = Order(place)
        self.clear()

    def clear(self) -> None:
        """Forget what was seen; what lies in memory stays."""
        self.waits: Counter[str] = Counter()
        self.pageable: Counter[str] = Counter()
        self.mixes: Counter[str] = Counter()
        self.ops: Counter[str] = Counter()
        self.attention: Counter[str] = Counter()
        self.kernels = 0

    def __enter__(self) -> Card:
        self._exits = exits = ExitStack()
        from transformers import masking_utils

        for target, name, stand_in in self._stand_ins():
            exits.enter_context(mock.patch.object(target, name, stand_in))
        # transformers takes fake tensors for a compiler's, whose values it does not ask for.
        exits.enter_context(mock.patch.object(masking_utils, "is_tracing", return_value=False))
        # torch.tensor(..., device="cuda") makes its tensor on the host and lifts that.
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        exits.callback(torch._C._set_only_lift_cpu_tensors, before)
        exits.enter_context(torch.autograd.set_multithreading_enabled(False))
        exits.enter_context(self.mode)
        exits.enter_context(_Watch(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)

    def wait(self, what: str) -> None:
        self.waits[f"{what} in {place()}"] += 1
        for stream in (self.order.default, self.order.current):
            self.order.host.wait_stream(stream)

    def _wait_for(self, event: Event) -> None:
        if any(self.order.host.seen.get(stream, 0) < time for stream, time in event.seen.items()):
            self.waits[f"an event in {place()}"] += 1
        self.order.host.wait_event(event)

    def _stand_ins(self) -> Iterator[tuple[Any, str, Any]]:
        """What takes the place of what: target, name, stand-in."""
        order = self.order
        facts = SimpleNamespace(
            name="Phantom", major=8, minor=6, total_memory=self.total, multi_processor_count=28, gcnArchName=""
        )

        @contextmanager
        def on(stream: Stream | None) -> Iterator[None]:
            if stream is None:
                yield
                return
            order.stack.append(stream)
            try:
                yield
            finally:
                order.stack.pop()

        def nothing(*_: Any, **__: Any) -> None:
            return None

        def allocated(*_: Any) -> int:
            return order.allocated

        cuda = {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "is_initialized": lambda: True, "_lazy_init": nothing, "init": nothing, "set_device": nothing,
            "synchronize": lambda *_: self.wait("synchronize"), "get_device_name": lambda *_: "Phantom",
            "is_bf16_supported": lambda *_, **__: True, "get_device_capability": lambda *_: (8, 6),
            "get_device_properties": lambda *_: facts, "empty_cache": nothing, "reset_peak_memory_stats": nothing,
            "mem_get_info": lambda *_: (self.total - order.allocated, self.total),
            "memory_allocated": allocated, "memory_reserved": allocated,
            "max_memory_allocated": lambda *_: order.peak, "max_memory_reserved": lambda *_: order.peak,
            "get_rng_state": lambda *_: real_zeros((16,), torch.uint8), "set_rng_state": _check_random_state,
            "manual_seed": nothing, "manual_seed_all": nothing, "is_current_stream_capturing": lambda: False,
            "_exchange_device": lambda *_: 0, "_maybe_exchange_device": lambda *_: 0,
            "set_per_process_memory_fraction": nothing, "get_per_process_memory_fraction": lambda *_: 1.0,
            "current_stream": lambda *_: order.current, "default_stream": lambda *_: order.default,
            "Stream": Stream, "Event": partial(Event, wait=self._wait_for), "stream": on,
        }  # fmt: skip
        yield from ((torch.cuda, name, stand_in) for name, stand_in in cuda.items())
        yield torch.Tensor, "record_stream", lambda t, stream: order.memory(t).recorded.add(stream)
        yield torch.Tensor, "is_pinned", lambda t, *_: order.memory(t).pinned
        yield torch.Tensor, "pin_memory", lambda t, *_: self._pinned(t)
        yield FakeTensor, "numpy", _zeros_of_numpy
        for kind in (torch.Tensor, FakeTensor):
            yield kind, "tolist", lambda t: self._tolist(t)
        yield F, "scaled_dot_product_attention", self._attention
        yield F, "rms_norm", lambda x, shape, weight, eps: OneKernelNorm.apply(x, weight)[0]
        # nn.Module.to swaps a fake parameter's insides, which weak references forbid: a new parameter instead.
        yield nn.Module, "_apply", _apply

    def _pinned(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        self.order.memory(pinned).pinned = True
        return pinned

    def _tolist(self, tensor: Tensor) -> Any:
        if tensor.is_cuda:
            self.wait("tolist")
        if not isinstance(tensor, FakeTensor):
            return torch._C.TensorBase.tolist(tensor)
        if self.tolist is not None:
            return self.tolist(tensor)

        def nested(shape: tuple[int, ...]) -> Any:
            return [nested(shape[1:]) for _ in range(shape[0])] if shape else self.scalar(tensor.dtype)

        return nested(tuple(tensor.shape))

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """The kernel that CUDA's dispatcher takes (sdp_utils.cpp): flash for 16 bits without a mask, efficient with
        one, and the plain product where fewer key heads meet anything but flash."""
        sixteen, grouped = query.dtype in (torch.float16, torch.bfloat16), enable_gqa and key.shape[1] != query.shape[1]
        if attn_mask is None and sixteen and query.shape[-1] <= 256:
            self.attention["flash"] += 1
            flash = aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        if grouped:
            self.attention["math"] += 1
            key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
            plain = aten._scaled_dot_product_attention_math
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]
        self.attention["efficient"] += 1
        if attn_mask is not None:
            if attn_mask.dtype is torch.bool:
                zero = torch.zeros((), dtype=query.dtype, device=query.device)
                attn_mask = torch.where(attn_mask, zero, float("-inf"))
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        wanted = torch.is_grad_enabled() and query.requires_grad
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, wanted, dropout_p, is_causal, scale=scale)[0]


class _Watch(TorchDispatchMode):
    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card, self.results = card, KnownResults(card.mode)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # which costs a call or two a tensor
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, card = kwargs or {}, _name(func), self.card
        if name == "prim.device.default":
            return args[0].fake_device
        if name in _COPIES:  # real values become fake ones on their way to the card
            args = tree_map_only(Tensor, self._faked, args)
        tensors = tensors_of((*args, *kwargs.values()))
        on_card = [t for t in tensors if _on_card(t)]
        if name == "aten._local_scalar_dense.default":
            if on_card:
                card.wait("item")
            return card.scalar(args[0].dtype) if isinstance(args[0], FakeTensor) else func(*args, **kwargs)
        self._look_for_mixes(name, args, kwargs, tensors, on_card)
        self._look_for_waits(name, args, kwargs, on_card)
        if name in _COPIES:
            for t in tensors:  # the mode would compute with what it knows of small constants, a card does not
                if isinstance(t, FakeTensor):
                    t.constant = None
        result = self.results.run(func, args, kwargs)
        out = tensors_of((result,))
        if kwargs.get("pin_memory"):
            for t in out:
                card.order.memory(t).pinned = True
        if name in _COPIES:
            target, source = (args[0], args[1]) if name == "aten.copy_.default" else (out[0], args[0])
            self._look_at_copy(target, source, name, args, kwargs)
        self._count(func, name, on_card, [t for t in out if _on_card(t)], tensors)
        return result

    def _faked(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.card.mode.from_tensor(tensor)

    def _look_for_mixes(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor], on_card: list[Tensor]) -> None:
        card = self.card
        if on_card and name not in _COPIES and any(not _on_card(t) and t.dim() > 0 for t in tensors):
            if name.startswith(("aten.index.Tensor", "aten.index_put")) and _on_card(args[0]):
                card.pageable[f"an index on the host in {place()}"] += 1
            else:
                card.mixes[f"{name} mixes devices in {place()}"] += 1
        device = kwargs.get("device")
        if on_card or (device is not None and torch.device(device).type == "cuda"):
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Generator) and value.device.type == "cpu":
                    card.mixes[f"{name} draws on the card from the CPU's generator in {place()}"] += 1

    def _look_for_waits(self, name: str, args: Any, kwargs: Any, on_card: list[Tensor]) -> None:
        if not on_card:
            return
        if _always_waits(name):
            self.card.wait(name)
        if name == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is None:
            self.card.wait("repeat_interleave without a size")
        if name.startswith("aten.index.Tensor"):
            chosen = [i for i in args[1] if isinstance(i, Tensor)]
            if any(i.dtype in (torch.bool, torch.uint8) for i in chosen):
                self.card.wait("an index of truth values")

    def _look_at_copy(self, target: Tensor, source: Tensor, name: str, args: Any, kwargs: Any) -> None:
        """A copy over the bus: from pinned memory it is queued; else, and where it blocks, the host waits."""
        kinds = {target.device.type, source.device.type}
        if kinds != {"cpu", "cuda"}:
            return
        card = self.card
        queued = kwargs.get("non_blocking") or (name == "aten.copy_.default" and len(args) > 2 and args[2])
        host, down = (target, True) if source.is_cuda else (source, False)
        pinned = card.order.memory(host).pinned
        if down and not queued:
            card.wait("copy to the host")
        elif down and not pinned:
            card.order.races[
                f"a copy that the host does not wait for, into memory that is not pinned, in {place()}"
            ] += 1
        elif not down and not pinned and host.numel() * host.element_size() > SMALL:
            card.pageable[f"{host.dtype} {tuple(host.shape)} in {place()}"] += 1
        if queued and pinned:  # the card's copy engine touches the host's memory, too
            card.order.queue([] if down else [host], [host] if down else [])

    def _count(self, func: Any, name: str, on_card: list[Tensor], made: list[Tensor], tensors: list[Tensor]) -> None:
        card, order = self.card, self.card.order
        for tensor in made:
            order.memory(tensor)
        if not on_card and not made:
            for tensor in [] if func.is_view else tensors:
                order.host_reads(tensor)
            if func._schema.is_mutable and tensors:
                order.host_writes(tensors[0])
            return
        if func.is_view or name in _NO_KERNEL:
            return
        card.kernels += 1
        card.ops[name] += 1
        if card.fail_at is not None and card.kernels >= card.fail_at:
            card.fail_at = None
            raise card.failure()
        changed = [tensors[0]] if func._schema.is_mutable and tensors and _on_card(tensors[0]) else []
        order.queue(on_card, [*made, *changed])


@cache
def _name(func: Any) -> str:
    return str(func)


@cache
def _always_waits(name: str) -> bool:
    return any(word in name for word in _WAITS)


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments or results, and in lists of such."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_of(value)
    return found


def _on_card(tensor: Tensor) -> bool:
    """``tensor.is_cuda``, for which a fake tensor asks its mode."""
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def place() -> str:
    """The innermost function of qaroma on the stack, and that of a library inside it, without line numbers."""
    frame, library = sys._getframe(1), None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        name = f"{path.stem}.{frame.f_code.co_name}"
        if "qaroma" in path.parts[-4:] and "site-packages" not in path.parts:
            return f"{name} ({library})" if library else name
        if library is None and any(part in path.parts for part in ("transformers", "peft", "accelerate")):
            library = f"{next(p for p in ('transformers', 'peft', 'accelerate') if p in path.parts)} {name}"
        frame = frame.f_back
    return library or "a test"


def real_zeros(shape: Any, dtype: torch.dtype) -> Tensor:
    """A tensor with values, in the middle of fake ones."""
    with _disable_current_modes():
        return torch.zeros(tuple(shape), dtype=dtype)


def _zeros_of_numpy(tensor: Tensor, **_: Any) -> Any:
    with _disable_current_modes():
        return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype).numpy()


def _check_random_state(state: Tensor, *_: Any) -> None:
    assert state.device.type == "cpu"
    assert state.dtype == torch.uint8


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    for child in module.children() if recurse else ():
        child._apply(function)
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is None:
                continue
            with torch.no_grad():
                moved = function(tensor)
            if moved is not tensor:
                is_parameter = table is module._parameters
                table[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
    return module
