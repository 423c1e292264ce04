import pytest
import torch
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.loading.lora.layer import LoraLayer
from ltx2_engine.ltx2_core.loading.write import write_checkpoint
from ltx2_engine.ltx2_core.networks import build_on_meta
from ltx2_engine.ltx2_core.tiny import checkpoint_file, tiny_config


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _device(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


def transformer_on_meta(label):
    return build_on_meta("transformer", ModelConfig.from_config(tiny_config(label), 7, ()))


@pytest.fixture(scope="session")
def on_meta():
    """A function from a version to its tiny transformer without memory."""
    return transformer_on_meta


@pytest.fixture(scope="session")
def shapes():
    """A function from a version to the shapes of its tiny transformer's parameters."""
    return lambda label: {name: tuple(p.shape) for name, p in transformer_on_meta(label).named_parameters()}


@pytest.fixture(scope="session")
def checkpoint(tiny_models):
    """The tiny checkpoint of 2.3."""
    return tiny_models / "checkpoints" / checkpoint_file("2.3")


@pytest.fixture
def written(tmp_path):
    """A function that writes a file of tensors and returns its path."""

    def write(tensors, metadata=None, name="lora.safetensors"):
        write_checkpoint(tmp_path / name, tensors, metadata or {})
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def layer():
    """A function that makes a layer from its kind and tensors, as if they had been read from a file."""

    def make(kind, tensors, bias=None, alpha=None, rank=None):
        return LoraLayer("in.file", "blocks.0.video.attn1.to_q", kind, tensors, bias or {}, None, rank, alpha)

    return make
