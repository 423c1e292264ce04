"""ComfyUI as the host: the only file of the pack that imports it, and only inside functions."""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ltx2_core.host import HostOutOfMemory, PreviewSpec, Resident, SavedFile, set_default_host
from ..ltx2_core.paths import (
    GGUF_KINDS,
    GGUF_SUFFIX,
    KIND_FOLDERS,
    MODEL_SUFFIXES,
    PathError,
    check_model_file,
    check_relative,
    check_text_encoder,
    find_files,
    find_inside,
    is_inside,
    text_encoder_names,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["ComfyHost", "NestedLatent", "install", "nested_latent", "split_nested"]


class ComfyProgress:
    """ComfyUI's progress bar of one node. Every call polls the interrupt, which ComfyUI itself does only when it draws.

    Create it in the node's thread: ComfyUI binds its progress hook and the node at construction.
    """

    def __init__(self, total: int, node_id: str | None) -> None:
        from comfy.utils import ProgressBar

        self._bar = ProgressBar(total, node_id=node_id)
        self._shown: tuple[int, int] | None = None

    def __enter__(self) -> ComfyProgress:
        self.to(0)
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def step(self, n: int = 1, picture: np.ndarray | None = None) -> None:
        self._report(self._bar.current + n, None, picture)

    def to(self, value: int, total: int | None = None) -> None:
        self._report(value, total, None)

    def _report(self, value: int, total: int | None, picture: np.ndarray | None) -> None:
        # ComfyUI sends every report of a full bar, and a loader reports the same full bar many times
        shown = value, self._bar.total if total is None else total
        if shown != self._shown:
            self._shown = shown
            self._bar.update_absolute(*shown, preview=None if picture is None else _preview(picture))
        _check_interrupt()


def _preview(picture: np.ndarray) -> tuple[str, Any, int]:
    """A picture as ComfyUI's progress takes it, enlarged to the size that it shows."""
    from comfy.cli_args import args
    from PIL import Image

    image = Image.fromarray(picture)
    scale = args.preview_size / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return "JPEG", image.resize(size, Image.Resampling.BILINEAR), args.preview_size


def _check_interrupt() -> None:
    from comfy.model_management import throw_exception_if_processing_interrupted

    throw_exception_if_processing_interrupted()


class ComfyHost:
    """The ``Host`` protocol on ComfyUI. One a process: it owns the entries in ComfyUI's list of loaded models."""

    name = "comfyui"
    log = logging.getLogger("ltx2")

    def __init__(self) -> None:
        self._patchers: dict[tuple[int, str], Any] = {}

    def progress(self, total: int, label: str, node_id: str | None = None) -> ComfyProgress:
        """A display of ``total`` steps. ComfyUI shows the node's title, so ``label`` has no place."""
        return ComfyProgress(total, node_id)

    def wants_preview(self, channels: int) -> PreviewSpec | None:
        """ComfyUI's colours of LTX-2 latents, unless the user switched previews off."""
        from comfy.latent_formats import LTXAV
        from comfy.model_management import get_torch_device
        from latent_preview import get_previewer

        latents = LTXAV()
        factors, bias = latents.latent_rgb_factors, latents.latent_rgb_factors_bias
        if len(factors) != channels or bias is None or get_previewer(get_torch_device(), latents) is None:
            return None
        return PreviewSpec(tuple(map(tuple, factors)), tuple(bias))

    def check_interrupt(self) -> None:
        """Raise ComfyUI's InterruptProcessingException (a BaseException) once if the user asked to stop."""
        _check_interrupt()

    def interrupted(self) -> bool:
        from comfy.model_management import processing_interrupted

        return processing_interrupted()

    def inference_scope(self) -> AbstractContextManager[Any]:
        import torch

        return torch.inference_mode()

    def list_models(self, kind: str) -> list[str]:
        """Relative names of the weight files of ``kind``, sub-folders included, from ComfyUI's cached lists.

        GGUF files are in none of these lists, whatever the folder: they are looked for.
        """
        import folder_paths

        folders = _folders(kind)
        listed = (name.replace("\\", "/") for name in folder_paths.get_filename_list(kind))
        names = {name for name in listed if name.lower().endswith(MODEL_SUFFIXES)}
        if kind in GGUF_KINDS:
            try:
                names |= find_files(folders, _allowed_folders(), (GGUF_SUFFIX,))
            except PathError as error:  # a list without them is better than none
                self.log.warning("GGUF files of models/%s are not listed: %s", kind, error)
        return sorted(names, key=str.casefold)

    def list_text_encoders(self) -> list[str]:
        """Relative names of the text encoder folders, and of the text encoder files that lie in none."""
        names = text_encoder_names(self.list_models("text_encoders"), _folders("text_encoders"))
        return sorted(names, key=str.casefold)

    def resolve_model(self, kind: str, name: str) -> Path:
        """The weight file ``name``. Raises ``PathError`` when it is absent, of another type, or out of bounds."""
        path = find_inside(_folders(kind), _allowed_folders(), name, f"{kind} file", self.list_models(kind))
        return check_model_file(path, kind, name)

    def resolve_text_encoder(self, name: str) -> Path:
        """The text encoder folder or file ``name``. Raises ``PathError`` as ``resolve_model`` does."""
        folders = _folders("text_encoders")
        path = find_inside(folders, _allowed_folders(), name, "text encoder", self.list_text_encoders())
        return check_text_encoder(path, name)

    def input_path(self, name: str) -> Path:
        """The existing file ``name`` of the input folder; ``name [output]`` and ``name [temp]`` name other folders."""
        import folder_paths

        plain, marked = folder_paths.annotated_filepath(check_relative(name, "input file"))
        folder = Path(marked or folder_paths.get_input_directory())
        listed = sorted(entry.name for entry in folder.iterdir() if entry.is_file()) if folder.is_dir() else []
        path = find_inside([folder], [folder], plain.rstrip(), "input file", listed)
        if not path.is_file():
            raise PathError(f"input file {name!r} is a folder")
        return path

    def save_path(self, prefix: str, ext: str, width: int = 0, height: int = 0) -> SavedFile:
        """The next free name ``{prefix}_{counter:05}_.{ext}`` below the output folder; ComfyUI fills in ``%width%`` ..."""
        import folder_paths

        output = folder_paths.get_output_directory()
        check_relative(prefix, "file name prefix")
        if not is_inside(output, (Path(output) / prefix).parent):
            raise PathError(f"file name prefix {prefix!r} leaves the output folder {output}")
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, output, width, height)
        file = f"{stem}_{counter:05}_.{ext}"
        return SavedFile(Path(folder) / file, file, subfolder)

    def temp_dir(self) -> Path:
        """ComfyUI's temporary folder, which it empties when it starts and ends."""
        import folder_paths

        folder = Path(folder_paths.get_temp_directory())
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def save_metadata(self) -> dict[str, Any] | None:
        """The prompt that runs, to embed into saved files; ``None`` when ComfyUI was started with metadata disabled.

        The workflow of the interface reaches a node only through its hidden input EXTRA_PNGINFO.
        """
        from comfy.cli_args import args
        from comfy_execution.progress import get_progress_state

        return None if args.disable_metadata else {"prompt": get_progress_state().dynprompt.original_prompt}

    def compute_devices(self) -> list[str]:
        from comfy.model_management import get_all_torch_devices

        return [str(device) for device in get_all_torch_devices()]

    def default_device(self) -> str:
        from comfy.model_management import get_torch_device

        return str(get_torch_device())

    def offload_device(self) -> str:
        from comfy.model_management import unet_offload_device

        return str(unet_offload_device())

    def intermediate_device(self) -> str:
        from comfy.model_management import intermediate_device

        return str(intermediate_device())

    def free_bytes(self, device: str) -> int:
        import torch
        from comfy.model_management import get_free_memory

        return int(get_free_memory(torch.device(device)))

    def make_room(self, bytes_by_device: dict[str, int]) -> None:
        """Let ComfyUI unload models, ours included, until each device has the bytes or nothing is left."""
        import torch
        from comfy.model_management import free_memory

        for device, wanted in bytes_by_device.items():
            free_memory(wanted, torch.device(device))

    def admit(self, resident: Resident, device: str, weight_bytes: int, activation_bytes: int) -> None:
        """Enter ``resident`` in ComfyUI's list of loaded models, which unloads others until it fits.

        Call it before loading weights and before each use; ComfyUI may release ``resident`` between uses. The entry
        keeps ``resident`` alive until ``retire``. weight_bytes: what it holds there when complete, what is loaded
        already included. Raises ``HostOutOfMemory``.
        """
        from comfy.model_management import load_models_gpu

        key = id(resident), device
        if key not in self._patchers:
            self._patchers[key] = _engine_patcher()(resident, device)
        patcher = self._patchers[key]
        patcher.size = weight_bytes
        needed = max(weight_bytes - resident.bytes_on(device), 0) + activation_bytes
        _make_room_beside(patcher, needed)
        load_models_gpu([patcher], memory_required=activation_bytes)
        free = self.free_bytes(device)
        if free < needed:
            held = resident.bytes_on(device)
            if held == 0:
                del self._patchers[key]
            raise HostOutOfMemory(
                f"{resident.label} does not fit on {device}: it needs {_gib(weight_bytes)} for weights "
                f"({_gib(held)} are loaded) and {_gib(activation_bytes)} for work, {_gib(free)} are free after ComfyUI "
                f"unloaded what it could. Use fewer frames or a smaller picture, weights in fp8, or another device "
                f"(there is {', '.join(self.compute_devices())})"
            )

    def retire(self, resident: Resident) -> None:
        """Take ``resident`` off ComfyUI's list, releasing what it still holds on any device."""
        from comfy.model_management import soft_empty_cache

        for owner, device in list(self._patchers):
            if owner == id(resident):
                del self._patchers[owner, device]
        soft_empty_cache()


def _folders(kind: str) -> list[Path]:
    import folder_paths

    if kind not in KIND_FOLDERS:
        raise ValueError(f"no model folder is called {kind!r}; there is {', '.join(KIND_FOLDERS)}")
    return [Path(folder) for folder in folder_paths.get_folder_paths(kind)]


def _allowed_folders() -> Sequence[Path]:
    return [folder for kind in KIND_FOLDERS for folder in _folders(kind)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _make_room_beside(patcher: Any, needed: int) -> None:
    """Release other residents in main memory, where ``load_models_gpu`` never unloads anything."""
    from comfy.model_management import current_loaded_models, free_memory

    if patcher.load_device.type == "cpu":
        own = [entry for entry in current_loaded_models if entry.model is patcher]
        free_memory(needed, patcher.load_device, keep_loaded=own)


@functools.cache
def _engine_patcher() -> type:
    """The class EnginePatcher, made on first use because its base class is ComfyUI's."""
    import torch
    from comfy.model_management import unet_offload_device
    from comfy.model_patcher import ModelPatcher

    class EnginePatcher(ModelPatcher):
        """What one resident holds on one device, as an entry of ComfyUI's list of loaded models.

        The proxy module stands for the weights and carries the resident's label into ComfyUI's log. Nothing else may
        refer to it: ComfyUI takes a proxy that outlives its patcher for a memory leak.
        """

        def __init__(self, resident: Resident, device: str) -> None:
            proxy = type(resident.label, (torch.nn.Module,), {"device": None})()
            super().__init__(proxy, torch.device(device), unet_offload_device())
            self._resident = resident
            self._device = device
            weakref.finalize(self, _release, resident, device).atexit = False

        def model_size(self) -> int:
            return max(self.size, self.loaded_size())

        def loaded_size(self) -> int:
            return self._resident.bytes_on(self._device)

        def current_loaded_device(self) -> torch.device:
            return self.load_device if self.loaded_size() else self.offload_device

        def partially_load(self, device_to: object, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
            """Load nothing: the engine streams its weights in after it was admitted."""
            return 0

        def partially_unload(
            self, device_to: object, memory_to_free: float = 0, force_patch_weights: bool = False
        ) -> int:
            return self._resident.release(self._device, int(min(memory_to_free, self.loaded_size())))

        def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
            """Release everything; with unpatch_all False keep it, which is what ComfyUI asks on every re-load."""
            if unpatch_all:
                _release(self._resident, self._device)
            return self.model

        def clone(self, *args: object, **options: object) -> ModelPatcher:
            raise TypeError(f"{self._resident.label}: LTX-2 Engine models cannot be cloned or patched by other nodes")

        add_patches = deepclone_multigpu = clone

    return EnginePatcher


def _release(resident: Resident, device: str) -> None:
    resident.release(device, None)


@dataclass(frozen=True, eq=False)
class NestedLatent:
    """The ``samples`` of an AV LATENT where ComfyUI is absent. shape, dtype and device are the first tensor's."""

    tensors: tuple[torch.Tensor, ...]
    is_nested = True

    def unbind(self) -> tuple[torch.Tensor, ...]:
        return self.tensors

    def to(self, *args: Any, **options: Any) -> NestedLatent:
        return NestedLatent(tuple(tensor.to(*args, **options) for tensor in self.tensors))

    @property
    def shape(self) -> torch.Size:
        return self.tensors[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


def nested_latent(video: torch.Tensor, audio: torch.Tensor) -> Any:
    """The `samples` of an AV LATENT: ComfyUI's NestedTensor in its process, else a NestedLatent."""
    if not _hosted():
        return NestedLatent((video, audio))
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([video, audio])


def split_nested(samples: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Video and audio of a LATENT's `samples`; a plain tensor is video without sound."""
    if not getattr(samples, "is_nested", False):
        return samples, None
    parts = tuple(samples.unbind())
    if len(parts) != 2:
        raise ValueError(f"a nested latent of {len(parts)} tensors: LTX-2 needs two, video then audio")
    return parts


def _hosted() -> bool:
    return "comfy.model_management" in sys.modules


@functools.cache
def _comfy_host() -> ComfyHost:
    return ComfyHost()


def install() -> None:
    """Make ComfyUI the process's default host when it is already imported; otherwise do nothing."""
    if _hosted():
        set_default_host(_comfy_host())
