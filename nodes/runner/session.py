"""Workflows run one after the other on one host, which may keep the last one's models loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ltx2_core.host import use_host
from ...ltx2_core.paths import PathError
from ...ltx2_core.standalone import StandaloneHost
from .execute import Event, RunResult, execute
from .options import apply_settings
from .schema import NodeTable, Prompt
from .validate import validate
from .workflow import Workflow


@dataclass(frozen=True)
class Folders:
    """Where models and inputs lie on this machine. No model roots: those of ``LTX2_MODELS``. Never part of a workflow."""

    models: tuple[Path, ...] = ()
    input: Path = Path("input")
    extra_model_paths: Path | None = None

    @property
    def model_roots(self) -> tuple[Path, ...]:
        environment = os.environ.get("LTX2_MODELS", "").split(os.pathsep)
        return self.models or tuple(Path(root) for root in environment if root)


class RunnerHost(StandaloneHost):
    """A standalone host that can also be asked to give up the running job.

    ``give_up`` is polled where an interrupt is; it returns an exception to raise, or None.
    """

    give_up: Callable[[], BaseException | None] | None = None

    def check_interrupt(self) -> None:
        super().check_interrupt()
        reason = self.give_up() if self.give_up else None
        if reason is not None:
            raise reason


class Session:
    """Runs workflows on one host, which keeps account of all models that are loaded."""

    def __init__(
        self,
        folders: Folders,
        nodes: NodeTable,
        *,
        progress: str = "bar",
        metadata: bool = True,
        keep_models: bool = False,
        on_event: Event | None = None,
    ):
        """metadata: embed each workflow into what it saves. keep_models: those of the last run stay loaded for the next.

        Raises PathError for an unusable ``extra_model_paths``.
        """
        self.host = RunnerHost(
            model_roots=folders.model_roots,
            input_dir=folders.input,
            progress=progress,
            extra_model_paths=folders.extra_model_paths,
            on_event=on_event,
        )
        self._nodes, self._metadata, self._keep, self._on_event = nodes, metadata, keep_models, on_event
        self._models: list[Any] = []

    def check(self, workflow: Workflow, settings: Sequence[str] = ()) -> None:
        """Raises WorkflowError, OptionError and PathError as ``run`` does before the first node."""
        with use_host(self.host):
            self._checked(workflow, settings)

    def run(self, workflow: Workflow, output: Path, settings: Sequence[str] = ()) -> RunResult:
        """Run a workflow and save into ``output``.

        Raises WorkflowError, OptionError, PathError, NodeFailed, and lets Interrupted pass.
        """
        host, event = self.host, self._on_event
        host.output_dir = output
        # input lists come from the host, so it is in place before the nodes are asked what they take
        with use_host(host):
            chosen, prompt = self._checked(workflow, settings)
            extra = workflow.extra_data.get("extra_pnginfo") or {}
            make_output(output)
            host.metadata = {**extra, "prompt": chosen} if self._metadata else None
            if event is not None:
                event("queued", node_count=len(prompt))
            # those of the run before are dropped behind this one, which may have used them
            models: list[Any] = []
            result = execute(prompt, self._nodes, host, workflow.extra_data, event, models if self._keep else None)
            self._models = models
        return result

    def _checked(self, workflow: Workflow, settings: Sequence[str]) -> tuple[Prompt, Prompt]:
        """The prompt with the settings, and what of it is to be executed."""
        chosen = apply_settings(workflow.prompt, self._nodes, settings)
        return chosen, validate(chosen, self._nodes)


def make_output(output: Path) -> None:
    """Have the output folder before hours of work, of which it would be the last step. Raises PathError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PathError(
            f"the output folder {output} cannot be made: {error.strerror}. Choose another: --output"
        ) from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise PathError(
            f"the output folder {output} cannot be written to. Choose another, --output, or change its mode"
        )


def node_table(nodes: NodeTable | None = None) -> NodeTable:
    """The pack's nodes, or ``nodes`` in their place, with ComfyUI's own that workflows use."""
    from .core_nodes import CORE_NODES

    if nodes is not None:
        return {**CORE_NODES, **nodes}
    from .. import NODE_CLASS_MAPPINGS

    return {**CORE_NODES, **NODE_CLASS_MAPPINGS}
