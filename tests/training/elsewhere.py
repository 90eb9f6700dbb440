"""A device that computes on the CPU and mixes with it as little as a GPU does: what is not moved there fails by name.

Its tensors hold one of the CPU each and say that they lie elsewhere, so that values, shapes and gradients are real. It
takes up the place that PyTorch has for one more backend, in a process of its own:

    python -m tests.training.elsewhere       # fits every method on it, and compares the logits with those of the CPU
    python -m tests.training.elsewhere trd   # some methods

CUDA has other rules than the CPU for what autocast narrows, and PyTorch knows them without a GPU: methods with epochs
go forward on tensors without values under these too. What is left (determinism, speed) shows on a GPU alone.
"""

import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from fieldmark.devices import set_up_torch
from fieldmark.params import Block
from tests.training.cache import ALL, ENCODER, Plan, write_cache, write_moments, write_other
from tests.training.methods.test_universal import LINKED, LOOPED, METHODS, WHOLE, lend
from training.data import Cache, read_cache
from training.data.nodes import Nodes
from training.loop import predict, total_loss
from training.methods import also_reads_of, load_method, single_points

# As on CUDA, positions may lie on the CPU, and these move what they are given.
MIXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::copy_"}


ROOT = Path(__file__).parents[2]
# Settings that have parts of their own beside those of WHOLE.
WITH_PROBE = {"with_probe": {"method": "ridge", "settings": {"features": ["pooled", "isqrt"]}}}
VARIED: dict[str, list[dict[str, Any]]] = {
    "attention_pool": [{}, WITH_PROBE, {"nodes": "tokens"}],
    "concept_graph": [
        WHOLE["concept_graph"],
        {"graph": "gat", "description": True},
        {"graph": "sage", "texts": 0},
        {"nodes": "tokens", "texts": 0, **WITH_PROBE},
    ],
    "concept_bottleneck": [{}, {"nec": 2}],
    "latex_gcl": [
        {"sources": "all"},
        {"augment": "words", "features": ["descriptions"], "words": ["asked/guess/reasons"], "beside": True},
    ],
    "linear_probe": [{}, {"features": ["inherited/near"]}],
    "balanced_probe": [{}, {"balance": "weights"}],
    "smote": [{}, {"balance": 2.0}, {"balance": 2.0, "features": ["descriptions"], "texts": "asked/guess/reasons"}],
    "la_tag": [{}, {"balance": 2.0}],
    "gaga": [{}, {"annotations": "descriptions"}],
    "link_gnn": [{}, {"conv": "gat"}, {"conv": "gcn", "fanout": 2, "sources": "all", **WITH_PROBE}],
    "sgc": [{}, {"sources": "all", "features": ["pooled"]}],
    "label_propagation": [{}, {"sources": "all"}],
    "correct_smooth": [{}, {"sources": "all", **WITH_PROBE}],
    "pmrc": [{}, {"regions": "maps", "loss_weights": {"reverse": 0.1}}],
    "relational_proxies": [
        {"boxes": True},
        {"faults": ("scrambled_crops", "untrained_proxies", "crop_positions", "shared_batch_norm", "constant_rate")},
    ],
    "tape": [
        {},
        {"conv": None, "texts": "both"},
        {"conv": "gat", "guesses": "asked/guess/guesses", "explanation": ["asked/guess/reasons"], **WITH_PROBE},
    ],
    "transfg": [{}, {"select": "attention"}],
}


class Backend(_DummyBackendModule):  # type: ignore[misc]
    """What PyTorch asks of the module of a device."""

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        """Its random numbers are drawn by the generator of the CPU."""


class Elsewhere(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=ELSEWHERE,
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()


class ElsewhereMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on what its tensors hold. Raises RuntimeError where some lie elsewhere and others do not."""
    name, asked = func.overloadpacket._qualified_op_name, kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    stray = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]
    if there and stray and name not in MIXING:
        raise RuntimeError(f"{name} of tensors on two devices; on the CPU are those of shapes {stray}")
    if name == "aten::copy_":
        there = isinstance(args[0], Elsewhere)
    elif asked is not None:
        there = torch.device(asked).type == ELSEWHERE.type
    held = tree_map(lambda leaf: leaf.inner if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
    found = func(*held[0], **held[1] | ({"device": torch.device("cpu")} if asked is not None else {}))
    if not there:
        return found
    found = tree_map(lambda leaf: Elsewhere(leaf) if isinstance(leaf, Tensor) else leaf, found)
    # In place and for views, what comes back is what was given, or shares its memory.
    return found if asked is not None else return_and_correct_aliasing(func, args, kwargs, found)


def compare(method: str, knobs: dict[str, Any], cache: Cache) -> None:
    """Fit on the CPU and elsewhere; raise where the latter mixes devices or says something else."""
    module = load_method(method)
    quick = {"epochs": 1, "batch_size": 32, "hidden": 32, "precision": "fp32", "max_iterations": 20, "start_l2": 1.0}
    known = {name: value for name, value in quick.items() if name in module.Settings.model_fields}
    settings = single_points(module.Settings(**knobs, **known))[0]
    # Its gradients are found in this thread: a thread of its own would not know the mode.
    with ElsewhereMode(), torch.autograd.set_multithreading_enabled(False):
        expected, found = (fit_and_predict(module, each, settings) for each in (cache, cache.on(ELSEWHERE)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def compare_far(method: str, knobs: dict[str, Any], cache: Cache) -> None:
    """The same where the parts do not fit there."""
    with mock.patch("training.data.part.room", return_value=0):
        compare(method, knobs, cache)
        with ElsewhereMode():
            assert cache.on(ELSEWHERE).part(Nodes).nodes.device.type == "cpu"


def fit_and_predict(module: Any, cache: Cache, settings: Block) -> Tensor:
    model = module.fit(cache, settings, 0).model
    left = [name for name, value in model.state_dict().items() if value.ndim and value.device != cache.device]
    assert not left, f"on the CPU stay {left}"
    return predict(model, cache, torch.arange(len(cache.paths))).cpu()


def narrow(method: str, knobs: dict[str, Any], cache: Cache) -> None:
    """Forward under CUDA's autocast, on tensors that have no values; raise where types or devices do not fit."""
    module: Any = load_method(method)
    settings = single_points(module.Settings(epochs=0, **knobs))[0]
    model, batch = module.fit(cache, settings, 0).model.train(), cache.batch(cache.images("train"))
    torch._C._ensureCUDADeviceGuardSet()  # which does nothing where there is no GPU
    with FakeTensorMode() as mode, cuda_autocast():

        def there(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: mode.from_tensor(value).detach().to("cuda") for name, value in values.items()}

        also = tuple(other.changed(**there(other.values)) for other in batch.also)
        moved = batch.changed(**there({**batch.values, "y": batch.y, "target": batch.target}), also=also)
        state = there(dict([*model.named_parameters(), *model.named_buffers()]))
        output = torch.func.functional_call(model, state, (moved,))
        total_loss(output, moved.target, dict.fromkeys(output.losses, 1.0))


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """torch.autocast("cuda", torch.bfloat16), which does nothing where there is no GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.clear_autocast_cache()


def main() -> None:
    set_up_torch()
    torch.set_num_threads(1)
    said: list[str] = []
    asked = set(sys.argv[1:] or METHODS)
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(views=2, rings=3, sentences=4, described="all", train=8, val=4, test=2)
        write_cache(Path(folder), plan)
        write_other(Path(folder), "other", 24)
        shutil.copy(Path(folder, f"embed/{ENCODER}/text.parquet"), Path(folder, "embed/other"))
        for name in ("pooled", "isqrt"):
            write_moments(Path(folder), "other", name, 24)
        # A forward without values last: it changes what PyTorch knows of CUDA.
        for check, methods in ((compare, METHODS), (compare_far, ["concept_graph"]), (narrow, LOOPED)):
            for method in sorted(asked.intersection(methods)):
                for knobs in VARIED.get(method, [{}, WHOLE[method]] if method in WHOLE else [{}]):
                    if check is narrow and ("with_probe" in knobs or method in LINKED):
                        continue  # training batches hold an offset; how much reaches a batch is known by values alone
                    beside = also_reads_of(method, load_method(method).Settings(**knobs))
                    reads, also = ALL | {"tokens"}, ["other"] if beside else []
                    cache = read_cache(folder, ENCODER, plan.buckets, reads, also, beside)
                    cache = lend(method, cache)
                    try:
                        check(method, knobs, cache)
                    except Exception as error:
                        said.append(f"{check.__name__}: {method} {knobs}: {describe(error)}")
    print("\n".join(said))
    raise SystemExit(len(said) > 0)


def describe(error: Exception) -> str:
    """The line of this project, this file apart, that an error came from, and the first line of its message."""
    ours = (frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(ROOT))
    place = ([None] + [frame for frame in ours if frame.filename != __file__])[-1]
    where = f"{place.filename}:{place.lineno}: {place.line}" if place else "here"
    return f"{where}: {str(error).partition(chr(10))[0]}"


_setup_privateuseone_for_python_backend("elsewhere", Backend())
ELSEWHERE = torch.device("elsewhere", 0)
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes one of the CPU first, and moves it
# Autocast has nothing to do there, and asks for a say in it.
autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
autocast.fallback(torch.library.fallthrough_kernel)

if __name__ == "__main__":
    main()
