"""Where the host reads what the device computes: on a GPU, each of these stops the host until the device has caught up."""

import traceback
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class HostReads(TorchDispatchMode):
    """Counts operations whose result, or its shape, the host must know before it can go on: `.item()`, `if tensor:`, `nonzero`,
    boolean masks.

    `found` maps the names of the innermost functions of this package or of Composer that asked, with the line, to a count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        masked = name in _INDEXED and any(isinstance(i, Tensor) and i.element_size() == 1 for i in args[1])
        if name in _READS or masked:
            frames = [f for f in traceback.extract_stack() if "/prx_composer/" in f.filename or "/composer/" in f.filename]
            self.found[f"{frames[-1].filename.split('/')[-1]}:{frames[-1].name}" if frames else name] += 1
        return func(*args, **(kwargs or {}))
