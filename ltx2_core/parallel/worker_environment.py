"""What a worker's environment has beyond its parent's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_ALWAYS = {
    # without these the transports listen on the address that the host's name resolves to
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    # a thread of NCCL that answers whoever asks for its state
    "NCCL_RAS_ENABLE": "0",
    # multicast objects fail, or disturb the host, where the driver reports them and the machine does not permit them
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    # a failed collective is an error of the process, not a wait without end
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    # the host's choice (ComfyUI: cudaMallocAsync) gives memory that other processes cannot open; both names are read
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
    "PYTORCH_ALLOC_CONF": "expandable_segments:False",
}


def worker_environment(
    parent: Mapping[str, str], additions: Mapping[str, str], rank: int, size: int, folder: Path
) -> dict[str, str]:
    """The parent's variables, those of every worker, the group's ``additions``, and this rank's own, the later ones win."""
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        # libraries put sockets and compiled code there
        "TMPDIR": str(folder),
    }
    return {**parent, **_ALWAYS, **additions, **own}
