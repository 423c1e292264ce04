import logging
import os
import signal
import string
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ltx2_engine.ltx2_core import host as host_module
from ltx2_engine.ltx2_core import paths
from ltx2_engine.ltx2_core.host import HostOutOfMemory, Interrupted, host, set_default_host, use_host
from ltx2_engine.ltx2_core.paths import KIND_FOLDERS, PathError, read_extra_model_paths
from ltx2_engine.ltx2_core.standalone import StandaloneHost

GIB = 2**30


@pytest.fixture
def models(tmp_path):
    """A models folder with one file each, and a secret beside it."""
    root = tmp_path / "models"
    for name in (
        "checkpoints/a.safetensors", "checkpoints/Sub/b.SFT", "checkpoints/c.ckpt", "checkpoints/.hidden/d.safetensors",
        "unet/u.safetensors", "diffusion_models/t.safetensors", "loras/l.safetensors",
        "text_encoders/gemma/config.json", "text_encoders/gemma/model.safetensors", "text_encoders/gemma/g.gguf",
        "clip/deep/er/config.json", "clip/deep/er/m1.safetensors", "clip/deep/er/m2.safetensors",
        "clip/deep/er/sub/m.safetensors", "text_encoders/config.json", "text_encoders/single.safetensors",
        "clip/q.GGUF", "diffusion_models/t.gguf", "loras/l.gguf", "vae/v.gguf", "checkpoints/c.gguf",
        "vae/v.safetensors", "latent_upscale_models/x2.safetensors",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (tmp_path / "secret.safetensors").touch()
    return root


# models


def test_folders_are_comfyuis(models):
    standalone = StandaloneHost([models])
    assert standalone.list_models("checkpoints") == ["a.safetensors", "c.gguf", "Sub/b.SFT"]
    assert standalone.list_models("diffusion_models") == ["t.gguf", "t.safetensors", "u.safetensors"]
    assert standalone.list_models("vae") == ["v.safetensors"]
    assert standalone.list_models("loras") == ["l.safetensors"]
    assert standalone.resolve_model("checkpoints", "Sub/b.SFT") == models / "checkpoints/Sub/b.SFT"
    assert standalone.resolve_model("diffusion_models", "t.gguf") == models / "diffusion_models/t.gguf"
    with pytest.raises(ValueError, match="'hypernetworks'; there is checkpoints"):
        standalone.list_models("hypernetworks")


def test_text_encoders_are_folders_and_files(models):
    """A folder with a config.json stands for its shards; a GGUF in it is an encoder of its own."""
    standalone = StandaloneHost([models])
    listed = ["deep/er", "deep/er/sub/m.safetensors", "gemma", "gemma/g.gguf", "q.GGUF", "single.safetensors"]
    assert standalone.list_text_encoders() == listed
    assert standalone.resolve_text_encoder("deep/er") == models / "clip/deep/er"
    assert standalone.resolve_text_encoder("single.safetensors") == models / "text_encoders/single.safetensors"
    assert standalone.resolve_text_encoder("q.GGUF") == models / "clip/q.GGUF"


def test_every_listed_name_resolves(models):
    standalone = StandaloneHost([models])
    for kind in KIND_FOLDERS:
        assert all(standalone.resolve_model(kind, name).is_file() for name in standalone.list_models(kind))
    assert all(standalone.resolve_text_encoder(name).exists() for name in standalone.list_text_encoders())


def test_the_first_root_wins(models, tmp_path):
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "checkpoints" / "a.safetensors").touch()
    name = ("checkpoints", "a.safetensors")
    assert StandaloneHost([other, models]).resolve_model(*name).is_relative_to(other)
    assert StandaloneHost([models, other]).resolve_model(*name).is_relative_to(models)


def test_a_missing_name_lists_near_matches(models):
    standalone = StandaloneHost([models])
    with pytest.raises(PathError, match=r"'A.safetensor' was not found. Did you mean 'a.safetensors'\?"):
        standalone.resolve_model("checkpoints", "A.safetensor")
    with pytest.raises(PathError, match=r"'zzzzzzzzz' was not found. There is 'a.safetensors', 'c.gguf', 'Sub/b.SFT'"):
        standalone.resolve_model("checkpoints", "zzzzzzzzz")
    with pytest.raises(PathError, match=r"There are none.*use --models DIR"):
        StandaloneHost().resolve_model("checkpoints", "a.safetensors")


def test_only_weight_files_and_encoder_folders_resolve(models):
    standalone = StandaloneHost([models])
    for kind, name in (
        ("checkpoints", "c.ckpt"),
        ("checkpoints", "Sub"),
        ("text_encoders", "gemma/config.json"),
        ("vae", "v.gguf"),
        ("loras", "l.gguf"),
    ):
        with pytest.raises(PathError, match="is not a file ending in"):
            standalone.resolve_model(kind, name)
    (models / "clip" / "empty").mkdir()
    with pytest.raises(PathError, match=r"holds no config\.json"):
        standalone.resolve_text_encoder("empty")
    with pytest.raises(PathError, match=r"is not a file ending in \.safetensors or \.sft or \.gguf"):
        standalone.resolve_text_encoder("gemma/config.json")


TRICKS = [
    "../secret.safetensors", "Sub/../../../secret.safetensors", "./a.safetensors", "Sub//b.SFT", "/etc/passwd",
    "C:/a.safetensors", "c:a.safetensors", "..\\secret.safetensors", "Sub\\b.SFT", "\\\\server\\share\\a.safetensors",
    "a.safetensors\0", "a.safetensors\n", "", " ", "~/a.safetensors", "a.safetensors/", "a" * 5000, "é" * 200 + ".sft",
    "\ud800.safetensors", "%2e%2e/secret.safetensors", "file:///etc/passwd", "..", ".",
]  # fmt: skip


@pytest.mark.parametrize("name", TRICKS)
def test_path_tricks_are_refused(models, name):
    standalone = StandaloneHost([models], input_dir=models, output_dir=models)
    calls = [
        lambda: standalone.resolve_model("checkpoints", name),
        lambda: standalone.resolve_text_encoder(name),
        lambda: standalone.input_path(name),
    ]
    for call in calls:
        with pytest.raises(PathError):
            call()


@pytest.mark.parametrize("name", [None, 3, ["a"], b"a"])
def test_names_must_be_texts(models, name):
    standalone = StandaloneHost([models])
    for call in (standalone.input_path, standalone.resolve_text_encoder, lambda n: standalone.save_path(n, "png")):
        with pytest.raises(PathError):
            call(name)


parts = st.one_of(
    st.sampled_from(["..", ".", "", "a.safetensors", "Sub", "b.SFT", "out", "in", "~", "C:", "secret.safetensors"]),
    st.text(alphabet=string.printable + "\0\\é\u202e", max_size=8),
)
names = st.builds("".join, st.lists(st.one_of(parts, st.sampled_from(["/", "\\"])), max_size=8))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=names)
@example(name="Sub/b.SFT")
@example(name="out/secret.safetensors")
def test_no_name_leaves_its_folder(models, tmp_path, name):
    for link, target in (("checkpoints/out", tmp_path), ("checkpoints/in", models / "loras")):
        if not (models / link).is_symlink():
            (models / link).symlink_to(target)
    standalone = StandaloneHost([models], input_dir=models / "vae", output_dir=tmp_path / "o")
    for resolve, root in (
        (lambda: standalone.resolve_model("checkpoints", name), models),
        (lambda: standalone.input_path(name), models / "vae"),
        (lambda: standalone.save_path(name, "png").path, tmp_path / "o"),
    ):
        try:
            path = resolve()
        except PathError:
            continue
        assert os.path.realpath(path).startswith(os.path.realpath(root) + os.sep)


def test_links_count_by_where_they_lead(models, tmp_path):
    folder = models / "checkpoints"
    (folder / "inside.safetensors").symlink_to(models / "loras" / "l.safetensors")
    (folder / "outside.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "loop").symlink_to(folder)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "f.safetensors").touch()
    (folder / "far").symlink_to(tmp_path / "far")
    standalone = StandaloneHost([models])
    assert standalone.list_models("checkpoints") == ["a.safetensors", "c.gguf", "inside.safetensors", "Sub/b.SFT"]
    assert standalone.resolve_model("checkpoints", "inside.safetensors").exists()
    for name in ("outside.safetensors", "far/f.safetensors"):
        with pytest.raises(PathError, match="leaves its folder"):
            standalone.resolve_model("checkpoints", name)
    extra = tmp_path / "extra.yaml"
    extra.write_text("mine:\n  loras: far\n")
    standalone = StandaloneHost([models], extra_model_paths=extra)
    assert standalone.resolve_model("checkpoints", "far/f.safetensors").exists()


@pytest.mark.parametrize(("limit", "what"), [("MAX_LISTED", "models"), ("MAX_WALKED", "folders")])
def test_a_folder_that_holds_too_much_is_not_walked_to_its_end(models, monkeypatch, limit, what):
    monkeypatch.setattr(paths, limit, 1)
    with pytest.raises(PathError, match=rf"checkpoints holds more than 1 {what}; name a smaller folder"):
        StandaloneHost([models]).list_models("checkpoints")


def test_a_linked_models_root_is_fine(models, tmp_path):
    (tmp_path / "link").symlink_to(models)
    assert StandaloneHost([tmp_path / "link"]).resolve_model("vae", "v.safetensors").is_file()


def test_extra_model_paths_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("SHELF", str(tmp_path / "shelf"))
    file = tmp_path / "conf" / "extra.yaml"
    file.parent.mkdir()
    file.write_text(
        "comfyui:\n  base_path: $SHELF\n  is_default: true\n  checkpoints: ckpt/\n  clip: |\n    te1\n    te2\n"
        "  custom_nodes: nodes/\nother:\n  unet: rel/unet\n  loras: /abs/loras\nempty:\n"
    )
    shelf = tmp_path / "shelf"
    assert read_extra_model_paths(file) == [
        ("checkpoints", shelf / "ckpt", True),
        ("text_encoders", shelf / "te1", True),
        ("text_encoders", shelf / "te2", True),
        ("diffusion_models", tmp_path / "conf" / "rel" / "unet", False),
        ("loras", Path("/abs/loras"), False),
    ]
    for place in (shelf / "ckpt", tmp_path / "root" / "checkpoints"):
        place.mkdir(parents=True)
        (place / "a.safetensors").touch()
    standalone = StandaloneHost([tmp_path / "root"], extra_model_paths=file)
    assert standalone.resolve_model("checkpoints", "a.safetensors").is_relative_to(shelf)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot read"),
        ("- 1", "must hold named sections, found list"),
        ("a: 3", "section 'a' must be a mapping"),
        ("a:\n  loras: [x]", "a.loras must be a path or lines of paths"),
        ("a:\n  is_default: 3\n  loras: x", "is_default must be true or false, found 3"),
        ("a: !!python/object/apply:os.system [ls]", "cannot read"),
    ],
)
def test_broken_extra_model_paths_say_what_is_wrong(tmp_path, text, message):
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(PathError, match=message):
        StandaloneHost(extra_model_paths=tmp_path / "e.yaml")


# input and output


def test_input_marks_name_other_folders(tmp_path):
    standalone = StandaloneHost(input_dir=tmp_path / "i", output_dir=tmp_path / "o")
    for folder in (tmp_path / "i", tmp_path / "o", standalone.temp_dir()):
        folder.mkdir(exist_ok=True)
        (folder / "x.png").touch()
    assert standalone.input_path("x.png") == standalone.input_path("x.png [input]") == tmp_path / "i" / "x.png"
    assert standalone.input_path("x.png [output]") == tmp_path / "o" / "x.png"
    assert standalone.input_path("x.png [temp]") == standalone.temp_dir() / "x.png"
    with pytest.raises(PathError):
        standalone.input_path("../o/x.png [input]")


def test_counter_follows_what_is_there(tmp_path):
    standalone = StandaloneHost(output_dir=tmp_path)
    first = standalone.save_path("video/clip", "mp4")
    assert (first.filename, first.subfolder, first.type) == ("clip_00001_.mp4", "video", "output")
    assert first.path == tmp_path / "video" / "clip_00001_.mp4"
    assert first.ui() == {"filename": "clip_00001_.mp4", "subfolder": "video", "type": "output"}
    for name in ("clip_00007_.mp4", "clip_00009_audio.wav", "clip_x_.mp4", "clipper_00050_.mp4", "clip_.mp4"):
        (tmp_path / "video" / name).touch()
    assert standalone.save_path("video/clip", "png").filename == "clip_00010_.png"
    assert standalone.save_path("clip", "png").filename == "clip_00001_.png"


def test_counter_agrees_with_comfyuis_rule(tmp_path):
    """folder_paths: the number between the first and second underscore after the prefix, else 0; highest plus one."""
    standalone = StandaloneHost(output_dir=tmp_path)
    (tmp_path / "a_b_00004_.png").touch()
    assert standalone.save_path("a", "png").filename == "a_00001_.png"
    assert standalone.save_path("a_b", "png").filename == "a_b_00005_.png"
    (tmp_path / "a_123456_.png").touch()
    assert standalone.save_path("a", "png").filename == "a_123457_.png"


def test_prefix_variables(tmp_path, monkeypatch):
    moment = time.struct_time((2026, 3, 4, 5, 6, 7, 0, 0, 0))
    monkeypatch.setattr(time, "localtime", lambda: moment)
    standalone = StandaloneHost(output_dir=tmp_path)
    saved = standalone.save_path("%year%-%month%-%day%/%hour%%minute%%second%_%width%x%height%_%other%", "png", 64, 32)
    assert saved.subfolder == "2026-03-04"
    assert saved.filename == "050607_64x32_%other%_00001_.png"


@pytest.mark.parametrize("ext", ["", ".png", "p/g", "../x", "a" * 9, "p ng"])
def test_extension_is_checked(tmp_path, ext):
    with pytest.raises(PathError, match="file extension"):
        StandaloneHost(output_dir=tmp_path).save_path("a", ext)


def test_saving_through_a_link_out_of_the_output_folder_is_refused(tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "link").symlink_to(tmp_path)
    with pytest.raises(PathError, match="leaves the output folder"):
        StandaloneHost(output_dir=tmp_path / "o").save_path("link/a", "png")


def test_temp_dir_is_private_and_goes_with_the_host():
    standalone = StandaloneHost()
    folder = standalone.temp_dir()
    assert folder == standalone.temp_dir()
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "x").touch()
    del standalone
    assert not folder.exists()


# progress and interrupts


def test_an_interrupt_is_raised_once_by_every_poll():
    standalone = StandaloneHost(progress="quiet")
    standalone.check_interrupt()
    for poll in (lambda p: standalone.check_interrupt(), lambda p: p.step(), lambda p: p.to(3)):
        with standalone.progress(5, "work") as progress:
            standalone.interrupt()
            assert standalone.interrupted()
            with pytest.raises(Interrupted):
                poll(progress)
            assert not standalone.interrupted()
            progress.step()
    assert not issubclass(Interrupted, Exception)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_set_the_flag_and_the_second_one_is_left_to_the_system(number):
    standalone = StandaloneHost(progress="quiet")
    before = signal.getsignal(number)
    with standalone.signals():
        os.kill(os.getpid(), number)
        for _ in range(100):
            if standalone.interrupted():
                break
            time.sleep(0.01)
        assert standalone.interrupted()
        assert signal.getsignal(number) is signal.SIG_DFL
    assert signal.getsignal(number) is before


def test_bar_shows_on_stderr(capsys):
    with StandaloneHost(progress="bar").progress(4, "denoise") as progress:
        progress.step(2)
        progress.to(6, total=6)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "denoise" in captured.err
    assert "6/6" in captured.err


def test_events_are_throttled_but_keep_first_and_last():
    events = []

    def on_event(type, **fields):
        events.append((type, *fields.values()))

    standalone = StandaloneHost(progress="json", on_event=on_event)
    standalone.current_node = "7"
    with standalone.progress(1000, "denoise") as progress:
        for _ in range(1000):
            progress.step()
    assert events[0] == ("progress", "7", 0, 1000)
    assert events[-1] == ("progress", "7", 1000, 1000)
    assert len(events) < 100
    assert len(set(events)) == len(events)
    events.clear()
    with standalone.progress(1, "x", node_id="9") as progress:
        progress.to(0)  # a poll without progress
        progress.step()
        progress.to(1)
    assert events == [("progress", "9", 0, 1), ("progress", "9", 1, 1)]


@pytest.mark.parametrize("options", [{"progress": "loud"}, {"progress": "json"}])
def test_bad_progress_options(options):
    with pytest.raises(ValueError, match="progress"):
        StandaloneHost(**options)


# which host


def test_use_host_nests_and_other_threads_see_the_default(monkeypatch):
    monkeypatch.setattr(host_module, "_default", None)
    outer, inner, default = (StandaloneHost(progress="quiet") for _ in range(3))
    assert isinstance(host(), StandaloneHost)
    assert host() is host()
    set_default_host(default)
    seen = []
    with use_host(outer):
        with use_host(inner):
            assert host() is inner
        assert host() is outer
        thread = threading.Thread(target=lambda: seen.append(host()))
        thread.start()
        thread.join()
    assert host() is default
    assert seen == [default]


def test_log_and_inference_scope():
    standalone = StandaloneHost()
    assert standalone.log is logging.getLogger("ltx2")
    with standalone.inference_scope():
        assert torch.is_inference_mode_enabled()


# memory


class Part:
    def __init__(self, machine, label, size):
        self.machine, self.label, self.size, self.asked = machine, label, size, []

    def bytes_on(self, device):
        return self.size if device == "cpu" else 0

    def release(self, device, wanted):
        self.asked.append(wanted)
        freed, self.size = self.size, 0
        self.machine.free += freed
        return freed


class Machine(StandaloneHost):
    """A host whose only device has a known amount of memory."""

    def __init__(self, free):
        super().__init__(progress="quiet")
        self.free = free

    def compute_devices(self):
        return ["cpu"]

    def free_bytes(self, device):
        return self.free


def load(machine, label, size, activation=0):
    part = Part(machine, label, 0)
    machine.admit(part, "cpu", size, activation)
    machine.free -= size
    part.size = size
    return part


def test_admission_releases_the_least_recently_used_first_and_only_what_is_needed():
    machine = Machine(100 * GIB)
    text = load(machine, "text", 30 * GIB)
    model = load(machine, "model", 40 * GIB)
    vae = load(machine, "vae", 20 * GIB)
    machine.admit(text, "cpu", 30 * GIB, 0)  # used again: now the youngest
    load(machine, "upsampler", 10 * GIB, activation=5 * GIB)
    assert (text.size, model.size, vae.size) == (30 * GIB, 0, 20 * GIB)
    assert model.asked == [5 * GIB]
    assert vae.asked == text.asked == []


def test_what_is_loaded_is_not_counted_twice_and_never_asked_to_leave_for_itself():
    machine = Machine(50 * GIB)
    model = load(machine, "model", 45 * GIB)
    machine.admit(model, "cpu", 45 * GIB, 5 * GIB)
    assert model.asked == []
    with pytest.raises(HostOutOfMemory):
        machine.admit(model, "cpu", 45 * GIB, 6 * GIB)
    assert model.size == 45 * GIB


def test_out_of_memory_gives_numbers_and_three_ways_out():
    machine = Machine(10 * GIB)
    load(machine, "text", 4 * GIB)
    with pytest.raises(HostOutOfMemory) as raised:
        load(machine, "transformer", 30 * GIB, activation=2 * GIB)
    message = str(raised.value)
    assert "transformer does not fit on cpu: it needs 30.0 GiB for weights (0 MiB are loaded)" in message
    assert "2.0 GiB for work; 10.0 GiB are free after releasing text (4.0 GiB)" in message
    assert "1. weights in fp8" in message
    assert "3. fewer frames" in message
    with pytest.raises(HostOutOfMemory, match=r"1\. fewer frames.*2\. weights in fp8.*3\. more GPUs"):
        load(machine, "vae", 1 * GIB, activation=20 * GIB)


def test_make_room_and_retire():
    machine = Machine(10 * GIB)
    first, second = load(machine, "first", 4 * GIB), load(machine, "second", 4 * GIB)
    machine.retire(first)
    machine.make_room({"cpu": 5 * GIB})
    assert (first.size, second.size) == (4 * GIB, 0)
    machine.make_room({"cpu": 999 * GIB})
    assert first.asked == []


def test_a_device_of_unknown_size_admits():
    machine = Machine(None)
    part = Part(machine, "x", 0)
    machine.admit(part, "cpu", 10**15, 0)


def test_devices_of_this_machine():
    standalone = StandaloneHost()
    devices = standalone.compute_devices()
    assert devices[-1] == "cpu"
    assert standalone.default_device() == devices[0]
    assert standalone.offload_device() == standalone.intermediate_device() == "cpu"
    free = standalone.free_bytes("cpu")
    assert free is None or 2**24 < free < 2**50
    assert standalone.free_bytes("meta") is None
    assert standalone.save_metadata() is None
